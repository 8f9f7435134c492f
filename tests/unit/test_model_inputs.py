"""What a model refuses to read, wherever it runs, and what it keeps from a call without gradients for the next."""

import dataclasses

import pytest
import torch

from titans_pretrain.config import Config, DataConfig
from titans_pretrain.config.model import VARIANTS, MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.data import Batch
from titans_pretrain.models import ModelState, build_model
from titans_pretrain.training.engine import on_device

VOCAB = 50


def config(variant: str = "mag") -> ModelConfig:
    return ModelConfig(
        variant, dim=32, layers=2, heads=2, vocab_size=VOCAB, window=16, persistent_tokens=2,
        memory=MemoryConfig(heads=2, chunk_size=4), mac=MacConfig(segment=8),
    )  # fmt: skip


def model(variant: str = "mag"):
    """In float64, with every parameter away from its start."""
    torch.manual_seed(0)
    model = build_model(config(variant)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def tokens(count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, count), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_goes_on_behind_padding_but_a_new_document(variant):
    m, padded = model(variant), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, -1, -1, -1]])
    following = tokens(8, rows=2)
    with torch.no_grad():
        state = m(tokens(8, rows=2), positions=padded).state
        with pytest.raises(ValueError, match="the state ends in padding.* give positions, 0 where the next one starts"):
            m(following, state=state)
        found = m(following, state=state, positions=torch.arange(8).repeat(2, 1))
        torch.testing.assert_close(found.logits, m(following).logits, rtol=1e-10, atol=1e-10)
        m(following[:1], state=state.select(torch.tensor([0])))  # the other row's document goes on


def test_padding_in_front_of_a_document_is_not_its_end():
    m = model()
    positions = torch.tensor([[-1, -1, -1, -1, 0, 1, 2, 3]])
    with torch.no_grad():
        state = m(tokens(8), positions=positions).state
        assert m(tokens(3), state=state).state.position.tolist() == [7]


def batch(**changes) -> Batch:
    fields = {"tokens": tokens(16, rows=2), "labels": tokens(16, rows=2), "positions": torch.arange(16).repeat(2, 1)}
    return Batch(**fields | changes)


@pytest.mark.parametrize(("variant", "start"), [("mag", 6), ("lmm", 2), ("mac", 4), ("mal", 13)])
def test_a_batch_is_checked_before_it_goes_to_a_device(variant, start):
    """The meta device stands for any other than the CPU: no values can be read from it."""
    settings, device = Config(config(variant), DataConfig(seq_len=16)), torch.device("meta")
    positions = torch.arange(16).repeat(2, 1)
    positions[1, start:] -= start
    with pytest.raises(
        ValueError, match=f"off the grid: pad documents to a multiple of {8 if variant == 'mac' else 4}"
    ):
        on_device(batch(positions=positions), settings, device)
    positions = torch.arange(16).repeat(2, 1)
    positions[1, 8:] -= 8
    assert {x.device for x in on_device(batch(positions=positions), settings, device).values()} == {device}


@pytest.mark.parametrize(
    "pattern", [["lmm", {"variant": "lmm", "memory": {"chunk_size": 8}}], ["transformer", {"variant": "mac"}]]
)
def test_behind_a_state_a_document_starts_where_every_layer_is_between_chunks(pattern):
    c = dataclasses.replace(config(), pattern=pattern)
    m = build_model(c)
    with torch.no_grad():
        state = m(tokens(4)).state  # half a chunk of the second layer, nothing of the first's
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        with pytest.raises(ValueError, match="off the grid: pad documents to a multiple of 8"):
            m(tokens(8), state=state, positions=positions)
        positions = torch.tensor([[4, 5, 6, 7, 0, 1, 2, 3]])
        m(tokens(8), state=state, positions=positions)


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_tokens_outside_the_vocabulary_do_not_reach_a_device(wrong):
    held = tokens(16, rows=2)
    held[1, 3] = wrong
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 50\)"):
        on_device(batch(tokens=held), Config(config(), DataConfig(seq_len=16)), torch.device("meta"))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "transformer"])
def test_a_kept_initial_state_is_not_used_with_gradients_on(variant):
    """It has no history: where a document starts, what it starts from must be made again to get its gradient."""
    m, following = model(variant), tokens(16)
    with torch.no_grad():
        kept = m(tokens(8)).state
    assert all(layer.memory.initial is not None for layer in kept.layers)
    bare = ModelState(
        tuple(dataclasses.replace(s, memory=dataclasses.replace(s.memory, initial=None)) for s in kept.layers),
        kept.position,
    )
    positions = torch.cat((torch.arange(8, 16), torch.arange(8)))[None]

    def gradients(state):
        m.zero_grad()
        m(following, labels=following, state=state, positions=positions).loss.backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    expected, found = gradients(bare), gradients(kept)
    assert expected["layers.1.memory.weights.0"].abs().max() > 0
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
