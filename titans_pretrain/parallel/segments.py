"""A stage's pass over a sequence in segments, each starting from the states that the one before it left (cyclic segments).

Forward, a rank walks its segments in order and each segment's layers in order: a layer takes its state from the segment before
(ring.py) and sends the new one on. Backward it walks all of this in reverse, and the states' gradients return. The only
traffic between ranks is point-to-point, so ranks skew by one layer and pipeline by themselves. To autograd the whole pass is
one function of the stage's input and parameters: whoever drives it (a loss, a pipeline schedule, ZeRO) sees an ordinary module.

What is kept for the backward pass (`recompute`):
  none     every layer's graph
  block    every layer's input and incoming state; each layer runs again
  segment  every segment's incoming states; the segment runs again from them, without communication
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from titans_pretrain.kernels.memory_scan import MemoryState
from titans_pretrain.models.state import LayerState, MemoryLayerState, map_tensors, tensors
from titans_pretrain.parallel.ring import LocalLink, RingLink
from titans_pretrain.parallel.stage import Stage, part_of
from titans_pretrain.parallel.timeline import Timeline


class SegmentedStage(nn.Module):
    """Called as a Stage is, with this rank's columns: its segments side by side, [B, T / P]."""

    def __init__(
        self,
        stage: Stage,
        link: LocalLink | RingLink,
        segments: int,
        recompute: str = "none",
        truncate_every: int | None = None,
    ):
        """segments: of this rank. truncate_every: tokens between boundaries of segments that no gradient crosses."""
        super().__init__()
        self.stage, self.link, self.segments, self.recompute = stage, link, segments, recompute
        self.truncate_every = truncate_every
        self.timeline = Timeline(enabled=False)

    @property
    def last(self) -> bool:
        return self.stage.last

    def forward(self, x: Tensor, *, positions: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _Pass(self, x, positions, labels, {}).forward("nothing")
        names, parameters = zip(*self.stage.own_parameters().items(), strict=True)
        return _Walk.apply(self, names, x, positions, labels, *parameters)

    def number(self, i: int) -> int:
        """Place in the sequence of this rank's i-th segment."""
        return i * self.link.size + self.link.rank

    @property
    def total(self) -> int:
        """Segments of the whole sequence."""
        return self.segments * self.link.size

    def gradient_crosses(self, boundary: int, length: int) -> bool:
        """Whether a gradient passes from segment `boundary` to the one before it, each of so many tokens."""
        inside = 0 < boundary < self.total
        return inside and not (self.truncate_every and boundary * length % self.truncate_every == 0)


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segmented, names, x, positions, labels, *parameters):
        # Stand-ins share the parameters' memory, not their hooks and gradients: those see one backward pass, not one a segment.
        stand_ins = {n: p.detach().requires_grad_(p.requires_grad) for n, p in zip(names, parameters, strict=True)}
        ctx.run = _Pass(segmented, x.detach(), positions, labels, stand_ins)
        return ctx.run.forward(segmented.recompute)

    @staticmethod
    def backward(ctx, d_out):
        run, ctx.run = ctx.run, None
        d_x = run.backward(d_out)
        return (None, None, d_x, None, None, *(run.gradients.get(name) for name in run.parameters))


@dataclass
class _Cell:
    """One step of a segment. run(*inputs) -> outputs; the first of each is the activation, the rest is the layer's state."""

    name: str  # of the layer, as it is in the model; "enter" or "leave"
    parameters: dict[str, Tensor]  # that it reads, by their names in the model: the stand-ins of _Walk
    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] | None = None  # with their graph, where that is kept


class _Caller(nn.Module):
    """Lets functional_call stand in for any function of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, f: Callable, *args):
        return f(*args)


def with_parameters(model: nn.Module, parameters: dict[str, Tensor], f: Callable, *args):
    """f(*args) while the model has these parameters."""
    own = {f"model.{name}": p for name, p in parameters.items()}
    return functional_call(_Caller(model), own, (f, *args), tie_weights=False)


class _Pass:
    """One call of a SegmentedStage: its forward and its backward pass."""

    def __init__(self, segmented: SegmentedStage, x: Tensor, positions: Tensor, labels: Tensor, parameters):
        if positions.shape[1] % segmented.segments:
            raise ValueError(f"{positions.shape[1]} tokens do not divide into {segmented.segments} segments")
        self.segmented, self.stage, self.link = segmented, segmented.stage, segmented.link
        self.model = segmented.stage.model
        self.layers = {str(i): self.model.layers[i] for i in self.stage.layers}
        self.x, self.positions, self.labels = x, positions, labels
        self.length = positions.shape[1] // segmented.segments
        self.parameters: dict[str, Tensor] = parameters
        self.parts: dict[str, dict[str, Tensor]] = {}  # part -> its parameters
        for name, p in parameters.items():
            self.parts.setdefault(part_of(name), {})[name] = p
        self.gradients: dict[str, Tensor] = {}
        self.kept: list = []  # per segment: its cells; with recompute=segment the states that entered it
        device = x.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        weight = next(iter(self.model.parameters()))
        self.dtype = self.autocast[1] if self.autocast[2] else weight.dtype  # of the activations

    # Forward

    def forward(self, keep: str) -> Tensor:
        self.keep = keep
        outputs = []
        for i in range(self.segmented.segments):
            y, states, cells = self._run_segment(i, keep, None)
            outputs.append(y)
            self.kept.append({"none": cells, "block": cells, "segment": states}.get(keep))
        if self.stage.last:
            return torch.stack(outputs).sum(0)
        return torch.cat(outputs, 1)

    def _run_segment(self, i: int, keep: str, states: dict[str, tuple[Tensor, ...]] | None):
        """Returns the segment's output, the states that entered its layers, and its cells.

        states: those states, to run the segment again in private; None takes them from the link, and sends the new ones on.
        """
        number, alone, timeline = self.segmented.number(i), states is not None, self.segmented.timeline
        states = dict(states or {})
        incoming = {}
        if number and not alone:
            incoming = self.link.receive_states(self._templates(number))
        x, cells = _piece(self.x, i, self.segmented.segments), []
        for cell in self._cells(i):
            if cell.name in incoming:
                with timeline.span("wait", f"state of layer {cell.name}, segment {number}"):
                    states[cell.name] = tuple(tensors(incoming[cell.name]()))
            with timeline.span("again" if alone else "forward", f"layer {cell.name}, segment {number}"):
                cell.inputs = (x, *states.get(cell.name, ()))
                if keep == "none":
                    self._run_with_graph(cell)
                    x, *new = (y.detach() for y in cell.outputs)
                else:
                    with torch.no_grad(), self._autocast():
                        x, *new = cell.run(*cell.inputs)
            if new and not alone and number + 1 < self.segmented.total:
                self.link.send_state(cell.name, _refill(self._template(cell.name, number + 1), new))
            if keep in ("none", "block"):
                cells.append(cell)
        return x, states, cells

    def _cells(self, i: int) -> Iterator[_Cell]:
        """The steps of this rank's i-th segment."""
        stage, model, number = self.stage, self.model, self.segmented.number(i)
        positions, labels = (_piece(t, i, self.segmented.segments) for t in (self.positions, self.labels))
        by = model.rotations(positions, self.dtype)
        if stage.first:
            yield self._cell("enter", ["embed_tokens"], lambda tokens: (model.embed_tokens(tokens),))
        for name, layer in self.layers.items():

            def run(x, *state, name=name, layer=layer):
                before = _refill(self._template(name, number), state) if state else None
                y, after = layer(x, before, by, positions)
                return y, *tensors(bare(after))

            yield self._cell(name, [f"layers.{name}"], run)
        if stage.last:
            head = "embed_tokens" if model.lm_head is None else "lm_head"
            yield self._cell("leave", ["norm", head], lambda hidden: (stage.loss(hidden, labels),))

    def _cell(self, name: str, parts: list[str], f: Callable[..., tuple[Tensor, ...]]) -> _Cell:
        """A step that reads these parts' parameters: by their stand-ins, where there are any."""
        own = {n: p for part in parts for n, p in self.parts.get(part, {}).items()}
        return _Cell(name, own, partial(with_parameters, self.model, own, f))

    def _run_with_graph(self, cell: _Cell) -> None:
        cell.inputs = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in cell.inputs)
        with torch.enable_grad(), self._autocast():
            cell.outputs = cell.run(*cell.inputs)

    def _autocast(self) -> torch.autocast:
        """As it was around the call, but without its cache: what that holds of the stand-ins would outlive the step."""
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)

    # Backward

    def backward(self, d_out: Tensor) -> Tensor | None:
        """Fills `gradients` and returns the input's gradient (None for tokens)."""
        d_inputs = []
        for i in reversed(range(self.segmented.segments)):
            kept = self.kept.pop()
            number = self.segmented.number(i)
            incoming = {}
            if self.segmented.gradient_crosses(number + 1, self.length):
                templates = self._templates(number + 1)
                incoming = self.link.receive_gradients(dict(reversed(templates.items())))
            if self.keep == "segment":
                kept = self._run_segment(i, "none", kept)[2]
            d = d_out if self.stage.last else _piece(d_out, i, self.segmented.segments)
            while kept:
                d = self._cell_backward(kept.pop(), number, d, incoming)
            d_inputs.append(d)
        return None if self.stage.first else torch.cat(d_inputs[::-1], 1)

    def _cell_backward(self, cell: _Cell, number: int, d: Tensor, incoming: dict) -> Tensor:
        """The gradient of the cell's activation, from that of its output; the state's goes to the segment before."""
        timeline = self.segmented.timeline
        d_outputs = [d]
        if cell.name in incoming:
            with timeline.span("wait", f"gradient of layer {cell.name}, segment {number}"):
                d_outputs += tensors(incoming[cell.name]())
        with timeline.span("backward", f"layer {cell.name}, segment {number}"):
            if cell.outputs is None:
                self._run_with_graph(cell)
            own = {n: p for n, p in cell.parameters.items() if p.requires_grad}
            inputs = [t for t in cell.inputs if t.requires_grad]
            wanted = [*inputs, *own.values()]
            outputs, d_outputs = zip(*((y, d) for y, d in zip(cell.outputs, d_outputs) if y.requires_grad))
            found = torch.autograd.grad(outputs, wanted, d_outputs, allow_unused=True)
            for name, gradient in zip(own, found[len(inputs) :], strict=True):
                if gradient is not None:
                    known = self.gradients.get(name)
                    self.gradients[name] = gradient if known is None else known + gradient
            found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found)]
        if cell.name in self.layers and self.segmented.gradient_crosses(number, self.length):
            self.link.send_gradient(cell.name, _refill(self._template(cell.name, number), found[1:]))
        return found[0] if found else None

    # Shapes

    def _templates(self, boundary: int) -> dict[str, LayerState]:
        return {name: self._template(name, boundary) for name in self.layers}

    def _template(self, layer: str, boundary: int) -> LayerState:
        tokens = boundary * self.length
        return state_template(self.layers[layer], self.positions.shape[0], tokens, self.dtype)


def state_template(block: nn.Module, batch: int, tokens: int, dtype: torch.dtype) -> LayerState:
    """Shapes, as tensors without memory, of a block's state after `tokens` tokens, at a boundary where segments may meet.

    dtype: of the activations."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    memory = kv = None
    layer = getattr(block, "memory", None)
    if layer is not None:
        weights = tuple(
            empty(batch, *w.shape, dtype=torch.promote_types(w.dtype, torch.float32)) for w in layer.weights
        )
        width, taps = layer.q_conv.shape
        memory = MemoryLayerState(MemoryState(weights, weights), (empty(batch, taps - 1, width, dtype=dtype),) * 3)
    attention = getattr(block, "attention", None)
    if attention is not None and not block.config.has_segments:  # those of mac do not see the one before
        kept = tokens if attention.window is None else min(attention.window - 1, tokens)
        size = attention.k_proj.weight.shape[0] // attention.kv_heads
        kv = (empty(batch, kept, attention.kv_heads, size, dtype=dtype),) * 2
    return LayerState(memory=memory, kv=kv)


def bare(state: LayerState) -> LayerState:
    """Without what a call only keeps to save the next one work."""
    return state if state.memory is None else replace(state, memory=replace(state.memory, initial=None))


def _refill(template: LayerState, values) -> LayerState:
    """A state of these tensors, which must have the template's shapes."""
    left = iter(values)

    def take(like: Tensor) -> Tensor:
        x = next(left)
        assert x.shape == like.shape and x.dtype == like.dtype, (
            f"a state of {x.shape} {x.dtype}, not {like.shape} {like.dtype}"
        )
        return x

    state = map_tensors(take, template)
    assert next(left, None) is None, "a state has more tensors than its template"
    return state


def _piece(x: Tensor, i: int, n: int) -> Tensor:
    """The i-th of n equal pieces of the columns."""
    size = x.shape[1] // n
    return x[:, i * size : (i + 1) * size].contiguous()
