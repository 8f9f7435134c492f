"""Recall and state tracking on sequences that are made, for models that were trained on them (train_synthetic.py).

    mqar     multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs of a key and a value, then every key once
             more, after gaps drawn from a power law; the answer is its value. Between the queries stand values of no key.
    needle   the single needle of RULER (Hsieh et al. 2024, arXiv 2404.06654) in the same alphabet: a key and its value somewhere in
             a haystack of values, the key again at the end
    parity   bits; the answer at each is the parity of all so far
    s5       permutations of five things (Merrill et al. 2024, arXiv 2404.08819); the answer at each is the product of all so far

Answers are never read: they are labels, aligned with the tokens they are given at.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from titans_pretrain.config.check import at_least, setting
from titans_pretrain.evaluation.figures import markdown_table, save_picture
from titans_pretrain.evaluation.model import LanguageModel
from titans_pretrain.evaluation.tasks import Item, check_options, format_length, parse_lengths
from titans_pretrain.evaluation.texts import Texts

NO_LABEL = -100
GAP_POWER = 0.01  # of the gaps before queries: p(n) ~ n ** (GAP_POWER - 1), as in the paper's code


@dataclass(frozen=True)
class Options:
    problem: Literal["mqar", "needle", "parity", "s5"] = setting("mqar", "mqar, needle, parity or s5")
    lengths: list = setting(lambda: [64, 128, 256, 512], "tokens of a sequence")
    samples: int = setting(256, "sequences of each length")
    vocab: int = setting(8192, "of mqar and needle: keys and values, half each")
    pairs: int | None = setting(None, "of mqar and needle; null: a sixteenth of the length, and one needle")
    repeats: int = setting(1, "of mqar and needle: how often each key is asked for")
    gap: int = setting(0, "of mqar and needle: tokens between a pair and a question, at least")
    moved: int = setting(5, "of s5: things that a permutation moves, at most; 2: swaps alone, and none")
    seed: int = setting(0, "of the sequences; those of a training are others")

    def __post_init__(self):
        check_options(self, "synthetic")
        at_least("synthetic.samples", self.samples, 1)
        at_least("synthetic.vocab", self.vocab, 4)
        at_least("synthetic.repeats", self.repeats, 1)
        at_least("synthetic.gap", self.gap, 0)
        if not 2 <= self.moved <= 5:
            raise ValueError(f"synthetic.moved must lie in [2, 5], got {self.moved}")
        for length in parse_lengths("synthetic.lengths", self.lengths):
            at_least("synthetic.lengths", length, 1)
            if self.problem in ("mqar", "needle"):
                each, most = 2 + 2 * self.repeats, self.vocab // 2
                if not 1 <= self.pairs_of(length) <= min((length - self.gap) // each, most):
                    raise ValueError(
                        f"synthetic.lengths has {length}, and {self.problem} needs synthetic.gap={self.gap} tokens and {each} for each "
                        f"of synthetic.pairs={self.pairs_of(length)} (1 at least), and synthetic.vocab={self.vocab} twice as many ids"
                    )

    def pairs_of(self, length: int) -> int:
        if self.pairs is not None:
            return self.pairs
        return 1 if self.problem == "needle" else length // 16

    @property
    def ids(self) -> int:
        """How many token ids there are."""
        return {"parity": 2, "s5": 120}.get(self.problem, self.vocab)

    @property
    def chance(self) -> float:
        """Share of right answers of a guess."""
        return {"parity": 1 / 2, "s5": 1 / 120}.get(self.problem, 2 / self.vocab)


class Synthetic:
    Options = Options

    def __init__(self, options: Options, model: LanguageModel, texts: Texts):
        self._options, self._model = options, model
        check_vocabulary(options, model.config.vocab_size)

    def identity(self) -> dict:
        return {}

    def items(self) -> list[Item]:
        lengths = parse_lengths("synthetic.lengths", self._options.lengths)
        return [Item(f"{length}/{i}", length) for length in lengths for i in range(self._options.samples)]

    def run(self, items: Sequence[Item]) -> list[dict]:
        rows = [make_row(self._options, item.tokens, int(item.key.split("/")[1])) for item in items]
        tokens, labels = (np.stack(part) for part in zip(*rows, strict=True))
        said = np.concatenate([piece.cpu().numpy() for piece in self._model.greedy(tokens)], 1)
        asked, right = labels != NO_LABEL, said == labels
        return [
            {"asked": int(a.sum()), "right": int(r[a].sum()), "last": int(r[a][-1])}
            for a, r in zip(asked, right, strict=True)
        ]

    def figures(self, results: Mapping[str, dict]) -> dict[str, dict[str, float]]:
        """Shares by length of the answers that are right, of the last ones, and of sequences with no wrong one."""
        by_length: dict[str, list[dict]] = {}
        for key, result in results.items():
            by_length.setdefault(key.split("/")[0], []).append(result)
        return {
            length: {
                "accuracy": sum(r["right"] for r in found) / sum(r["asked"] for r in found),
                "last": sum(r["last"] for r in found) / len(found),
                "whole": sum(r["right"] == r["asked"] for r in found) / len(found),
            }
            for length, found in by_length.items()
        }

    def report(self, results: Mapping[str, dict], folder: Path) -> tuple[dict, str]:
        figures = self.figures(results)
        rows = [
            [length, *(f"{100 * figures[length][m]:.1f}" for m in ("accuracy", "last", "whole"))] for length in figures
        ]
        header = ["tokens", "answers right, %", "the last one, %", "all of a sequence, %"]
        chance = self._options.chance
        note = f"{self._options.samples} sequences of each length; by chance {100 * chance:.2g} % are right.\n\n"
        save_picture(folder / "synthetic.png", lambda figure: _draw(figure, self._options.problem, figures, chance))
        return figures, f"## {self._options.problem}\n\n{note}{markdown_table(header, rows)}\n"


def make_row(options: Options, length: int, number: int, training: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels [length], int64, of the number-th sequence of this length. Those of a training come from another stream."""
    draw = np.random.default_rng([options.seed, int(training), length, number])
    return {"mqar": _mqar, "needle": _needle, "parity": _parity, "s5": _s5}[options.problem](options, length, draw)


def check_vocabulary(options: Options, vocab_size: int) -> None:
    if vocab_size < options.ids:
        raise ValueError(
            f"{options.problem} has {options.ids} token ids, the model {vocab_size}: set model.vocab_size={options.ids}"
        )


def _mqar(options: Options, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    half, pairs = options.vocab // 2, options.pairs_of(length)
    keys, values = draw.choice(half, pairs, replace=False), draw.integers(half, options.vocab, pairs)
    tokens, labels = draw.integers(half, options.vocab, length), np.full(length, NO_LABEL)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    start, asked = 2 * pairs + options.gap, pairs * options.repeats
    slots = (length - start) // 2
    weights = np.arange(1, slots + 1) ** (GAP_POWER - 1)
    at = start + 2 * draw.choice(slots, asked, replace=False, p=weights / weights.sum())
    tokens[at], labels[at] = np.tile(keys, options.repeats), np.tile(values, options.repeats)
    return tokens, labels


def _needle(options: Options, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    half, pairs = options.vocab // 2, options.pairs_of(length)
    keys, values = draw.choice(half, pairs, replace=False), draw.integers(half, options.vocab, pairs)
    tokens, labels = draw.integers(half, options.vocab, length), np.full(length, NO_LABEL)
    end = length - 2 * pairs * options.repeats  # there the questions begin
    at = 2 * draw.choice((end - options.gap) // 2, pairs, replace=False)
    tokens[at], tokens[at + 1] = keys, values
    asked = draw.permutation(np.tile(np.arange(pairs), options.repeats))
    tokens[end::2], labels[end::2] = keys[asked], values[asked]
    return tokens, labels


def _parity(options: Options, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    bits = draw.integers(0, 2, length)
    return bits, bits.cumsum() % 2


def _s5(options: Options, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    tokens, product = draw.choice(_moving(options.moved), length), _products()
    labels = itertools.accumulate(tokens, lambda so_far, token: product[token, so_far])
    return tokens, np.array(list(labels))


@cache
def _moving(most: int) -> list[int]:
    """The numbers of the permutations that leave all but so many things where they are."""
    return [
        number
        for number, p in enumerate(itertools.permutations(range(5)))
        if sum(i != to for i, to in enumerate(p)) <= most
    ]


@cache
def _products() -> np.ndarray:
    """[120, 120]: the number of "first q, then p" at [p, q]; permutations are numbered in lexicographic order."""
    group = list(itertools.permutations(range(5)))
    number = {p: i for i, p in enumerate(group)}
    return np.array([[number[tuple(p[i] for i in q)] for q in group] for p in group])


def _draw(figure, problem: str, figures: dict, chance: float) -> None:
    axes = figure.subplots()
    at = list(range(len(figures)))
    for measure, name in (("accuracy", "all answers"), ("last", "the last one")):
        axes.plot(at, [f[measure] for f in figures.values()], marker="o", label=name)
    axes.axhline(chance, color="gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(at, [format_length(int(length)) for length in figures])
    axes.set(xlabel="tokens", ylabel="accuracy", ylim=(0, 1.02), title=problem)
    axes.grid(alpha=0.3)
    axes.legend()
