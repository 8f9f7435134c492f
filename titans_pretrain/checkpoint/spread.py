"""Reading once what several ranks need: each reads some of the tensors and sends them to the others."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def read_shared(
    read: Callable[[dict[str, Tensor]], None], tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fills the tensors, which all ranks of the group have alike, in place. group: None or of one rank reads all by itself.

    Raises, on all ranks of the group, if one of them cannot read: there its own error, elsewhere OSError."""
    if group is None or group.size() == 1:
        read(tensors)
        return
    readers = readers_of({name: t.nbytes for name, t in tensors.items()}, group.size())
    error = None
    try:
        read({name: t for name, t in tensors.items() if readers[name] == group.rank()})
    except Exception as e:  # whatever it is, the others must not wait for this rank
        error = e
    told: list = [None] * group.size()
    dist.all_gather_object(told, error and " ".join(str(error).split()), group=group)
    if error is not None:
        raise error
    if failed := next((reason for reason in told if reason is not None), None):
        raise OSError(failed)
    for name, t in tensors.items():
        whole = t.contiguous()
        dist.broadcast(whole, group=group, group_src=readers[name])
        if whole is not t:
            t.copy_(whole)


def readers_of(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """Who reads what: the largest first, each by the rank that has least to read so far."""
    load, found = [0] * ranks, {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        found[name] = load.index(min(load))
        load[found[name]] += sizes[name]
    return found
