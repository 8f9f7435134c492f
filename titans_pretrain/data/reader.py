"""The training-time reader: batches of packed documents, in an order that nothing but the seed decides.

How the order is made, and why it survives any change of the cluster:

* A corpus is an endless sequence of *samples* of `seq_len` tokens (source.py, window.py, packing.py), a pure function
  of (seed, epoch, manifest). It is computed from document lengths alone; no token is read to know what lies where.
* A mixture draws global sample g from the corpus that is furthest behind its share of the g samples so far.
* One call of `next` on every rank takes the next `micro_batch * world` samples; rank r gets rows
  [r * micro_batch, (r + 1) * micro_batch) of them. All ranks therefore hold the same cursor at all times: how many
  samples each corpus has given, as (epoch, window, sample). Another number of ranks, or another micro-batch, goes on
  from it with exactly the samples not yet seen.
* Context parallelism reads only its columns; labels are cut before, so the last column has its label too.

Documents are padded to `model.document_multiple` with inert tokens and cut where a sample ends; the rest of a cut
document is a document of its own (position 0) in another sample. At the end of a window (about a billion tokens) the
last sample is filled up with inert tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from titans_pretrain.data.source import Source
from titans_pretrain.data.storage import Folder

if TYPE_CHECKING:
    import torch

ORDER_VERSION = 1  # changes whenever the same seed gives another order


class Batch(NamedTuple):
    tokens: torch.Tensor  # int64 [micro_batch, columns]
    labels: torch.Tensor  # int64, same shape: the next token of the document; -100 none
    positions: torch.Tensor  # int64, same shape: index in the document; 0 starts one, -1 is inert padding


class Reader:
    """Iterator of `Batch`; made by `build_reader`."""

    def __init__(
        self, sources: list[Source], rank: int, world: int, micro_batch: int, columns: list[range], identity: dict
    ):
        self._sources = sources
        self._rank, self._world, self._micro_batch = rank, world, micro_batch
        self._columns = columns
        self._width = sum(len(part) for part in columns)
        self._filler = sources[0].manifest.tokenizer.filler_id
        self._identity = identity  # what a cursor depends on

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Batch:
        import torch  # not above: `titans-data` uses this package, a process per core, and needs no torch

        samples = [self._draw() for _ in range(self._micro_batch * self._world)]
        if samples[0] is None:
            raise StopIteration
        batch = Batch(*(torch.empty(self._micro_batch, self._width, dtype=torch.int64) for _ in range(3)))
        arrays = [tensor.numpy() for tensor in batch]
        first = self._rank * self._micro_batch
        for row, sample in enumerate(samples[first : first + self._micro_batch]):
            if sample is None:  # the last batch of the last epoch is not full
                for array, value in zip(arrays, (self._filler, -100, -1)):
                    array[row] = value
                continue
            window, number = sample
            start = 0
            for part in self._columns:
                end = start + len(part)
                window.read(number, part.start, part.stop, *(array[row, start:end] for array in arrays))
                start = end
        return batch

    def _draw(self):
        alive = [source for source in self._sources if not source.exhausted]
        if len(alive) < 2:
            return alive[0].next() if alive else None
        total = sum(source.weight for source in alive)
        drawn = sum(source.drawn for source in alive) + 1
        # the largest deficit; among equals the first by fingerprint, so the order of the config's keys does not matter
        chosen = max(alive, key=lambda source: source.weight / total * drawn - source.drawn)
        return chosen.next() or self._draw()  # None only where the rest of its last epoch was unreadable

    @property
    def skipped(self) -> dict[str, str]:
        """Shards that could not be read so far: name -> reason. Empty unless data.on_bad_shard is skip."""
        return {name: reason for source in self._sources for name, reason in source.skipped.items()}

    @property
    def epoch(self) -> int:
        """Epochs that the corpus furthest behind has completed."""
        return min(source.epoch for source in self._sources)

    def state_dict(self) -> dict:
        """The cursor, for a checkpoint: the same on every rank, a few integers per corpus (JSON-able)."""
        return self._identity | {"sources": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a cursor of any world size and micro-batch. Weights of the mixture may have changed, and corpora
        may have joined or left: the shares then count from here. Raises ValueError for a cursor of other data."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(f"the checkpoint's data cursor has {key}={state.get(key)}, this run has {key}={value}")
        cursors = {cursor["manifest"]: cursor for cursor in state["sources"]}
        known = [source for source in self._sources if source.fingerprint in cursors]
        if not known:
            paths = ", ".join(source.folder.path for source in self._sources)
            raise ValueError(f"the checkpoint's data cursor belongs to another corpus than {paths}")
        same = {source.fingerprint: source.weight for source in self._sources} == {
            fingerprint: cursor["weight"] for fingerprint, cursor in cursors.items()
        }
        for source in known:
            source.load_state_dict(cursors[source.fingerprint])
        if not same:
            for source in self._sources:
                source.drawn = 0


def build_reader(
    config,
    split: str = "train",
    rank: int = 0,
    world: int = 1,
    *,
    epochs: int | None = None,
    context_rank: int = 0,
    context_size: int = 1,
    segments_per_rank: int = 1,
) -> Reader:
    """The reader of one data-parallel rank.

    config:        uses data.*, train.seed, train.micro_batch, model.document_multiple, model.vocab_size
    rank, world:   this data-parallel rank and how many there are
    epochs:        None reads for ever; a number ends (StopIteration) after so many epochs, the last batch filled up
                   with inert rows
    context_*:     context parallelism: `seq_len` is cut into context_size * segments_per_rank equal segments and this
                   rank gets columns of segments context_rank, context_rank + context_size, ... side by side

    Each `next` gives Batch tensors [train.micro_batch, seq_len / context_size]. Raises ValueError for a configuration
    or data that cannot be read, ShardError (a ValueError) naming the shard while reading.
    """
    data, multiple = config.data, config.model.document_multiple
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} ranks")
    if data.reset_documents and data.seq_len % multiple:
        raise ValueError(f"data.seq_len={data.seq_len} must be a multiple of {multiple}, where documents may start")
    if not data.reset_documents and not data.split_long_documents:
        raise ValueError("data.split_long_documents=false needs data.reset_documents=true")
    if data.on_bad_shard not in ("stop", "skip"):
        raise ValueError(f"data.on_bad_shard is {data.on_bad_shard!r}; legal are stop, skip")
    if not data.mixture and not data.path:
        raise ValueError("data.path is not set; give the folder that `titans-data tokenize` wrote")
    paths = data.mixture or {data.path: 1.0}
    if any(weight <= 0 for weight in paths.values()):
        raise ValueError(f"weights of data.mixture must be positive, got {paths}")
    seed = config.train.seed
    layout = {
        "seq_len": data.seq_len,
        "multiple": multiple if data.reset_documents else 1,
        "reset_documents": data.reset_documents,
        "split_documents": data.split_long_documents,
    }
    sources = [
        Source(
            Folder(path, data.cache_dir),
            split,
            weight,
            seed,
            epochs=epochs,
            skip_bad_shards=data.on_bad_shard == "skip",
            layout=layout,
        )
        for path, weight in paths.items()
    ]
    sources.sort(key=lambda source: source.fingerprint)
    _check_agreement(sources, config.model.vocab_size)
    identity = {
        "version": ORDER_VERSION,
        "split": split,
        "seed": seed,
        "seq_len": data.seq_len,
        "document_multiple": layout["multiple"],
        "reset_documents": data.reset_documents,
        "split_long_documents": data.split_long_documents,
        "tokenizer": sources[0].manifest.tokenizer.fingerprint,
    }
    columns = context_columns(data.seq_len, context_rank, context_size, segments_per_rank)
    return Reader(sources, rank, world, config.train.micro_batch, columns, identity)


def context_columns(seq_len: int, context_rank: int, context_size: int, segments_per_rank: int) -> list[range]:
    """The columns of each segment that a context-parallel rank holds, in order."""
    segments = context_size * segments_per_rank
    if seq_len % segments:
        raise ValueError(f"data.seq_len={seq_len} does not divide into {segments} segments (cp * segments_per_rank)")
    if context_size == 1:
        return [range(seq_len)]
    length = seq_len // segments
    return [range(s * length, (s + 1) * length) for s in range(context_rank, segments, context_size)]


def _check_agreement(sources: list[Source], vocab_size: int) -> None:
    first = sources[0]
    for source in sources[1:]:
        if source.manifest.tokenizer.fingerprint != first.manifest.tokenizer.fingerprint:
            raise ValueError(f"{source.folder.path} and {first.folder.path} were made with different tokenizers")
    if len({source.fingerprint for source in sources}) < len(sources):
        raise ValueError("data.mixture names the same corpus twice")
    needed = first.manifest.tokenizer.vocab_size
    if needed > vocab_size:
        raise ValueError(f"model.vocab_size={vocab_size} is too small for the data's tokenizer of {needed} ids")
