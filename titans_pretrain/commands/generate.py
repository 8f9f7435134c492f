"""Completing a text with the model's state: a prefix is read once, then one token at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_pretrain.checkpoint import find_tokenizer, load_model
from titans_pretrain.data_prep.tokenizer import load_tokenizer
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


def generate_text(path: str, prompt: str, sampling: Sampling, device: str = "auto") -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they come. path: a run, checkpoint or exported folder."""
    if (Path(path) / "config.json").is_file():
        from titans_pretrain.hf.modeling_titans import TitansForCausalLM

        tokenizer, model = load_tokenizer(path), TitansForCausalLM.from_pretrained(path).model.eval()
    else:
        tokenizer, model = load_tokenizer(find_tokenizer(path)), load_model(path)[0]
    model = model.to(pick_device(device))
    ids = tokenizer.encode(prompt).tolist()
    shown = tokenizer.decode(ids)
    for token in generate_tokens(model, list(ids), sampling, tokenizer.entry.eos_id):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several tokens is not whole yet
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


@torch.no_grad()
def generate_tokens(model: nn.Module, prompt: list[int], sampling: Sampling, eos_id: int | None) -> Iterator[int]:
    """Token ids that continue `prompt`, up to `eos_id` (not given out) or `max_new_tokens`."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(sampling.seed)
    state = None
    for part in torch.tensor([prompt], device=device).split(PREFILL, dim=1):
        out = model(part, state=state)
        state = out.state
    for _ in range(sampling.max_new_tokens):
        token = pick_token(out.logits[0, -1].float(), sampling, random)
        if token == eos_id:
            return
        yield token
        out = model(torch.tensor([[token]], device=device), state=state)
        state = out.state


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
