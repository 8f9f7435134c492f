"""Answers to lm-eval's requests against plain loops over single forward passes, and the real library on a tiny data set."""

import json

import pytest
import torch

from titans_pretrain.evaluation.harness import Harness, Options, answer_requests, encode_pair, find_local, request_key

TEXT = "A document that is longer than a piece of the model's reading is, and then some."


@torch.no_grad()
def log_likelihood(lm, given: list[int], ids: list[int]) -> float:
    """A token at a time, each from a forward pass over everything before it."""
    total = 0.0
    for i, token in enumerate(ids):
        total += float(lm.model(torch.tensor([[*given, *ids[:i]]])).logits[0, -1].log_softmax(-1)[token])
    return total


def test_answers_equal_plain_loops(lm, short_pieces):
    eos, encode = lm.tokenizer.entry.eos_id, lm.tokenizer.encode
    requests = [
        ("loglikelihood", ("The sky ", "is blue")),
        ("loglikelihood_rolling", (TEXT,)),
        ("loglikelihood", ("", "x")),
        ("generate_until", ("Once", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False})),
        ("loglikelihood_rolling", ("",)),
    ]
    first, rolling, second, said, nothing = answer_requests(lm, requests)
    assert first[0] == pytest.approx(
        log_likelihood(lm, encode("The sky").tolist(), encode(" is blue").tolist()), rel=1e-4
    )
    assert second[0] == pytest.approx(log_likelihood(lm, [eos], encode("x").tolist()), rel=1e-4)
    assert rolling == pytest.approx(log_likelihood(lm, [eos], encode(TEXT).tolist()), rel=1e-4)
    assert nothing == 0.0
    assert lm.tokenizer.decode(lm.generate(torch.from_numpy(encode("Once").astype("int64"))[None], 5)[0]).startswith(
        said
    )


def test_blanks_go_to_the_continuation(lm):
    decode = lm.tokenizer.decode
    assert [decode(ids) for ids in encode_pair(lm.tokenizer, "a b  ", "c")] == ["a b", "  c"]
    assert encode_pair(lm.tokenizer, " ", "c") == ([256], [32, 99])


def test_answers_end_before_what_they_may_not_have(lm, monkeypatch):
    said = lm.tokenizer.encode(" yes, it is.\nQ: more").tolist()

    def generate(prompts, limit, ended):
        assert limit == 7
        assert not ended(0, said[:12]) and ended(0, said[:13])
        return [said[:13]]

    monkeypatch.setattr(lm, "generate", generate)
    settings = {"until": ["\n", "Q:"], "max_gen_toks": 7}
    assert answer_requests(lm, [("generate_until", ("x", settings))]) == [" yes, it is."]
    with pytest.raises(ValueError, match="only greedy ones are supported"):
        answer_requests(lm, [("generate_until", ("x", {"do_sample": True}))])


def test_local_files_are_found(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("")
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/validation.parquet").write_text("")
    assert find_local(tmp_path, "piqa") == {"": tmp_path / "piqa.jsonl"}
    assert find_local(tmp_path, "boolq") == {"validation": tmp_path / "boolq/validation.parquet"}
    with pytest.raises(ValueError, match="has no data of arc_easy"):
        find_local(tmp_path, "arc_easy")


@pytest.mark.slow
def test_the_real_library_on_local_data(lm, tmp_path, monkeypatch):
    """Its metrics, from our answers, equal those of plain loops over the same documents."""
    pytest.importorskip("lm_eval", reason="lm-eval is an option: pip install 'titans-pretrain[evaluation]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    goals = [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat it", "label": 0},
        {"goal": "dry a shirt", "sol1": "soak it", "sol2": "hang it in the sun", "label": 1},
        {"goal": "cut", "sol1": "a knife", "sol2": "a spoon", "label": 0},
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in goals))
    texts = ["the cat sat on the mat", "a bird in the hand"]
    (tmp_path / "lambada_openai.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = Options(tasks=["piqa", "lambada_openai"], data=str(tmp_path))
    task = Harness(options, lm, None)
    items = task.items()
    assert len(items) == 3 * 2 + 2
    results = {item.key: task.run([item])[0] for item in items}
    figures, table = task.report(json.loads(json.dumps(results)), tmp_path)
    encode = lm.tokenizer.encode
    right = 0
    for line in goals:
        context = encode(f"Question: {line['goal']}\nAnswer:").tolist()
        scores = [log_likelihood(lm, context, encode(f" {line[name]}").tolist()) for name in ("sol1", "sol2")]
        right += (scores[1] > scores[0]) == line["label"]
    assert figures["piqa"]["acc,none"] == pytest.approx(right / 3)
    nats = [
        -log_likelihood(lm, encode(" ".join(t.split()[:-1])).tolist(), encode(" " + t.split()[-1]).tolist())
        for t in texts
    ]
    assert figures["lambada_openai"]["perplexity,none"] == pytest.approx(
        torch.tensor(nats).mean().exp().item(), rel=1e-3
    )
    assert "| this model" in table and "paper: Titans (MAC), 760M" in table


def test_without_the_library_one_line_says_so(lm, monkeypatch):
    import importlib.metadata

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"pip install 'titans-pretrain\[evaluation\]'"):
        Harness(Options(), lm, None)


def test_keys_tell_requests_apart():
    requests = [("loglikelihood", ("a", "b")), ("loglikelihood", ("ab", "")), ("generate_until", ("a", {"until": []}))]
    assert len({request_key(r) for r in requests}) == 3
