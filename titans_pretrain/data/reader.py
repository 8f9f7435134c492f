"""The training-time reader: batches of packed documents, in an order that nothing but the seed decides.

How the order is made, and why it survives any change of the cluster:

* A corpus is an endless sequence of *samples* of `seq_len` tokens (source.py, window.py, packing.py), a pure function
  of (seed, epoch, manifest). It is computed from document lengths alone; no token is read to know what lies where.
* A mixture draws global sample g from the corpus that is furthest behind its share of the g samples so far. Where
  `data.mixture_schedule` changes the weights, or a restart does, the shares count from there.
* One call of `next` on every rank takes the next `micro_batch * world` samples; rank r gets rows
  [r * micro_batch, (r + 1) * micro_batch) of them. All ranks therefore hold the same cursor at all times: how many
  samples each corpus has given, as (epoch, window, sample). Another number of ranks, or another micro-batch, goes on
  from it with exactly the samples not yet seen.
* Context parallelism reads only its columns; labels are cut before, so the last column has its label too.
* `data.seq_len_warmup` cuts each sample into several rows, side by side in the batch: order and cursor do not know of it.
* With `data.on_bad_shard=skip` the processes agree, when a window opens and with every batch, on what none of them reads.

One batch is read ahead, in a thread, unless reading is quick. A cursor never counts it: it tells what was given out.

Documents are padded to `model.document_multiple` with inert tokens and cut where a sample ends; the rest of a cut
document is a document of its own (position 0) in another sample. At the end of a window (about a billion tokens) the
last sample is filled up with inert tokens.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from titans_pretrain.data.background import Background, at_once
from titans_pretrain.data.source import Gather, Source, alone, open_manifests
from titans_pretrain.data.storage import Folder
from titans_pretrain.data.window import Window

if TYPE_CHECKING:
    import torch

ORDER_VERSION = 1  # changes whenever the same seed gives another order
POLL = 0.2  # seconds between looks at a stop request while data is being waited for
SLOW = (
    0.002  # seconds that reading a batch takes, from which on the next one is read ahead; a thread costs a tenth of it
)


class Stopped(Exception):
    """A stop was requested while the next batch was on its way; it still comes, if it is asked for again."""


class Batch(NamedTuple):
    tokens: torch.Tensor  # int64 [micro_batch, columns]; of cut rows [micro_batch * n, columns / n]
    labels: torch.Tensor  # int64, same shape: the next token of the document; -100 none
    positions: torch.Tensor  # int64, same shape: index in the document; 0 starts one, -1 is inert padding


class Reader:
    """Iterator of `Batch`; made by `build_reader`."""

    def __init__(
        self,
        sources: list[Source],
        rank: int,
        world: int,
        micro_batch: int,
        seq_len: int,
        columns: Callable[[int], list[range]],
        starts: list[int],
        identity: dict,
        *,
        rows: int | None,
        gather: Gather | None,
        pinned: bool,
        stopped: Callable[[], bool],
    ):
        """columns: of a row of so many tokens, those that this process reads. starts: tokens before each mixture of the
        schedule. gather: None where nothing has to be agreed on."""
        self.tokenizer = sources[0].manifest.tokenizer
        self._sources = sources
        self._rank, self._world, self._micro_batch = rank, world, micro_batch
        self._seq_len, self._columns = seq_len, columns
        self._starts, self._tokens = starts, 0  # tokens of all samples that were taken, padding included
        self._counted = True  # False after a cursor of a release that did not count them
        self._identity = identity  # what a cursor depends on
        self._rows, self._drawn = rows, 0  # how many to give and how many were taken
        self._gather, self._pinned, self._stopped = gather, pinned, stopped
        self._endless = sources[0].endless
        self._absent: list[dict] = []  # cursors of corpora that have left the mixture and may come back
        self._given = self._cursor()  # after the last batch that was given out
        self._background = Background()
        self._ahead: tuple[Batch, Future] | None = None  # the next batch, and the cursor after it once it is filled
        self._places: list[tuple[Window, int] | None] = []  # its samples
        self._took = SLOW  # seconds, the last one
        self.cut_rows(seq_len)

    def cut_rows(self, length: int) -> None:
        """From the next batch on each sample is seq_len / length rows, in order: the same tokens and labels, and a document that
        a row's end cuts goes on in the next row as one of its own. length: a divisor of seq_len that divides into the segments."""
        assert self._seq_len % length == 0, f"rows of {length} tokens do not make up {self._seq_len}"
        columns = self._columns(length)
        self._rows_of_sample = [(start, columns) for start in range(0, self._seq_len, length)]
        self._shape = self._micro_batch * len(self._rows_of_sample), sum(map(len, columns))

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._begin()
        batch, cursor = self._ahead
        while not cursor.done():
            try:
                cursor.exception(POLL)  # waits; an error is raised below
            except TimeoutError:
                if self._stopped():
                    raise Stopped from None
        self._ahead = None
        if (given := cursor.result()) is None:
            raise StopIteration
        if batch.tokens.shape != self._shape:  # it was read ahead, before `cut_rows`
            batch = self._empty()
            self._read(self._places, self._rows_of_sample, [tensor.numpy() for tensor in batch])
        self._given = given
        if self._beside:
            self._begin()
        return batch

    @property
    def _beside(self) -> bool:
        """Whether the next batch is read in a thread. Not where the ranks must agree, since the other communication is in this one,
        nor what lies at hand: out of the page cache it takes less time than the work of a step that hides it."""
        count = self._micro_batch * self._world
        return self._gather is None and (self._took >= SLOW or not all(s.has_open(count) for s in self._sources))

    def _begin(self) -> None:
        """Begins the next batch.

        The thread never owns a tensor: to free one while the interpreter ends would abort the process. And what memory
        another thread allocates is given back to the system each time."""
        batch = self._empty()
        run = self._background.submit if self._beside else at_once
        self._ahead = batch, run(self._next, self._rows_of_sample, [tensor.numpy() for tensor in batch])

    def _empty(self) -> Batch:
        import torch  # not above: `titans-data` uses this package, a process per core, and needs no torch

        return Batch(*(torch.empty(self._shape, dtype=torch.int64, pin_memory=self._pinned) for _ in range(3)))

    def close(self) -> None:
        """Gives up what is being downloaded. For the end of a run: the reader cannot be used any more."""
        for source in self._sources:
            source.folder.close()

    def _next(self, rows: list[tuple[int, list[range]]], arrays: list[np.ndarray]) -> dict | None:
        """Fills tokens, labels, positions; the cursor after them. None at the end."""
        began = time.perf_counter()
        self._places, windows = self._draw()
        if not windows:
            return None
        self._read(self._places, rows, arrays)
        while self._gather:
            found = self._gather([window.unreadable for window in windows])
            if all(other == found[0] for other in found):
                break
            for window, *numbers in zip(windows, *found):
                window.give_up(set().union(*numbers))
            self._read(self._places, rows, arrays)
        self._took = time.perf_counter() - began
        return self._cursor()

    def _cursor(self) -> dict:
        tokens = {"tokens": self._tokens} if self._counted else {}
        return tokens | {"sources": [source.state_dict() for source in self._sources]}

    def _draw(self) -> tuple[list[tuple[Window, int] | None], list[Window]]:
        """The next samples of all ranks: window and sample of this rank's own, None for inert ones; and all windows that any is in."""
        first, count, drawn = self._rank * self._micro_batch, self._micro_batch * self._world, 0
        if self._rows is not None:
            count = min(count, self._rows - self._drawn)
        own, windows = [], []
        while drawn < count and (sources := self._drawn_from()):
            # with an end, a source may give less than it is asked for, and those that are left share the rest
            most = min(count - drawn, self._left_of_mixture()) if len(sources) == 1 or self._endless else 1
            order = self._order(sources, most)
            stretches = [
                source.take(n) for source, n in zip(sources, np.bincount(order, minlength=len(sources)).tolist())
            ]
            taken = sum(n for stretch in stretches for _, _, n in stretch)
            for i in range(max(first - drawn, 0), min(first + self._micro_batch - drawn, taken)):
                own.append(_sample(stretches[order[i]], int((order[:i] == order[i]).sum())))
            windows += [window for stretch in stretches for window, _, _ in stretch]
            drawn += taken
            self._tokens += taken * self._seq_len
        self._drawn += drawn
        return own + [None] * (self._micro_batch - len(own)), list(dict.fromkeys(windows))

    def _drawn_from(self) -> list[Source]:
        """The sources of the mixture that now holds."""
        self._weigh(self._weights())
        return [source for source in self._sources if source.weight and not source.exhausted]

    def _weights(self) -> dict[str, float]:
        return {source.fingerprint: source.weight for source in self._sources if source.weight}

    def _weigh(self, before: dict[str, float]) -> None:
        """Gives every source its weight after so many tokens. Where they are not those of before, the shares count from here."""
        stage = bisect_right(self._starts, self._tokens) - 1
        for source in self._sources:
            source.weight = source.weights[stage]
        if self._weights() != before:
            for source in self._sources:
                source.drawn = 0

    def _left_of_mixture(self) -> int:
        """Samples until the next mixture; a sample is of the one that holds where it begins."""
        following = bisect_right(self._starts, self._tokens)
        return (
            -(-(self._starts[following] - self._tokens) // self._seq_len) if following < len(self._starts) else 1 << 62
        )

    def _order(self, sources: list[Source], count: int) -> np.ndarray:
        """The sources, by number, that the next samples come from: each time the one with the largest deficit; among equals
        the first by fingerprint, so the order of the config's keys does not matter."""
        if len(sources) == 1:
            return np.zeros(count, np.int64)
        total = sum(source.weight for source in sources)
        shares, drawn = [source.weight / total for source in sources], [source.drawn for source in sources]
        first, order = sum(drawn) + 1, []
        for samples in range(first, first + count):
            deficits = [share * samples - n for share, n in zip(shares, drawn)]
            chosen = deficits.index(max(deficits))
            drawn[chosen] += 1
            order.append(chosen)
        return np.array(order)

    def _read(self, places: list, rows: list[tuple[int, list[range]]], arrays: list[np.ndarray]) -> None:
        """places: of the samples, see _draw; rows: of each, the column of the sample where it begins and its columns to be read."""
        for number, (place, (begin, columns)) in enumerate(product(places, rows)):
            if place is None:  # the last batch is not full
                for array, value in zip(arrays, (self.tokenizer.filler_id, -100, -1)):
                    array[number] = value
                continue
            window, sample = place
            start = 0
            for part in columns:
                end = start + len(part)
                into = (array[number, start:end] for array in arrays)
                window.read(sample, begin + part.start, begin + part.stop, *into, row=begin)
                start = end

    @property
    def skipped(self) -> dict[str, str]:
        """Shards that could not be read so far: name -> reason. Empty unless data.on_bad_shard is skip."""
        return {name: reason for source in self._sources for name, reason in source.skipped.items()}

    @property
    def epoch(self) -> int:
        """Epochs that the corpus furthest behind has completed."""
        return min(cursor["epoch"] for cursor in self._given["sources"])

    def state_dict(self) -> dict:
        """The cursor, for a checkpoint: the same on every rank, a few integers per corpus (JSON-able)."""
        return self._identity | self._given | {"absent": self._absent}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a cursor of any world size and micro-batch. Weights of the mixture may have changed, and corpora
        may have joined, left or come back: the shares then count from here. Raises ValueError for a cursor of other data."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(f"the checkpoint's data cursor has {key}={state.get(key)}, this run has {key}={value}")
        cursors = {cursor["manifest"]: cursor for cursor in [*state.get("absent", []), *state["sources"]]}
        known = [source for source in self._sources if source.fingerprint in cursors]
        if not known:
            paths = ", ".join(source.folder.path for source in self._sources)
            raise ValueError(f"the checkpoint's data cursor belongs to another corpus than {paths}")
        if len(self._starts) > 1 and "tokens" not in state:
            raise ValueError(
                "data.mixture_schedule counts tokens, and the checkpoint's data cursor, of an earlier release, does not: change "
                "data.mixture at a restart instead"
            )
        if self._ahead is not None:
            wait([self._ahead[1]])
            self._ahead = None
        for source in known:
            source.load_state_dict(cursors.pop(source.fingerprint))
        self._tokens, self._counted = state.get("tokens", 0), "tokens" in state
        self._weigh({cursor["manifest"]: cursor["weight"] for cursor in state["sources"] if cursor["weight"]})
        self._absent, self._drawn = list(cursors.values()), 0
        self._given = self._cursor()


def _sample(stretches: list[tuple[Window, int, int]], number: int) -> tuple[Window, int]:
    """Window and sample of the `number`-th of these samples."""
    for window, first, count in stretches:
        if number < count:
            return window, first + number
        number -= count
    raise AssertionError("fewer samples than were counted")


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
    rows: int | None = None,
    gather: Gather | None = None,
    pinned: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Reader:
    """The reader of one data-parallel rank.

    config:        uses data.*, train.seed, train.micro_batch, model.document_multiple, model.vocab_size
    rank, world:   this data-parallel rank and how many there are
    epochs:        None reads for ever; a number ends (StopIteration) after so many epochs, the last batch filled up
                   with inert rows
    context_*:     context parallelism: `seq_len` is cut into context_size * segments_per_rank equal segments and this
                   rank gets columns of segments context_rank, context_rank + context_size, ... side by side
    rows:          ends after so many rows of all ranks together, the last batch filled up with inert rows; they are the same
                   ones for any number of ranks
    gather:        of a run of many processes: called on each with an object, answers with the objects of all, in one order
                   (all_gather_object); each process builds its readers and takes their batches in step with the others
    pinned:        puts batches into pinned memory, from where they go to a GPU while it computes
    stopped:       whether to give up waiting: `next` then raises Stopped

    Each `next` gives Batch tensors [train.micro_batch, seq_len / context_size], see also cut_rows. With `epochs` a mixture
    is the one that data.mixture_schedule begins with. Raises ValueError for a configuration
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
    skip = data.on_bad_shard == "skip"
    if skip and gather is None and world * context_size > 1:
        raise ValueError(
            "data.on_bad_shard=skip on several ranks needs `gather`: they have to agree on what is skipped"
        )
    mixtures = [(0, data.mixture or {data.path: 1.0})]
    if data.mixture and epochs is None:
        mixtures += data.mixture_schedule
    if any(weight <= 0 for _, mixture in mixtures for weight in mixture.values()):
        raise ValueError(f"weights of data.mixture must be positive, got {mixtures}")
    paths = list(dict.fromkeys(path for _, mixture in mixtures for path in mixture))
    seed = config.train.seed
    layout = {
        "seq_len": data.seq_len,
        "multiple": multiple if data.reset_documents else 1,
        "reset_documents": data.reset_documents,
        "split_documents": data.split_long_documents,
    }
    folders, pool = [Folder(path, data.cache_dir) for path in paths], Background(8)
    sources = [
        Source(
            folder,
            manifest,
            split,
            [mixture.get(path, 0.0) for _, mixture in mixtures],
            seed,
            epochs=epochs,
            skip_bad_shards=skip,
            layout=layout,
            gather=gather or alone,
            pool=pool,
        )
        for path, folder, manifest in zip(paths, folders, open_manifests(folders, gather or alone))
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
    columns = partial(
        context_columns, context_rank=context_rank, context_size=context_size, segments_per_rank=segments_per_rank
    )
    gather = gather if skip else None
    return Reader(
        sources,
        rank,
        world,
        config.train.micro_batch,
        data.seq_len,
        columns,
        [tokens for tokens, _ in mixtures],
        identity,
        rows=rows,
        gather=gather,
        pinned=pinned,
        stopped=stopped,
    )


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
