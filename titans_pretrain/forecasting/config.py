"""The schema of a forecasting run. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from titans_pretrain.config.check import at_least, check_fields, setting
from titans_pretrain.config.fit import FitConfig, FolderConfig
from titans_pretrain.config.model import ModelConfig
from titans_pretrain.config.paths import expand_home


@dataclass
class SeriesConfig:
    """What is forecast, from what, and how a window becomes tokens."""

    path: str | None = setting(None, "CSV file: a header, the date in the first column, a variate in each other one")
    split: Literal["auto", "ett_hourly", "ett_minutely", "shares"] = setting(
        "auto", "ett_*: 12, 4 and 4 months; shares: 7:1:2 of the rows; auto: by the file's name"
    )
    lookback: int = setting(96, "rows that a forecast sees")
    horizons: list[int] = setting(lambda: [96], "rows to forecast; a model is trained for each number")
    patch: int = setting(16, "rows in a token; 1: a token per row")
    stride: int = setting(8, "rows between the starts of tokens")
    normalize: bool = setting(
        True, "a window's mean and deviation are taken out before the model and put back after it"
    )
    head_dropout: float = setting(0.1, "share of the last layer's outputs that a training step leaves out")
    linear_skip: bool = setting(
        False, "a linear map from the window to the forecast beside the blocks, which learn what it leaves"
    )
    loss: Literal["mse", "mae"] = setting(
        "mse", "the error that the training makes small; on validation windows it chooses the best weights"
    )

    def __post_init__(self):
        check_fields(self, "series")
        for name in ("lookback", "patch", "stride"):
            at_least("series." + name, getattr(self, name), 1)
        if not self.horizons or not all(type(h) is int and h >= 1 for h in self.horizons):
            raise ValueError(f"series.horizons = {self.horizons}: give one or more numbers of rows, as [96, 192]")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"series.head_dropout must lie in [0, 1), got {self.head_dropout}")
        if self.patch > self.lookback:
            raise ValueError(f"series.patch={self.patch} is longer than series.lookback={self.lookback}")
        if left := (self.lookback - self.patch) % self.stride:
            raise ValueError(
                f"series.lookback={self.lookback} is not covered by patches of {self.patch} every {self.stride} rows: {left} are "
                f"left over; try series.lookback={self.lookback - left} or {self.lookback - left + self.stride}"
            )
        if self.path:
            self.path = expand_home(self.path)

    @property
    def tokens(self) -> int:
        """Of a window."""
        return (self.lookback - self.patch) // self.stride + 1


@dataclass
class ForecastConfig:
    series: SeriesConfig = field(default_factory=SeriesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: FitConfig = field(default_factory=FitConfig)
    run: FolderConfig = field(default_factory=FolderConfig)

    def __post_init__(self):
        check_fields(self)
        if self.model.vocab_size != ModelConfig.vocab_size or self.model.tie_embeddings != ModelConfig.tie_embeddings:
            raise ValueError("model.vocab_size and model.tie_embeddings mean nothing for a series; leave them out")
