"""Speed of the data work: tokenizing against sentencepiece itself, and reading.

    python -m benchmarks.data                      # two minutes; prints a table, then one line per bar
    python -m benchmarks.data --text corpus/*.txt  # tokenize your own text instead of this machine's Python files
    python -m benchmarks.data --json data.json --strict

Bars: tokenizing, files to shards, at least 80 % of what sentencepiece does on the same cores and text in memory (the faster
of two ways: whole documents with its own threads, or lines in one process per core); 100 M tokens per CPU-second out of the page cache; the first batch in
2 s with 10,000 shards of 64,000 documents in the manifest; memory that does not grow by more than 4 batches while reading.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import sysconfig
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.common import Bar

ROUNDS = 2


def find_text(paths: list[str] | None, megabytes: int) -> list[Path]:
    """UTF-8 files, about so many megabytes; by default Python sources of this machine."""
    if paths is None:
        roots = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
        candidates = sorted(path for root in sorted(roots) for path in Path(root).rglob("*.py"))
    else:
        candidates = [Path(path) for path in paths]
    chosen, size = [], 0
    for path in candidates:
        try:
            size += len(path.read_text(encoding="utf-8").encode())
        except (OSError, UnicodeDecodeError):
            continue
        chosen.append(path)
        if size > megabytes << 20:
            break
    return chosen


def tokenizing(folder: Path, files: list[Path], vocab_size: int, cores: int) -> tuple[list[tuple[str, str]], list[Bar]]:
    from titans_pretrain.data_prep.tokenize import TokenizeOptions, tokenize
    from titans_pretrain.data_prep.train_tokenizer import sample_lines, train_sentencepiece

    texts = [path.read_text(encoding="utf-8") for path in files]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    began = time.perf_counter()
    tokenizer = train_sentencepiece(sample_lines(texts, 200_000, 0), vocab_size)
    rows = [("training the tokenizer, 200,000 lines", f"{time.perf_counter() - began:.1f} s")]

    # one file, as corpora come; opening tens of thousands of small files would measure the disk
    corpus = folder / "corpus.jsonl"
    with open(corpus, "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")

    def ours() -> float:
        data = folder / f"data{time.monotonic_ns()}"
        began = time.perf_counter()
        tokenize([str(corpus)], tokenizer, data, TokenizeOptions(validation=0.0), workers=cores)
        return time.perf_counter() - began

    ways = {
        f"titans-data tokenize, {cores} processes, start to finish": ours,
        "sentencepiece itself, whole documents, threads": lambda: encode_threads(tokenizer.definition, texts, cores),
        "sentencepiece itself, lines, processes": lambda: encode_processes(tokenizer.definition, texts, cores),
    }
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on all of them
        for name, measure in ways.items():
            seconds[name].append(measure())
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    rows += [(name, speed(megabytes / min(times), tokens / megabytes)) for name, times in seconds.items()]
    first, *others = (min(times) for times in seconds.values())
    return rows, [Bar("tokenizing / sentencepiece", min(others) / first, 0.8, "times")]


def encode_threads(model: bytes, texts: list[str], cores: int) -> float:
    """Seconds that sentencepiece takes with its own threads."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    began = time.perf_counter()
    processor.encode(texts, num_threads=cores)
    return time.perf_counter() - began


def encode_processes(model: bytes, texts: list[str], cores: int) -> float:
    """Seconds that the slowest of `cores` processes takes, each with its part of the lines, when all have them in memory."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(cores), context.Queue()
    workers = [
        context.Process(target=_encode_lines, args=(model, texts[i::cores], barrier, seconds)) for i in range(cores)
    ]
    for worker in workers:
        worker.start()
    slowest = max(seconds.get() for _ in workers)
    for worker in workers:
        worker.join()
    return slowest


def _encode_lines(model: bytes, texts: list[str], barrier, seconds) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    lines = [text.split("\n") for text in texts]
    barrier.wait()
    began = time.perf_counter()
    for part in lines:
        processor.encode(part)
    seconds.put(time.perf_counter() - began)


def speed(megabytes_per_second: float, tokens_per_megabyte: float) -> str:
    return f"{megabytes_per_second:.1f} MB/s, {megabytes_per_second * tokens_per_megabyte / 1e6:.2f} M tokens/s"


def make_config(path: Path, seq_len: int, micro_batch: int, multiple: int):
    data = SimpleNamespace(
        path=str(path),
        seq_len=seq_len,
        mixture={},
        reset_documents=True,
        split_long_documents=True,
        cache_dir=None,
        on_bad_shard="stop",
    )
    train = SimpleNamespace(seed=0, micro_batch=micro_batch)
    return SimpleNamespace(data=data, train=train, model=SimpleNamespace(vocab_size=300, document_multiple=multiple))


def write_corpus(folder: Path, tokens: int, mean_length: int) -> None:
    """Documents of random bytes, lengths log-normal as those of web text."""
    from titans_pretrain.data.manifest import MANIFEST, Manifest
    from titans_pretrain.data_prep.shards import ShardWriter, tar_sample
    from titans_pretrain.data_prep.tokenizer import ByteTokenizer

    tokenizer, random = ByteTokenizer(), np.random.default_rng(0)
    tokenizer.save(folder / "tokenizer")
    writer = ShardWriter(folder, "train", 64 << 20, tokenizer.dtype.itemsize)
    written = 0
    while written < tokens:
        length = int(np.clip(random.lognormal(np.log(mean_length) - 0.5, 1.0), 2, 1 << 20))
        document = random.integers(0, 256, length).astype(tokenizer.dtype)
        document[-1] = tokenizer.entry.eos_id
        writer.add(tar_sample(f"{written:012d}", document, {}), document.nbytes)
        written += length
    manifest = Manifest(tokenizer.entry, {"train": writer.finish(), "validation": []})
    (folder / MANIFEST).write_text(manifest.to_json())


def reading(folder: Path, tokens: int) -> tuple[list[tuple[str, str]], list[Bar]]:
    from titans_pretrain.data import build_reader

    write_corpus(folder, tokens, mean_length=1000)
    rows, bars = [], []
    reader = build_reader(make_config(folder, 4096, 8, multiple=16), epochs=1)  # also brings all into the page cache
    for _ in range(5):
        size = sum(tensor.nbytes for tensor in next(reader))
    peak = peak_bytes()
    deque(reader, maxlen=0)
    growth = (peak_bytes() - peak) / size
    bars.append(Bar("memory growth while reading", growth, 4, "batches", at_least=False))
    for seq_len, micro_batch in ((2048, 8), (4096, 8), (32768, 1), (1 << 20, 1)):
        reader = build_reader(make_config(folder, seq_len, micro_batch, multiple=16), epochs=1)
        began, read = time.process_time(), 0
        for batch in reader:
            read += batch.tokens.numel()
        rate = read / (time.process_time() - began) / 1e6
        rows.append((f"reading rows of {seq_len:,}, mean document 1,000", f"{rate:.0f} M tokens per CPU-second"))
        if seq_len == 4096:
            bars.append(Bar("reading, rows of 4,096", rate, 100, "M tokens per CPU-second"))
    return rows, bars


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def first_batch(folder: Path, shards: int, documents: int) -> tuple[list[tuple[str, str]], list[Bar]]:
    """10,000 names for one shard of 64,000 documents: a corpus of 0.6 trillion tokens that needs no disk."""
    from titans_pretrain.data import build_reader
    from titans_pretrain.data.manifest import MANIFEST, Manifest, ShardEntry
    from titans_pretrain.data_prep.shards import save_index
    from titans_pretrain.data_prep.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer")
    index = np.empty((documents, 2), np.int64)
    index[:, 1] = 2000
    index[:, 0] = 512 + 3584 * np.arange(documents)
    size = 3584 * documents + 1024
    save_index(folder / "shard.idx.npy", index)
    with open(folder / "shard.tar", "wb") as file:
        file.truncate(size)  # a sparse file: zeros
    entries = [ShardEntry(f"train-{i:06d}.tar", documents, 1000 * documents, size, f"{i:064x}") for i in range(shards)]
    for entry in entries:
        os.symlink("shard.tar", folder / entry.name)
        os.symlink("shard.idx.npy", folder / entry.index_name)
    (folder / MANIFEST).write_text(Manifest(tokenizer.entry, {"train": entries, "validation": []}).to_json())
    began = time.perf_counter()
    next(build_reader(make_config(folder, 4096, 8, 16)))
    seconds = time.perf_counter() - began
    return [(f"first batch, {shards:,} shards, {shards * documents:,} documents", f"{seconds:.2f} s")], [
        Bar(f"first batch with {shards:,} shards", seconds, 2, "s", at_least=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text to tokenize (default: Python files here)")
    parser.add_argument("--megabytes", type=int, default=64, help="of text (default: 64)")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="to read (default: 100 million)")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is not held")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as root:
        for name, measure in (
            (
                "tokenizing",
                lambda f: tokenizing(f, find_text(options.text, options.megabytes), options.vocab_size, cores),
            ),
            ("reading", lambda f: reading(f, options.tokens)),
            ("first batch", lambda f: first_batch(f, 10_000, 64_000)),
        ):
            folder = Path(root) / name.replace(" ", "-")
            folder.mkdir()
            more_rows, more_bars = measure(folder)
            for row in more_rows:
                print(f"| {row[0]:<60} | {row[1]:<38} |", flush=True)
            rows += more_rows
            bars += more_bars
    print(f"\n{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    for bar in bars:
        print(bar)
    if options.json:
        figures = {"rows": rows, "bars": [asdict(bar) | {"held": bar.held} for bar in bars], "cores": cores}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.strict and not all(bar.held for bar in bars):
        sys.exit(1)


if __name__ == "__main__":
    main()
