"""A pipeline stage: consecutive layers of a model, with its embedding at the first stage and its norm, head and loss at the last.

Without pipeline parallelism the one stage is the whole model. What a rank does not run is taken away from its model; names stay, so
checkpoints and optimizers do not see how it was cut.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.models.initialize import named_parts


class Stage(nn.Module):
    """stage(x, positions=, labels=) -> hidden [B, T, dim], or at the last stage the sum of the labels' losses as [1].

    x: tokens [B, T] int64 at the first stage, hidden [B, T, dim] at others; positions, labels [B, T] int64 as the model has them.
    """

    def __init__(self, model: TitansForCausalLM, layers: range):
        """model: may have more than this stage's parts."""
        super().__init__()
        self.model, self.layers = model, layers
        self.first, self.last = layers.start == 0, layers.stop == len(model.layers)

    def forward(self, x: Tensor, *, positions: Tensor, labels: Tensor) -> Tensor:
        if self.first:
            x = self.model.embed_tokens(x)
        by = self.model.rotations(positions, x.dtype)
        x, _ = self.model.run_layers(x, by, positions, layers=self.layers)
        return self.loss(x, labels) if self.last else x

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(self.model.norm(x), labels)[0].view(1)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the model."""
        parts = stage_parts(self.model.config, self.layers)
        return {n: p for n, p in self.model.named_parameters() if part_of(n) in parts}


def stage_parts(c: ModelConfig, layers: range) -> list[str]:
    """Names of the parts of a model that a stage of these layers runs."""
    first, last = layers.start == 0, layers.stop == c.layers
    return [
        *(["embed_tokens"] if first or (last and c.tie_embeddings) else []),
        *(f"layers.{i}" for i in layers),
        *(["norm"] if last else []),
        *(["lm_head"] if last and not c.tie_embeddings else []),
    ]


def part_of(name: str) -> str:
    """ "layers.3" of "layers.3.mlp.up_proj.weight", "norm" of "norm.weight"."""
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def keep_parts(model: TitansForCausalLM, parts: Iterable[str]) -> None:
    """Takes everything else away, in place."""
    parts = set(parts)
    for i in range(len(model.layers)):
        if f"layers.{i}" not in parts:
            model.layers[i] = None
    for name in {"embed_tokens", "norm", "lm_head"} - parts:
        setattr(model, name, None)


def replace_parts(model: TitansForCausalLM, f: Callable[[str, nn.Module], nn.Module]) -> None:
    """Puts f(name, part) in the place of every part that is there, one after the other, and holds no part that was replaced."""
    for name in list(named_parts(model)):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, f(name, model.get_submodule(name)))
