"""A memory whose hidden size lies on two ranks is the whole memory: float64, values and every gradient.

Both ranks run every case, whole and split, once for all tests; a test looks at what they found.
"""

import hashlib
import itertools
import multiprocessing
import pickle
import re
import time
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.kernels.memory_scan import MemoryState, memory_read, memory_scan, memory_step
from titans_pretrain.models import build_model
from titans_pretrain.models.memory import MemoryLayer
from titans_pretrain.models.state import map_tensors
from titans_pretrain.parallel.splits import hidden_split

WORLD, TIMEOUT = 2, 120.0
TOL = 1e-10
BATCH, HEADS, DIM, HIDDEN = 2, 2, 6, 10
TOKENS = ("q", "k", "v", "forget", "momentum", "lr")

# --- cases: (f, x) where f(x, group) makes named tensors of the named tensors x -----------------------------------------


def inputs(tokens, gates=1, dtype=torch.float64):
    """Tokens, gates with exact 0 and 1 among them, and states; seeded."""
    g = torch.Generator().manual_seed(tokens + gates)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def gate(high):
        x = torch.rand(BATCH, tokens, HEADS, gates, generator=g, dtype=torch.float64) * high
        kind = torch.randint(0, 8, x.shape, generator=g)
        return x.masked_fill(kind == 0, 0.0).masked_fill(kind == 1, high)

    x = {name: randn(BATCH, tokens, HEADS, DIM) for name in ("q", "k", "v")}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    x |= {"forget": gate(1.0), "momentum": gate(1.0), "lr": gate(0.1)}
    for i, shape in enumerate([(DIM, HIDDEN), (HIDDEN, DIM)]):
        x[f"weights.{i}"] = randn(BATCH, HEADS, *shape) / shape[0] ** 0.5
        x[f"surprise.{i}"] = 0.1 * randn(BATCH, HEADS, *shape)
        x[f"initial_weights.{i}"] = randn(1, HEADS, *shape) / shape[0] ** 0.5
        x[f"initial_surprise.{i}"] = 0.1 * randn(1, HEADS, *shape)
    return {name: t.to(dtype) for name, t in x.items()}


def split_of(group):
    """None: one rank holds the whole memory."""
    return None if group is None else hidden_split(group)


def pair(x, kind):
    return x[f"{kind}.0"], x[f"{kind}.1"]


def states(x):
    return [MemoryState(pair(x, before + "weights"), pair(x, before + "surprise")) for before in ("", "initial_")]


def named(y, state):
    found = {"y": y}
    for kind in ("weights", "surprise", "anchor"):
        found |= {f"{kind}.{i}": t for i, t in enumerate(getattr(state, kind) or ())}
    return found


def scan_case(cuts, *, gates=1, dtype=torch.float64, read=memory_scan, **options):
    """The tokens in one call of `read`, or in several that hand the state on."""

    def f(x, group):
        state, initial = states(x)
        ys = []
        for start, stop in itertools.pairwise(cuts):
            tokens = [x[name][:, start:stop] for name in TOKENS]
            y, state = read(*tokens, state, initial_state=initial, hidden_split=split_of(group), **options)
            ys.append(y)
        return named(torch.cat(ys, 1), state)

    return f, inputs(cuts[-1], gates, dtype)


def read_case():
    def f(x, group):
        return {"y": memory_read(x["q"], states(x)[0], residual_norm=True, hidden_split=split_of(group))}

    return f, inputs(9)


def split_module(module, parameters, group):
    """Puts these parameters, any of a rank's parts among them, into the module."""
    for name, t in parameters.items():
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._parameters[key] = t
    for part in module.modules():
        if isinstance(part, MemoryLayer):
            part.hidden_split = split_of(group)


def layer_case(chunk, **memory):
    """A memory layer over packed documents after persistent tokens, in two calls; what a document starts from, too."""
    dim = HEADS * DIM
    torch.manual_seed(0)
    layer = MemoryLayer(dim, MemoryConfig(heads=HEADS, chunk_size=chunk, expansion=2.0, **memory)).double()
    x = {name: p.detach() for name, p in layer.named_parameters()}
    x |= {"x": torch.randn(BATCH, 14, dim).double(), "persistent": torch.randn(3, dim).double()}
    positions = torch.arange(14).repeat(BATCH, 1)
    positions[1, 8:] = torch.arange(6)
    positions[1, 7] = -1

    def f(x, group):
        split_module(layer, {name: t for name, t in x.items() if name not in ("x", "persistent")}, group)
        state, ys = None, []
        for start, stop in ((0, 9), (9, 14)):
            here = slice(start, stop)
            y, state = layer(x["x"][:, here], state, positions[:, here].contiguous(), x["persistent"])
            ys.append(y)
        return named(torch.cat(ys, 1), state.memory)

    return f, x


def tiny_mac(**mac):
    memory = MemoryConfig(heads=HEADS, chunk_size=4, expansion=2.0)
    config = ModelConfig(
        "mac",
        dim=12,
        layers=2,
        heads=2,
        vocab_size=17,
        persistent_tokens=3,
        memory=memory,
        mac=MacConfig(segment=4, **mac),
    )
    torch.manual_seed(0)
    return build_model(config).double(), torch.randint(0, 17, (BATCH, 11))


def mac_case(recompute, **mac):
    """A whole model that also retrieves from its memory."""
    model, tokens = tiny_mac(**mac)
    model.recompute = recompute

    def f(x, group):
        split_module(model, x, group)
        out = model(tokens, tokens)
        return {"loss": out.loss} | named(out.loss, out.state.layers[1].memory.memory)

    return f, {name: p.detach() for name, p in model.named_parameters()}


def cases():
    """name -> what makes the case."""
    found = {}
    starts = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)
    for norm, to, gates in itertools.product((False, True, "damped"), ("zero", "initial"), (1, 2)):
        name = f"norm={norm} to={to} gates={gates}"
        damping = 0.7 * (norm == "damped")  # of the whole hidden size, on every rank
        options = dict(gates=gates, chunk_size=5, residual_norm=bool(norm), damping=damping, forget_to=to)
        found[f"scan {name}"] = partial(scan_case, (0, 23), checkpoint_every=2, **options)
        found[f"scan with resets {name}"] = partial(scan_case, (0, 23), checkpoint_every=2, reset=starts, **options)
        found[f"calls {name}"] = partial(scan_case, (0, 3, 4, 11, 23), **options)
        found[f"steps {name}"] = partial(scan_case, range(12), read=memory_step, **options)
    tiles = dict(chunk_size=66, residual_norm=True, forget_to="initial")
    found["tiles in one call"] = partial(scan_case, (0, 110), **tiles)
    found["tiles in two calls"] = partial(scan_case, (0, 20, 110), **tiles)
    found["chunk of one"] = partial(scan_case, (0, 7), chunk_size=1, residual_norm=True)
    found["read"] = read_case
    found["layer"] = partial(layer_case, 4)
    found["layer, other options"] = partial(
        layer_case, 2, residual_norm=False, forget_to="zero", per_layer_gates=True, step="telescoped"
    )
    found["mac"] = partial(mac_case, "none")
    found["mac, recomputed"] = partial(mac_case, "block", memory_tokens=2)
    return found


# --- on a rank -----------------------------------------------------------------------------------------------------------------


def part(name, x, rank):
    """A rank's part of a named tensor of the memory, of its gradient as well; anything else is the same on every rank."""
    match = re.search(r"(weights|surprise|anchor)\.([01])$", name)
    return x.chunk(WORLD, -1 if match[2] == "0" else -2)[rank] if match else x


def evaluate(f, x, group, coefficients):
    """Outputs, and the gradients of a linear functional of them."""
    x = {name: t.clone().requires_grad_() for name, t in x.items()}
    outputs = f(x, group)
    if coefficients is None:
        g = torch.Generator().manual_seed(1)
        coefficients = {n: torch.randn(o.shape, generator=g, dtype=torch.float64) for n, o in outputs.items()}
    weights = [coefficients[n].to(o.dtype) for n, o in outputs.items()]
    grads = torch.autograd.grad(list(outputs.values()), list(x.values()), weights, allow_unused=True)
    found = {n: o.detach() for n, o in outputs.items()}
    found |= {f"gradient of {n}": d for n, d in zip(x, grads, strict=True) if d is not None}
    return found, coefficients


def relative(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-3))


def digest(x):
    return hashlib.sha256(x.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def compare(f, x, rank):
    """Relative errors of this rank's part of each tensor, and digests of those that every rank has."""
    whole, coefficients = evaluate(f, x, None, None)
    cut = {name: part(name, c, rank) for name, c in coefficients.items()}
    split, _ = evaluate(f, {name: part(name, t, rank).contiguous() for name, t in x.items()}, dist.group.WORLD, cut)
    assert split.keys() == whole.keys()
    errors = {name: relative(split[name], part(name, t, rank)) for name, t in whole.items()}
    return errors, {name: digest(t) for name, t in split.items() if part(name, whole[name], rank) is whole[name]}


def single_precision(rank):
    """bfloat16 tokens and float32 states."""
    f, x = scan_case((0, 40), dtype=torch.float32, chunk_size=8, residual_norm=True, forget_to="initial")
    return compare(f, {n: t.bfloat16() if n in TOKENS else t for n, t in x.items()}, rank)


def count_sums(rank):
    """All-reduces of each call, forward and backward."""
    calls = {
        "scan, chunks of 5": scan_case((0, 23), chunk_size=5, checkpoint_every=2),
        "scan, chunks of two tiles": scan_case((0, 110), chunk_size=66),
        "scan of a token": scan_case((0, 1), chunk_size=5),
        "step": scan_case((0, 1), chunk_size=5, read=memory_step),
        "read": read_case(),
    }
    counts = {}
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums:
        for name, (f, x) in calls.items():
            sums.reset_mock()
            x = {n: part(n, t, rank).contiguous().requires_grad_() for n, t in x.items()}
            outputs = f(x, dist.group.WORLD)
            forward = sums.call_count
            sum(o.sum() for o in outputs.values()).backward()
            counts[name] = forward, sums.call_count - forward
    return counts


def decode(rank):
    """A model's logits token by token without gradients, against the whole model's."""
    found = []
    for group in (None, dist.group.WORLD):
        model, tokens = tiny_mac()
        if group is not None:
            split_module(model, {name: part(name, p, rank) for name, p in model.named_parameters()}, group)
        with torch.no_grad():
            logits, state = [], None
            for piece in tokens.split([5, 1, 1, 1, 3], 1):
                out = model(piece, state=state)
                logits.append(out.logits)
                state = map_tensors(torch.Tensor.clone, out.state)
        found.append(torch.cat(logits, 1))
    return relative(found[1], found[0])


def messages(rank):
    """What is refused, and how."""
    x = {name: part(name, t, rank) for name, t in inputs(5).items()}
    tokens, (state, _) = [x[name] for name in TOKENS], states(x)
    deep = MemoryState((x["weights.0"], torch.eye(5).double().expand(2, 2, 5, 5), x["weights.1"]), (None,) * 3)
    linear = MemoryState.initial((torch.zeros(HEADS, DIM, DIM).double(),), BATCH)
    others = dist.new_group([0])
    calls = {
        "depth 1": lambda: memory_scan(*tokens, linear, chunk_size=5, hidden_split=hidden_split(dist.group.WORLD)),
        "depth 3": lambda: memory_read(x["q"], deep, hidden_split=hidden_split(dist.group.WORLD)),
        "step of depth 1": lambda: memory_step(
            *(t[:, :1] for t in tokens), linear, chunk_size=5, hidden_split=hidden_split(dist.group.WORLD)
        ),
        "reference": lambda: memory_scan(
            *tokens, state, chunk_size=5, backend="reference", hidden_split=hidden_split(dist.group.WORLD)
        ),
    }
    if rank:
        calls["not a member"] = lambda: memory_read(x["q"], state, hidden_split=hidden_split(others))
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        found[name] = str(error.value)
    return found


def serve(rank, folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised tensors hold NaN
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    found = {"cases": {name: compare(*case(), rank) for name, case in cases().items()}}
    for f in (single_precision, count_sums, decode, messages):
        found[f.__name__] = f(rank)
    with open(f"{folder}/rank{rank}", "wb") as file:
        pickle.dump(found, file)
    dist.destroy_process_group()


# --- tests ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("hidden_split")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=serve, args=(rank, str(folder)), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    try:  # a rank that fails leaves the others waiting: stop at the first
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < deadline, f"the ranks have not finished in {TIMEOUT:.0f} s"
            time.sleep(0.05)
        assert [p.exitcode for p in processes] == [0] * WORLD, "a rank failed; see its traceback"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", cases())
def test_equals_the_whole_memory(ranks, name):
    for rank, found in enumerate(ranks):
        errors, digests = found["cases"][name]
        worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
        assert errors[worst] < TOL, f"rank {rank}, {worst}: relative error {errors[worst]:.2e}"
        assert digests == ranks[0]["cases"][name][1]


def test_every_gradient_is_compared(ranks):
    errors, digests = ranks[0]["cases"]["scan with resets norm=True to=initial gates=2"]
    assert {n for n in errors if n.startswith("gradient")} == {f"gradient of {n}" for n in inputs(1)}
    assert {n for n in errors if not n.startswith("gradient")} == {
        "y",
        *(f"{kind}.{i}" for kind in ("weights", "surprise", "anchor") for i in range(2)),
    }
    assert digests.keys() == {"y", *(f"gradient of {n}" for n in TOKENS)}


def test_single_precision_is_the_same_on_all_ranks(ranks):
    """What is replicated stays so to the bit, in the dtypes of training."""
    errors, digests = ranks[0]["single_precision"]
    assert digests == ranks[1]["single_precision"][1]
    assert errors["weights.1"] < 1e-5 and errors["y"] < 1e-2


def test_one_sum_per_chunk(ranks):
    """Forward and backward: one per tile, one per span. The spans are of 2, 2 and 1 tiles, then of 2 and 2."""
    assert ranks[0]["count_sums"] == {
        "scan, chunks of 5": (5 + 3, 5 + 3),
        "scan, chunks of two tiles": (4 + 2, 4 + 2),
        "scan of a token": (1 + 1, 1 + 1),
        "step": (2, 6),  # backward, which decoding does without: q, k, the error, three gates
        "read": (1, 1),
    }


def test_decoding(ranks):
    assert max(found["decode"] for found in ranks) < TOL


def test_refused(ranks):
    found = ranks[1]["messages"]
    for name in ("depth 1", "depth 3", "step of depth 1"):
        assert "hidden_split" in found[name] and "depth 2" in found[name]
    assert "reference" in found["reference"] and "hidden_split" in found["reference"]
    assert "not in the group" in found["not a member"]
