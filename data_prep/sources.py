"""Finds input files and streams their documents, never more than one document at a time in memory.

    .txt .md .py ... (anything else)   a file is a document; or its lines, paragraphs, or parts between separator lines
    .jsonl .ndjson .json(l)            one JSON object per line, the text in one field
    .parquet                           the text in one column (FineWeb-Edu's form)
    .fa .fasta .fna                    one sequence per record
each also with .gz .zst .bz2 .xz (not .parquet), as file, folder, glob, fsspec URL or `-` (standard input).
"""

import glob
import io
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "fasta": (".fa", ".fasta", ".fna"),
}
STDIN = "-"


@dataclass(frozen=True)
class InputFile:
    path: str  # what to open
    name: str  # what the shards' metadata call it: relative to the folder that was given
    size: int  # bytes, 0 if unknown


@dataclass(frozen=True)
class ReadOptions:
    format: str | None = None  # text, jsonl, parquet, fasta; None: by suffix
    field: str = "text"  # of JSON objects and parquet tables
    documents: str = "file"  # of text files: file, line, paragraph
    separator: str | None = None  # of text files: a line of its own between documents


def find_inputs(inputs: list[str], suffixes: list[str] | None = None) -> list[InputFile]:
    """All files behind paths, folders, globs and URLs, in the order given, a folder's sorted by name.

    suffixes: for folders and globs, only files whose name ends with one of these. Raises ValueError if there are none.
    """
    files = []
    for path in inputs:
        if path == STDIN:
            found = [InputFile(STDIN, "stdin", 0)]
        elif "://" in path:
            found = _find_remote(path)
        elif os.path.isdir(path):
            found = [
                InputFile(str(p), str(p.relative_to(path)), p.stat().st_size)
                for p in sorted(Path(path).rglob("*"))
                if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
            ]
        elif os.path.exists(path):
            files.append(InputFile(path, os.path.basename(path), os.stat(path).st_size))
            continue  # named by the user, whatever its suffix
        else:
            found = [
                InputFile(p, os.path.basename(p), os.stat(p).st_size)
                for p in sorted(glob.glob(path, recursive=True))
                if os.path.isfile(p)
            ]
        if suffixes:
            found = [file for file in found if file.path == STDIN or file.name.endswith(tuple(suffixes))]
        if not found:
            raise ValueError(f"no input files at {path}" + (f" ending in {' '.join(suffixes)}" if suffixes else ""))
        files += found
    return files


def _find_remote(path: str) -> list[InputFile]:
    import fsspec

    try:
        system, stripped = fsspec.core.url_to_fs(path)
        if any(sign in path for sign in "*?["):
            found = sorted(system.glob(stripped))
        elif system.isdir(stripped):
            found = sorted(system.find(stripped))
        else:
            found = [stripped]
        return [
            InputFile(system.unstrip_protocol(p), p.rsplit("/", 1)[-1], system.info(p).get("size") or 0) for p in found
        ]
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"cannot list {path}: {error}") from None


def format_of(file: InputFile, options: ReadOptions) -> str:
    if options.format:
        return options.format
    name = file.name
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return next((kind for kind, endings in FORMATS.items() if name.endswith(endings)), "text")


class Documents:
    """Iterates the raw documents of many files: (file number, record number, raw document).

    A raw document is bytes (UTF-8 text, a JSON line) or str; `extract` turns it into text, which is left to the
    worker processes. `bytes_read` says how far it is, in bytes of these files as they lie on disk.
    """

    def __init__(
        self, files: list[InputFile], options: ReadOptions, numbers: range | None = None, first_record: int = 0
    ):
        """numbers: which files to read; first_record: where to begin in the first of them."""
        self.files, self.options = files, options
        self._numbers = range(len(files)) if numbers is None else numbers
        self._first_record = first_record
        self._before = 0
        self._raw: BinaryIO | None = None
        self._within = 0

    @property
    def bytes_read(self) -> int:
        if self._raw is not None and not self._raw.closed:
            with suppress(OSError):  # a pipe has no position
                self._within = self._raw.tell()
        return self._before + self._within

    def __iter__(self) -> Iterator[tuple[int, int, bytes | str]]:
        skip = self._first_record
        for number in self._numbers:
            file = self.files[number]
            try:
                for record, raw in enumerate(self._read(file)):
                    if record >= skip:
                        yield number, record, raw
            except (OSError, EOFError) as error:
                raise ValueError(f"cannot read {file.path}: {error}") from error
            skip = 0
            self._before, self._within = self._before + file.size, 0

    def _read(self, file: InputFile) -> Iterator[bytes | str]:
        kind = format_of(file, self.options)
        with _open(file.path) as self._raw:
            if kind == "parquet":
                yield from self._read_parquet(file)
                return
            stream = _decompressed(self._raw, file.name)
            if kind == "text" and self.options.documents == "file" and not self.options.separator:
                yield stream.read()
            elif kind == "jsonl":
                yield from (line for line in stream if not line.isspace())
            elif kind == "fasta":
                yield from _fasta_records(stream)
            else:
                yield from _text_parts(stream, self.options)

    def _read_parquet(self, file: InputFile) -> Iterator[str]:
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(self._raw)
            if self.options.field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{file.path} has no column {self.options.field!r}, only {names}; see --field")
            for batch in table.iter_batches(batch_size=1024, columns=[self.options.field], use_threads=False):
                yield from (text or "" for text in batch.column(0).to_pylist())
        except pyarrow.ArrowException as error:
            raise ValueError(f"cannot read {file.path}: {error}") from None


def extract(raw: bytes | str, kind: str, field: str) -> str:
    """Text of a raw document. Raises ValueError if it is not UTF-8, not JSON, or lacks the field."""
    if kind == "jsonl":
        import json

        value = json.loads(raw)
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            raise ValueError(f"no text in field {field!r}")
        text = value[field]
        text.encode()  # JSON may hold half a surrogate pair, which is no text
        return text
    return raw if isinstance(raw, str) else raw.decode()


def _open(path: str) -> BinaryIO:
    if path == STDIN:
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    if "://" in path:
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(path, "rb", buffering=1 << 20)


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        import gzip

        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if name.endswith(".zst"):
        import zstandard

        # a file may hold several frames: what pzstd and `cat a.zst b.zst` make
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)
    if name.endswith(".bz2"):
        import bz2

        return bz2.BZ2File(raw)
    if name.endswith(".xz"):
        import lzma

        return lzma.LZMAFile(raw)
    return raw


def _text_parts(stream: BinaryIO, options: ReadOptions) -> Iterator[bytes]:
    if options.separator:
        end = options.separator.encode()

        def is_end(line: bytes) -> bool:
            return line.rstrip(b"\r\n") == end

    elif options.documents == "paragraph":
        is_end = bytes.isspace
    else:
        yield from (line.rstrip(b"\r\n") for line in stream)
        return
    part: list[bytes] = []
    for line in stream:
        if not is_end(line):
            part.append(line)
        elif part:
            yield b"".join(part).rstrip(b"\r\n")
            part = []
    if part:
        yield b"".join(part).rstrip(b"\r\n")


def _fasta_records(stream: BinaryIO) -> Iterator[bytes]:
    part: list[bytes] = []
    for line in stream:
        if line[:1] in (b">", b";"):
            if part:
                yield b"".join(part)
            part = []
        else:
            part.append(line.strip())
    if part:
        yield b"".join(part)
