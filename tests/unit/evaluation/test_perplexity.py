"""Loss by position, against one forward pass over what its targets may see."""

import math

import numpy as np
import pytest
import torch

from titans_pretrain.evaluation.perplexity import Options, Perplexity, bucket_edges, first_tokens

TEXT = " ".join(f"{i * i % 97} words" for i in range(60))


@torch.no_grad()
def nats_from(lm, row: np.ndarray, start: int, stop: int) -> list[float]:
    """Of the tokens after positions start to stop - 1, for a model that reads from `start` on, in one forward pass."""
    ids = torch.from_numpy(row.astype(np.int64))
    shares = lm.model(ids[None, start:stop]).logits[0].log_softmax(-1)
    return [-float(shares[i, ids[start + i + 1]]) for i in range(stop - start)]


@pytest.mark.parametrize("overlap", [None, 0, 40])
def test_buckets_equal_a_forward_pass_per_target(lm, documents, short_pieces, tmp_path, overlap):
    options = Options(tokens=128, sequences=2, first_bucket=16, reset=32, overlap=overlap)
    task = Perplexity(options, lm, documents(TEXT, TEXT[::-1]))
    items = task.items()
    assert [item.key for item in items] == ["0", "1"]
    results = {item.key: r for item, r in zip(items, task.run(items), strict=True)}
    figures, table = task.report(results, tmp_path)
    stream = first_tokens(documents(TEXT, TEXT[::-1]), None, lm.tokenizer, 257)
    rows = [stream[:129], stream[128:]]
    before = 32 if overlap is None else overlap
    carried_of = [nats_from(lm, row, 0, 128) for row in rows]
    reset_of = [
        [nats for at in range(0, 128, 32) for nats in nats_from(lm, row, max(0, at - before), at + 32)[-32:]]
        for row in rows
    ]
    for bucket, (a, b) in zip(figures["buckets"], [(0, 16), (16, 32), (32, 64), (64, 128)], strict=True):
        carried = [nats for row in carried_of for nats in row[a:b]]
        reset = [nats for row in reset_of for nats in row[a:b]]
        assert (bucket["from"], bucket["to"], bucket["targets"]) == (a, b, len(carried))
        assert bucket["carried"] == pytest.approx(np.mean(carried), rel=1e-4)
        assert bucket["reset"] == pytest.approx(np.mean(reset), rel=1e-4)
        assert bucket["memory"] == pytest.approx(np.mean(reset) - np.mean(carried), abs=1e-4)
    whole = np.mean(carried_of)
    assert figures["buckets"][-1]["perplexity"] == pytest.approx(math.exp(whole), rel=1e-3)
    assert "| 64 to 128" in table
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_documents_follow_one_another_with_eos(lm, documents):
    assert first_tokens(documents("ab", "c"), None, lm.tokenizer, 100).tolist() == [97, 98, 256, 99, 256]
    assert first_tokens(documents("ab", "c"), None, lm.tokenizer, 4).tolist() == [97, 98, 256, 99]


def test_buckets_double():
    assert bucket_edges(2048, 256) == [0, 256, 512, 1024, 2048]
    assert bucket_edges(1000, 256) == [0, 256, 512, 1000]
    assert bucket_edges(100, 256) == [0, 100]


def test_what_does_not_fit_is_refused(lm, documents):
    with pytest.raises(ValueError, match=r"the text has 3 tokens, perplexity.tokens=64 needs 65"):
        Perplexity(Options(tokens=64), lm, documents("ab")).items()
    with pytest.raises(ValueError, match=r"perplexity.tokens=100 is no multiple of perplexity.reset=16"):
        Perplexity(Options(tokens=100), lm, documents(TEXT))
    with pytest.raises(ValueError, match=r"perplexity.sequences must be 1 or more"):
        Options(sequences=0)
    with pytest.raises(ValueError, match=r"perplexity.tokens has '3X'"):
        Options(tokens="3X")
