"""Inputs of `titans-data`, and what came of them."""

import json
import tarfile
from pathlib import Path

import numpy as np

from titans_pretrain.data.manifest import MANIFEST, Manifest
from titans_pretrain.data_prep.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SMALL = {"shard_size": 20_000, "validation": 0.1}


class Killed(BaseException):
    pass


def write_lines(path: Path, texts) -> list[str]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(path)]


def texts_of(folder: Path, split: str) -> list[str]:
    """All documents of a split, read through tarfile alone."""
    texts = []
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    for shard in manifest.splits[split]:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                if member.name.endswith(".tokens.bin"):
                    texts.append(TOKENIZER.decode(np.frombuffer(tar.extractfile(member).read(), "<u2")))
    return texts
