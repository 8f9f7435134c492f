"""The manifest of a data folder: what `titans-data` wrote and what the reader trusts.

    DATA_DIR/manifest.json              this file; written last, so a folder without it is unfinished
    DATA_DIR/tokenizer/                 the tokenizer that made the tokens
    DATA_DIR/train-000000.tar           WebDataset shard: KEY.tokens.bin (little-endian tokens) and KEY.json per document
    DATA_DIR/train-000000.tar.idx.npy   int64 [documents, 2]: offset and size in bytes of the token members, in order

Shards are numbered from 0 in each split.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field

import numpy as np

from titans_pretrain.data.tokenizer import TokenizerEntry, quoted

VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
# A manifest may come from anywhere: its names become parts of paths, addresses and commands
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}").fullmatch
_SHA256 = re.compile(r"[0-9a-f]{64}").fullmatch


@dataclass
class ShardEntry:
    """Raises ValueError for what cannot be a shard; a name has letters, digits, `_`, `-` and `.` only, no folder."""

    name: str  # file name of the tar
    documents: int
    tokens: int
    bytes: int  # size of the tar
    sha256: str  # of the tar

    def __post_init__(self):
        if not (isinstance(self.name, str) and _PLAIN_NAME(self.name)):
            raise ValueError(f"{self.name!r} is not a plain file name")
        if not (isinstance(self.sha256, str) and _SHA256(self.sha256)):
            raise ValueError(f"{self.name}: sha256 is {self.sha256!r}")
        counts = (self.documents, self.tokens, self.bytes)
        if not all(type(count) is int and 0 <= count < 1 << 60 for count in counts):
            raise ValueError(f"{self.name}: documents, tokens, bytes are {counts}")

    @property
    def index_name(self) -> str:
        return self.name + ".idx.npy"


@dataclass
class Manifest:
    tokenizer: TokenizerEntry
    splits: dict[str, list[ShardEntry]]
    source: dict = field(default_factory=dict)  # inputs and options of the run, documents dropped and why

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size)

    def totals(self, split: str) -> dict[str, int]:
        shards = self.splits[split]
        return {key: sum(getattr(shard, key) for shard in shards) for key in ("documents", "tokens", "bytes")}

    def fingerprint(self) -> str:
        """sha256 over tokenizer, shards and their checksums: equal exactly when the tokens and their order are."""
        text = json.dumps([self.tokenizer.fingerprint, _splits_to_json(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        document = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "tokenizer": asdict(self.tokenizer),
            "splits": {name: {**self.totals(name), "shards": shards} for name, shards in _splits_to_json(self).items()},
            "source": self.source,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST) -> "Manifest":
        """Raises ValueError naming `where` if the text is no manifest of this version."""
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']}, this program reads version {VERSION}")
            splits = {name: [ShardEntry(**shard) for shard in document["splits"][name]["shards"]] for name in SPLITS}
            return cls(TokenizerEntry(**document["tokenizer"]), splits, dict(document["source"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{where} is not a readable manifest ({quoted(error)}); run `titans-data verify`"
            ) from None


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian type that tokens of this vocabulary are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _splits_to_json(manifest: Manifest) -> dict[str, list[dict]]:
    # vars() and not asdict(): the latter copies recursively, seconds for 10,000 shards
    return {name: [vars(shard) for shard in shards] for name, shards in manifest.splits.items()}
