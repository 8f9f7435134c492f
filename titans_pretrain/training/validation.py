"""Loss on held-out rows, always the same ones."""

import contextlib
import itertools
import math

from titans_pretrain.data import Stopped
from titans_pretrain.training.engine import Engine
from titans_pretrain.training.signals import StopRequest


class Validator:
    """Reads the same micro-batches each time it runs: the first `batches`, or all of a reader that ends before."""

    def __init__(self, reader, batches: int):
        self.reader, self.batches = reader, batches
        self._start = reader.state_dict()

    def run(self, engine: Engine, stop: StopRequest | None = None) -> dict | None:
        """{"validation_loss" (nats per target), "validation_perplexity", "validation_tokens"}; None on a stop request."""
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
        mean = loss / targets
        return {
            "validation_loss": mean,
            "validation_perplexity": math.exp(min(mean, 700.0)),
            "validation_tokens": targets,
        }
