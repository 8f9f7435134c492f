"""A needle in a haystack: the three single-needle tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654), made here.

    single_1   haystack: a few sentences over and over    value: 7 digits   (pass-key retrieval)
    single_2   haystack: running text                     value: 7 digits
    single_3   haystack: running text                     value: a uuid

A sentence that gives a key's value stands at some depth of the haystack; at the end the model is asked for it and answers greedily.
Lengths are exact, in the model's own tokens, and count the answer's as RULER does. Where this differs from RULER: the wording and the
words of keys; the text is what is given, not one author's essays; depths are equally many and equally spaced for all three (RULER
draws one of 40, or a random sentence of single_1); a text shorter than the haystack is repeated, and each sample begins elsewhere in it;
the haystack is cut where the length is reached, which may be inside its last sentence.
"""

import random
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans_pretrain.config.check import at_least, setting
from titans_pretrain.evaluation.figures import markdown_table, save_picture
from titans_pretrain.evaluation.haystack import Haystack, haystack_of, split_sentences
from titans_pretrain.evaluation.model import LanguageModel
from titans_pretrain.evaluation.paper import S_NIAH, S_NIAH_LENGTHS
from titans_pretrain.evaluation.tasks import Item, check_options, format_length, parse_lengths
from titans_pretrain.evaluation.texts import Texts

KINDS = {"single_1": ("noise", "number"), "single_2": ("text", "number"), "single_3": ("text", "uuid")}
NOISE = (
    " The river runs slowly. The lamps are lit. The road is long and straight. We walk on. Then it is morning again."
)
OPENING = (
    "Some text follows, and hidden in it is a special {value}. Remember it: the question at the end is what it is.\n"
)
NEEDLE = " One fact to remember: the special {value} for {key} is {answer}."
QUESTION = "\nWhat is the special {value} for {key} in the text above? The special {value} for {key} is"
ADJECTIVES = (
    "amber bold brisk calm clever copper crisp distant eager faint gentle golden hollow humble icy jolly keen lively mellow "
    "narrow noble pale proud quiet rapid rustic silent silver steady stormy sunny swift tender vivid wild"
)
NOUNS = (
    "anchor basket bridge candle canyon castle cedar compass cradle engine falcon feather fiddle garden glacier hammer harbor "
    "island kettle ladder lantern maple meadow mirror needle orchard pebble pillow ribbon saddle shovel tunnel valley violin wagon"
)


@dataclass(frozen=True)
class Options:
    tasks: list = setting(lambda: list(KINDS), f"which of {', '.join(KINDS)}")
    lengths: list = setting(
        lambda: ["2K", "4K", "8K", "16K"], "tokens of prompt and answer together, up to 2M and beyond"
    )
    samples: int = setting(110, "of each task and length; RULER has 500")
    depths: int = setting(11, "places of the needle, from the beginning to the end of the haystack")
    answer_tokens: int = setting(128, "tokens of the answer at most")
    text: str | None = setting(
        None, "file or folder of the haystack's text; null: the held-out documents of the run's data"
    )
    seed: int = setting(0, "of keys, values and where in the text a sample begins")

    def __post_init__(self):
        check_options(self, "niah")
        for name in ("samples", "depths", "answer_tokens"):
            at_least(f"niah.{name}", getattr(self, name), 1)
        if unknown := [task for task in self.tasks if task not in KINDS]:
            raise ValueError(f"niah.tasks has {unknown[0]!r}; there are {', '.join(KINDS)}")
        parse_lengths("niah.lengths", self.lengths)


@dataclass(frozen=True)
class Sample:
    """prompt: ids, of the item's length. place: of the needle's first id in it."""

    prompt: np.ndarray
    answer: str
    place: int


class Niah:
    Options = Options

    def __init__(self, options: Options, model: LanguageModel, texts: Texts):
        self._options, self._model, self._texts = options, model, texts
        self._lengths = parse_lengths("niah.lengths", options.lengths)
        self._haystacks: dict[str, Haystack] = {}
        self._places = {  # key -> task, length, index of the depth
            f"{task}/{length}/{i}": (task, length, i % options.depths)
            for task in options.tasks
            for length in self._lengths
            for i in range(options.samples)
        }

    def identity(self) -> dict:
        return {"text": self._texts.identity(self._options.text)} if self._needs_text() else {}

    def items(self) -> list[Item]:
        for length in self._lengths:  # before anything is run: the shortest haystack must have room
            for task in self._options.tasks:
                self.sample(f"{task}/{length}/0")
        return [Item(key, length - self._options.answer_tokens) for key, (_, length, _) in self._places.items()]

    def run(self, items: Sequence[Item]) -> list[dict]:
        samples = [self.sample(item.key) for item in items]
        tokenizer = self._model.tokenizer

        def ended(row: int, ids: list[int]) -> bool:  # what follows the whole value changes nothing
            text = tokenizer.decode(ids)
            return samples[row].answer in text and not text.endswith(samples[row].answer)

        prompts = np.stack([sample.prompt for sample in samples])
        answers = self._model.generate(prompts, self._options.answer_tokens, ended)
        return [judge(tokenizer.decode(ids), sample.answer) for ids, sample in zip(answers, samples, strict=True)]

    def sample(self, key: str) -> Sample:
        """The same on every process and at every time."""
        task, length, depth = self._places[key]
        haystack_kind, value = KINDS[task]
        draw = random.Random(f"{self._options.seed}/{key}")
        words = {"value": value, "key": f"{draw.choice(ADJECTIVES.split())}-{draw.choice(NOUNS.split())}"}
        words["answer"] = draw_value(value, draw)
        encode = self._model.tokenizer.encode
        opening, needle, question = (encode(text.format(**words)) for text in (OPENING, NEEDLE, QUESTION))
        room = length - self._options.answer_tokens - len(opening) - len(needle) - len(question)
        if room < 1:
            raise ValueError(
                f"niah.lengths has {length}, and {length - room} tokens are taken by the question, the needle and "
                f"niah.answer_tokens={self._options.answer_tokens}; choose longer ones"
            )
        hay, places = self._haystack(haystack_kind).cut(room, draw)
        share = depth / max(1, self._options.depths - 1)
        at = int(places[np.searchsorted(places, share * room, side="right") - 1])  # the closest before that depth
        prompt = np.concatenate([opening, hay[:at], needle, hay[at:], question])
        return Sample(prompt, words["answer"], len(opening) + at)

    def report(self, results: Mapping[str, dict], folder: Path) -> tuple[dict, str]:
        figures: dict = {}
        for key, result in results.items():
            task, length, depth = self._places[key]
            of_length = figures.setdefault(task, {}).setdefault(str(length), {"depths": {}})
            of_length["depths"].setdefault(str(depth), []).append([result["found"], result["exact"]])
        for of_task in figures.values():
            for of_length in of_task.values():
                everything = np.concatenate(list(of_length["depths"].values()))
                of_length["samples"] = len(everything)
                of_length["found"], of_length["exact"] = everything.mean(0).tolist()
                of_length["depths"] = {depth: float(np.mean(cell, 0)[0]) for depth, cell in of_length["depths"].items()}
        for task, of_task in figures.items():
            save_picture(folder / f"niah-{task}.png", lambda figure, t=task, f=of_task: self._draw(figure, t, f))
        return figures, self._table(figures)

    def _table(self, figures: dict) -> str:
        rows = []
        columns = [str(length) for length in self._lengths]
        for task, of_task in figures.items():
            for measure, meaning in (("found", "the answer has the value"), ("exact", "it begins with it")):
                cells = [f"{100 * of_task[column][measure]:.1f}" for column in columns]
                rows.append([task if measure == "found" else "", meaning, *cells])
            for model, accuracies in S_NIAH[task].items():
                by_length = dict(zip(map(str, S_NIAH_LENGTHS), accuracies, strict=True))
                if not by_length.keys().isdisjoint(columns):
                    rows.append(
                        ["", f"paper: {model}", *(f"{by_length[c]:.1f}" if c in by_length else "" for c in columns)]
                    )
        header = ["task", "per cent", *(format_length(int(column)) for column in columns)]
        note = (
            f"{self._options.samples} samples of each task and length, needles at {self._options.depths} depths. The paper names its "
            "tasks PK, N and W; that W is single_3 is inferred.\n\n"
        )
        return "## Needle in a haystack (RULER's S-NIAH)\n\n" + note + markdown_table(header, rows) + "\n"

    def _draw(self, figure, task: str, of_task: dict) -> None:
        """Depth by length, as a map of accuracies."""
        columns, depths = list(of_task), sorted({int(d) for cells in of_task.values() for d in cells["depths"]})
        values = [[of_task[column]["depths"].get(str(depth), np.nan) for column in columns] for depth in depths]
        axes = figure.subplots()
        image = axes.imshow(np.array(values), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), [format_length(int(column)) for column in columns])
        last = max(1, self._options.depths - 1)
        axes.set_yticks(range(len(depths)), [f"{100 * depth / last:.0f} %" for depth in depths])
        axes.set(xlabel="tokens", ylabel="depth of the needle", title=task)
        figure.colorbar(image, label="accuracy")

    def _needs_text(self) -> bool:
        return any(KINDS[task][0] == "text" for task in self._options.tasks)

    def _haystack(self, kind: str) -> Haystack:
        if kind not in self._haystacks:
            tokenizer = self._model.tokenizer
            self._haystacks[kind] = (
                Haystack([tokenizer.encode(sentence) for sentence in split_sentences(NOISE)], anywhere=False)
                if kind == "noise"
                else haystack_of(self._texts, self._options.text, tokenizer, max(self._lengths))
            )
        return self._haystacks[kind]


def draw_value(kind: str, draw: random.Random) -> str:
    if kind == "number":
        return str(draw.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def judge(said: str, answer: str) -> dict:
    """found: whether the answer has the value, in any case of letters (RULER's measure); exact: whether it begins with it and the
    value ends there."""
    exact = re.match(rf"\W*{re.escape(answer)}(?!\w)", said, re.IGNORECASE)
    return {"found": int(answer.lower() in said.lower()), "exact": int(exact is not None), "said": said[:200]}
