"""Completing a text with the model's state: a prefix is read once, then one token at a time."""

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from titans_pretrain.checkpoint import find_tokenizer, load_model
from titans_pretrain.data_prep.tokenizer import load_tokenizer
from titans_pretrain.hf.importing import is_export, load_export
from titans_pretrain.models.state_file import fingerprint, load_state, save_state
from titans_pretrain.training.engine import pick_device

PREFILL = 1024  # tokens of the prompt read at once, so that the logits of a long one never exist whole


@dataclass
class Sampling:
    """temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave all tokens in."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be 1 or more, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must lie in (0, 1], got {self.top_p}")


class Context:
    """What a model has read so far, as its state, and what it expects next."""

    def __init__(self, model: nn.Module):
        self.model, self.state, self.logits = model, None, None
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> None:
        for part in torch.tensor([tokens], device=self.device).split(PREFILL, dim=1):
            out = self.model(part, state=self.state)
            self.state, self.logits = out.state, out.logits[0, -1].float()

    @property
    def tokens(self) -> int:
        """Read so far."""
        return 0 if self.state is None else int(self.state.position[0])

    def write(self, sampling: Sampling, eos_id: int | None) -> Iterator[int]:
        """Token ids that go on from here, up to `eos_id` (not given out) or `max_new_tokens`; they are read too."""
        random = torch.Generator(self.device).manual_seed(sampling.seed)
        for _ in range(sampling.max_new_tokens):
            token = pick_token(self.logits, sampling, random)
            if token == eos_id:
                return
            yield token
            self.read([token])


def generate_tokens(model: nn.Module, prompt: Sequence[int], sampling: Sampling, eos_id: int | None) -> Iterator[int]:
    """Token ids that continue `prompt`; see Context.write."""
    context = Context(model)
    context.read(_not_empty(prompt))
    return context.write(sampling, eos_id)


class Writer:
    """A model and its tokenizer, opened once. path: a run, checkpoint or exported folder; state: a file of `save`, whose text comes
    before every prompt."""

    def __init__(self, path: str, device: str = "auto", state: str | None = None):
        if is_export(path):
            self.tokenizer, model = load_tokenizer(path), load_export(path, dtype=None)[0]
        else:
            self.tokenizer, model = load_tokenizer(find_tokenizer(path)), load_model(path)[0]
        self.model = model.to(pick_device(device))
        self.tokens_per_second = 0.0  # of the newest continuation
        self.start = self.context = Context(self.model)  # before a prompt; and behind the newest that was read for good
        if state is not None:
            self.start.state = load_state(state, self._fingerprint(), self.start.device)
            rows = len(self.start.state.position)
            if rows > 1:
                raise ValueError(f"{state} holds the states of {rows} rows; a prompt goes on from that of one")

    def read(self, text: str) -> int:
        """Reads a text without going on from it; the tokens read so far."""
        self.context = copy.copy(self.start)
        self.context.read(_not_empty(self.tokenizer.encode(text).tolist()))
        return self.context.tokens

    def save(self, path: str) -> None:
        """What was read, for another process to go on from."""
        save_state(path, self.context.state, self._fingerprint())

    def _fingerprint(self) -> str:
        return fingerprint(self.model.config, self.model.state_dict())

    def complete(self, prompt: str, sampling: Sampling, samples: int = 1) -> Iterator[Iterator[str]]:
        """So many continuations of a text, each in pieces as they come; the i-th is drawn with the i-th seed from the given one."""
        if samples < 1:
            raise ValueError(f"--num-samples must be 1 or more, got {samples}")
        context, ids = copy.copy(self.start), _not_empty(self.tokenizer.encode(prompt).tolist())
        context.read(ids)
        for i in range(samples):
            yield self._pieces(copy.copy(context), ids, replace(sampling, seed=sampling.seed + i))

    def converse(self, lines: Iterable[str], sampling: Sampling) -> Iterator[Iterator[str]]:
        """For each line a continuation, in pieces, of all that was read and written before it. An empty line asks for more."""
        self.context = context = copy.copy(self.start)
        for i, line in enumerate(lines):
            ids = self.tokenizer.encode(("" if context.state is None else "\n") + line).tolist() if line else []
            if ids:
                context.read(ids)
            if context.logits is not None:  # of a state that was loaded none are known
                yield self._pieces(context, ids, replace(sampling, seed=sampling.seed + i))

    def _pieces(self, context: Context, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        read, start = len(ids), time.monotonic()
        ids = list(ids)
        shown = self.tokenizer.decode(ids)
        for token in context.write(sampling, self.tokenizer.entry.eos_id):
            ids.append(token)
            self.tokens_per_second = (len(ids) - read) / (time.monotonic() - start)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character of several tokens is not whole yet
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode(ids)[len(shown) :]


def _not_empty(prompt: Sequence[int]) -> Sequence[int]:
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    return prompt


def pick_token(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token id drawn from logits [V] under the limits of `sampling`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, ids = (logits / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        ordered, ids = ordered[: sampling.top_k], ids[: sampling.top_k]
    shares = ordered.softmax(0)
    before = shares.cumsum(0) - shares  # what the likelier ones hold together: 0 for the first, so one always stays
    shares = shares.masked_fill(before >= sampling.top_p, 0.0)
    return int(ids[torch.multinomial(shares, 1, generator=random)])
