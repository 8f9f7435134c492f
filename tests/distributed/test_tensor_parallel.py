"""Tensor parallelism against one process: loss, every gradient, logits, and what is communicated."""

import dataclasses
import re
import statistics
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.models import build_model
from titans_pretrain.parallel.layout import check_tensor_parallel
from titans_pretrain.parallel.megatron import load_megatron
from titans_pretrain.parallel.mesh import leave_mesh
from titans_pretrain.parallel.splits import vocabulary_split
from titans_pretrain.parallel.tensor import shard_tensors

ROWS, TOKENS, VOCAB, DIM = 2, 64, 48, 32


@dataclasses.dataclass
class Case:
    model: ModelConfig
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    recompute: str = "none"
    calls: int = 1  # parts of the sequence, the state going on from one to the next
    documents: bool = True
    sequence_parallel: bool = False
    memory_split: str = "heads"


def case(
    variant: str, *, memory: dict | None = None, memory_tokens: int = 0, model: dict | None = None, **options
) -> Case:
    config = ModelConfig(
        layers=2, dim=DIM, vocab_size=VOCAB, ffn_dim=24,
        memory=MemoryConfig(**{"heads": 4, "chunk_size": 8, "expansion": 2.0} | (memory or {})),
        mac=MacConfig(segment=16, memory_tokens=memory_tokens), **{"variant": variant, "heads": 4, "window": 12, "persistent_tokens": 3} | (model or {}),
    )  # fmt: skip
    return Case(config, **options)


def fresh(case: Case):
    """The model with every parameter away from zero and one, so that none of their gradients can hide."""
    torch.manual_seed(0)
    model = build_model(case.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.3)
            if name.endswith("forget_proj.bias"):
                p.add_(4.0)
    model.set_recompute(case.recompute)
    return model.to(case.dtype)


def batch(seed: int) -> dict:
    """Packed documents that start on multiples of 16, padding inside and at the end, missing labels."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=g)
    labels = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=g)
    labels[:, ::7] = -100
    positions = torch.arange(TOKENS).repeat(ROWS, 1)
    positions[0, 16:] -= 16
    positions[0, 48:] -= 32
    positions[0, 42:48] = -1
    positions[1, -5:] = -1
    labels[positions < 0] = -100
    return {"tokens": tokens, "labels": labels, "positions": positions}


def run(model, case: Case) -> torch.Tensor:
    """Two micro-batches, forward and backward, one through the model's loss and one through its logits; the loss of both."""
    total = torch.zeros((), dtype=torch.float64)
    for seed in range(2):
        data = batch(seed)
        if not case.documents:
            del data["positions"]
        loss, state = 0.0, None
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            for part in range(case.calls):
                size = TOKENS // case.calls
                columns = {n: x[:, part * size : (part + 1) * size] for n, x in data.items()}
                labels = columns.pop("labels")
                if seed == 0:
                    out = model(**columns, labels=labels, state=state, num_items_in_batch=50)
                    loss = loss + out.loss
                else:
                    out = model(**columns, state=state)
                    loss = loss + cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum") / 50
                state = out.state
        loss.backward()
        total += loss.detach()
    return total


def alone(case: Case) -> dict:
    model = fresh(case)
    loss = run(model, case)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(batch(5)["tokens"]).logits
    return {"loss": loss, "gradients": gradients, "logits": logits}


@pytest.fixture(scope="module")
def tensor_ranks(ranks):
    """tensor_ranks(n, f, ...) calls f on n ranks of one tensor-parallel group, which stays up for the next test."""
    used = set()

    def run(world: int, f, *args) -> list:
        used.add(world)
        return ranks(world).run(in_group, f, *args)

    yield run
    for world in used:
        ranks(world).run(leave_mesh)


def in_group(f, *args):
    load_megatron()
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(dist.get_world_size())
    return f(*args)


def shard(case: Case):
    model = fresh(case)
    shard_tensors(model, sequence_parallel=case.sequence_parallel, memory_split=case.memory_split)
    return model


def spread(case: Case) -> dict:
    model = shard(case)
    loss = run(model, case)
    gradients, unequal, sharded = {}, [], []
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == case.dtype
        pieces = gathered(p.grad)
        if getattr(p, "tensor_model_parallel", False):
            sharded.append(name)
            gradients[name] = torch.cat(pieces, p.partition_dim)
        else:
            gradients[name] = pieces[0]
            if not all(torch.equal(pieces[0], piece) for piece in pieces):
                unequal.append(name)
    with torch.no_grad():
        logits = model(batch(5)["tokens"]).logits
    return {"loss": loss, "gradients": gradients, "logits": logits, "unequal": unequal, "sharded": sharded,
            "names": list(model.state_dict())}  # fmt: skip


def gathered(x: torch.Tensor) -> list[torch.Tensor]:
    pieces = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, x.contiguous())
    return pieces


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def compare(tensor_ranks, world: int, case: Case, tolerance: float) -> None:
    expected = alone(case)
    for found in tensor_ranks(world, spread, case):
        assert found["unequal"] == []
        assert found["gradients"].keys() == expected["gradients"].keys()
        assert found["names"] == list(fresh(case).state_dict())
        worst = {n: difference(g, expected["gradients"][n]) for n, g in found["gradients"].items()}
        worst |= {k: difference(found[k], expected[k]) for k in ("loss", "logits")}
        wrong = {n: d for n, d in worst.items() if not d < tolerance}
        assert not wrong, wrong


GROUPED = {"heads": 8, "kv_heads": 4, "qk_norm": True}
CASES = {
    "mag-grouped-sp": case("mag", model=GROUPED, sequence_parallel=True),
    "mac-grouped-recompute": case("mac", model=GROUPED | {"head_dim": 6}, recompute="block"),
    "hybrid": case("", model=GROUPED | {"variant": "mag", "pattern": [{"variant": "transformer", "window": None}, "lmm"]}),
    "hybrid-sp-state": case(
        "", model={"variant": "mag", "pattern": ["mac", {"variant": "mal", "memory": {"chunk_size": 4, "depth": 3}}]},
        sequence_parallel=True, calls=2,
    ),
    "lmm": case("lmm"),
    "lmm-deep1-untied-sp": case(
        "lmm", memory={"depth": 1}, model={"tie_embeddings": False}, sequence_parallel=True
    ),
    "lmm-gates-recompute-sp": case("lmm", memory={"per_layer_gates": True}, recompute="block", sequence_parallel=True),
    "mac": case("mac"),
    "mac-sp-recompute": case("mac", sequence_parallel=True, recompute="block"),
    "mac-tokens": case("mac", memory_tokens=3, model={"tie_embeddings": False}),
    "mac-tokens-sp-state": case("mac", memory_tokens=3, sequence_parallel=True, calls=2),
    "mag-recompute": case("mag", recompute="block"),
    "mag-gates-sp": case("mag", memory={"per_layer_gates": True, "step": "telescoped"}, sequence_parallel=True),
    "mal-state": case("mal", calls=2, documents=False),
    "mal-plain-sp": case("mal", memory={"residual_norm": False, "depth": 1}, sequence_parallel=True),
    "transformer": case("transformer", model={"tie_embeddings": False}),
    "transformer-bare-sp": case("transformer", model={"persistent_tokens": 0, "window": None}, sequence_parallel=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(tensor_ranks, name):
    compare(tensor_ranks, 2, CASES[name], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_four(tensor_ranks, name):
    compare(tensor_ranks, 4, CASES[name], 1e-9)


HIDDEN = {
    "lmm-sp": case("lmm", memory={"heads": 1, "per_layer_gates": True}, sequence_parallel=True),
    "mac": case("mac", memory={"heads": 1}),
    "mac-tokens-sp": case("mac", memory_tokens=3, sequence_parallel=True),
    "mag": case("mag", memory={"heads": 1}, recompute="block"),
    "mag-sp": case("mag", sequence_parallel=True, calls=2),
    "mal": case("mal", memory={"residual_norm": False}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_memories_split_by_hidden_size(tensor_ranks, name):
    compare(tensor_ranks, 2, dataclasses.replace(HIDDEN[name], memory_split="hidden"), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", HIDDEN)
def test_memories_split_by_hidden_size_on_four(tensor_ranks, name):
    compare(tensor_ranks, 4, dataclasses.replace(HIDDEN[name], memory_split="hidden"), 1e-9)


def strided_gradient() -> torch.Tensor:
    from titans_pretrain.parallel.tensor_layers import enter

    x = torch.zeros(2, 3, requires_grad=True)
    (enter(x).t() * torch.arange(6.0).view(3, 2)).sum().backward()
    return x.grad


def test_gradient_that_is_not_contiguous_is_summed(tensor_ranks):
    for found in tensor_ranks(2, strided_gradient):
        assert torch.equal(found, 2 * torch.arange(6.0).view(3, 2).t())


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_float32(tensor_ranks, variant):
    compare(tensor_ranks, 2, case(variant, dtype=torch.float32, sequence_parallel=True), 1e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_bfloat16_is_as_close_to_float64_as_one_process(tensor_ranks, autocast, sequence_parallel):
    low = case(
        "mag",
        dtype=torch.float32 if autocast else torch.bfloat16,
        autocast=autocast,
        sequence_parallel=sequence_parallel,
    )
    exact, single = alone(dataclasses.replace(low, dtype=torch.float64, autocast=False)), alone(low)

    def error(found: dict) -> dict[str, float]:
        pairs = {n: (g, exact["gradients"][n]) for n, g in found["gradients"].items()}
        pairs |= {k: (found[k], exact[k]) for k in ("loss", "logits")}
        return {n: float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for n, (a, b) in pairs.items()}

    allowed = error(single)
    # Rounding happens to leave almost no error in some small tensor, and a large one in a sum that cancels (a gate's bias).
    typical = statistics.median(allowed.values())
    assert typical < 0.05
    for found in tensor_ranks(2, spread, low):
        assert found["unequal"] == []
        got = error(found)
        assert max(got.values()) < 1.5 * max(allowed.values())
        wrong = {n: (got[n], allowed[n]) for n in got if got[n] > 3 * max(allowed[n], typical)}
        assert not wrong, wrong


GATES = ("forget_proj", "momentum_proj", "lr_proj")


def gates_under_autocast() -> dict[str, torch.Tensor]:
    memory, x = shard(case("lmm", dtype=torch.float32)).layers[0].memory, hidden_states()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return {name: torch.cat(gathered(getattr(memory, name)(x)), -1) for name in GATES}


def hidden_states() -> torch.Tensor:
    return torch.randn(2, 64, DIM, generator=torch.Generator().manual_seed(0))


def test_biases_of_sharded_gates_are_added_in_float32(tensor_ranks):
    """As one process does. In bfloat16 hardly any sum with a bias would come out the same."""
    memory, x = fresh(case("lmm", dtype=torch.float32)).layers[0].memory, hidden_states()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = {name: getattr(memory, name)(x) for name in GATES}
    for found in tensor_ranks(2, gates_under_autocast):
        for name in GATES:
            assert found[name].dtype == expected[name].dtype == torch.float32
            assert (found[name] == expected[name]).double().mean() > 0.9  # the products may be summed in another order


class Collectives(TorchDispatchMode):
    """Counts what is sent: (operation, shape of its first tensor, the output) -> times."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            first = args[0][0] if isinstance(args[0], list) else args[0]
            self.counts[func._schema.name.removeprefix("c10d::").strip("_"), tuple(first.shape)] += 1
        return func(*args, **(kwargs or {}))


def communicated(case: Case) -> list[Counter]:
    model = shard(case)
    with Collectives() as forward:
        loss = model(**batch(0)).loss
    with Collectives() as backward:
        loss.backward()
    return [forward.counts, backward.counts]


PARTS = {"lmm": 2, "transformer": 2, "mag": 3, "mal": 3}  # of a block that end in a sum
ENTRIES = {"lmm": 2, "transformer": 2, "mag": 2, "mal": 3}  # and norms whose output they read


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "transformer"])
def test_one_sum_per_part_and_direction(tensor_ranks, variant, sequence_parallel):
    layers, whole, head_size, persistent = 2, (ROWS, TOKENS, DIM), DIM // 4, (3, DIM)
    gathered, scattered = (TOKENS, ROWS, DIM), (TOKENS // 2, ROWS, DIM)
    forward = Counter({("allreduce", (ROWS * TOKENS, 1)): 1, ("allreduce", (ROWS * TOKENS, 2)): 1})  # the loss
    backward = Counter({("allreduce", persistent): layers})
    if variant != "transformer":
        backward["allreduce", (head_size,)] += layers
    if variant == "mac":
        segments, segment = 4 * layers, (ROWS, 16, DIM)
        forward["allreduce", segment] += 2 * segments
        backward["allreduce", segment] += segments
        forward["allgather_base", (2 * ROWS, 16, DIM // 2)] += segments
        backward["reduce_scatter_base", (ROWS * 16, DIM // 2)] += segments
        ends, entries, cuts = layers, 2 * layers, layers
    else:
        ends, entries, cuts = PARTS[variant] * layers, ENTRIES[variant] * layers, 0
    ends, entries = ends + 1, entries + 1  # the embedding, the head
    if sequence_parallel:
        forward |= {("reduce_scatter_base", scattered): ends, ("allgather_base", gathered): entries}
        backward |= {("reduce_scatter_base", scattered): entries, ("allgather_base", gathered): ends + cuts}
        backward["allreduce", (DIM,)] += entries + (2 * layers if variant == "mag" else 0)  # norms
    else:
        forward["allreduce", whole] += ends
        backward["allreduce", whole] += entries
    for found in tensor_ranks(2, communicated, case(variant, sequence_parallel=sequence_parallel)):
        assert found == [forward, backward]


def sharded_loss(chunk: int, ignore_index: int, labels: torch.Tensor) -> list[torch.Tensor]:
    hidden, weight = head()
    rows = weight.shape[0] // dist.get_world_size()
    weight = weight[rows * dist.get_rank() :][:rows].detach().requires_grad_()
    loss, count = linear_cross_entropy(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        chunk_tokens=chunk,
        vocabulary_split=vocabulary_split(dist.group.WORLD),
    )
    (loss * 0.3).backward()
    with torch.no_grad():
        again, _ = linear_cross_entropy(
            hidden, weight, labels, ignore_index=ignore_index, vocabulary_split=vocabulary_split(dist.group.WORLD)
        )
    dist.all_reduce(hidden.grad)
    return [loss.detach(), again, count, hidden.grad, torch.cat(gathered(weight.grad))]


def head() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=g, dtype=torch.float64) * 30  # exp() of these logits overflows
    return hidden.requires_grad_(), torch.randn(20, 8, generator=g, dtype=torch.float64).mul_(10).requires_grad_()


@pytest.mark.parametrize(("chunk", "ignore_index"), [(7, -100), (1024, 13)])
def test_loss_of_a_sharded_vocabulary(tensor_ranks, chunk, ignore_index):
    labels = torch.randint(20, (37,), generator=torch.Generator().manual_seed(1))
    labels[::5] = ignore_index
    hidden, weight = head()
    loss, count = linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index)
    (loss * 0.3).backward()
    for found in tensor_ranks(2, sharded_loss, chunk, ignore_index, labels):
        for got, expected in zip(found, [loss, loss, count, hidden.grad, weight.grad], strict=True):
            torch.testing.assert_close(got, expected.detach(), rtol=1e-11, atol=1e-11)


def refused_calls() -> list[str]:
    model, data = shard(case("lmm", sequence_parallel=True)), batch(0)
    hidden, weight = head()
    messages = []
    for call in (
        lambda: model(data["tokens"][:, :63]),
        lambda: linear_cross_entropy(
            hidden, weight[:10], torch.full((37,), 20), vocabulary_split=vocabulary_split(dist.group.WORLD)
        ),
        lambda: shard(case("lmm", memory={"heads": 1})),
    ):
        with pytest.raises(ValueError) as refused:
            call()
        messages.append(str(refused.value))
    return messages


def test_calls_that_do_not_fit_are_refused(tensor_ranks):
    for messages in tensor_ranks(2, refused_calls):
        for message, expected in zip(messages, (
            "parallel.sequence_parallel splits the sequence over parallel.tp=2 ranks, got 63 tokens",
            "labels holds 20; legal are 0 to 19",
            "model.memory.heads=1 does not divide over parallel.tp=2: use parallel.tp=1, or parallel.memory_split=hidden",
        ), strict=True):  # fmt: skip
            assert expected in message


WIDE = {"dim": 36, "heads": 6, "ffn_dim": 24, "vocab_size": 48}


@pytest.mark.parametrize(
    ("tp", "memory_split", "model", "memory", "message"),
    [
        (2, "heads", {}, {"heads": 3}, "model.memory.heads=3 does not divide over parallel.tp=2: use parallel.tp=1 or 3, or parallel.memory_split=hidden"),
        (2, "heads", {}, {"heads": 3, "depth": 1}, "model.memory.heads=3 does not divide over parallel.tp=2: use parallel.tp=1 or 3"),
        (4, "heads", {}, {"heads": 6}, "model.heads=6 does not divide over parallel.tp=4: use parallel.tp=1 or 2 or 3 or 6"),
        (2, "heads", {"vocab_size": 51}, {"heads": 6}, "model.vocab_size=51 does not divide over parallel.tp=2: use parallel.tp=1 or 3, or model.vocab_size=52"),
        (2, "heads", {"ffn_dim": 25}, {"heads": 6}, "model.ffn_dim=25 does not divide over parallel.tp=2: use parallel.tp=1, or model.ffn_dim=26"),
        (2, "hidden", {}, {"heads": 3, "depth": 1}, "parallel.memory_split=hidden needs model.memory.depth=2, got 1: use parallel.memory_split=heads"),
        (2, "hidden", {}, {"heads": 4, "expansion": 1.0}, "model.memory.heads=9 does not divide over parallel.tp=2: use parallel.tp=1 or 3"),
        (2, "heads", {"kv_heads": 3}, {"heads": 6}, "model.kv_heads=3 does not divide over parallel.tp=2: use parallel.tp=1 or 3, or model.kv_heads=2"),
        (2, "heads", {"layers": 3, "pattern": ["lmm", {"variant": "mag", "heads": 9}]}, {"heads": 6}, "model.pattern[1].heads=9 does not divide over parallel.tp=2: use parallel.tp=1 or 3"),
        (2, "heads", {"pattern": ["lmm", {"variant": "transformer", "kv_heads": 1}]}, {"heads": 6}, "model.pattern[1].kv_heads=1 does not divide over parallel.tp=2: use parallel.tp=1, or model.pattern[1].kv_heads=2"),
        (2, "heads", {"pattern": ["transformer", {"variant": "lmm", "memory": {"heads": 9}}]}, {"heads": 3}, "model.pattern[1].memory.heads=9 does not divide over parallel.tp=2: use parallel.tp=1 or 3, or parallel.memory_split=hidden"),
        (2, "heads", {"pattern": [{"variant": "lmm", "ffn_dim": 21}, "lmm"]}, {"heads": 6}, "model.pattern[0].ffn_dim=21 does not divide over parallel.tp=2: use parallel.tp=1 or 3, or model.pattern[0].ffn_dim=22"),
        (2, "hidden", {"pattern": ["mag", {"variant": "lmm", "memory": {"depth": 3}}]}, {"heads": 6}, "parallel.memory_split=hidden needs model.pattern[1].memory.depth=2, got 3: use parallel.memory_split=heads"),
        (2, "hidden", {}, {"heads": 3, "backend": "reference"}, "cannot run model.memory.backend=reference: use auto or chunked"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named_with_a_way_out(tp, memory_split, model, memory, message):
    config = ModelConfig(**WIDE | model, memory=MemoryConfig(**memory))
    with pytest.raises(ValueError, match=re.escape(message) + "($|, or)"):
        check_tensor_parallel(config, tp, False, memory_split)


def test_layouts_that_fit():
    check_tensor_parallel(ModelConfig(**WIDE, memory=MemoryConfig(heads=3)), 2, True, "hidden")
    check_tensor_parallel(ModelConfig(**WIDE, memory=MemoryConfig(heads=3)), 3, False, "heads")
    check_tensor_parallel(ModelConfig(**WIDE, variant="transformer", memory=MemoryConfig(heads=3)), 2, False, "hidden")
    check_tensor_parallel(
        ModelConfig(**WIDE | {"heads": 4}, variant="lmm", memory=MemoryConfig(heads=6)), 6, False, "heads"
    )
    check_tensor_parallel(ModelConfig(vocab_size=51), 1, False, "heads")
    with pytest.raises(ValueError, match="with parallel.tp=1 set it to false"):
        check_tensor_parallel(ModelConfig(), 1, True, "heads")
