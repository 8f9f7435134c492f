"""`titans-data inspect`: what is in a data folder, for people."""

import json
from pathlib import Path

import numpy as np

from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.shards import load_index
from titans_pretrain.data.source import open_manifest
from titans_pretrain.data.storage import Folder
from titans_pretrain.data_prep.shards import read_metadata
from titans_pretrain.data_prep.tokenizer import load_tokenizer

PREVIEW = 400  # characters


class Split:
    """Random access to the documents of one split of a local data folder."""

    def __init__(self, folder: str, split: str):
        self._folder = Folder(folder)
        self.manifest: Manifest = open_manifest(self._folder)
        self._shards = self.manifest.splits[split]
        tables = [load_index(self._folder, shard) for shard in self._shards]
        self._first = np.cumsum([0] + [len(table) for table in tables])
        self._table = np.concatenate(tables) if tables else np.empty((0, 2), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return self._table[:, 1] // self.manifest.dtype.itemsize

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict]:
        """Tokens and metadata of a document."""
        if not 0 <= number < len(self):
            raise ValueError(f"there is no document {number}; this split has {len(self)}")
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        offset, size = self._table[number].tolist()
        with open(self._folder.local(self._shards[shard].name), "rb") as file:
            file.seek(offset)
            tokens = np.frombuffer(file.read(size), self.manifest.dtype)
            return tokens, read_metadata(file, offset, size)


def length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges [n + 1] at powers of two, documents [n] and tokens [n] between them."""
    if not len(lengths):
        return np.array([1]), np.empty(0, np.int64), np.empty(0, np.int64)
    edges = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
    first = int(lengths.min()).bit_length() - 1
    edges = edges[max(first, 0) :]
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths)
    return edges, documents, tokens.astype(np.int64)


def inspect(folder: str, split: str, documents: list[int] | None, sample: int, png: str | None) -> None:
    """Prints to standard output; writes the histogram as a picture if `png` is given."""
    data = Split(folder, split)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    if documents is not None:
        for number in documents:
            tokens, metadata = data[number]
            print(f"--- document {number}: {len(tokens)} tokens, {json.dumps(metadata, ensure_ascii=False)}")
            print(tokenizer.decode(tokens))
        return
    entry = data.manifest.tokenizer
    print(
        f"tokenizer  {entry.kind}, {entry.vocab_size} ids, {entry.fingerprint[:12]}; tokens stored as {data.manifest.dtype}"
    )
    for name in data.manifest.splits:
        totals = data.manifest.totals(name)
        print(
            f"{name:<11}{totals['documents']:,} documents, {totals['tokens']:,} tokens, "
            f"{totals['bytes']:,} bytes in {len(data.manifest.splits[name])} shards"
        )
    edges, counts, tokens = length_histogram(data.lengths)
    if len(data):
        lengths = data.lengths
        print(
            f"\n{split} documents have {lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.1f}, "
            f"median {np.median(lengths):,.0f}\n\n{'tokens':>21} {'documents':>12} {'share of tokens':>16}"
        )
        for i, count in enumerate(counts):
            share = tokens[i] / max(tokens.sum(), 1)
            print(f"{edges[i]:>10,}-{edges[i + 1] - 1:>10,} {count:>12,} {share:>8.1%} {'#' * round(40 * share)}")
    # evenly spread, so that the same command shows the same documents
    for number in np.linspace(0, len(data) - 1, min(sample, len(data))).astype(int).tolist():
        tokens, metadata = data[number]
        text = tokenizer.decode(tokens[:PREVIEW])[:PREVIEW]
        print(
            f"\n--- document {number}: {len(tokens):,} tokens, {metadata['source']} record {metadata['record']}\n{text}"
        )
    if png:
        _draw(png, folder, split, edges, counts)


def _draw(png: str, folder: str, split: str, edges: np.ndarray, counts: np.ndarray) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")  # 1,024 and not 2^10
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.set_title(f"{folder}: {split}, {counts.sum():,} documents")
    figure.tight_layout()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
    print(f"\nhistogram written to {png}")
