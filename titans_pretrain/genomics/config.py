"""The schema of a classification run. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from titans_pretrain.config.check import at_least, check_fields, setting
from titans_pretrain.config.fit import FitConfig, FolderConfig
from titans_pretrain.config.model import ModelConfig
from titans_pretrain.config.paths import expand_home


@dataclass
class LabelledConfig:
    """What is classified."""

    path: str | None = setting(
        None, "folder with train/CLASS/*.txt and test/CLASS/*.txt, or with train.csv and test.csv"
    )
    validation: float = setting(0.1, "share of each class of the training sequences that chooses the best weights")
    max_length: int | None = setting(None, "bases read of a sequence, from its start; null: all")

    def __post_init__(self):
        check_fields(self, "data")
        if not 0 < self.validation < 1:
            raise ValueError(f"data.validation must lie in (0, 1), got {self.validation}")
        if self.max_length is not None:
            at_least("data.max_length", self.max_length, 1)
        if self.path:
            self.path = expand_home(self.path)


@dataclass
class HeadConfig:
    """How a sequence's hidden states become a class, and what learns it."""

    init_from: str | None = setting(
        None, "a run or checkpoint folder of a pretrained model, which then says what the model is; null: from scratch"
    )
    pooling: Literal["mean", "last"] = setting("mean", "of the hidden states of all bases; or that of the last base")
    trained: Literal["all", "head"] = setting("all", "the whole model; or the linear head over a model left as it is")
    dropout: float = setting(0.1, "share of the pooled features that a training step leaves out")

    def __post_init__(self):
        check_fields(self, "head")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"head.dropout must lie in [0, 1), got {self.dropout}")
        if self.trained == "head" and not self.init_from:
            raise ValueError("head.trained=head needs a pretrained model: give head.init_from=RUN")
        if self.init_from:
            self.init_from = expand_home(self.init_from)


@dataclass
class ClassifyConfig:
    data: LabelledConfig = field(default_factory=LabelledConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: FitConfig = field(default_factory=FitConfig)
    run: FolderConfig = field(default_factory=FolderConfig)

    def __post_init__(self):
        check_fields(self)
