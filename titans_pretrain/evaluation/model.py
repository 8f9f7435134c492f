"""The model that is evaluated, as the tasks see it: it reads tokens with a state, scores continuations, generates.

Long inputs go through it PIECE tokens at a time with the state carried from one to the next, so memory does not grow with their
length (but with full attention, whose state does).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.checkpoint import find_checkpoint, find_tokenizer, load_model
from titans_pretrain.checkpoint.checksums import SUMS
from titans_pretrain.data_prep.tokenizer import Tokenizer, load_tokenizer
from titans_pretrain.hf.importing import is_export, load_export
from titans_pretrain.models.state import ModelState
from titans_pretrain.training.engine import compute_dtype, pick_device

PIECE = 1024  # tokens read at once: the logits of more never exist together


class LanguageModel:
    """model: a TitansForCausalLM. find_tokenizer: gives the tokenizer's folder; called where a task needs one. precision:
    `fp32` or `bf16`, as train.precision."""

    def __init__(self, model: nn.Module, find_tokenizer: Callable[[], Path], precision: str = "fp32"):
        self.model, self.config = model.eval(), model.config
        self._find_tokenizer, self._precision = find_tokenizer, precision
        self.device = next(model.parameters()).device
        self.tokens_read = 0  # so far, of all rows
        self.told: Callable[[int], object] = lambda tokens: None  # called with that number after each piece

    @cached_property
    def tokenizer(self) -> Tokenizer:
        found = load_tokenizer(self._find_tokenizer())
        if found.entry.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {found.entry.vocab_size} ids, the model {self.config.vocab_size}: it is another model's"
            )
        return found

    def read(self, tokens, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """tokens [B, T], int64 or an array -> float32 logits [B, V] after the last one, and the state."""
        logits = None
        for out in self._pieces(tokens, state):
            logits, state = out.logits[:, -1].float(), out.state
        return logits, state

    def losses(self, tokens, state: ModelState | None = None) -> Iterator[Tensor]:
        """tokens [B, T + 1] -> nats of each of the last T given those before it, in pieces [B, at most PIECE]."""
        at = 1
        for out in self._pieces(tokens[:, :-1], state):
            targets = self._on_device(tokens[:, at : at + out.logits.shape[1]])
            at += targets.shape[1]
            yield F.cross_entropy(out.logits.transpose(1, 2).float(), targets, reduction="none")

    def greedy(self, tokens) -> Iterator[Tensor]:
        """tokens [B, T] -> the likeliest id after each, in pieces [B, at most PIECE]."""
        for out in self._pieces(tokens, None):
            yield out.logits.argmax(-1)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation), ids, neither empty: the continuation's log-likelihood in nats, and whether it is the
        greedy one. Shorter rows of the batch are padded at their ends, where nothing is read any more."""
        if not all(context and continuation for context, continuation in pairs):
            raise ValueError("a context or a continuation is empty; there is nothing to predict it from")
        rows = [[*context, *continuation] for context, continuation in pairs]
        longest = max(map(len, rows)) - 1
        inputs, targets = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -100)
        positions = torch.full((len(rows), longest), -1)
        for i, (row, (context, _)) in enumerate(zip(rows, pairs, strict=True)):
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            targets[i, len(context) - 1 : len(row) - 1] = torch.tensor(row[len(context) :])
            positions[i, : len(row) - 1] = torch.arange(len(row) - 1)
        total, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        at = 0
        for out in self._pieces(inputs, None, positions):
            logits = out.logits.float()
            here = targets[:, at : at + logits.shape[1]].to(self.device)
            at += logits.shape[1]
            total -= F.cross_entropy(logits.transpose(1, 2), here, reduction="none").double().sum(1).cpu()
            greedy &= ((logits.argmax(-1) == here) | (here == -100)).all(1).cpu()
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def generate(
        self, prompts, limit: int, ended: Callable[[int, list[int]], bool] = lambda row, ids: False
    ) -> list[list[int]]:
        """Greedy continuations of prompts [B, T] of one length: up to `limit` ids, up to eos (left out), or until `ended`, which
        sees the row's number and its ids so far, says so."""
        logits, state = self.read(prompts)
        answers: list[list[int]] = [[] for _ in range(len(logits))]
        rows = list(range(len(logits)))
        entry = self.tokenizer.entry
        while True:
            picked = logits[:, : entry.vocab_size].argmax(-1).tolist()
            open_rows = []
            for at, (row, token) in enumerate(zip(rows, picked, strict=True)):
                if token == entry.eos_id:
                    continue
                answers[row].append(token)
                if len(answers[row]) < limit and not ended(row, answers[row]):
                    open_rows.append(at)
            if not open_rows:
                return answers
            if len(open_rows) < len(rows):
                state = state.select(torch.tensor(open_rows))
                rows = [rows[at] for at in open_rows]
            logits, state = self.read(torch.tensor([[picked[at]] for at in open_rows]), state)

    @torch.no_grad()
    def _pieces(self, tokens, state: ModelState | None, positions: Tensor | None = None) -> Iterator:
        """What the model gives for each PIECE of tokens [B, T], which go to the device piece by piece."""
        for start in range(0, tokens.shape[1], PIECE):
            here = slice(start, start + PIECE)
            at = None if positions is None else positions[:, here].to(self.device)
            with compute_dtype(self.device, self._precision):
                out = self.model(self._on_device(tokens[:, here]), state=state, positions=at)
            state = out.state
            self.tokens_read += tokens[:, here].shape[0] * tokens[:, here].shape[1]
            self.told(self.tokens_read)
            yield out

    def _on_device(self, tokens) -> Tensor:
        if isinstance(tokens, np.ndarray):  # as shards store them
            tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens.to(self.device)


def open_model(path: str | Path, device: str = "auto", precision: str = "fp32") -> LanguageModel:
    """The model of a run, checkpoint or exported folder."""
    if is_export(path):
        model, folder = load_export(path, dtype=None)[0], lambda: Path(path)
    else:
        model, folder = load_model(path)[0], lambda: find_tokenizer(path)
    return LanguageModel(model.to(pick_device(device)), folder, precision)


def fingerprint(path: str | Path) -> str:
    """sha256 of what decides a model's outputs: its weights and its configuration."""
    digest = hashlib.sha256()
    if is_export(path):
        files = sorted([*Path(path).glob("*.safetensors"), Path(path) / "config.json"])
    else:
        checkpoint = find_checkpoint(path)
        sums = checkpoint / SUMS
        files = [sums] if sums.is_file() else sorted(p for p in checkpoint.rglob("*") if p.is_file())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def perplexity(nats: float) -> float:
    """exp of a mean loss; what is beyond a float counts as its largest."""
    return math.exp(min(nats, 700.0))
