"""The identity of a tokenizer: what the manifest, the checkpoint and the model must agree on.

A tokenizer folder holds `titans_tokenizer.json` (this entry), the file that defines the ids (a sentencepiece model or
a Hugging Face tokenizer.json; none for bytes and nucleotides) and the same tokenizer in Hugging Face form.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ENTRY = "titans_tokenizer.json"
DEFINITION = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "byte": None, "nucleotide": None}
NUCLEOTIDES = "ACGTN"  # the ids 0 to 4 of that kind


@dataclass(frozen=True)
class TokenizerEntry:
    """Raises ValueError for what cannot be a tokenizer."""

    kind: str  # a key of DEFINITION
    vocab_size: int
    eos_id: int
    bos_id: int | None = None
    pad_id: int | None = None
    fingerprint: str = ""  # sha256 of the kind, the ids above and the definition

    def __post_init__(self):
        if not (isinstance(self.kind, str) and self.kind in DEFINITION and isinstance(self.fingerprint, str)):
            raise ValueError(f"a tokenizer's kind is one of {', '.join(DEFINITION)}, not {self.kind!r}")
        if not (type(self.vocab_size) is int and 0 < self.vocab_size <= 1 << 31):
            raise ValueError(f"vocab_size is {self.vocab_size!r}")
        for name in ("eos_id", "bos_id", "pad_id"):
            value = getattr(self, name)
            if not ((type(value) is int and 0 <= value < self.vocab_size) or (value is None and name != "eos_id")):
                raise ValueError(f"{name} is {value!r}, of {self.vocab_size} ids")

    def __str__(self) -> str:
        return f"{self.kind} of {self.vocab_size:,} ids ({self.fingerprint[:12]})"

    @property
    def filler_id(self) -> int:
        """Token id of inert padding: it is never a label and never enters a memory, so any legal id serves."""
        return self.eos_id if self.pad_id is None else self.pad_id

    def with_fingerprint(self, definition: bytes) -> "TokenizerEntry":
        values = asdict(self) | {"fingerprint": ""}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode() + definition)
        return TokenizerEntry(**values | {"fingerprint": digest.hexdigest()})


def read_tokenizer_entry(folder: Path) -> TokenizerEntry:
    """The entry of a tokenizer folder, with its fingerprint computed from the files that lie there now.
    Raises ValueError if the folder is none."""
    try:
        entry = TokenizerEntry(**json.loads((folder / ENTRY).read_text()))
        definition = DEFINITION[entry.kind]
        return entry.with_fingerprint((folder / definition).read_bytes() if definition else b"")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder} is not a tokenizer folder ({quoted(error)}); make one with `titans-data tokenizer`"
        ) from None


def quoted(error: Exception) -> str:
    """An error about a file from anywhere, which may quote any of it, as a short piece of one line."""
    text = repr(error)
    return text if len(text) < 300 else text[:300] + "..."
