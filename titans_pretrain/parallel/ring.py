"""How LayerStates pass from one segment of a sequence to the next: within a process, or around a ring of context-parallel ranks.

Segment s of k * P lives on rank s mod P, so the next segment is always at the right neighbour (with P = 1, here). Forward, a
layer's state goes right; backward, its gradient comes back left. States and gradients, and links that meet, have process groups
of their own: on NCCL what two ranks exchange in one group waits for each other, and a receive posted early must not hold up a
send. All transfers are point-to-point and asynchronous, one message per layer and segment, of a size that does not depend on
the segments' length.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.models.state import LayerState, map_tensors, tensors
from titans_pretrain.parallel.groups import group_of
from titans_pretrain.parallel.mesh import Mesh

Incoming = Callable[[], LayerState]  # waits for a state that is under way


@dataclass(frozen=True)
class Traffic:
    """Bytes and messages that left this rank."""

    bytes: int = 0
    messages: int = 0


class LocalLink:
    """All segments in one process: states and gradients are handed over as they are."""

    rank, size = 0, 1

    def __init__(self):
        self._states: dict[str, LayerState] = {}

    def send_state(self, layer: str, state: LayerState) -> None:
        assert layer not in self._states, "the segment before sent a state that this one did not take"
        self._states[layer] = state

    def receive_states(self, templates: dict[str, LayerState]) -> dict[str, Incoming]:
        return {layer: lambda layer=layer: self._states.pop(layer) for layer in templates}

    send_gradient, receive_gradients = send_state, receive_states

    def flush(self) -> None:
        assert not self._states, "a state was sent that no segment received"


class RingLink:
    """Segments on the ranks of a context-parallel group of two or more."""

    def __init__(self, mesh: Mesh):
        """All ranks of the ring must come here: they make its groups."""
        axis, device = mesh.context, mesh.device
        self.rank, self.size = axis.rank, axis.size
        groups = {
            (way, odd): group_of(axis.ranks, f"{way} {odd}", mesh.timeout)
            for way in ("states", "gradients")
            for odd in (0, 1)
        }

        self.waiting: Callable[[], AbstractContextManager] = nullcontext  # around every wait, for whoever measures

        def channel(way: str, link: int, peer: int) -> _Channel:
            """Over link i, which joins the ring's i-th rank and the next one: of two ranks, both links join the same two."""
            return _Channel(groups[way, link % 2], axis.ranks[peer % axis.size], device, lambda: self.waiting())

        to_right, to_left = axis.rank, (axis.rank - 1) % axis.size
        self._states_out = channel("states", to_right, axis.rank + 1)
        self._states_in = channel("states", to_left, axis.rank - 1)
        self._gradients_out = channel("gradients", to_left, axis.rank - 1)
        self._gradients_in = channel("gradients", to_right, axis.rank + 1)

    def send_state(self, layer: str, state: LayerState) -> None:
        self._states_out.send(state)

    def receive_states(self, templates: dict[str, LayerState]) -> dict[str, Incoming]:
        """Posts the receives, in the order of `templates`, which is the order in which the neighbour sends."""
        return {layer: self._states_in.receive(template) for layer, template in templates.items()}

    def send_gradient(self, layer: str, gradient: LayerState) -> None:
        self._gradients_out.send(gradient)

    def receive_gradients(self, templates: dict[str, LayerState]) -> dict[str, Incoming]:
        return {layer: self._gradients_in.receive(template) for layer, template in templates.items()}

    def flush(self) -> None:
        """Waits until everything sent has arrived."""
        self._states_out.flush()
        self._gradients_out.flush()

    @property
    def traffic(self) -> dict[str, Traffic]:
        return {"states": self._states_out.traffic, "gradients": self._gradients_out.traffic}


class _Channel:
    """One direction between this rank and one neighbour. A message is all of a state's tensors as one run of bytes."""

    def __init__(self, group: dist.ProcessGroup, peer: int, device: torch.device, waiting: Callable):
        self._group, self._peer, self._device, self._waiting = group, peer, device, waiting
        self._pending: list[tuple[dist.Work, Tensor]] = []  # a buffer must live until it is sent
        self.traffic = Traffic()

    def send(self, value: LayerState) -> None:
        self._pending = [(work, buffer) for work, buffer in self._pending if not work.is_completed()]
        buffer = torch.cat([x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors(value)])
        self._pending.append((dist.isend(buffer, self._peer, group=self._group), buffer))
        self.traffic = Traffic(self.traffic.bytes + buffer.numel(), self.traffic.messages + 1)

    def receive(self, template: LayerState) -> Incoming:
        parts = tensors(template)
        sizes = [x.numel() * x.element_size() for x in parts]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        work = dist.irecv(buffer, self._peer, group=self._group)

        def wait() -> LayerState:
            with self._waiting():
                work.wait()
            pieces = iter(buffer.split(sizes))
            return map_tensors(lambda x: _shaped(next(pieces), x), template)

        return wait

    def flush(self) -> None:
        with self._waiting():
            for work, _ in self._pending:
                work.wait()
        self._pending.clear()


def _shaped(raw: Tensor, like: Tensor) -> Tensor:
    if raw.data_ptr() % like.element_size():  # a view of another type must be aligned
        raw = raw.clone()
    return raw.view(like.dtype).view(like.shape)
