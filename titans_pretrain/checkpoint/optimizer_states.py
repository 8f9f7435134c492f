"""An optimizer's moments, the float32 weights and their average by parameter, wherever an optimizer keeps them.

A torch optimizer has them as they are. DeepSpeed ZeRO has flat pieces of them on every rank of its data-parallel group: they are
put together parameter by parameter, and each rank keeps only its share of the parameters, so no rank ever holds all of the state.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from titans_pretrain.checkpoint.spread import read_shared

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
AVERAGE = "ema"  # of the weights, where an optimizer is `averaging`
Read = Callable[[str, dict[str, Tensor]], None]  # (kind, name -> tensor to be filled)


class _States:
    """optimizer: torch's, or the one inside of ZeRO."""

    optimizer: torch.optim.Optimizer

    def steps(self) -> int:
        """Finished steps."""
        found = {int(s["step"]) for s in self.optimizer.state.values() if "step" in s}
        assert len(found) <= 1, f"parameters were updated {found} times: AdamW updates all or none"
        return found.pop() if found else 0

    def kinds(self, p: Tensor) -> tuple[str, ...]:
        """What there is of a parameter: "weight", and the optimizer's states by their names there."""
        return "weight", *self._moments(p), *((AVERAGE,) if getattr(self.optimizer, "averaging", False) else ())

    def _moments(self, p: Tensor) -> tuple[str, ...]:
        """AdamW's, unless the optimizer says others."""
        told = getattr(self.optimizer, "moments_of", None)
        return MOMENTS if told is None else told(p)

    def by_kind(self, named: dict[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        found: dict[str, dict[str, nn.Parameter]] = {}
        for name, p in named.items():
            for kind in self.kinds(p):
                found.setdefault(kind, {})[name] = p
        return found

    def empty(self, p: Tensor, steps: int) -> dict[str, Tensor]:
        """As the optimizer makes it in its first step; fused kernels read `step` on the parameter's device."""
        state = {kind: torch.zeros_like(p) for kind in self.kinds(p) if kind != "weight"}
        if self._moments(p) == MOMENTS:
            beside = self.optimizer.defaults["fused"] or self.optimizer.defaults["capturable"]
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=p.device if beside else "cpu")
        return state


class TorchStates(_States):
    """Of an optimizer of torch: the tensors themselves."""

    copies = False

    def __init__(self, optimizer: torch.optim.Optimizer, data_group=None):
        """data_group: ranks that hold the same, None: this one alone."""
        self.optimizer, self.data_group = optimizer, data_group

    def tensors(self, named: dict[str, nn.Parameter]) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, name, tensor) of what this rank hands out."""
        for kind, those in self.by_kind(named).items():
            for name, p in those.items():
                yield kind, name, self.whole(p, kind)

    def load(self, named: dict[str, nn.Parameter], steps: int, read: Read) -> None:
        """Takes over the state of so many finished steps."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.optimizer.state[p] = self.empty(p, steps)
        for kind, those in self.by_kind(named).items():
            tensors = {name: self.whole(p, kind) for name, p in those.items()}
            read_shared(partial(read, kind), tensors, self.data_group)

    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        """As this rank has the parameter."""
        return p.data if kind == "weight" else self.optimizer.state[p][kind]


class ZeroStates(_States):
    """Of a DeepSpeed engine, ZeRO stage 1, 2 or 3. tensors() is collective over its data-parallel group."""

    SHARE = 2**28  # bytes that a rank loads at a time
    copies = True  # whether tensors() gives out copies

    def __init__(self, engine):
        self.zero = engine.optimizer
        self.optimizer = self.zero.optimizer
        self.stage, self.data_group = engine.zero_optimization_stage(), engine.data_parallel_group
        self.rank = torch.distributed.get_rank(self.data_group)
        self.size = torch.distributed.get_world_size(self.data_group)

    def tensors(self, named: dict[str, nn.Parameter]) -> Iterator[tuple[str, str, Tensor]]:
        self._link()
        for i, (name, p) in enumerate(named.items()):
            for kind in self.kinds(p):
                full = self._gathered(p, kind)
                if i % self.size == self.rank:
                    yield kind, name, full.cpu()  # a GPU has no room for another copy of its share

    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        self._link()
        return self._gathered(p, kind)

    @staticmethod
    def _gathered(p: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(p) if kind == "weight" else safe_get_full_optimizer_state(p, kind)

    def load(self, named: dict[str, nn.Parameter], steps: int, read: Read) -> None:
        for flat in self.partitions():
            self.optimizer.state[flat] = self.empty(flat, steps)
        self._link()
        for kind, those in self.by_kind(named).items():
            part: dict[str, Tensor] = {}
            for name, p in those.items():
                if kind != "weight" and getattr(p, "_hp_mapping", p) is None:
                    continue  # stages 1, 2: none of it is on this rank
                part[name] = torch.empty(getattr(p, "ds_shape", p.shape), dtype=torch.float32, device=p.device)
                if sum(t.nbytes for t in part.values()) > self.SHARE:
                    self._fill(named, kind, part, read)
                    part = {}
            self._fill(named, kind, part, read)

    def _link(self) -> None:
        """Shows DeepSpeed's accessors the states as they are: it looks once, and may have been too early."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def partitions(self) -> list[Tensor]:
        """What the inner optimizer sees as its parameters: this rank's flat pieces."""
        for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
            if hasattr(self.zero, name):
                return list(getattr(self.zero, name))
        raise AssertionError(f"{type(self.zero).__name__} keeps its partitions elsewhere")

    def _fill(self, named: dict[str, nn.Parameter], kind: str, part: dict[str, Tensor], read: Read) -> None:
        alike = self.stage == 3 or kind == "weight"  # on all ranks; of moments each has others
        read_shared(partial(read, kind), part, self.data_group if alike else None)
        write = self._write_partition if self.stage == 3 else self._write
        for name, value in part.items():
            write(named[name], kind, value)

    @staticmethod
    def _write(p: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == "weight":
            safe_set_full_fp32_param(p, value)
            p.data.copy_(value)
        else:
            safe_set_full_optimizer_state(p, value, kind)

    def _write_partition(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        """Stage 3 cuts a parameter into equal pieces, the last one padded."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = p.ds_tensor.ds_numel
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.size - value.numel()))
        piece = padded[self.rank * size : (self.rank + 1) * size]
        if kind == "weight":
            safe_set_local_fp32_param(p, piece)
            p.ds_tensor.data.copy_(piece)
            if p.data.shape == value.shape:  # small ones stay gathered
                p.data.copy_(value)
        else:
            safe_set_local_optimizer_state(p, piece, kind)


def states_of(optimizer, data_group=None) -> TorchStates | ZeroStates:
    """optimizer: a torch optimizer, the same on all ranks of data_group, or a DeepSpeed engine, which knows its own."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchStates(optimizer, data_group)
    return ZeroStates(optimizer)
