"""Loss by position in a long sequence: with the state carried all along, and with it reset, which says what the memory is worth.

A sequence is read once in pieces, the state carried from one to the next. It is then read again in blocks of `reset` tokens that
start without a state, `overlap` tokens before the first target of theirs: so those targets see `overlap` tokens at least, what
attention would show them anyway, and nothing older. The difference is what older tokens are worth, in nats per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from titans_pretrain.config.check import at_least, setting
from titans_pretrain.evaluation.figures import markdown_table, save_picture
from titans_pretrain.evaluation.model import LanguageModel, perplexity
from titans_pretrain.evaluation.tasks import Item, check_options, format_length, parse_lengths
from titans_pretrain.evaluation.texts import Texts


@dataclass(frozen=True)
class Options:
    text: str | None = setting(None, "file or folder of text; null: the held-out documents of the run's data")
    tokens: int | str = setting("16K", "of a sequence: 2K to 2M and beyond")
    sequences: int = setting(8, "how many, one after the other in the text")
    first_bucket: int = setting(256, "positions of the first bucket; each one after it has as many as all before it")
    reset: int | None = setting(None, "tokens between resets; null: the attention window, as a power of two, or 2048")
    overlap: int | None = setting(None, "tokens read before a reset's first target; null: as many as `reset`; 0: none")

    def __post_init__(self):
        check_options(self, "perplexity")
        for name in ("sequences", "first_bucket"):
            at_least(f"perplexity.{name}", getattr(self, name), 1)
        at_least("perplexity.reset", 1 if self.reset is None else self.reset, 1)
        at_least("perplexity.overlap", self.overlap or 0, 0)
        at_least("perplexity.tokens", self.length, 2)

    @property
    def length(self) -> int:
        return parse_lengths("perplexity.tokens", [self.tokens])[0]


class Perplexity:
    Options = Options

    def __init__(self, options: Options, model: LanguageModel, texts: Texts):
        self._options, self._model, self._texts = options, model, texts
        self._length = options.length
        windows = [c.window for c in model.config.layer_configs if c.has_attention and c.window]
        self._reset = options.reset or min(_power_of_two(min(windows, default=2048)), self._length)
        self._overlap = self._reset if options.overlap is None else options.overlap
        if self._length % self._reset:
            raise ValueError(
                f"perplexity.tokens={self._length} is no multiple of perplexity.reset={self._reset}; choose another"
            )
        self._edges = bucket_edges(self._length, options.first_bucket)
        self._stream: np.ndarray | None = None

    def identity(self) -> dict:
        return {"text": self._texts.identity(self._options.text), "reset": self._reset, "overlap": self._overlap}

    def items(self) -> list[Item]:
        needed = self._options.sequences * self._length + 1
        if self._stream is None:
            self._stream = first_tokens(self._texts, self._options.text, self._model.tokenizer, needed)
        count = (len(self._stream) - 1) // self._length
        if not count:
            raise ValueError(
                f"the text has {len(self._stream)} tokens, perplexity.tokens={self._length} needs {self._length + 1}: "
                "give more text, or fewer tokens"
            )
        return [Item(str(i), self._length) for i in range(min(count, self._options.sequences))]

    def run(self, items: Sequence[Item]) -> list[dict]:
        """Sums of nats per bucket."""
        starts = [int(item.key) * self._length for item in items]
        rows = np.stack([self._stream[start : start + self._length + 1] for start in starts])
        carried = torch.zeros(len(rows), len(self._edges) - 1, dtype=torch.float64)
        at = 0
        for nats in self._model.losses(rows):
            self._add(carried, nats, torch.arange(at, at + nats.shape[1]))
            at += nats.shape[1]
        reset = torch.stack([self._with_resets(row, len(rows)) for row in rows])
        return [{"carried": c.tolist(), "reset": r.tolist()} for c, r in zip(carried, reset, strict=True)]

    def _with_resets(self, row: np.ndarray, at_once: int) -> torch.Tensor:
        """[buckets] of one sequence; its blocks, which know nothing of each other, are rows of a batch."""
        sums = torch.zeros(1, len(self._edges) - 1, dtype=torch.float64)
        for targets, before in _blocks(self._length, self._reset, self._overlap, at_once):
            batch = np.stack([row[start - before : start + self._reset + 1] for start in targets])
            at = -before
            for nats in self._model.losses(batch):
                keep = min(max(0, -at), nats.shape[1])
                columns = torch.arange(at + keep, at + nats.shape[1])
                for line, start in zip(nats[:, keep:], targets, strict=True):
                    self._add(sums, line[None], start + columns)
                at += nats.shape[1]
        return sums[0]

    def _add(self, sums: torch.Tensor, nats: torch.Tensor, positions: torch.Tensor) -> None:
        """nats [B, n] of the targets after the tokens at positions [n]."""
        bucket = torch.bucketize(positions, torch.tensor(self._edges[1:-1]), right=True)
        sums.index_add_(1, bucket, nats.double().cpu())

    def report(self, results: Mapping[str, dict], folder: Path) -> tuple[dict, str]:
        n, sizes = len(results), np.diff(self._edges)
        by_way = {way: np.array([r[way] for r in results.values()]).sum(0) for way in ("carried", "reset")}
        carried, reset = by_way["carried"] / (n * sizes), by_way["reset"] / (n * sizes)
        up_to = np.cumsum(by_way["carried"]) / (n * np.cumsum(sizes))
        figures = {
            "sequences": n,
            "tokens": self._length,
            "buckets": [
                {"from": a, "to": b, "targets": int(n * (b - a)), "carried": c, "reset": r, "memory": r - c, "perplexity": perplexity(u)}
                for a, b, c, r, u in zip(self._edges, self._edges[1:], carried.tolist(), reset.tolist(), up_to.tolist())
            ],
        }  # fmt: skip
        rows = [
            [
                f"{b['from']:,} to {b['to']:,}", f"{b['targets']:,}", f"{b['carried']:.4f}", f"{b['reset']:.4f}", f"{b['memory']:+.4f}",
                f"{b['perplexity']:.2f}",
            ]
            for b in figures["buckets"]
        ]  # fmt: skip
        header = ["position", "targets", "carried", "reset", "memory is worth", "perplexity up to here"]
        table = (
            f"## Perplexity\n\n{n} sequences of {self._length:,} tokens, nats per token. Carried: the state of all tokens before. Reset: "
            f"only the last {self._overlap:,} to {self._overlap + self._reset:,} tokens are known.\n\n"
        )
        save_picture(folder / "perplexity.png", lambda figure: _draw(figure, self._edges, carried, reset))
        return figures, table + markdown_table(header, rows) + "\n"


def bucket_edges(length: int, first: int) -> list[int]:
    """0, first, 2 first, 4 first, ..., length."""
    edges = [0]
    while first < length:
        edges.append(first)
        first *= 2
    return [*edges, length]


def first_tokens(texts: Texts, path: str | None, tokenizer, count: int) -> np.ndarray:
    """The first `count` ids of all documents one after the other, each with its eos; fewer if there are no more."""
    parts, found = [], 0
    for ids in texts.documents(path, tokenizer):
        parts += [ids, np.array([tokenizer.entry.eos_id], tokenizer.dtype)]
        found += len(ids) + 1
        if found >= count:
            break
    return np.concatenate([np.zeros(0, tokenizer.dtype), *parts])[:count]


def _blocks(length: int, reset: int, overlap: int, at_once: int) -> Iterator[tuple[list[int], int]]:
    """(first positions of blocks, tokens that are read before each): blocks with equally many of them together."""
    same: list[int] = []
    for start in range(0, length, reset):
        if start < overlap:
            yield [start], start
            continue
        same.append(start)
        if len(same) == at_once or start + reset == length:
            yield same, overlap
            same = []


def _power_of_two(at_most: int) -> int:
    return 1 << (at_most.bit_length() - 1)


def _draw(figure, edges: Sequence[int], carried: np.ndarray, reset: np.ndarray) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    at = list(range(len(carried)))
    above.plot(at, carried, marker="o", markersize=3, label="state carried")
    above.plot(at, reset, marker="o", markersize=3, label="state reset")
    above.set(ylabel="nats per token")
    above.legend()
    below.bar(at, reset - carried, color="tab:green")
    below.set(ylabel="memory is worth", xlabel="position up to")
    below.set_xticks(at, [format_length(edge) for edge in edges[1:]])
    for axes in (above, below):
        axes.grid(alpha=0.3)
