"""Finds input files and streams their documents, never more than one document at a time in memory.

    .txt .md .py ... (anything else)   a document is the file, its parts, paragraphs, lines, or what stands between separators
    .jsonl .ndjson .json(l)            one JSON object per line, the text in one field
    .parquet                           the text in one column (FineWeb-Edu's form)
    .fa .fasta .fna                    one sequence per record
each also with .gz .zst .bz2 .xz (not .parquet), as file, folder, glob, fsspec URL or `-` (standard input).
"""

import glob
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from titans_pretrain.data_prep.compression import decompressed, ending_of

log = logging.getLogger(__name__)

FORMATS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "fasta": (".fa", ".fasta", ".fna"),
}
STDIN = "-"
PART_BYTES = 4096  # of a text file: what `--documents part` gathers at least


@dataclass(frozen=True)
class InputFile:
    path: str  # what to open
    name: str  # what the shards' metadata call it: relative to the folder that was given
    size: int  # bytes, 0 if unknown


@dataclass(frozen=True)
class ReadOptions:
    format: str | None = None  # text, jsonl, parquet, fasta; None: by suffix
    field: str = "text"  # of JSON objects and parquet tables
    documents: str = "file"  # of text files: file, part, paragraph, line, or auto: see `unit_chosen`
    separator: str | None = None  # of text files: a line of its own between documents


def find_inputs(inputs: list[str], suffixes: list[str] | None = None) -> list[InputFile]:
    """All files behind paths, folders, globs and URLs, in the order given, a folder's sorted by name.

    suffixes: for folders and globs, only files whose name ends with one of these. Raises ValueError if there are none.
    """
    files = []
    endings = tuple(suffix.lower() for suffix in suffixes or ())
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
        if endings:
            found = [file for file in found if file.path == STDIN or file.name.lower().endswith(endings)]
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
    name = file.name.lower().removesuffix(ending_of(file.name))
    return next((kind for kind, endings in FORMATS.items() if name.endswith(endings)), "text")


def unit_chosen(files: list[InputFile], options: ReadOptions, validation: float) -> ReadOptions:
    """`documents: auto` settled: a text file is a document, unless the share to hold out is less than one file."""
    if options.documents != "auto":
        return options
    all_text = all(format_of(file, options) == "text" for file in files)
    if options.separator or not all_text or not 0 < len(files) * validation < 1:
        return replace(options, documents="file")
    log.warning(
        "%d text file%s: read in parts of about %d KiB, so that some can be held out; --documents file keeps a file whole",
        len(files), "s" * (len(files) > 1), PART_BYTES >> 10,
    )  # fmt: skip
    return replace(options, documents="part")


class Documents:
    """Iterates the raw documents of many files: (file number, record number, raw document).

    A raw document is bytes (UTF-8 text, a JSON line), or None where a table has none; `extract` turns it into text, which
    is left to the worker processes. `bytes_read` says how far it is, in bytes of these files as they lie on disk.
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

    def __iter__(self) -> Iterator[tuple[int, int, bytes | None]]:
        skip = self._first_record
        for number in self._numbers:
            file = self.files[number]
            try:
                for record, raw in enumerate(self._read(file)):
                    if record >= skip:
                        yield number, record, raw
            except (OSError, EOFError) as error:
                raise ValueError(f"cannot read {file.path}: {' '.join(str(error).split())}") from error
            skip = 0
            self._before, self._within = self._before + file.size, 0

    def _read(self, file: InputFile) -> Iterator[bytes | None]:
        kind = format_of(file, self.options)
        with _open(file.path) as self._raw:
            if kind == "parquet":
                yield from self._read_parquet(file)
                return
            stream = decompressed(self._raw, file.name)
            if kind == "text" and self.options.documents == "file" and not self.options.separator:
                yield stream.read()
            elif kind == "jsonl":
                yield from (line for line in stream if not line.isspace())
            elif kind == "fasta":
                yield from _fasta_records(stream)
            else:
                yield from _text_parts(stream, self.options)

    def _read_parquet(self, file: InputFile) -> Iterator[bytes | None]:
        import pyarrow
        from pyarrow import parquet

        field = self.options.field
        try:
            table = parquet.ParquetFile(self._raw)
            names = table.schema_arrow.names
            if field in names:
                for batch in table.iter_batches(batch_size=1024, columns=[field], use_threads=False):
                    yield from _texts_of(batch.column(0))
                return
        except (pyarrow.ArrowException, ValueError) as error:
            raise OSError(error) from None
        raise ValueError(f"{file.path} has no column {field!r}, only {', '.join(names)}; see --field")


def _texts_of(column) -> list[bytes | None]:
    """The values of an Arrow array as bytes, whose UTF-8 nobody has checked yet; None for what is no text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type).removeprefix("large_") not in ("string", "string_view", "binary", "binary_view", "null"):
        return [None] * len(column)
    return [value or b"" for value in column.cast(pyarrow.large_binary()).to_pylist()]


def extract(raw: bytes | None, kind: str, field: str) -> str:
    """Text of a raw document. Raises ValueError if it is not UTF-8, not JSON, or lacks the field."""
    if raw is None:
        raise ValueError(f"column {field!r} holds no text; --field names another")
    if kind == "jsonl":
        import json

        try:
            value = json.loads(raw)
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            raise ValueError(f"no text in field {field!r}")
        text = value[field]
        text.encode()  # JSON may hold half a surrogate pair, which is no text
        return text
    return raw.decode()


def _open(path: str) -> BinaryIO:
    if path == STDIN:
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    if "://" in path:
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(path, "rb", buffering=1 << 20)


def _text_parts(stream: BinaryIO, options: ReadOptions) -> Iterator[bytes]:
    if options.separator:
        end = options.separator.encode()

        def is_end(line: bytes) -> bool:
            return line.rstrip(b"\r\n") == end

    elif options.documents == "paragraph":
        is_end = bytes.isspace
    elif options.documents == "part":
        yield from _gathered_paragraphs(stream)
        return
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


def _gathered_paragraphs(stream: BinaryIO) -> Iterator[bytes]:
    """Paragraphs until they are PART_BYTES together; where no blank line comes, lines until they are four times that."""
    part: list[bytes] = []
    size = 0
    for line in stream:
        blank = line.isspace()
        if part or not blank:
            part.append(line)
            size += len(line)
        if size >= (PART_BYTES if blank else 4 * PART_BYTES):
            yield b"".join(part).rstrip(b"\r\n")
            part, size = [], 0
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
