"""Documents become finished tar members, in worker processes or in this one."""

import hashlib
import multiprocessing
import os
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans_pretrain.data_prep.cleaning import CleanOptions
from titans_pretrain.data_prep.shards import tar_sample
from titans_pretrain.data_prep.sources import InputFile, ReadOptions, extract, format_of
from titans_pretrain.data_prep.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Chunk:
    """Finished tar members of consecutive documents."""

    blob: bytes
    ends: list[int]  # of each document in blob
    token_bytes: list[int]
    digests: list[bytes]
    dropped: Counter
    text_bytes: int


class ChunkEncoder:
    """Turns raw documents into tar members; lives in every worker process."""

    def __init__(self, tokenizer: Tokenizer, files: list[InputFile], read: ReadOptions, clean: CleanOptions):
        self.tokenizer, self.files, self.field, self.clean = tokenizer, files, read.field, clean
        self._eos = np.array(tokenizer.entry.eos_id, tokenizer.dtype)
        self.kinds = [format_of(file, read) for file in files]

    def __call__(self, chunk: list[tuple[int, int, bytes | None]]) -> Chunk:
        result = Chunk(b"", [], [], [], Counter(), 0)
        members = []
        size = 0
        for number, record, raw in chunk:
            try:
                text = extract(raw, self.kinds[number], self.field)
            except ValueError as error:
                if not self.clean.skip_bad_records:
                    raise ValueError(
                        f"{self.files[number].path}, record {record}: {error}; --skip-bad-records would leave it out"
                    ) from None
                result.dropped["bad_record"] += 1
                continue
            if reason := self.clean.reason_to_drop(text):
                result.dropped[reason] += 1
                continue
            encoded = text.encode()
            digest = hashlib.blake2b(encoded, digest_size=16)
            tokens = np.append(self.tokenizer.encode(text), self._eos)
            metadata = {
                "source": self.files[number].name,
                "record": record,
                "characters": len(text),
                "blake2b": digest.hexdigest(),
            }
            members.append(tar_sample(f"{number:06d}-{record:09d}", tokens, metadata))
            size += len(members[-1])
            result.ends.append(size)
            result.token_bytes.append(tokens.nbytes)
            result.digests.append(digest.digest())
            result.text_bytes += len(encoded)
        result.blob = b"".join(members)
        return result


@contextmanager
def encoding(workers: int, tokenizer: Tokenizer, folder: Path, *how):
    """A function that encodes chunks, in their order, in worker processes or (0 workers) here.

    folder: where the tokenizer is saved; how: files and options as ChunkEncoder takes them."""
    if workers == 0:
        encoder = ChunkEncoder(tokenizer, *how)
        yield lambda chunks: ((encoder(chunk), len(chunk), end, read) for chunk, end, read in chunks)
        return

    def encode(chunks):
        waiting = deque()
        for chunk, end, read in chunks:
            waiting.append((pool.submit(_encode, chunk), len(chunk), end, read))
            if len(waiting) > 2 * workers:  # what is read ahead stays bounded
                future, *rest = waiting.popleft()
                yield future.result(), *rest
        for future, *rest in waiting:
            yield future.result(), *rest

    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # fork is unsafe once pyarrow or a progress bar has threads
        _start_worker,
        (folder, *how),
    )
    try:
        yield encode
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died, perhaps for lack of memory; run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: ChunkEncoder  # of this worker process


def _start_worker(folder: Path, *how) -> None:
    global _encoder
    _encoder = ChunkEncoder(load_tokenizer(folder), *how)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a killed parent cannot tell its workers, and they would wait for work for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(chunk) -> Chunk:
    return _encoder(chunk)
