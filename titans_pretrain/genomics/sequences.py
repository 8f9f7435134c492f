"""Labelled sequences as GenomicsBenchmarks (Gresova et al. 2023) has them on disk, and batches of them.

ROOT/train/CLASS/*.txt, ROOT/test/CLASS/*.txt    a file is a sequence: what the package genomic-benchmarks unpacks
ROOT/train.csv, ROOT/test.csv                    a header with `sequence` (or `seq`) and `label`, a row a sequence
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titans_pretrain.data_prep.tokenizer import NucleotideTokenizer

_LETTERS = re.compile("[A-Za-z]+")
_COORDINATES = "holds coordinates in a genome, no sequences; genomic_benchmarks.loc2seq.download_dataset(NAME) unpacks the sequences"


@dataclass(frozen=True)
class Labelled:
    """sequences: ids of bases, [length] each; labels [N] int64, indices of the classes."""

    sequences: list[np.ndarray]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, examples: Tensor) -> "Labelled":
        return Labelled([self.sequences[i] for i in examples], self.labels[examples])

    def padded(self, filler: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, longest] int64, filled up on the right; lengths [N]; labels [N]."""
        lengths = torch.tensor([len(sequence) for sequence in self.sequences])
        tokens = torch.full((len(self), int(lengths.max())), filler)
        for row, sequence in zip(tokens, self.sequences):
            row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        return tokens, lengths, self.labels

    def batches(self, size: int) -> Iterator["Labelled"]:
        """Each once; those of about one length together, so that little is filled up."""
        order = torch.tensor([len(sequence) for sequence in self.sequences]).argsort(stable=True)
        return (self.select(examples) for examples in order.split(size))

    def shuffled(self, size: int, seed: int) -> Iterator["Labelled"]:
        """Endless: every epoch in an order of its own; what does not fill a batch is left out of the epoch."""
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(self))
        while True:
            for examples in torch.randperm(len(self), generator=generator).split(size):
                if len(examples) == size:
                    yield self.select(examples)


@dataclass(frozen=True)
class Benchmark:
    name: str
    classes: list[str]
    train: Labelled
    test: Labelled


def read_benchmark(path: str | Path, max_length: int | None = None) -> Benchmark:
    """A data set of either layout. Raises ValueError with the file (and the line) for what is none."""
    root = Path(path)
    train, test = (_read_split(root, split) for split in ("train", "test"))
    classes = sorted({label for _, label in train})
    if len(classes) < 2:
        raise ValueError(
            f"{root}: all training sequences are of the class {classes[0]}; two or more classes are needed"
        )
    if strange := {label for _, label in test} - set(classes):
        raise ValueError(f"{root}: the test has classes that the training has not: {', '.join(sorted(strange))}")
    tokenizer = NucleotideTokenizer()

    def labelled(pairs: list[tuple[str, str]]) -> Labelled:
        sequences = [tokenizer.encode(text[:max_length]) for text, _ in pairs]
        return Labelled(sequences, torch.tensor([classes.index(label) for _, label in pairs]))

    return Benchmark(root.resolve().name, classes, labelled(train), labelled(test))


def held_out(labelled: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """The sequences without, and those with, a share of each class (at least one of each), drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    kept, out = [], []
    for label in labelled.labels.unique():
        members = (labelled.labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(share * len(members)))
        if count >= len(members):
            raise ValueError(
                f"data.validation={share} leaves none to train on of a class of {len(members)} training sequences; lower it"
            )
        out.append(members[:count])
        kept.append(members[count:])
    return labelled.select(torch.cat(kept).sort().values), labelled.select(torch.cat(out).sort().values)


def _read_split(root: Path, split: str) -> list[tuple[str, str]]:
    """(sequence, class) in the order of the files' names."""
    if (root / f"{split}.csv").is_file():
        return _read_csv(root / f"{split}.csv")
    folders = sorted(p for p in (root / split).glob("*") if p.is_dir())
    pairs = [(_checked(p.read_text().strip(), p), f.name) for f in folders for p in sorted(f.glob("*.txt"))]
    if not pairs and any((root / split).glob("*.csv*")):
        raise ValueError(f"{root / split} {_COORDINATES}")
    if not pairs:
        raise ValueError(f"{root} holds neither {split}/CLASS/*.txt nor {split}.csv; give the folder of one data set")
    return pairs


def _read_csv(path: Path) -> list[tuple[str, str]]:
    pairs = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        names = lines.fieldnames or []
        column = next((name for name in ("sequence", "seq") if name in names), None)
        if column is None and {"start", "end"} <= set(names):
            raise ValueError(f"{path} {_COORDINATES}")
        if column is None or "label" not in names:
            raise ValueError(
                f"{path}, line 1: needs columns sequence (or seq) and label, has {', '.join(names) or 'none'}"
            )
        for row in lines:
            where = f"{path}, line {lines.line_num}"
            if not row["label"]:
                raise ValueError(f"{where}: no label")
            pairs.append((_checked((row[column] or "").strip(), where), row["label"]))
    if not pairs:
        raise ValueError(f"{path} holds a header and no rows")
    return pairs


def _checked(text: str, where: str | Path) -> str:
    if not text:
        raise ValueError(f"{where}: an empty sequence")
    if not _LETTERS.fullmatch(text):
        odd = next(c for c in text if not _LETTERS.fullmatch(c))
        raise ValueError(f"{where}: {odd!r} in a sequence is no base; one sequence of letters belongs here")
    return text
