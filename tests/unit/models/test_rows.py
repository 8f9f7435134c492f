"""Rows that have read different numbers of tokens, in one state: each goes on as it would alone."""

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.config.model import VARIANTS, MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model
from titans_pretrain.models.rows import rows_of, stack_rows

EXACT = {"rtol": 1e-10, "atol": 1e-10}
KINDS = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "queries": {"variant": "mac", "mac": MacConfig(segment=8, memory_tokens=2)},
    "full": {"variant": "mag", "window": None, "kv_heads": 1},
    "plain": {"variant": "mal", "memory": MemoryConfig(heads=2, chunk_size=4, step="plain", forget_to="zero", per_layer_gates=True)},
    "token": {"variant": "lmm", "memory": MemoryConfig(heads=2, chunk_size=1)},
    "mixed": {
        "pattern": ["mac", {"variant": "lmm", "memory": {"chunk_size": 3}}, {"variant": "transformer", "window": 1}],
        "layers": 3,
    },
}  # fmt: skip


def build(kind):
    torch.manual_seed(0)
    sizes = dict(
        dim=16, layers=2, heads=2, vocab_size=40, window=6, persistent_tokens=2, memory=MemoryConfig(heads=2, chunk_size=4),
        mac=MacConfig(segment=8),
    )  # fmt: skip
    model = build_model(ModelConfig(**sizes | KINDS[kind])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_go_on_as_each_would_alone(kind):
    model, lengths, more = build(kind), (5, 8, 2, 16), 10
    texts = [torch.randint(40, (1, n + more), generator=torch.Generator().manual_seed(n)) for n in lengths]
    alone = [model(text).logits[0] for text in texts]
    state = stack_rows([model(text[:, :n]).state for text, n in zip(texts, lengths)])
    for i in range(more - 2):
        out = model(torch.cat([text[:, n + i : n + i + 1] for text, n in zip(texts, lengths)]), state=state)
        assert_close(out.logits[:, 0], torch.stack([y[n + i] for y, n in zip(alone, lengths)]), **EXACT)
        state = out.state
        if i == 4:  # apart, and together in another order
            order = torch.tensor([2, 0, 3, 1])
            state = stack_rows([rows_of(state)[row] for row in order]).select(order.argsort())
    for row, text, y in zip(rows_of(state), texts, alone):
        assert_close(model(text[:, -2:], state=row).logits[0], y[-2:], **EXACT)


@torch.no_grad()
def test_it_takes_one_token_at_a_time():
    model = build("mag")
    state = stack_rows([model(torch.zeros(1, n, dtype=torch.int64)).state for n in (3, 5)])
    for arguments in (
        (torch.zeros(2, 2, dtype=torch.int64),),
        (torch.zeros(2, 1, dtype=torch.int64), None, state, torch.zeros(2, 1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="take one token at a time"):
            model(*arguments, **({} if len(arguments) > 1 else {"state": state}))


def test_gradients_are_those_of_each_alone():
    model, texts = build("mag"), [torch.arange(n)[None] for n in (4, 6)]
    gradients = []
    for together in (True, False):
        model.zero_grad()
        states = [model(text[:, :-1]).state for text in texts]
        last = [text[:, -1:] for text in texts]
        if together:
            model(torch.cat(last), state=stack_rows(states)).logits.square().sum().backward()
        else:
            sum(model(x, state=s).logits.square().sum() for x, s in zip(last, states)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert_close(*gradients, **EXACT)
