"""`titans-data tokenize`: documents in, shards out.

One process reads and writes, in the order of the input; the others turn chunks of documents into finished tar members.
So the result depends on the input and the options alone, never on the number of workers. Every few seconds the run notes
how far it is (`progress.json`); started again after a kill it goes on from there and gives the same bytes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from bisect import bisect_left
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from titans_pretrain.data.manifest import MANIFEST, SPLITS, Manifest
from titans_pretrain.data_prep.cleaning import CleanOptions
from titans_pretrain.data_prep.encode import Chunk, encoding
from titans_pretrain.data_prep.progress import progress_bar
from titans_pretrain.data_prep.shards import ShardWriter, write_text, writing
from titans_pretrain.data_prep.sources import (
    Documents,
    InputFile,
    ReadOptions,
    find_inputs,
    unit_chosen,
)
from titans_pretrain.data_prep.tokenizer import Tokenizer, refuse_another

PROGRESS = "progress.json"
DIGESTS = "digests.partial"
CHUNK_BYTES = 1 << 20  # of raw documents, the work of one task
CHUNK_DOCUMENTS = 4096
CHECKPOINT_SECONDS = 10.0


@dataclass(frozen=True)
class TokenizeOptions:
    validation: float = 0.01  # share of documents, chosen by the hash of their text
    shard_size: int = 128 << 20  # bytes of a tar
    part: tuple[int, int] = (0, 1)  # i of N, for array jobs
    suffixes: tuple[str, ...] = ()
    read: ReadOptions = field(default_factory=ReadOptions)
    clean: CleanOptions = field(default_factory=CleanOptions)


class Run:
    """A tokenize run and what it has to remember to go on after a kill."""

    def __init__(self, files: list[InputFile], tokenizer: Tokenizer, out: Path, options: TokenizeOptions):
        self.files, self.tokenizer, self.out, self.options = files, tokenizer, out, options
        self.numbers, self.modulus = files_of_part(files, options.part)
        self.identity = self.identity_of(files, tokenizer, options)
        state = self._load()
        self.file, self.record = state.get("file", self.numbers.start), state.get("record", 0)
        self.read, self.text_bytes = state.get("read", 0), state.get("text_bytes", 0)
        self.dropped = Counter(state.get("dropped", {}))
        item_size = tokenizer.dtype.itemsize
        self.writers = {
            split: ShardWriter(out, split, options.shard_size, item_size, state.get("splits", {}).get(split))
            for split in SPLITS
        }
        self._seen = _DigestSet(out / DIGESTS, state.get("digests", 0)) if options.clean.deduplicate else None

    @staticmethod
    def identity_of(files: list[InputFile], tokenizer: Tokenizer, options: TokenizeOptions) -> str:
        """A hash of all that the result depends on, the same for all parts of a job array: only the same run may go on
        where another stopped. With or without skip_bad_records it is the same until a record is bad."""
        clean = replace(options.clean, skip_bad_records=False)
        whole = asdict(replace(options, part=(0, 1), clean=clean))
        described = json.dumps([whole, [asdict(file) for file in files], tokenizer.entry.fingerprint])
        return hashlib.sha256(described.encode()).hexdigest()

    def _load(self) -> dict:
        path = self.out / PROGRESS
        if not path.exists():
            if any(self.out.glob("*-*.tar")):
                raise ValueError(f"{self.out} already holds shards of something else; choose an empty folder")
            return {}
        try:
            state = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is damaged; remove {self.out} and start again") from None
        if not any(split["shards"] or split["bytes"] for split in state["splits"].values()):
            return {}  # nothing is lost, whatever it was
        if not _is_same_run(self.identity, self.options, state["identity"], state["dropped"]):
            raise ValueError(
                f"{self.out} holds an unfinished run with other inputs, options or tokenizer; "
                "repeat that command, or remove the folder"
            )
        return state

    @property
    def tokens(self) -> int:
        return sum(writer.total_tokens for writer in self.writers.values())

    def remaining(self) -> Documents:
        return Documents(self.files, self.options.read, range(self.file, self.numbers.stop), self.record)

    def mine(self, record: int) -> bool:
        i, n = self.modulus
        return record % n == i

    def append(self, chunk: Chunk, documents: int, end: tuple[int, int]) -> None:
        """Writes a finished chunk; the next document to read is `end`: file and record number."""
        limit = int(self.options.validation * 2**64)
        blob, start = memoryview(chunk.blob), 0
        for stop, token_bytes, digest in zip(chunk.ends, chunk.token_bytes, chunk.digests):
            if self._seen is not None and not self._seen.add(digest):
                self.dropped["duplicate"] += 1
            else:
                split = "validation" if int.from_bytes(digest[:8], "little") < limit else "train"
                self.writers[split].add(blob[start:stop], token_bytes)
            start = stop
        self.dropped.update(chunk.dropped)
        self.read += documents
        self.text_bytes += chunk.text_bytes
        self.file, self.record = end

    def checkpoint(self) -> None:
        state = {
            "identity": self.identity,
            "file": self.file,
            "record": self.record,
            "read": self.read,
            "text_bytes": self.text_bytes,
            "dropped": dict(self.dropped),
            "splits": {split: writer.checkpoint() for split, writer in self.writers.items()},
            "digests": self._seen.checkpoint() if self._seen is not None else 0,
        }
        write_text(self.out / PROGRESS, json.dumps(state))

    def close(self) -> None:
        """After a failure: what is not on disk is done again."""
        for file in (*self.writers.values(), self._seen):
            if file is not None:
                with suppress(OSError):  # of a full disk
                    file.close()

    def finish(self) -> Manifest:
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        source = {
            "run": self.identity,
            "files": len(self.numbers),
            "documents_read": self.read,
            "text_bytes": self.text_bytes,
            "dropped": dict(sorted(self.dropped.items())),
            "options": asdict(self.options),
        }
        manifest = Manifest(self.tokenizer.entry, splits, source)
        write_text(self.out / MANIFEST, manifest.to_json())
        return manifest


class _DigestSet:
    """The digests of all documents so far, in memory and in an append-only file."""

    def __init__(self, path: Path, count: int):
        self._file = open(path, "a+b")  # noqa: SIM115, lives as long as the run
        self._file.truncate(16 * count)
        self._file.seek(0)
        content = self._file.read()
        self._digests = {content[i : i + 16] for i in range(0, len(content), 16)}

    def add(self, digest: bytes) -> bool:
        """False if it was there before."""
        if digest in self._digests:
            return False
        self._digests.add(digest)
        self._file.write(digest)
        return True

    def close(self) -> None:
        self._file.close()

    def checkpoint(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(self._digests)


def tokenize(
    inputs: list[str],
    tokenizer: Tokenizer,
    out: str | Path,
    options: TokenizeOptions = TokenizeOptions(),
    *,
    workers: int = 0,
    progress: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Manifest:
    """Tokenizes all documents of `inputs` into the data folder `out`, or goes on with the run that was killed there.

    workers: worker processes; 0 does everything in this one. With options.part = (i, N) only the i-th of N parts is
    done, into a folder inside `out` that `titans-data merge` joins with the others. A finished run is returned as it is.
    Raises ValueError for inputs, options and records that cannot be used.
    """
    files = find_inputs(inputs, list(options.suffixes))
    options = replace(options, read=unit_chosen(files, options.read, options.validation))
    out = Path(out)
    i, n = options.part
    if n > 1:
        out = out / f"part-{i:05d}-of-{n:05d}"
    new = not out.exists()
    with writing(out), _only_writer(out):
        if (out / MANIFEST).exists():
            manifest = _finished(out, Run.identity_of(files, tokenizer, options), options)
        else:
            if not (out / PROGRESS).exists():
                refuse_another(tokenizer.entry, out / "tokenizer")
            run = Run(files, tokenizer, out, options)
            with _tidy_after_failure(run, new):
                run.checkpoint()
                tokenizer.save(out / "tokenizer")
                _work(run, workers, progress, checkpoint_seconds)
                manifest = run.finish()
        for name in (PROGRESS, DIGESTS):  # with a manifest there is nothing to go on from
            (out / name).unlink(missing_ok=True)
        return manifest


@contextmanager
def _only_writer(out: Path):
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {out}") from None
        yield


def _finished(out: Path, identity: str, options: TokenizeOptions) -> Manifest:
    manifest = Manifest.from_json((out / MANIFEST).read_text(), str(out / MANIFEST))
    if not _is_same_run(identity, options, manifest.source.get("run"), manifest.source.get("dropped", {})):
        raise ValueError(f"{out} is a finished data folder of other inputs, options or tokenizer; choose another")
    return manifest


def _is_same_run(identity: str, options: TokenizeOptions, noted: str | None, dropped: dict) -> bool:
    return identity == noted and (options.clean.skip_bad_records or not dropped.get("bad_record"))


@contextmanager
def _tidy_after_failure(run: Run, new: bool):
    """A failed run that wrote no document leaves no folder, if the folder is new."""
    try:
        yield
    except (ValueError, OSError):
        run.close()
        if new and not run.tokens:
            shutil.rmtree(run.out)
        raise


def _work(run: Run, workers: int, progress: bool, checkpoint_seconds: float) -> None:
    documents = run.remaining()
    total = sum(run.files[number].size for number in range(run.file, run.numbers.stop))
    saved = time.monotonic()
    with (
        progress_bar(total, disable=not progress) as bar,
        encoding(
            workers, run.tokenizer, run.out / "tokenizer", run.files, run.options.read, run.options.clean
        ) as encode,
    ):
        began, before = time.monotonic(), run.tokens
        for chunk, count, end, bytes_read in encode(_chunks(run, documents)):
            run.append(chunk, count, end)
            now = time.monotonic()
            if now - saved > checkpoint_seconds:
                run.checkpoint()
                saved = now
            bar.set_postfix_str(f"{(run.tokens - before) / max(now - began, 1e-9) / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(bytes_read - bar.n)


def _chunks(run: Run, documents: Documents):
    """(raw documents, the file and record to go on from, bytes read so far) of about CHUNK_BYTES each."""
    chunk, size, end = [], 0, (run.file, run.record)
    for number, record, raw in documents:
        if run.mine(record):
            chunk.append((number, record, raw))
            size += len(raw or b"")
        end = (number, record + 1)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk, end, documents.bytes_read
            chunk, size = [], 0
    yield chunk, end, documents.bytes_read


def files_of_part(files: list[InputFile], part: tuple[int, int]) -> tuple[range, tuple[int, int]]:
    """What part i of N does: the numbers of its files, and (i, n) for "of these the records r with r % n == i".

    Files go to parts in runs of about equal bytes, so the parts one after the other are the input in its order. With
    fewer files than parts every part reads all files and takes every N-th record.
    """
    i, n = part
    if not 0 <= i < n:
        raise ValueError(f"--shard {i}/{n}: the first number must be 0 to {n - 1}")
    if len(files) < n:
        return range(len(files)), (i, n)
    total = sum(file.size + 1 for file in files)
    before, owners = 0, []
    for file in files:
        owners.append(int((before + (file.size + 1) / 2) * n / total))
        before += file.size + 1
    return range(bisect_left(owners, i), bisect_left(owners, i + 1)), (0, 1)
