"""bAbI files in their published form, prompts of the length that was asked for, and the benchmark's measure."""

import json
import random

import numpy as np
import pytest

from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.evaluation.babilong import (
    Babilong,
    Options,
    Question,
    build_prompt,
    is_right,
    read_task,
    training_texts,
)
from titans_pretrain.evaluation.babilong_texts import main
from titans_pretrain.evaluation.haystack import Haystack, split_sentences

STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra journeyed to the kitchen.
2 Where is Sandra? \tkitchen\t1
"""
TEXT = " ".join(f"The {i}th carriage came by at noon." for i in range(60))


@pytest.fixture
def facts(tmp_path) -> str:
    for split in ("test", "train"):
        (tmp_path / f"qa1_single-supporting-fact_{split}.txt").write_text(STORIES)
    return str(tmp_path)


def babilong(lm, documents, facts, **options) -> Babilong:
    return Babilong(
        Options(**({"facts": facts, "tasks": ["qa1"], "lengths": [0, 700, "1K"]} | options)), lm, documents(TEXT)
    )


def test_stories_are_read_as_they_are_published(facts):
    assert read_task(facts, "qa1", "test") == [
        Question(["Mary moved to the bathroom.", "John went to the hallway."], "Where is Mary?", "bathroom"),
        Question(
            ["Mary moved to the bathroom.", "John went to the hallway.", "Daniel went back to the hallway."], "Where is Daniel?", "hallway"
        ),
        Question(["Sandra journeyed to the kitchen."], "Where is Sandra?", "kitchen"),
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", ["few-shot", "fine-tuned"])
def test_prompts_are_exact(lm, documents, facts, protocol):
    made = babilong(lm, documents, facts, protocol=protocol)
    items = made.items()
    assert [item.key for item in items] == [f"qa1/{length}/{i}" for length in (0, 700, 1024) for i in range(3)]
    for item in items:
        _, length, number = item.key.split("/")
        asked, prompt = read_task(facts, "qa1", "test")[int(number)], made.prompt(item.key)
        text = lm.tokenizer.decode(prompt)
        assert len(prompt) == item.tokens == (int(length) or len(text))
        assert text.endswith(f"\nQuestion: {asked.question}\nAnswer:")
        story = text[: text.rindex("\nQuestion")]
        if protocol == "few-shot":
            assert text.startswith("Facts are hidden") and text.count("Answer: ") == 2
            story = story.rpartition("\n\n")[2]
        else:
            assert "Answer: " not in text
        places = [story.index(f" {fact}") for fact in asked.facts]
        assert places == sorted(places)
        rest = story
        for fact in reversed(asked.facts):
            rest = rest.replace(f" {fact}", "", 1)
        assert rest in TEXT * 3  # the background is whole, as many times over as need be
        if length == "0":
            assert rest == ""
    assert np.array_equal(
        made.prompt("qa1/700/1"), babilong(lm, documents, facts, protocol=protocol).prompt("qa1/700/1")
    )


def test_facts_stand_anywhere_between_sentences():
    tokenizer, seen = ByteTokenizer(), set()
    background = Haystack([tokenizer.encode(s) for s in split_sentences(TEXT)], anywhere=False)
    asked = Question(["A was here.", "B was there."], "Who?", "A")
    for seed in range(60):
        text = tokenizer.decode(
            build_prompt(tokenizer, asked, [], 300, background, random.Random(seed), few_shot=False)
        )
        at = text.index(" A was here.")
        assert at == 0 or text[at - 1] == "." or at > 230  # the last sentence may be cut short
        seen.add(at)
    assert min(seen) == 0 and max(seen) > 200 and len(seen) > 5


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" bathroom.", True), ("The Bathroom\nhallway", True), ("bathroom or hallway", False), ("hallway", False), ("", False),
        ("bathrooms", False), ("in the garden. bathroom", False),
    ],
)  # fmt: skip
def test_the_benchmarks_measure(said, right):
    answers = {"bathroom", "hallway", "garden"}
    assert is_right(said, Question([], "Where is Mary?", "bathroom"), answers) == right
    assert is_right("not the hallway but the bathroom", Question([], "Was it the hallway?", "bathroom"), answers)


def test_the_table(lm, documents, facts, tmp_path, monkeypatch):
    made = babilong(lm, documents, facts, lengths=[0, "1K"])

    def generate(prompts, limit, ended):
        assert ended(0, lm.tokenizer.encode(" hallway.").tolist()) and not ended(
            0, lm.tokenizer.encode(" hallway").tolist()
        )
        return [lm.tokenizer.encode(" hallway.").tolist()] * len(prompts)

    monkeypatch.setattr(lm, "generate", generate)
    results = {item.key: made.run([item])[0] for item in made.items()}
    figures, table = made.report(results, tmp_path)
    assert figures["mean"] == pytest.approx({"0": 1 / 3, "1024": 1 / 3})
    assert "paper" not in table.partition("|")[2]  # its mean is over five tasks
    assert (tmp_path / "babilong.png").exists()


def test_what_does_not_fit_is_refused(lm, documents, facts, tmp_path):
    with pytest.raises(ValueError, match=r"babilong.lengths has 100, and a prompt without background has \d+ tokens"):
        babilong(lm, documents, facts, lengths=[100]).prompt("qa1/100/0")
    with pytest.raises(ValueError, match=r"has 0 files qa2_\*_test.txt"):
        babilong(lm, documents, facts, tasks=["qa2"])
    with pytest.raises(ValueError, match="babilong.facts is not set"):
        babilong(lm, documents, None)
    with pytest.raises(ValueError, match="there are qa1 to qa20"):
        Options(tasks=["qa21"])
    (tmp_path / "qa3_x_test.txt").write_text("Mary went home.\n")
    with pytest.raises(ValueError, match=r"line 1: 'Mary went home.' is no line of a bAbI task"):
        read_task(str(tmp_path), "qa3", "test")


def test_texts_to_train_on(facts, documents, tmp_path, capsys):
    options = Options(facts=facts, tasks=["qa1"], lengths=[0, 400])
    texts = list(training_texts(options, ByteTokenizer(), documents(TEXT), 6))
    for text, length in zip(texts, [0, 400] * 3, strict=True):
        prompt, _, answer = text.rpartition(" ")
        assert prompt.endswith("\nAnswer:") and answer in ("bathroom", "hallway", "kitchen")
        assert len(prompt) == length or (length == 0 and len(prompt) < 150)
    (tmp_path / "books.txt").write_text(TEXT)
    ByteTokenizer().save(tmp_path / "tokenizer")
    settings = [
        f"babilong.facts={facts}",
        "babilong.tasks=[qa1]",
        "babilong.lengths=[0,400]",
        f"babilong.text={tmp_path}/books.txt",
    ]
    assert main([str(tmp_path / "tokenizer"), str(tmp_path / "out.jsonl"), "6", *settings]) == 0
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == texts
    assert main([str(tmp_path / "tokenizer"), str(tmp_path / "out.jsonl"), "6", "babilong.length=3"]) == 2
    assert "did you mean lengths?" in capsys.readouterr().err
