"""Statistics of a data folder's tokens."""

import numpy as np

from titans_pretrain.data.shards import load_index, open_tar
from titans_pretrain.data.source import open_manifest
from titans_pretrain.data.storage import Folder


def unigram_counts(data_dir: str, split: str = "train", cache_dir: str | None = None) -> np.ndarray:
    """How often each token id occurs in a split, int64 [vocab_size]. Reads the whole split, a document at a time."""
    folder = Folder(str(data_dir), cache_dir)
    manifest = open_manifest(folder)
    counts = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for shard in manifest.splits.get(split, []):
        file = open_tar(folder, shard)
        for offset, size in load_index(folder, shard).tolist():
            tokens = np.empty(size // manifest.dtype.itemsize, manifest.dtype)
            file.read_into(memoryview(tokens).cast("B"), offset)
            # add.at touches only the ids of this document; bincount would cost the whole vocabulary each time
            np.add.at(counts, tokens, 1)
    return counts


def unigram_entropy(data_dir: str, split: str = "train", cache_dir: str | None = None) -> float:
    """Entropy of the token frequencies, nats per token: the loss of the best model that ignores context.
    Raises ValueError for a split without tokens."""
    counts = unigram_counts(data_dir, split, cache_dir)
    counts = counts[counts > 0]
    if not len(counts):
        raise ValueError(f"{data_dir} has no {split} tokens")
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def epoch_size(config, split: str = "train") -> tuple[int, int]:
    """(tokens, columns) of an epoch of all corpora of a config. Columns count the padding that lets each document start at a
    multiple of model.document_multiple; its share is that of the first shard of each corpus."""
    data, multiple = config.data, config.model.document_multiple if config.data.reset_documents else 1
    tokens = columns = 0
    for path in data.folders:
        folder = Folder(path, data.cache_dir)
        manifest = open_manifest(folder)
        lengths = load_index(folder, manifest.splits[split][0])[:, 1] // manifest.dtype.itemsize
        here = manifest.totals(split)["tokens"]
        tokens += here
        columns += int(here * (-(-lengths // multiple) * multiple).sum() / lengths.sum())
    return tokens, columns
