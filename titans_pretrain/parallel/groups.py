"""Process groups, each made by its own ranks alone: in a run of thousands of processes a rank makes about ten and waits for
nobody else."""

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

_made: dict[tuple, dist.ProcessGroup] = {}


def group_of(ranks: Iterable[int], use: str = "", timeout: timedelta | None = None) -> dist.ProcessGroup:
    """The group of these global ranks, this one among them; made when they first ask for it, which all do in the same order.

    use: groups of the same ranks for uses that must not wait for each other."""
    key = (use, *ranks)
    if not _alive(_made.get(key)):
        _made[key] = dist.new_group(
            list(key[1:]), timeout=timeout, use_local_synchronization=True, group_desc=use or None
        )
    return _made[key]


def destroy_other_groups() -> None:
    """Those that libraries made. Ours stay for the next who asks: torch may give a group the name of a destroyed one."""
    kept = [dist.group.WORLD, *_made.values()]
    for group in list(dist.distributed_c10d._world.pg_map):
        if not any(group is other for other in kept):
            dist.destroy_process_group(group)


def _alive(group: dist.ProcessGroup | None) -> bool:
    return group is not None and group in dist.distributed_c10d._world.pg_map
