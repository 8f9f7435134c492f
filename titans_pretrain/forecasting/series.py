"""Multivariate series: the public CSV form, the usual splits, and windows of them.

Every variate of every window is an example of its own (channel-independent, as in PatchTST): a forecaster sees one variate.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ETT_MONTH = 30 * 24  # hours: the months of the public splits have 30 days
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Series:
    variates: list[str]
    values: Tensor  # [rows, variates] float64, in the file's units


@dataclass(frozen=True)
class Scaling:
    """z = (x - mean) / std for each variate."""

    mean: Tensor  # [variates]
    std: Tensor

    def standardized(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


def read_series(path: str | Path) -> Series:
    """A CSV with a header and the date in the first column. Raises ValueError with the file and the line for anything else."""
    rows: list[list[float]] = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            lines = csv.reader(file)
            header = next(lines, [])
            if len(header) < 2:
                raise ValueError(f"{path}, line 1: a header of a date column and one or more variates belongs here")
            for row in lines:
                if row:
                    rows.append(_numbers(row, header, f"{path}, line {lines.line_num}"))
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is no CSV: {e}") from e
    if not rows:
        raise ValueError(f"{path} holds a header and no rows")
    return Series([name.strip() for name in header[1:]], torch.tensor(rows, dtype=torch.float64))


def _numbers(row: list[str], header: list[str], where: str) -> list[float]:
    if len(row) != len(header):
        raise ValueError(f"{where}: {len(row)} fields, the header has {len(header)}")
    numbers = []
    for name, text in zip(header[1:], row[1:]):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{where}: {name} is {text!r}, no finite number; fill gaps before")
        numbers.append(number)
    return numbers


def split_rows(rows: int, split: str, name: str) -> dict[str, range]:
    """The rows whose values each split forecasts: 12, 4 and 4 months (ETT; what follows is left out), or 7:1:2 of all.

    name: of the file, which decides where split is "auto"."""
    if split == "auto":
        split = {"ETTh": "ett_hourly", "ETTm": "ett_minutely"}.get(name[:4], "shares")
    if split == "shares":
        train, test = int(rows * 0.7), int(rows * 0.2)
        ends = (train, rows - test, rows)
    else:
        month = ETT_MONTH * (4 if split == "ett_minutely" else 1)
        ends = (12 * month, 16 * month, 20 * month)
    if rows < ends[-1]:
        raise ValueError(
            f"{name} has {rows} rows, its split of 12, 4 and 4 months needs {ends[-1]}; give series.split=shares"
        )
    return {name: range(start, end) for name, start, end in zip(SPLITS, (0, *ends), ends)}


def training_scale(values: Tensor, train: range) -> Scaling:
    """Mean and standard deviation of the training rows, of each variate; one that never changes there is only centred."""
    part = values[train.start : train.stop]
    std = part.std(0, correction=0)
    return Scaling(part.mean(0), torch.where(std > 0, std, 1.0))


class Windows:
    """All examples of a split: x [lookback] and y [horizon] of one variate, y within the split's rows.

    values [rows, variates], of the whole series: the first validation and test windows look back into the split before. Example
    i is variate i % variates of window i // variates."""

    def __init__(self, values: Tensor, rows: range, lookback: int, horizon: int):
        first = max(0, rows.start - lookback)
        self.lookback, self.variates = lookback, values.shape[1]
        self.count = rows.stop - first - lookback - horizon + 1
        if self.count < 1:
            raise ValueError(
                f"{rows.stop - rows.start} rows of a split hold no window of {lookback} and {horizon} rows; "
                "give a longer series, or lower series.lookback or series.horizons"
            )
        self._windows = values[first : rows.stop].T.contiguous().unfold(1, lookback + horizon, 1)

    def __len__(self) -> int:
        return self.count * self.variates

    def __getitem__(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """examples [N] int64 -> x [N, lookback], y [N, horizon]."""
        both = self._windows[examples % self.variates, examples // self.variates]
        return both[:, : self.lookback], both[:, self.lookback :]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each example once, in order."""
        for examples in torch.arange(len(self)).split(size):
            yield self[examples]

    def shuffled(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless: every epoch each example once, in an order of its own; what does not fill a batch is left out."""
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(self))
        while True:
            for examples in torch.randperm(len(self), generator=generator).split(size):
                if len(examples) == size:
                    yield self[examples]
