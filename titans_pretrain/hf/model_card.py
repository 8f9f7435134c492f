"""README.md of an exported model."""

from collections.abc import Iterable
from importlib.metadata import requires

from titans_pretrain.config.model import VARIANTS, ModelConfig

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- titans
---

# Titans language model ({variant}, {parameters} parameters)

A [Titans](https://arxiv.org/abs/2501.00663) language model: {what}.
{trained}
| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Needs torch and transformers, nothing else; tested with `{requirements}`. The folder carries the
model's code, which is why it asks for `trust_remote_code=True`. Read the `.py` files here before you trust them.

## Good to know

{notes}- `cache` (`past_key_values` before transformers 5.24) is a state of bounded size unless attention is full. It can be kept
  between calls, but not cropped: assisted decoding is refused.
- Rows of different length in a batch (padding by `attention_mask`) and packed documents (by `position_ids`) give what each
  would alone. For training pad on the right, as the tokenizer here does.
- In bfloat16 or float16, the memory's state stays float32.
"""


def model_card(config: ModelConfig, dtype: str, parameters: int, trained: str) -> str:
    """trained: where the weights come from, one line or nothing."""
    name = "+".join(config.variants)
    rows = {
        "variant": name,
        "layers x width": f"{config.layers} x {config.dim}",
        "vocabulary": config.vocab_size,
        "weights": dtype,
    }
    layers = config.layer_configs
    if config.pattern is not None:
        rows["layers"] = ", ".join(layer.variant for layer in layers)
    memories = _distinct(layer.memory for layer in layers if layer.has_memory)
    windows = _distinct(layer.window for layer in layers if layer.has_attention and not layer.has_segments)
    segments = _distinct(layer.mac.segment for layer in layers if layer.has_segments)
    notes = []
    if windows:
        heads = _distinct(layer.heads for layer in layers if layer.has_attention)
        rows["attention"] = f"{_either(heads)} heads, window {_either(w or 'unlimited' for w in windows)}"
    if memories:
        chunks = _either(_distinct(m.chunk_size for m in memories))
        told = (f"{m.heads} heads, depth {m.depth}, chunks of {m.chunk_size} tokens" for m in memories)
        rows["memory"] = _either(told, "; or ")
        notes.append(
            f"- The chunk size ({chunks}) is part of the function that the weights were trained for, not a speed "
            "setting: with\n  another one this is another, worse model."
        )
    if segments:
        heads = _distinct(layer.heads for layer in layers if layer.has_segments)
        rows["segments"] = f"{_either(segments)} tokens, attention of {_either(heads)} heads within each"
        notes.append(f"- So is the segment ({_either(segments)}).")
    return _CARD.format(
        variant=name,
        parameters=_count(parameters),
        what="; ".join(VARIANTS[v].summary for v in config.variants),
        requirements="`, `".join(
            r for r in requires("titans-pretrain") if r.startswith(("torch<", "torch>", "transformers"))
        ),
        trained=f"\nTrained with titans-pretrain: {trained}.\n" if trained else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        notes="".join(note + "\n" for note in notes),
    )


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _either(values: Iterable, by: str = " or ") -> str:
    return by.join(map(str, values))


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
