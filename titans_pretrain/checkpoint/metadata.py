"""Where the pieces of the tensors lie: torch.distributed.checkpoint's metadata as JSON, so that reading it runs no code.

weights/metadata.json    {NAME: {"dtype": "float32", "shape": [...], "pieces": [PIECE, ...]}, ...}
PIECE                    {"offsets": [...], "sizes": [...], "file": "__0_0.distcp", "start": first byte, "length": bytes}

Checkpoints of format version 2 have a pickle instead, weights/.metadata: it is read with stand-ins for the few classes that it
may name, and goes through the same checks.
"""

import io
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titans_pretrain.checkpoint.together import DamagedCheckpoint

METADATA, OLD_METADATA = "metadata.json", ".metadata"
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FILE = re.compile(r"__\d+_\d+\.distcp")


class Writer(FileSystemWriter):
    """Writes metadata.json instead of a pickle."""

    def finish(self, metadata: Metadata, results: list) -> None:
        stored = {r.index: r.storage_data for ranks in results for r in ranks}
        tensors = _described(metadata.state_dict_metadata, stored, lambda p: str(p.dtype).removeprefix("torch."))
        (Path(self.path) / METADATA).write_text(json.dumps(tensors))


class Reader(FileSystemReader):
    """Reads what Writer wrote, or a checkpoint of format version 2."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Raises DamagedCheckpoint, naming the file, for anything but what was written."""
        path = Path(self.path) / METADATA
        if not path.exists() and (Path(self.path) / OLD_METADATA).exists():
            path = Path(self.path) / OLD_METADATA
        content = path.read_bytes()
        try:
            tensors = json.loads(content) if path.name == METADATA else _unpickle(content)
            entries, stored = {}, {}
            for name, tensor in tensors.items():
                _check(isinstance(name, str), f"{name!r} is no name of a tensor")
                entries[name] = _entry(tensor)
                for piece, chunk in zip(tensor["pieces"], entries[name].chunks, strict=True):
                    stored[MetadataIndex(name, chunk.offsets)] = _place(piece, chunk, entries[name].properties.dtype)
        except Exception as e:  # whatever a parser says of bytes that may be anything
            told = " ".join(str(e).split())[:200]
            raise DamagedCheckpoint(
                f"{path} is damaged, or no metadata of a checkpoint ({type(e).__name__}: {told})"
            ) from e
        return Metadata(entries, storage_data=stored, storage_meta=StorageMeta(load_id=self.load_id))


def _described(entries: dict, stored: dict, dtype: Callable) -> dict:
    """What metadata.json says of torch's objects, or of what stands for them. dtype: its name, from a tensor's properties."""
    places = {(index.fqn, tuple(index.offset)): place for index, place in stored.items()}
    tensors = {}
    for name, tensor in entries.items():
        pieces = []
        for chunk in tensor.chunks:
            at = places[name, tuple(chunk.offsets)]
            place = {"file": at.relative_path, "start": at.offset, "length": at.length}
            pieces.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **place})
        tensors[name] = {"dtype": dtype(tensor.properties), "shape": list(tensor.size), "pieces": pieces}
    return tensors


def _entry(tensor: dict) -> TensorStorageMetadata:
    shape = _sizes(tensor["shape"])
    chunks = [ChunkStorageMetadata(_sizes(p["offsets"]), _sizes(p["sizes"])) for p in tensor["pieces"]]
    for chunk in chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        _check(all(end <= size for end, size in zip(ends, shape, strict=True)), "a piece ends outside of its tensor")
    _check(sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape), "the pieces do not make up the tensor")
    _check(not any(_overlap(a, b) for a, b in itertools.combinations(chunks, 2)), "pieces of a tensor overlap")
    return TensorStorageMetadata(TensorProperties(DTYPES[tensor["dtype"]]), shape, chunks)


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))


def _place(piece: dict, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> _StorageInfo:
    start, length = _sizes([piece["start"], piece["length"]])
    _check(_FILE.fullmatch(piece["file"]) is not None, "a piece lies in a file of another name")
    _check(length >= math.prod(chunk.sizes) * dtype.itemsize, "a piece is longer than its bytes in the file")
    return _StorageInfo(piece["file"], start, length)


def _sizes(values) -> torch.Size:
    _check(
        isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values), f"{values!r} are no sizes"
    )
    return torch.Size(values)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _unpickle(content: bytes) -> dict:
    """The pickle of format version 2 as metadata.json says it.

    A pickle calls whatever it names. Each name gets a stand-in that does nothing but hold what it was given, made for this one
    pickle: the real classes are out of its reach, so there is nothing that it could run or change."""
    metadata = _Unpickler(io.BytesIO(content)).load()
    return _described(metadata.state_dict_metadata, metadata.storage_data, lambda properties: properties.given[0])


class _Given:
    """Stands for an object of a pickle; `given`: its state."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.given = state
        if isinstance(state, dict):
            vars(self).update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        if name in _NAMED.get(module, ()):
            return type(name, (_Given,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no metadata does")


_NAMED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path", "WindowsPath"},
}  # fmt: skip
