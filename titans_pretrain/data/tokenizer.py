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
    kind: str  # a key of DEFINITION
    vocab_size: int
    eos_id: int
    bos_id: int | None = None
    pad_id: int | None = None
    fingerprint: str = ""  # sha256 of the kind, the ids above and the definition

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
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} is not a tokenizer folder ({error}); make one with `titans-data tokenizer`"
        ) from None
