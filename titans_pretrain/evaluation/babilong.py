"""BABILong (Kuratov et al. 2024, arXiv 2406.10149): the facts of a bAbI story, scattered in other text, and a question about them.

`babilong.facts` is the folder of the bAbI tasks as they are published (`qa1_single-supporting-fact_test.txt`, ...; Weston et al. 2015),
`babilong.text` the background (PG19's books in the benchmark). A fact stands after the end of a sentence, in the order of the story.
A prompt has exactly the tokens that were asked for, in the model's own; at length 0 it has the story alone.

    few-shot      instruction and examples (stories without background) before it, for a model as it was pretrained
    fine-tuned    the text and the question alone, as `python -m titans_pretrain.evaluation.babilong_texts` writes them for training

An answer is right if the target is the only answer of the task in its first sentence, those of the question's own words left out: the
benchmark's measure. Its wording is ours, and its length counts the instruction too.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from titans_pretrain.config.check import at_least, setting
from titans_pretrain.evaluation.figures import markdown_table, save_picture
from titans_pretrain.evaluation.haystack import Haystack, haystack_of
from titans_pretrain.evaluation.model import LanguageModel
from titans_pretrain.evaluation.paper import BABILONG, BABILONG_LENGTHS
from titans_pretrain.evaluation.tasks import Item, check_options, format_length, parse_lengths
from titans_pretrain.evaluation.texts import Texts

INSTRUCTION = (
    "Facts are hidden in the text below. Answer the question that follows it in one word, by the facts alone.\n\n"
)
QUESTION = "\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Options:
    facts: str | None = setting(None, "folder of the bAbI tasks' text files; needed")
    text: str | None = setting(None, "file or folder of the background; null: the held-out documents of the run's data")
    tasks: list = setting(lambda: ["qa1", "qa2", "qa3", "qa4", "qa5"], "qa1 to qa20")
    lengths: list = setting(lambda: [0, "1K", "2K", "4K", "8K", "16K"], "tokens of a prompt, to 10M; 0: no background")
    samples: int = setting(100, "of each task and length: the first questions of the task's test file")
    protocol: Literal["few-shot", "fine-tuned"] = setting("few-shot", "few-shot or fine-tuned")
    examples: int = setting(2, "of few-shot prompts: the first questions of the task's training file")
    answer_tokens: int = setting(20, "tokens of an answer at most")
    seed: int = setting(0, "of where the background begins and the facts stand")

    def __post_init__(self):
        check_options(self, "babilong")
        for name, least in (("samples", 1), ("examples", 0), ("answer_tokens", 1)):
            at_least(f"babilong.{name}", getattr(self, name), least)
        if wrong := [task for task in self.tasks if not re.fullmatch(r"qa([1-9]|1\d|20)", str(task))]:
            raise ValueError(f"babilong.tasks has {wrong[0]!r}; there are qa1 to qa20")
        parse_lengths("babilong.lengths", self.lengths)


class Question(NamedTuple):
    facts: list[str]  # the story's statements before it
    question: str
    answer: str


class Babilong:
    Options = Options

    def __init__(self, options: Options, model: LanguageModel, texts: Texts):
        self._options, self._model, self._texts = options, model, texts
        self._lengths = parse_lengths("babilong.lengths", options.lengths)
        self._questions = {task: read_task(options.facts, task, "test")[: options.samples] for task in options.tasks}
        self._examples = {
            task: read_task(options.facts, task, "train")[: options.examples]
            if options.protocol == "few-shot" and options.examples
            else []
            for task in options.tasks
        }
        self._answers = {task: {q.answer for q in read_task(options.facts, task, "test")} for task in options.tasks}

    def identity(self) -> dict:
        read = {task: [*questions, *self._examples[task]] for task, questions in self._questions.items()}
        found = {"facts": checksum(read)}
        return found | {"text": self._texts.identity(self._options.text)} if any(self._lengths) else found

    def items(self) -> list[Item]:
        """Without background a prompt is as long as its story: its length is that of its batch."""
        return [
            Item(f"{task}/{length}/{i}", length or len(self.prompt(f"{task}/0/{i}")))
            for task, questions in self._questions.items()
            for length in self._lengths
            for i in range(len(questions))
        ]

    def run(self, items: Sequence[Item]) -> list[dict]:
        tokenizer = self._model.tokenizer
        prompts = np.stack([self.prompt(item.key) for item in items])
        answers = self._model.generate(
            prompts,
            self._options.answer_tokens,
            lambda row, ids: re.search(r"\w.*[.\n]", tokenizer.decode(ids), re.S) is not None,
        )
        results = []
        for item, ids in zip(items, answers, strict=True):
            task, _, number = item.key.split("/")
            said, asked = tokenizer.decode(ids), self._questions[task][int(number)]
            results.append({"right": int(is_right(said, asked, self._answers[task])), "said": said[:200]})
        return results

    def prompt(self, key: str) -> np.ndarray:
        """The ids of an item's prompt; the same on every process and at every time."""
        task, length, number = key.split("/")
        return build_prompt(
            self._model.tokenizer,
            self._questions[task][int(number)],
            self._examples[task],
            int(length),
            self._background if int(length) else None,
            random.Random(f"{self._options.seed}/{key}"),
            few_shot=self._options.protocol == "few-shot",
        )

    @cached_property
    def _background(self) -> Haystack:
        return haystack_of(self._texts, self._options.text, self._model.tokenizer, max(self._lengths))

    def report(self, results: Mapping[str, dict], folder: Path) -> tuple[dict, str]:
        right: dict[str, dict[str, list[int]]] = {task: {} for task in self._options.tasks}
        for key, result in results.items():
            task, length, _ = key.split("/")
            right[task].setdefault(length, []).append(result["right"])
        tasks = {task: {n: float(np.mean(cell)) for n, cell in cells.items()} for task, cells in right.items()}
        columns = [str(length) for length in self._lengths]
        mean = {column: float(np.mean([cells[column] for cells in tasks.values()])) for column in columns}
        rows = [[name, *(f"{100 * cells[c]:.1f}" for c in columns)] for name, cells in (tasks | {"mean": mean}).items()]
        if set(self._options.tasks) == {"qa1", "qa2", "qa3", "qa4", "qa5"}:
            for name, accuracies in BABILONG[self._options.protocol].items():
                paper = {str(n): a for n, a in zip(BABILONG_LENGTHS, accuracies) if a is not None}
                if not paper.keys().isdisjoint(columns):
                    rows.append([f"paper: {name}", *(str(paper.get(c, "")) for c in columns)])
        header = ["%", *(format_length(length) for length in self._lengths)]
        note = (
            f"{self._options.protocol}, {max(map(len, self._questions.values()))} questions of each task and length. The paper's "
            "rows are read off its Figure 6, to about 1 %.\n\n"
        )
        save_picture(folder / "babilong.png", lambda figure: _draw(figure, tasks | {"mean": mean}))
        return {"tasks": tasks, "mean": mean}, "## BABILong\n\n" + note + markdown_table(header, rows) + "\n"


def build_prompt(
    tokenizer,
    asked: Question,
    examples: Sequence[Question],
    length: int,
    background: Haystack | None,
    draw: random.Random,
    few_shot: bool,
) -> np.ndarray:
    """Ids [length]; without a background as many as it takes. Raises ValueError where the facts alone are more."""
    encode = tokenizer.encode
    opening = INSTRUCTION if few_shot else ""
    for example in examples:
        opening += " ".join(example.facts) + QUESTION.format(question=example.question) + f" {example.answer}\n\n"
    before, after = encode(opening), encode(QUESTION.format(question=asked.question))
    facts = [encode(f" {fact}") for fact in asked.facts]
    if background is None:
        return np.concatenate([before, *facts, after])
    room = length - sum(map(len, (before, after, *facts)))
    if room < 0:
        raise ValueError(
            f"babilong.lengths has {length}, and a prompt without background has {length - room} tokens; choose a longer one"
        )
    ids, places = background.cut(room, draw)
    chosen = np.sort([places[draw.randrange(len(places))] for _ in facts])
    pieces = np.split(ids, chosen)
    mixed = [part for piece, fact in zip(pieces, [*facts, after], strict=True) for part in (piece, fact)]
    return np.concatenate([before, *mixed])


@cache
def read_task(folder: str | None, task: str, split: str) -> list[Question]:
    """The questions of a bAbI task file. A line is `NUMBER STATEMENT` or `NUMBER QUESTION<tab>ANSWER<tab>...`; number 1 begins a
    story. Raises ValueError for a file that is none."""
    if not folder:
        raise ValueError("babilong.facts is not set; give the folder of the bAbI tasks (qa1_*_test.txt, ...)")
    found = sorted(Path(folder).expanduser().glob(f"{task}_*_{split}.txt"))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} files {task}_*_{split}.txt; one is needed")
    questions, facts = [], []
    for number, line in enumerate(found[0].read_text().splitlines(), 1):
        match = re.fullmatch(r"(\d+) ([^\t]+?) *(?:\t([^\t]+)(?:\t.*)?)?", line)
        if match is None:
            raise ValueError(f"{found[0]}, line {number}: {line[:80]!r} is no line of a bAbI task")
        if match[1] == "1":
            facts = []
        if match[3] is None:
            facts = [*facts, match[2]]
        else:
            questions.append(Question(facts, match[2], match[3]))
    if not questions:
        raise ValueError(f"{found[0]} has no question")
    return questions


def is_right(said: str, asked: Question, answers: set[str]) -> bool:
    """Whether the target is the only one of the task's answers in the first sentence, without those that the question names."""
    first = re.split(r"[.\n]", said.strip(), maxsplit=1)[0].lower()
    question = asked.question.lower()
    named = {a.lower() for a in answers if _has(question, a.lower())} - {asked.answer.lower()}
    return {a.lower() for a in answers if _has(first, a.lower())} - named == {asked.answer.lower()}


def _has(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def checksum(read: Mapping[str, Sequence[Question]]) -> str:
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def training_texts(options: Options, tokenizer, texts: Texts, samples: int) -> Iterator[str]:
    """Prompts of the training files with their answers, the lengths in turn: what the fine-tuned protocol trains on."""
    lengths = parse_lengths("babilong.lengths", options.lengths)
    background = haystack_of(texts, options.text, tokenizer, max(lengths)) if any(lengths) else None
    questions = {task: read_task(options.facts, task, "train") for task in options.tasks}
    for i in range(samples):
        task, length = options.tasks[i % len(options.tasks)], lengths[i // len(options.tasks) % len(lengths)]
        draw = random.Random(f"training/{options.seed}/{i}")
        asked = draw.choice(questions[task])
        prompt = build_prompt(tokenizer, asked, [], length, background if length else None, draw, few_shot=False)
        yield f"{tokenizer.decode(prompt)} {asked.answer}"


def _draw(figure, tasks: dict[str, dict[str, float]]) -> None:
    axes = figure.subplots()
    for task, cells in tasks.items():
        style = {"color": "black", "linewidth": 2} if task == "mean" else {"linewidth": 1, "alpha": 0.7}
        axes.plot(range(len(cells)), list(cells.values()), marker="o", markersize=3, label=task, **style)
    axes.set_xticks(range(len(cells)), [format_length(int(length)) for length in cells])
    axes.set(xlabel="tokens", ylabel="accuracy", ylim=(0, 1.02), title="BABILong")
    axes.grid(alpha=0.3)
    axes.legend()
