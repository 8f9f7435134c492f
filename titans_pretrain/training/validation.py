"""Loss on held-out rows, always the same ones."""

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch

from titans_pretrain.checkpoint.optimizer_states import AVERAGE, states_of
from titans_pretrain.data import Stopped
from titans_pretrain.training.engine import Engine
from titans_pretrain.training.signals import StopRequest


class Validator:
    """Reads the same micro-batches each time it runs: the first `batches`, or all of a reader that ends before."""

    def __init__(self, reader, batches: int, average: bool = False):
        """average: also with the average of the weights."""
        self.reader, self.batches, self.average = reader, batches, average
        self._start = reader.state_dict()

    def run(self, engine: Engine, stop: StopRequest | None = None) -> dict | None:
        """{"validation_loss" (nats per target), "validation_perplexity", "validation_tokens"}, and "validation_loss_ema" with the
        average of the weights; None on a stop request."""
        found = self._loss(engine, stop)
        if found is None:
            return None
        mean, targets = found
        values = {
            "validation_loss": mean,
            "validation_perplexity": math.exp(min(mean, 700.0)),
            "validation_tokens": targets,
        }
        if self.average:
            with averaged_weights(engine):
                found = self._loss(engine, stop)
            if found is None:
                return None
            values["validation_loss_ema"] = found[0]
        return values

    def _loss(self, engine: Engine, stop: StopRequest | None) -> tuple[float, int] | None:
        """Mean over the targets, and their number."""
        self.reader.load_state_dict(self._start)
        loss, targets, left = 0.0, 0, self.batches
        while left:
            batches = []
            with contextlib.suppress(Stopped):  # in this process; the others may have their rows
                batches = list(itertools.islice(self.reader, min(left, engine.micro_batches)))
            if engine.any(stop is not None and stop.received is not None):
                return None
            if not batches:
                break
            left -= len(batches)
            loss += engine.evaluate(batches)
            targets += engine.count(batches)
        if not targets:
            raise ValueError("the validation rows hold no target; is data.seq_len too small?")
        return loss / targets, targets


@contextlib.contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """The model computes with the average of its weights; they wait in CPU memory. Collective."""
    states = states_of(engine.optimizer, engine.data_group)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    kept = [torch.empty_like(p, device="cpu").copy_(p.detach()) for p in trained]
    try:
        for p in trained:
            p.data.copy_(states.whole(p, AVERAGE))
        yield
    finally:
        for p, weight in zip(trained, kept, strict=True):
            p.data.copy_(weight)
