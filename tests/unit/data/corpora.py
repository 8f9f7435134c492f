"""Small corpora with known tokens, and configurations to read them."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from titans_pretrain.data.manifest import MANIFEST, Manifest
from titans_pretrain.data_prep.shards import ShardWriter, tar_sample
from titans_pretrain.data_prep.tokenizer import ByteTokenizer

EOS = 256


def write_corpus(folder: Path, lengths, shard_size: int = 4096, seed: int = 0, validation=()) -> list[list[int]]:
    """A data folder of random documents of these lengths (eos included); returns the training documents' tokens."""
    tokenizer = ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    random = np.random.default_rng(seed)
    splits, documents = {}, []
    for split, sizes in (("train", lengths), ("validation", validation)):
        writer = ShardWriter(folder, split, shard_size, tokenizer.dtype.itemsize)
        for i, size in enumerate(sizes):
            tokens = np.append(random.integers(0, 256, size - 1), EOS).astype(tokenizer.dtype)
            if split == "train":
                documents.append(tokens.tolist())
            sample = tar_sample(f"{i:06d}", tokens, {"source": "random", "record": i})
            writer.add(sample, tokens.nbytes)
        splits[split] = writer.finish()
    (folder / MANIFEST).write_text(Manifest(tokenizer.entry, splits, {}).to_json())
    return documents


def make_config(path=None, seq_len=64, multiple=8, micro_batch=1, seed=0, mixture=None, **data):
    defaults = {"reset_documents": True, "split_long_documents": True, "cache_dir": None, "on_bad_shard": "stop"}
    data = defaults | {"mixture_schedule": []} | data
    return SimpleNamespace(
        data=SimpleNamespace(path=path and str(path), seq_len=seq_len, mixture=mixture or {}, **data),
        train=SimpleNamespace(seed=seed, micro_batch=micro_batch),
        model=SimpleNamespace(vocab_size=300, document_multiple=multiple),
    )


def edit_manifest(folder: Path, change) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def together(world: int, work) -> list:
    """work(rank, gather) on `world` threads that stand for processes; gather as all_gather_object. The answers by rank; an exception
    on one is raised here."""
    barrier, slots = threading.Barrier(world, timeout=30), [None] * world

    def run(rank: int):
        def gather(what) -> list:
            slots[rank] = what
            barrier.wait()
            found = list(slots)
            barrier.wait()
            return found

        try:
            return work(rank, gather)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(run, rank) for rank in range(world)]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
