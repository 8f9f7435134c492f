"""Bytes of a process's activations at most: what its forward passes keep, and what runs beside that.

Each kind of step of a stage (embedding, a block of each LayerConfig, head and loss) is run once without data, forward and
backward, as one tensor-parallel rank has it; what the layout's schedule keeps of them is added up.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.commands.dry_run import LiveBytes, without_data
from titans_pretrain.config import Config
from titans_pretrain.config.model import LayerConfig, ModelConfig
from titans_pretrain.models import TitansForCausalLM
from titans_pretrain.models.state import LayerState, map_tensors, tensors
from titans_pretrain.parallel.layout import needs_segments
from titans_pretrain.parallel.segments import bare, state_template, with_parameters
from titans_pretrain.parallel.stage import Stage

MOST_TOKENS = 2**16  # of a row that are tried; the bytes of a longer one are taken in proportion


@dataclass(frozen=True)
class Step:
    """Bytes of one step of a pass, above what was there before it."""

    output: float  # the activation that the next step reads
    kept: float  # from its forward to its backward pass, the output included
    passing: float  # of its layer's state, until the forward pass of the whole stage ends
    entered: float  # of the state that it was given
    forward: float  # at most in its forward pass
    backward: float  # at most from there to the end of its backward pass
    casts: float  # of parameters, that autocast keeps in bfloat16 to the end of the training step


@dataclass(frozen=True)
class Steps:
    """What a pass is made of: over the tokens of one segment, or over a row's where there are no segments."""

    embedding: Step
    blocks: dict[LayerConfig, Step]
    head: Step
    rotations: float

    def of_stage(self, c: ModelConfig, layers: range) -> list[Step]:
        first, last = [self.embedding] * (layers.start == 0), [self.head] * (layers.stop == c.layers)
        return [*first, *(self.blocks[c.layer(i)] for i in layers), *last]


def count_steps(config: Config, model: TitansForCausalLM) -> Steps:
    """model: as one tensor-parallel rank has it, on the meta device; the group that it was cut for must still be there."""
    p, train, c = config.parallel, config.train, config.model
    bf16, segmented = train.precision == "bf16", needs_segments(config)
    tokens = config.data.seq_len // (p.segments if segmented else p.cp)
    columns = min(tokens, MOST_TOKENS)
    before = config.data.seq_len - tokens  # of the last segment
    dtype = torch.bfloat16 if bf16 and p.zero_stage else torch.float32  # of parameters and the residual stream
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not p.zero_stage, cache_enabled=not segmented)

    def count(parts: tuple[str, ...], run: Callable, x: Tensor, state: LayerState | None = None) -> Step:
        """run(x, state) -> (y, new state)."""
        own = {n: empty(p.shape, p.requires_grad) for n, p in model.named_parameters() if n.startswith(parts)}
        for parameter in own.values():
            parameter.grad = None if segmented else torch.empty_like(parameter)  # a walk collects them outside
        given = tensors(state)
        with LiveBytes() as live, autocast:
            y, after = with_parameters(model, own, run, x, state)
            forward, held, output = live.peak, live.now, y.nbytes
            outputs = [y, *(t for t in tensors(after) if segmented and t.requires_grad)]
            y = after = None
            kept = live.peak = live.now
            gradients = [torch.empty_like(t) for t in outputs]
            if segmented:
                wanted = [t for t in (x, *given, *own.values()) if t.requires_grad]
                torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
            else:
                torch.autograd.backward(outputs, gradients)
            backward = live.peak
            outputs = gradients = x.grad = None
            casts = live.now
        entered = sum(t.nbytes for t in given)
        bytes_per_token = output, kept - casts, held - kept, entered, forward - casts, backward - casts
        return Step(*(n * tokens / columns for n in bytes_per_token), casts)

    def empty(shape: Iterable[int], grad: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, requires_grad=grad)

    def entering(i: int) -> LayerState | None:
        if not (segmented and before):
            return None
        template = state_template(model.layers[i], train.micro_batch, before, torch.bfloat16 if bf16 else torch.float32)
        return map_tensors(lambda t: empty(t.shape, dtype=t.dtype), template)

    with without_data():
        ids = torch.zeros(train.micro_batch, columns, dtype=torch.int64)
        by = model.rotations(ids, torch.bfloat16 if bf16 else torch.float32)
        hidden = empty((train.micro_batch, columns // (p.tp if p.sequence_parallel else 1), c.dim))
        stage = Stage(model, range(c.layers))
        head = ("norm.", "embed_tokens." if c.tie_embeddings else "lm_head.")
        blocks = {}
        for i, layer in enumerate(c.layer_configs):
            if layer not in blocks:

                def block(x, state, run=model.layers[i]):
                    y, after = run(x, state, by, ids)
                    return y, bare(after)

                blocks[layer] = count((f"layers.{i}.",), block, hidden, entering(i))
        return Steps(
            count(("embed_tokens.",), lambda x, _: (model.embed_tokens(x), None), ids),
            blocks,
            count(head, lambda x, _: (stage.loss(x, ids), None), hidden),
            sum(t.nbytes for pair in by.values() for t in pair) * tokens / columns,
        )


def activation_bytes(config: Config, steps: Steps, stages: list[range], micro_batches: int, in_flight: int) -> float:
    """Of one pipeline rank at most. stages: its own; in_flight: of its passes over them, those whose backward pass is to come."""
    p = config.parallel
    passes = [_pass_bytes(config, steps, layers) for layers in stages]
    at_once = [passes[i // p.pp % len(stages)] for i in range(in_flight)]
    casts = sum(step.casts for layers in stages for step in steps.of_stage(config.model, layers))
    # The schedule has room for what every micro-batch receives, of either direction.
    borders = sum((layers.start > 0) + (layers.stop < config.model.layers) for layers in stages)
    segments = p.segments_per_rank if needs_segments(config) else 1
    received = borders * micro_batches * segments * steps.embedding.output
    return casts + received + sum(kept for kept, _ in at_once) + max(high - kept for kept, high in at_once)


def _pass_bytes(config: Config, steps: Steps, layers: range) -> tuple[float, float]:
    """Of one pass over a stage: what it keeps, and the most there is at a time."""
    p, recompute, segmented = config.parallel, config.train.recompute, needs_segments(config)
    one = steps.of_stage(config.model, layers)
    segments = p.segments_per_rank if segmented else 1
    joined = 0 if layers.stop == config.model.layers else segments * one[-1].output * segmented
    entered = sum(step.entered for step in one)
    # Gradients of the states of one boundary; on a ring, as many bytes in messages that the neighbour has not taken yet.
    passed = entered * (2 if p.cp > 1 else 1)
    if recompute == "segment":
        stays = segments * entered + joined
        return stays, stays + _walked([(step.kept, step) for step in one])[1] + steps.rotations + passed
    if recompute == "none":
        stays = [step.kept + step.entered * (p.cp > 1) for step in one]
    elif segmented:
        stays = [step.output + step.entered for step in one]
    else:
        ends = (steps.embedding, steps.head)
        stays = [step.kept if step in ends else step.output for step in one]
    kept, high = _walked(list(zip(stays, one, strict=True)) * segments)
    beside = joined + segments * steps.rotations
    return kept + beside, high + beside + passed


def _walked(steps: list[tuple[float, Step]]) -> tuple[float, float]:
    """(bytes that a step leaves, step) of a pass in order -> what all leave, and the most there is, forward and then backward."""
    kept = passing = high = 0.0
    for stays, step in steps:
        high = max(high, kept + passing + step.forward, kept + step.backward)
        kept += stays
        passing += step.passing
    return kept, high
