"""Prompts are of the length that was asked for, with the needle where it was asked for; answers are judged as RULER does."""

import random
import re

import numpy as np
import pytest

from titans_pretrain.evaluation.haystack import split_sentences
from titans_pretrain.evaluation.niah import Niah, Options, draw_value, judge
from titans_pretrain.evaluation.tasks import Item

TEXT = "It was a dark night. Was it?\nRain fell: 3.5 inches.\n\n" + " ".join(
    f"Sentence {i} says little." for i in range(20)
)


def niah(lm, documents, **options) -> Niah:
    return Niah(
        Options(**({"lengths": [600], "samples": 5, "depths": 5, "answer_tokens": 40} | options)), lm, documents(TEXT)
    )


@pytest.mark.parametrize("task", ["single_1", "single_2", "single_3"])
def test_prompts_are_exact(lm, documents, task):
    """Built again by a plain search over the text of the prompt."""
    made = niah(lm, documents, tasks=[task], lengths=[600, "1K"])
    items = made.items()
    assert [item.tokens for item in items] == [560] * 5 + [984] * 5
    answers = set()
    for number, item in enumerate(items):
        sample = made.sample(item.key)
        assert len(sample.prompt) == item.tokens
        text = lm.tokenizer.decode(sample.prompt)
        answers.add(sample.answer)
        value = "uuid" if task == "single_3" else "number"
        assert text.count(sample.answer) == 1
        assert text.startswith("Some text follows") and text.endswith(" is")
        needle = text[sample.place :].split(f"{sample.answer}.")[0] + f"{sample.answer}."
        key = needle.split(" for ")[1].split(" is ")[0]
        assert needle == f" One fact to remember: the special {value} for {key} is {sample.answer}."
        assert text.count(f"the special {value} for {key}") == 2  # in the needle and in the question
        hay = text[text.index("\n") + 1 : text.rindex("\nWhat is")].replace(needle, "")
        begin, depth = text.index("\n") + 1, number % 5 / 4
        place = sample.place - begin
        if task == "single_1":
            assert ("The lamps are lit." in hay) and hay.startswith(" The river runs slowly.")
        else:
            assert hay in TEXT * 3
        # the last end of a sentence, or of all, at or before the depth
        ends = [0, *np.cumsum([len(s) for s in split_sentences(hay)])]
        assert place == max(end for end in ends if end <= depth * len(hay) + 1e-9)
    assert len(answers) == 10
    assert np.array_equal(
        niah(lm, documents, tasks=[task], lengths=[600, "1K"]).sample(items[3].key).prompt,
        made.sample(items[3].key).prompt,
    )


@pytest.mark.parametrize(
    ("said", "found", "exact"),
    [
        (" 1234567. The end", 1, 1), ("1234567", 1, 1), (": 1234567", 1, 1), ("it is 1234567", 1, 0), ("12345678", 1, 0),
        ("1234568", 0, 0), ("123 4567", 0, 0),
    ],
)  # fmt: skip
def test_answers_are_judged(said, found, exact):
    assert judge(said, "1234567") == {"found": found, "exact": exact, "said": said}
    assert judge("ABCD-EF", "abcd-ef")["exact"] == 1


def test_values():
    draw = random.Random(0)
    assert len(draw_value("number", draw)) == 7 and draw_value("number", draw).isdecimal()
    assert [len(part) for part in draw_value("uuid", draw).split("-")] == [8, 4, 4, 4, 12]


def test_a_model_that_knows_gets_everything_right(lm, documents, tmp_path, monkeypatch):
    """It answers by searching its prompt; at depth 3 of single_2 it does not."""
    made = niah(lm, documents, tasks=["single_2", "single_3"], lengths=[600, 700])
    hidden = {made.sample(f"single_2/{length}/3").prompt.tobytes() for length in (600, 700)}

    def generate(prompts, limit, ended):
        answers = []
        for row, prompt in enumerate(prompts):
            text = lm.tokenizer.decode(prompt)
            key = text.split(" for ")[-1].removesuffix(" is")
            answer = text.split(f" for {key} is ")[1].split(".")[0]
            knows = prompt.tobytes() not in hidden
            answers.append(lm.tokenizer.encode(f" {answer}." if knows else "no idea").tolist())
            assert ended(row, answers[-1]) == knows and not ended(row, answers[-1][:-1])
        return answers

    monkeypatch.setattr(lm, "generate", generate)
    items = made.items()
    results = {}
    for length in (560, 660):
        batch = [item for item in items if item.tokens == length]
        results |= dict(zip([item.key for item in batch], made.run(batch), strict=True))
    figures, table = made.report(results, tmp_path)
    assert figures["single_2"]["600"] == {
        "samples": 5, "found": 0.8, "exact": 0.8, "depths": {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0},
    }  # fmt: skip
    assert figures["single_3"]["700"]["exact"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["niah-single_2.png", "niah-single_3.png"]
    assert "paper:" not in table  # it has no such lengths


def test_the_papers_rows_stand_beside_ours(lm, documents, tmp_path):
    made = niah(lm, documents, tasks=["single_2"], lengths=["2K", 3000], samples=1)
    results = {item.key: {"found": 1, "exact": 0, "said": ""} for item in made.items()}
    figures, table = made.report(results, tmp_path)
    assert figures["single_2"]["2048"]["found"] == 1.0
    assert re.search(r"paper: Titans \(MAC\) \| +99\.6 \| +\|", table)


def test_a_length_without_room_is_refused(lm, documents):
    with pytest.raises(ValueError, match=r"niah.lengths has 200, and \d+ tokens are taken by"):
        niah(lm, documents, lengths=[200]).items()
    with pytest.raises(ValueError, match=r"niah.tasks has 'multi'; there are single_1"):
        Options(tasks=["multi"])


def test_answers_of_the_model_itself(lm, documents, short_pieces):
    """A batch gives what its items give one by one."""
    made = niah(lm, documents, tasks=["single_1"], lengths=[500], samples=3, answer_tokens=4)
    items = made.items()
    assert made.run(items) == [made.run([item])[0] for item in items]
    assert isinstance(items[0], Item)
