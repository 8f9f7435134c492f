"""Where tasks take running text from: a file that is named, or the held-out documents of the run's data."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titans_pretrain.config import Config
from titans_pretrain.data import open_manifest
from titans_pretrain.data.shards import load_index, open_tar
from titans_pretrain.data.storage import Folder
from titans_pretrain.data_prep.sources import Documents, ReadOptions, extract, find_inputs, format_of
from titans_pretrain.data_prep.tokenizer import Tokenizer


class Texts:
    """config: whose data.* names the data folder; None: there is none. split: of that data."""

    def __init__(self, config: Config | None, split: str = "validation"):
        self._config, self._split = config, split

    def identity(self, path: str | None) -> str:
        """What tells one text from another: a checksum of the documents of `path`, or the data folder's."""
        if path:
            digest = hashlib.sha256()
            for text in read_texts(path):
                digest.update(hashlib.sha256(text.encode()).digest())
            return digest.hexdigest()
        return ",".join(open_manifest(folder).fingerprint() for folder in self._folders()) + f":{self._split}"

    def documents(self, path: str | None, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        """The ids of each document, without eos, in a fixed order. path: .txt, .jsonl, .parquet, a folder or a pattern of such;
        None: the run's data. Raises ValueError where there is no such text."""
        if path:
            yield from (tokenizer.encode(text) for text in read_texts(path))
            return
        for folder in self._folders():
            manifest = open_manifest(folder)
            if manifest.tokenizer != tokenizer.entry:
                raise ValueError(f"{folder.path} has tokens of {manifest.tokenizer}, the model reads {tokenizer.entry}")
            for shard in manifest.splits.get(self._split, []):
                file = open_tar(folder, shard)
                for offset, size in load_index(folder, shard).tolist():
                    tokens = np.empty(size // manifest.dtype.itemsize, manifest.dtype)
                    file.read_into(memoryview(tokens).cast("B"), offset)
                    yield tokens[:-1] if len(tokens) and tokens[-1] == tokenizer.entry.eos_id else tokens

    def _folders(self) -> list[Folder]:
        data = self._config and self._config.data
        if not data or not (data.path or data.mixture):
            raise ValueError("there is no text to read: give a task its own, as niah.text=FILE, or data.path=DATA")
        return [Folder(path, data.cache_dir) for path in data.mixture or [data.path]]


def read_texts(path: str) -> Iterator[str]:
    """The documents of a file, folder or pattern, each whole."""
    options = ReadOptions()
    files = find_inputs([str(Path(path).expanduser()) if "://" not in path else path])
    for number, _, raw in Documents(files, options):
        yield extract(raw, format_of(files[number], options), options.field)
