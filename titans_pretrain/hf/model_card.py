"""README.md of an exported model."""

from importlib.metadata import requires

from titans_pretrain.config.model import ModelConfig

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
- Rows of different length in a batch (left or right padding, by `attention_mask`) are run one after the other, because a
  padding token must not be read. The results are exact; batches of equal length are faster.
- In bfloat16 or float16, the memory's state stays float32.
"""

_WHAT = {
    "lmm": "a neural memory that learns while it reads, and no attention",
    "mac": "a neural memory that learns while it reads gives context to the attention within a segment",
    "mag": "sliding-window attention beside a neural memory that learns while it reads and gates it",
    "mal": "a neural memory that learns while it reads, then sliding-window attention, in every layer",
    "transformer": "the attention-only baseline of the same architecture",
}


def model_card(config: ModelConfig, dtype: str, parameters: int, trained: str) -> str:
    """trained: where the weights come from, one line or nothing."""
    rows = {
        "variant": config.variant,
        "layers x width": f"{config.layers} x {config.dim}",
        "vocabulary": config.vocab_size,
        "weights": dtype,
    }
    notes = []
    if config.has_attention and config.variant != "mac":
        rows["attention"] = f"{config.heads} heads, window {config.window or 'unlimited'}"
    if config.has_memory:
        memory = config.memory
        rows["memory"] = f"{memory.heads} heads, depth {memory.depth}, chunks of {memory.chunk_size} tokens"
        notes.append(
            f"- The chunk size ({memory.chunk_size}) is part of the function that the weights were trained for, not a speed "
            "setting: with\n  another one this is another, worse model."
        )
    if config.variant == "mac":
        rows["segments"] = f"{config.mac.segment} tokens, attention of {config.heads} heads within each"
        notes.append(f"- So is the segment ({config.mac.segment}).")
    return _CARD.format(
        variant=config.variant,
        parameters=_count(parameters),
        what=_WHAT[config.variant],
        requirements="`, `".join(
            r for r in requires("titans-pretrain") if r.startswith(("torch<", "torch>", "transformers"))
        ),
        trained=f"\nTrained with titans-pretrain: {trained}.\n" if trained else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        notes="".join(note + "\n" for note in notes),
    )


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
