from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.reader import Batch, Reader, Stopped, build_reader
from titans_pretrain.data.source import NoDocuments, open_manifest
from titans_pretrain.data.statistics import epoch_size, unigram_counts, unigram_entropy
from titans_pretrain.data.storage import ShardError

__all__ = [
    "Batch",
    "Manifest",
    "NoDocuments",
    "Reader",
    "ShardError",
    "Stopped",
    "build_reader",
    "epoch_size",
    "open_manifest",
    "unigram_counts",
    "unigram_entropy",
]
