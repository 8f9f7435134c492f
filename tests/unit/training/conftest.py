"""A model and a reader of a few lines, with the interfaces of the real ones, so that the loop is tested alone."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from titans_pretrain.config import Config, DataConfig, TrainConfig
from titans_pretrain.training.engine import SingleEngine
from titans_pretrain.training.trainer import Trainer
from titans_pretrain.training.validation import Validator

VOCAB, SEQ_LEN = 11, 16


class StubModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.embed_tokens.weight
        self.loss_scale = 1.0

    def forward(self, tokens, labels=None, state=None, positions=None, num_items_in_batch=None):
        logits = self.head(torch.tanh(self.hidden(self.embed_tokens(tokens))))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return SimpleNamespace(loss=losses * self.loss_scale / (num_items_in_batch or (labels != -100).sum()))


class StubBatch(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None


class StubReader:
    """Row i is drawn from seed i; a random share of its labels is masked."""

    def __init__(self, micro_batch: int):
        self.micro_batch, self.row = micro_batch, 0

    def __iter__(self):
        return self

    def __next__(self) -> StubBatch:
        rows = [self._draw(self.row + i) for i in range(self.micro_batch)]
        self.row += self.micro_batch
        return StubBatch(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), None)

    def _draw(self, row: int):
        random = torch.Generator().manual_seed(row)
        tokens = torch.randint(VOCAB, (SEQ_LEN,), generator=random)
        masked = torch.rand(SEQ_LEN, generator=random) < torch.rand((), generator=random)
        return tokens, torch.where(masked, -100, (tokens + 1) % VOCAB)

    def state_dict(self) -> dict:
        return {"row": self.row}

    def load_state_dict(self, state: dict) -> None:
        self.row = state["row"]


@pytest.fixture
def make_trainer():
    """make_trainer(steps=..., any other TrainConfig field) -> Trainer on stubs."""

    def make(validate: bool = False, **train) -> Trainer:
        defaults = {"steps": 6, "lr": 1e-2, "warmup_steps": 2, "micro_batch": 2, "global_batch": 4, "eval_every": 0}
        config = Config(data=DataConfig(seq_len=SEQ_LEN), train=TrainConfig(**(defaults | train)))
        torch.manual_seed(0)
        device = torch.device("cpu")
        validator = Validator(StubReader(2), config.train.eval_batches, config.train.ema > 0) if validate else None
        engine = SingleEngine(config, StubModel(), device)
        return Trainer(config, engine, StubReader(config.train.micro_batch), validator, device)

    return make
