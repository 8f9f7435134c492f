"""Adam's moments and the float32 weights by parameter, wherever an optimizer keeps them.

A torch optimizer has them as they are. DeepSpeed ZeRO has flat pieces of them on every rank of its data-parallel group: they are
put together parameter by parameter, and each rank keeps only its share of the parameters, so no rank ever holds all of the state.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchStates:
    """Of a torch.optim.AdamW: the tensors themselves, to be read and written in place."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def owned(self, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The parameters whose tensors this rank hands out."""
        return named

    def read(self, p: nn.Parameter, what: str) -> Tensor:
        """what: "weight" or one of MOMENTS."""
        return p.data if what == "weight" else self.optimizer.state[p][what]

    def steps(self) -> int:
        return _steps(self.optimizer.state)

    def prepare(self, steps: int) -> None:
        """Makes room for the state of so many finished steps."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.optimizer.state[p] = _empty_state(p, steps)

    def loading(self, named: dict[str, nn.Parameter], what: str) -> Iterator[tuple[dict[str, Tensor], Callable]]:
        """(tensors to be filled, what to call then), until all are loaded."""
        yield {name: self.read(p, what) for name, p in named.items()}, lambda tensors: None


class ZeroStates:
    """Of a DeepSpeed engine, ZeRO stage 1, 2 or 3. read() and loading() are collective over its data-parallel group."""

    SHARE = 2**28  # bytes that a rank loads at a time

    def __init__(self, engine):
        self.zero = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        self.rank = torch.distributed.get_rank(engine.data_parallel_group)
        self.size = torch.distributed.get_world_size(engine.data_parallel_group)

    def owned(self, named):
        self._link()
        return {name: p for i, (name, p) in enumerate(named.items()) if i % self.size == self.rank}

    def read(self, p, what):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(p) if what == "weight" else safe_get_full_optimizer_state(p, what)

    def steps(self) -> int:
        return _steps(self.zero.optimizer.state)

    def prepare(self, steps: int) -> None:
        state = self.zero.optimizer.state
        for flat in self._partitions():
            state[flat] = _empty_state(flat, steps)
        self._link()

    def _link(self) -> None:
        """Shows DeepSpeed's accessors the moments as they are: it looks once, and may have been too early."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        """What the inner optimizer sees as its parameters: this rank's flat pieces."""
        for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
            if hasattr(self.zero, name):
                return list(getattr(self.zero, name))
        raise AssertionError(f"{type(self.zero).__name__} keeps its partitions elsewhere")

    def loading(self, named, what):
        part: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(named.items()):
            part[name] = torch.empty(self._shape(p), dtype=torch.float32, device=p.device)
            if i == len(named) - 1 or sum(t.nbytes for t in part.values()) > self.SHARE:
                yield part, lambda tensors: [self._write(named[n], what, t) for n, t in tensors.items()]
                part = {}

    def _write(self, p: nn.Parameter, what: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            self._write_partition(p, what, value)
        elif what == "weight":
            safe_set_full_fp32_param(p, value)
            p.data.copy_(value)
        else:
            safe_set_full_optimizer_state(p, value, what)

    def _write_partition(self, p: nn.Parameter, what: str, value: Tensor) -> None:
        """Stage 3 cuts a parameter into equal pieces, the last one padded."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = p.ds_tensor.ds_numel
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.size - value.numel()))
        piece = padded[self.rank * size : (self.rank + 1) * size]
        if what == "weight":
            safe_set_local_fp32_param(p, piece)
            p.ds_tensor.data.copy_(piece)
            if p.data.shape == value.shape:  # small ones stay gathered
                p.data.copy_(value)
        else:
            safe_set_local_optimizer_state(p, piece, what)

    @staticmethod
    def _shape(p: nn.Parameter) -> torch.Size:
        return getattr(p, "ds_shape", p.shape)


def states_of(optimizer) -> TorchStates | ZeroStates:
    """optimizer: a torch optimizer or a DeepSpeed engine."""
    return TorchStates(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else ZeroStates(optimizer)


def _empty_state(p: Tensor, steps: int) -> dict[str, Tensor]:
    """As AdamW makes it in its first step."""
    return {"step": torch.tensor(float(steps)), **{moment: torch.zeros_like(p) for moment in MOMENTS}}


def _steps(state: dict) -> int:
    found = {int(s["step"]) for s in state.values() if "step" in s}
    assert len(found) <= 1, f"parameters were updated {found} times: AdamW updates all or none"
    return found.pop() if found else 0
