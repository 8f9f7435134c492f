"""Release gates of every variant: causality, independence, no hidden state, gradients everywhere, split invariance, decoding."""

import itertools

import pytest
import torch

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model
from titans_pretrain.models.state import tensors

VOCAB = 37
CHUNK, SEGMENT, WINDOW = 4, 8, 6


def config(variant, **options):
    memory = dict(heads=2, depth=2, expansion=2, chunk_size=CHUNK) | options.pop("memory", {})
    mac = MacConfig(segment=SEGMENT, **options.pop("mac", {}))
    base = dict(dim=16, layers=2, heads=2, vocab_size=VOCAB, window=WINDOW, persistent_tokens=3, ffn_dim=24)
    return ModelConfig(variant, **(base | options), memory=MemoryConfig(**memory), mac=mac)


CASES = {
    "lmm": config("lmm"),
    "mac": config("mac"),
    "mac-queries": config("mac", mac=dict(memory_tokens=3)),
    "mag": config("mag"),
    "mal": config("mal"),
    "transformer": config("transformer"),
    "full-attention": config("transformer", window=None),
    "linear-telescoped": config("mag", memory=dict(depth=1, residual_norm=False, step="telescoped", max_lr=0.5)),
    "deep-per-layer": config("lmm", memory=dict(depth=3, per_layer_gates=True, forget_to="zero", step="telescoped")),
    "untied-no-persistent": config("mal", persistent_tokens=0, tie_embeddings=False),
    "hybrid": config(
        "mag",
        pattern=["mag", "lmm", {"variant": "transformer", "window": None, "head_dim": 6, "persistent_tokens": 1}],
        layers=3,
        heads=4,
        kv_heads=2,
        qk_norm=True,
    ),
    "hybrid-memories": config(
        "lmm",
        kv_heads=1,
        pattern=[
            {"variant": "mac", "memory": {"depth": 1, "residual_norm": False, "step": "telescoped"}, "qk_norm": True},
            {"variant": "mal", "memory": {"chunk_size": 8, "heads": 4}, "window": 3, "ffn_dim": 20},
        ],
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def build(name):
    """A float64 model away from its initialisation, so that nothing cancels."""
    torch.manual_seed(0)
    model = build_model(CASES[name]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def sample(tokens, batch=2, seed=1):
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def documents():
    """Two rows of 24 tokens: three documents with padding, and one that starts in the middle."""
    rows = [[*range(8), *range(5), -1, -1, -1, *range(8)], [*range(5), -1, -1, -1, *range(16)]]
    return torch.tensor(rows)


def close(actual, expected, tol=1e-10):
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < tol, f"relative error {error:.2e}"


@cases
@pytest.mark.parametrize("packed", [False, True])
def test_causal(name, packed):
    """Changing token i leaves every output before i bit-identical."""
    model, x = build(name), sample(24)
    positions = documents() if packed else None
    before = model(x, positions=positions).logits
    for i in (0, 3, 4, 9, 15, 16, 23):
        y = x.clone()
        y[:, i] = (y[:, i] + 1) % VOCAB
        after = model(y, positions=positions).logits
        assert torch.equal(before[:, :i], after[:, :i]), f"token {i} is seen before it is read"
        assert not torch.equal(before[:, i:], after[:, i:])


@pytest.mark.parametrize("queries", [0, 3])
def test_far_segments_of_mac_meet_in_the_memory_alone(queries):
    """One layer: the first token changes what comes two segments later, unless nothing is written to the memory."""
    torch.manual_seed(0)
    model, x = build_model(config("mac", layers=1, mac=dict(memory_tokens=queries))).double(), sample(3 * SEGMENT)
    y = x.clone()
    y[:, 0] = (y[:, 0] + 1) % VOCAB

    def change() -> float:
        return float((model(x).logits - model(y).logits)[:, 2 * SEGMENT :].detach().abs().min(-1).values.max())

    assert change() > 1e-6
    with torch.no_grad():
        model.layers[0].memory.lr_proj.bias.fill_(-1e4)
    assert change() < 1e-12


@cases
def test_samples_are_independent(name):
    model, x = build(name), sample(21)
    before = model(x).logits
    y = x.clone()
    y[0] = (y[0] + 1) % VOCAB
    assert torch.equal(before[1], model(y).logits[1])


@cases
def test_no_hidden_state(name):
    model, x = build(name), sample(21)
    first = model(x).logits
    model(sample(13, seed=5))
    assert torch.equal(first, model(x).logits)


@cases
def test_every_parameter_gets_a_gradient(name):
    model, x = build(name), sample(24)
    model(x, labels=sample(24, seed=2)).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@cases
def test_split_invariance(name):
    """Any split into calls: the logits, the final state and the gradients of one call."""
    model, x = build(name), sample(27)
    whole = model(x)
    parts, state = [], None
    for start, stop in itertools.pairwise((0, 1, 6, 8, 19, 27)):
        out = model(x[:, start:stop], state=state)
        parts.append(out.logits)
        state = out.state
    logits = torch.cat(parts, 1)
    close(logits, whole.logits)
    for a, b in zip(tensors(state), tensors(whole.state), strict=True):
        close(a.double(), b.double())
    weight = torch.randn(logits.shape, dtype=torch.float64)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((logits * weight).sum(), parameters),
        torch.autograd.grad((whole.logits * weight).sum(), parameters),
        strict=True,
    ):
        close(a, b)


@cases
def test_decoding_equals_the_full_forward(name):
    """Token by token, across chunk, segment and window boundaries."""
    model, x = build(name), sample(21)
    with torch.no_grad():
        full = model(x).logits
        state, steps = None, []
        for t in range(x.shape[1]):
            out = model(x[:, t : t + 1], state=state)
            steps.append(out.logits)
            state = out.state
        close(torch.cat(steps, 1), full)


@cases
def test_packed_documents_are_what_they_are_alone(name):
    model, x, positions = build(name), sample(24), documents()
    packed = model(x, positions=positions).logits
    for row, start, length in ((0, 0, 8), (0, 8, 5), (0, 16, 8), (1, 0, 5), (1, 8, 16)):
        alone = model(x[row : row + 1, start : start + length]).logits[0]
        close(packed[row, start : start + length], alone)


@cases
def test_packed_documents_across_calls(name):
    model, x, positions = build(name), sample(24), documents()
    whole = model(x, positions=positions)
    first = model(x[:, :11], positions=positions[:, :11])
    second = model(x[:, 11:], positions=positions[:, 11:], state=first.state)
    close(torch.cat((first.logits, second.logits), 1), whole.logits)


@cases
def test_recompute_changes_nothing(name):
    model, x, y = build(name), sample(17), sample(17, seed=2)
    gradients = []
    for mode in ("none", "block"):
        model.set_recompute(mode)
        model.zero_grad()
        model(x, labels=y).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_loss_is_the_mean_over_labels():
    model, x = build("mag"), sample(12)
    labels = sample(12, seed=3)
    labels[0, :7] = -100
    expected = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), labels.flatten())
    close(model(x, labels=labels).loss, expected)
    close(model(x, labels=labels, num_items_in_batch=10).loss, expected * (labels != -100).sum() / 10)


@cases
def test_bfloat16_autocast(name):
    """Runs in bfloat16 with a float32 memory, close to float32."""
    model, x, labels = build(name).float(), sample(24), sample(24, seed=2)
    expected = model(x, labels=labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, labels=labels)
    out.loss.backward()
    assert out.loss.isfinite() and abs(out.loss - expected) < 0.1
    for layer in out.state.layers:
        assert layer.memory is None or layer.memory.memory.weights[0].dtype == torch.float32


@cases
def test_hidden_states_are_those_of_hugging_face(name):
    """The embedding's output and each layer's, the last one after the final norm: what the head reads."""
    model, x = build(name), sample(13)
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    out = model(x, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.layers) + 1
    for i, (before, after) in enumerate(seen):
        assert torch.equal(out.hidden_states[i], before)
        last = i == len(seen) - 1
        assert torch.equal(out.hidden_states[i + 1], model.norm(after) if last else after)
    head = (model.lm_head or model.embed_tokens).weight
    close(out.hidden_states[-1] @ head.T, out.logits)
    assert model(x).hidden_states is None
    assert model(x, labels=x, output_hidden_states=True).hidden_states is not None


def test_a_document_starts_where_every_layer_can():
    """Chunks of 4 and 8: a start at 12 is one layer's alone, in a call that goes on as in one that begins."""
    model, x = build("hybrid-memories"), sample(24, batch=1)
    off = torch.tensor([[*range(12), *range(12)]])
    with pytest.raises(ValueError, match="off the grid: pad documents to a multiple of 8 tokens"):
        model(x, positions=off)
    first = model(x[:, :5], positions=off[:, :5])
    with pytest.raises(ValueError, match="off the grid"):
        model(x[:, 5:], positions=off[:, 5:], state=first.state)
    on = torch.tensor([[*range(16), *range(8)]])
    model(x[:, 5:], positions=on[:, 5:], state=first.state)


def test_a_state_holds_the_shared_heads_only():
    state = build("hybrid")(sample(21)).state
    shapes = [None if layer.kv is None else tuple(layer.kv[0].shape) for layer in state.layers]
    assert shapes == [(2, WINDOW - 1, 2, 4), None, (2, 21, 2, 6)]


@cases
def test_select_rows_of_a_state(name):
    model, x = build(name), sample(13, batch=3)
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        state = model(x[:, :10]).state.select(rows)
        close(model(x[rows, 10:], state=state).logits, model(x).logits[rows, 10:])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=torch.zeros(1, 0, dtype=torch.int64)), "T >= 1"),
        (dict(tokens=torch.zeros(1, 8)), "int64"),
        (dict(tokens=torch.full((1, 8), VOCAB)), "vocab_size"),
        (dict(labels=torch.zeros(1, 7, dtype=torch.int64)), "labels"),
        (dict(positions=torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]])), "off the grid"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        build("mag")(**(dict(tokens=sample(8, batch=1)) | change))
