"""What the scan keeps for the backward pass: how much, and until when."""

import functools
import math

import pytest
import torch
from scan_cases import DIM, HEADS, HIDDEN, arguments, compare, make, run, states
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.kernels.memory_scan import memory_scan
from titans_pretrain.kernels.memory_scan.chunked import spans
from titans_pretrain.kernels.memory_scan.chunked.spans import MAX_TILE, MAX_TILES, spans_of
from titans_pretrain.models import build_model


class Storages(TorchDispatchMode):
    """Counts the bytes made under it that are still alive, whoever holds them."""

    def __init__(self):
        super().__init__()
        self.made = {}
        self.clones = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if func is torch.ops.aten.clone.default:
            self.clones.append(tuple(out.shape))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.made[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return out

    def alive(self) -> int:
        return sum(size for storage, size in self.made.items() if not storage.expired())


@pytest.mark.parametrize("variant", ["lmm", "mac"])
def test_recomputed_blocks_keep_nothing_of_the_scan(variant, monkeypatch):
    """Under recompute=block less than 2 % of what is kept without, and in neither anything after the backward pass, the loss
    still alive."""
    import titans_pretrain.models.memory as layer

    torch.manual_seed(0)
    memory = MemoryConfig(heads=2, chunk_size=4)
    model = build_model(
        ModelConfig(variant, dim=16, layers=2, heads=2, vocab_size=32, persistent_tokens=2, memory=memory)
    )
    tokens = torch.randint(0, 32, (2, 256))
    kept = {}
    for mode in ("none", "block"):
        storages = Storages()

        @functools.wraps(memory_scan)
        def counted(*args, storages=storages, **kwargs):
            with storages:
                return memory_scan(*args, **kwargs)

        monkeypatch.setattr(layer, "memory_scan", counted)
        model.set_recompute(mode)
        loss = model(tokens, labels=tokens).loss
        kept[mode] = storages.alive()
        loss.backward()
        assert storages.made and storages.alive() == 0, (
            f"recompute={mode} holds bytes of the scan after the backward pass"
        )
    states_of_spans = 2 * 4 * 2 * sum(w.numel() for w in model.layers[0].memory.weights)  # batch, bytes, W and S
    assert kept["none"] > 4 * states_of_spans
    assert kept["block"] < 0.02 * kept["none"]


def test_the_scan_alone_under_checkpoint():
    x = make(64, 2, dtype=torch.float32)

    def read(q):
        y, state = run(x | {"q": q}, 2, chunk_size=2, checkpoint_every=1)
        return y.sum() + sum(w.sum() for w in state.weights)

    with Storages() as storages:
        total = checkpoint(read, x["q"], use_reentrant=False)
        assert storages.alive() <= 2 * total.nbytes
        (expected,) = torch.autograd.grad(read(x["q"]), x["q"])
        assert torch.equal(torch.autograd.grad(total, x["q"])[0], expected)


def test_saved_states_pass_through_hooks():
    """Whatever a hook on saved tensors does, offloading for instance, it does to the states as well."""
    x = make(32, 2)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = run(x, 2, chunk_size=4, checkpoint_every=2)
    (found,) = torch.autograd.grad(y.sum(), x["weight0"])
    (expected,) = torch.autograd.grad(run(x, 2, chunk_size=4, checkpoint_every=2)[0].sum(), x["weight0"])
    assert torch.equal(found, expected)
    joined = [shape for shape in packed if len(shape) == 3]
    assert len(joined) == 2 * 3  # layers, spans but the first


def clones(every, grad):
    """How many states of a layer a scan of 16 chunks clones."""
    x = make(64, 2)
    with torch.set_grad_enabled(grad), Storages() as storages:
        run(x, 2, chunk_size=4, checkpoint_every=every)
    joined = {(2 * HEADS, 2 * DIM, HIDDEN), (2 * HEADS, 2 * HIDDEN, DIM)}
    return sum(shape in joined for shape in storages.clones)


def test_no_state_is_saved_without_gradients():
    assert clones(1, False) == clones(100, False) == 0
    assert clones(1, True) == 2 * 15 and clones(100, True) == 0  # layers, spans but the first


def test_no_anchor_is_saved():
    """At the start of a chunk it is in the state; in the middle of one it follows from the state at its start."""
    for chunk, offset in ((4, 0), (4, 2), (64, 0), (64, 8)):
        x = make(64, 2)
        state, _ = states(x, 2)
        if offset:
            _, state = memory_scan(*arguments(x, 0, offset), state, chunk_size=chunk)
        given = [*arguments(x), *state.weights, *state.surprise, *(state.anchor or ())]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            memory_scan(*arguments(x), state, chunk_size=chunk)
        shapes = [t.shape for t in saved]
        several = len(spans_of(64, chunk, offset, None)) - 1
        assert len(shapes) == len(given) + 2 * several


CASES = [
    (t, c, o, e)
    for t in (1, 5, 63, 200, 1000)
    for c in (1, 4, 64, 67, 130, 400, 8192)
    for o in (0, 1, 3)
    for e in (None, 1, 3)
]


@pytest.mark.parametrize("tokens, chunk, offset, every", [c for c in CASES if c[2] < c[1]])
def test_spans_cover_a_call(tokens, chunk, offset, every):
    found = spans_of(tokens, chunk, offset, every)
    at = 0
    for span in found:
        assert span.start == at
        x = torch.arange(span.stop - span.start)[None, :, None]
        groups = span.groups(x)
        assert torch.equal(span.ungroup(groups), x)
        for tile in span.tiles:
            assert tile.start == at - span.start and 0 < tile.stop - tile.start <= min(MAX_TILE, chunk)
            assert torch.equal(groups[tile.group][0, tile.index, :, 0], x[0, tile.start : tile.stop, 0])
            assert tile.opens_chunk == ((offset + at) % chunk == 0) and tile.chunk == (offset + at) // chunk
            at += tile.stop - tile.start
            assert (offset + at - 1) // chunk == tile.chunk  # no tile reaches over a chunk's end
        opener = found[span.opened_by] if span.opened_by is not None else None
        if span.opens_chunk:
            assert opener is None
        elif opener is None:
            assert (offset + span.start) // chunk == 0 and offset
        else:
            assert opener.opens_chunk and opener.chunk == span.chunk
    assert at == tokens


def test_what_is_kept_grows_as_the_square_root():
    for tokens, chunk in ((8192, 16), (65536, 64), (8192, 8192), (65536, 8192), (8192, 67)):
        for every in (None, 1):
            found = spans_of(tokens, chunk, 0, every)
            tiles = math.ceil(tokens / min(chunk, MAX_TILE))
            assert max(len(span.tiles) for span in found) <= MAX_TILES
            if every is None:
                assert len(found) <= max(2.5 * math.sqrt(tiles), 1.5 * tiles / MAX_TILES)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("forget_to, resets", [("zero", False), ("initial", True)])
def test_chunks_longer_than_a_span_equal_the_reference(offset, every, forget_to, resets, monkeypatch):
    """Spans inside a chunk: the anchor of a later one follows from the state, reset or not, where its chunk starts."""
    monkeypatch.setattr(spans, "MAX_TILE", 4)
    monkeypatch.setattr(spans, "MAX_TILES", 2)
    chunk, tokens = 19, 70
    assert any(not span.opens_chunk and span.opened_by is not None for span in spans_of(tokens, chunk, offset, every))
    x = make(tokens, 2)
    options = dict(chunk_size=chunk, residual_norm=True, damping=0.7, forget_to=forget_to)
    if resets:
        options["reset"] = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)[
            :, : -(-(tokens + offset) // chunk)
        ]
    if not offset:
        compare(x, 2, options, only=dict(checkpoint_every=every))
        return
    first = make(offset, 2, seed=5)
    state, initial = states(x, 2)
    ends = []
    for backend in ("chunked", "reference"):
        _, half = memory_scan(*arguments(first), state, chunk_size=chunk, backend="reference")
        y, end = memory_scan(
            *arguments(x), half, initial_state=initial, backend=backend, checkpoint_every=every, **options
        )
        total = y.square().sum() + sum(
            (w.square() + w * s).sum() for w, s in zip(end.weights, end.surprise, strict=True)
        )
        total = total + sum(a.square().sum() for a in end.anchor or ())
        ends.append(
            torch.autograd.grad(total, [*x.values(), *first.values()], allow_unused=True, materialize_grads=True)
        )
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
