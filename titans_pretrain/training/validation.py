"""Loss on held-out rows, always the same ones."""

import math

import torch
from torch import nn

from titans_pretrain.training.signals import StopRequest


class Validator:
    """Reads the same micro-batches each time it runs: the first `batches`, or all of a reader that ends before."""

    def __init__(self, reader, batches: int, device: torch.device, precision: str):
        self.reader, self.batches, self.device, self.precision = reader, batches, device, precision
        self._start = reader.state_dict()

    def run(self, model: nn.Module, stop: StopRequest | None = None) -> dict | None:
        """{"validation_loss" (nats per target), "validation_perplexity", "validation_tokens"}; None on a stop request."""
        self.reader.load_state_dict(self._start)
        was_training = model.training
        model.eval()
        loss, targets = 0.0, 0
        try:
            with torch.no_grad(), compute_dtype(self.device, self.precision):
                for _ in range(self.batches):
                    if stop is not None and stop.received:
                        return None
                    batch = next(self.reader, None)
                    if batch is None:
                        break
                    out = model(**on_device(batch, self.device), num_items_in_batch=1)  # the sum
                    loss += float(out.loss)
                    targets += count_targets(batch)
        finally:
            model.train(was_training)
        if not targets:
            raise ValueError("the validation rows hold no target; is data.seq_len too small?")
        mean = loss / targets
        return {
            "validation_loss": mean,
            "validation_perplexity": math.exp(min(mean, 700.0)),
            "validation_tokens": targets,
        }


def count_targets(batch) -> int:
    """Positions of a batch that have a label."""
    return int((batch.labels != -100).sum())


def on_device(batch, device: torch.device) -> dict:
    """A batch as the model's arguments."""
    fields = {"tokens": batch.tokens, "labels": batch.labels, "positions": batch.positions}
    return {name: x if x is None else x.to(device, non_blocking=True) for name, x in fields.items()}


def compute_dtype(device: torch.device, precision: str) -> torch.autocast:
    """fp32: as the parameters are; bf16: matrix products under autocast (the memory's state stays float32 by itself)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
