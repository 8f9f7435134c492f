"""The model as tasks see it, against one forward pass over everything and against a token at a time."""

import pytest
import torch

from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.evaluation.model import LanguageModel

CONTEXTS = ["a", "some text that is longer than a piece is, by far", "words of some kind"]
CONTINUATIONS = [" b", " and what follows it", ","]


def draw(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def one_by_one(lm, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one row, in one forward pass without a state."""
    return lm.model(torch.tensor([ids])).logits[0]


def test_losses_equal_one_forward_pass(lm, short_pieces):
    tokens = draw(2, 101)
    found = torch.cat(list(lm.losses(tokens)), 1)
    for row, nats in zip(tokens, found, strict=True):
        shares = one_by_one(lm, row[:-1].tolist()).log_softmax(-1)
        torch.testing.assert_close(nats, -shares[range(100), row[1:]], rtol=1e-4, atol=1e-5)


def test_losses_go_on_from_a_state(lm, short_pieces):
    tokens = draw(1, 101)
    whole = torch.cat(list(lm.losses(tokens)), 1)
    _, state = lm.read(tokens[:, :37])
    torch.testing.assert_close(
        torch.cat(list(lm.losses(tokens[:, 37:], state)), 1), whole[:, 37:], rtol=1e-4, atol=1e-5
    )


def test_score_equals_each_pair_by_itself(lm, short_pieces):
    encode = ByteTokenizer().encode
    pairs = [(encode(a).tolist(), encode(b).tolist()) for a, b in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    greedy = lm.generate(torch.tensor([pairs[1][0]]), 3)[0]
    assert len(greedy) == 3
    pairs.append((pairs[1][0], greedy))
    found = lm.score(pairs)
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        shares = one_by_one(lm, [*context, *continuation][:-1]).log_softmax(-1)[len(context) - 1 :]
        assert total == pytest.approx(float(shares[range(len(continuation)), continuation].sum()), rel=1e-4)
        assert is_greedy == (shares.argmax(-1).tolist() == continuation)
    assert [is_greedy for _, is_greedy in found] == [False, False, False, True]


def test_score_of_nothing_is_refused(lm):
    with pytest.raises(ValueError, match="a context or a continuation is empty"):
        lm.score([([], [1])])


def test_generation_equals_forward_passes_over_the_whole_text(lm, short_pieces):
    """Rows end at different lengths, so the batch shrinks while it goes on."""
    prompts = draw(3, 50)
    lengths = {tuple(p.tolist()): n for p, n in zip(prompts, (2, 7, 4), strict=True)}
    expected = []
    for prompt, length in lengths.items():
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(one_by_one(lm, ids)[-1, :259].argmax()))
        expected.append(ids[50:])
    assert lm.generate(prompts, 100, lambda row, ids: len(ids) == len(expected[row])) == expected
    assert lm.generate(prompts, 2) == [answer[:2] for answer in expected]


def test_generation_ends_at_eos_and_never_leaves_the_tokenizer(lm, monkeypatch):
    """The model has five more ids than its tokenizer: one of them, then eos, is made the likeliest."""
    said = iter([{260: 9.0, 65: 5.0}, {66: 5.0, 256: 7.0}])

    def read(tokens, state=None):
        logits = torch.zeros(1, 264)
        for token, value in next(said).items():
            logits[0, token] = value
        return logits, None

    other = LanguageModel(lm.model, lm._find_tokenizer)
    monkeypatch.setattr(other, "read", read)
    assert other.generate(draw(1, 4), 10) == [[65]]
