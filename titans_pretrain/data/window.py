"""A window: the shards that are open, and shuffled together, at one time.

An epoch permutes the shards and cuts them into windows of about a billion tokens. Within a window documents are
permuted over all its shards, packed into samples, and the samples are permuted again (the parts of a split document
do not follow each other). So only a window's document lengths are ever in memory, only its files need to be on this
machine, and the start of a run with 10,000 shards costs the reading of a few tables.
"""

from collections.abc import Callable, Iterable

import numpy as np

from titans_pretrain.data.background import Background
from titans_pretrain.data.manifest import Manifest, ShardEntry
from titans_pretrain.data.packing import hash_key, lay_out, permutation
from titans_pretrain.data.shards import load_index, open_tar
from titans_pretrain.data.storage import Folder, ShardError

# Part of the order: changing one changes ORDER_VERSION in reader.py
WINDOW_TOKENS = 1 << 30
WINDOW_SHARDS = 64


def windows_of_epoch(shards: list[ShardEntry], seed: int, epoch: int) -> list[list[int]]:
    """The shards (their numbers in the manifest) of each window of an epoch, in order."""
    windows, tokens = [], 0
    for shard in permutation(len(shards), hash_key(seed, epoch)).tolist():
        if not windows or len(windows[-1]) == WINDOW_SHARDS or tokens + shards[shard].tokens > WINDOW_TOKENS:
            windows.append([])
            tokens = 0
        windows[-1].append(shard)
        tokens += shards[shard].tokens
    return windows


class Window:
    """Samples made of the documents of some shards.

    samples:   how many
    left_out:  numbers of the shards that cannot be read, so that they have no place in the layout; given: those that must not
    begun:     whether samples were taken before (by an earlier process): a shard whose tar cannot be read then keeps its place,
               as padding, because nothing may move any more
    on_error:  called with a shard's number and its ShardError; it raises, or returns to go on without the shard
    pool:      opens the shards
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: str,
        shards: list[int],
        key: int,
        *,
        seq_len: int,
        multiple: int,
        reset_documents: bool,
        split_documents: bool,
        on_error: Callable[[int, ShardError], None],
        left_out: list[int],
        begun: bool,
        pool: Background,
    ):
        self.seq_len = seq_len
        self._on_error = on_error
        self._reset = reset_documents
        self._filler = manifest.tokenizer.filler_id
        self._dtype = manifest.dtype
        self._arange = np.arange(seq_len)
        self._buffer = np.empty(seq_len + 1, self._dtype)
        self._view = memoryview(self._buffer).cast("B")
        entries = manifest.splits[split]

        def open_shard(number: int):
            """The shard's index and its tar; without a tar its documents are padding, without an index it has none."""
            entry, table = entries[number], None
            try:
                if number in left_out:
                    raise ShardError(
                        f"{folder.describe(entry.name)}: left out of this window, here or on another process"
                    )
                table = load_index(folder, entry)
                return table, open_tar(folder, entry)
            except ShardError as error:
                on_error(number, error)
                return (table if begun else None), None

        opened = pool.map(open_shard, shards)  # waits for disks and downloads, not for this CPU
        self.left_out = [number for number, (table, _) in zip(shards, opened) if table is None]
        self._numbers = shards
        self._files = [file for _, file in opened]
        tables = [np.empty((0, 2), np.int64) if table is None else table for table, _ in opened]
        owner = np.repeat(np.arange(len(shards)), [len(table) for table in tables])
        table = np.concatenate(tables)
        length = table[:, 1] // self._dtype.itemsize
        order = permutation(len(length), hash_key(key, 1))
        layout = lay_out(length, order, seq_len, multiple, split_documents)
        self.samples = layout.samples
        self._start = np.append(layout.start, layout.samples * seq_len)  # the last one ends the last document's padding
        document = layout.document
        # per document: where it begins and where the next one does, tokens, offset in bytes, file. One table, because
        # taking a few rows out of it is what a sample costs.
        self._place = np.stack(
            [layout.start, self._start[1:], length[document], table[document, 0], owner[document]], axis=1
        )
        self._filled = int(self._place[-1, 0] + self._place[-1, 2]) if len(document) else 0  # the last document's end
        self._sample = permutation(self.samples, hash_key(key, 2))

    def read(
        self,
        sample: int,
        first: int,
        last: int,
        tokens: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
        row: int = 0,
    ):
        """Writes columns [first, last) of a sample into three int64 arrays [last - first]. row: the column at which their row
        begins, where a sample is several. Raises ShardError."""
        base = int(self._sample[sample]) * self.seq_len
        begin, width, size = base + first, last - first, self._dtype.itemsize
        buffer, view = self._buffer[: width + 1], self._view  # one token more: the last label
        buffer.fill(self._filler)
        unlabelled, unreadable = [], []  # column ranges
        i = int(self._start.searchsorted(begin, "right")) - 1
        # Without resets the label of a document's last token is the next document's first token.
        j = int(self._start.searchsorted(begin + width + (not self._reset)))
        for start, next_start, length, offset, file in self._place[i:j].tolist():
            start -= begin  # columns from here on
            over = start + length  # here its tokens end and its padding begins
            a = start if start > 0 else 0
            b = over if over <= width else width + 1
            if a < b and not self._read(file, view[a * size : b * size], offset + (a - start) * size):
                unreadable.append((a, min(b, width)))
            if not self._reset:
                continue
            if b > width:
                b = width
            if a < b:
                position = a - max(start, row - first)  # a part cut off by a row's end is a document of its own
                positions[a:b] = self._arange[position : position + b - a]
            if over <= width:
                pad_end = min(next_start - begin, width)
                if over < pad_end:
                    positions[max(over, 0) : pad_end] = -1
                unlabelled.append((max(over - 1, 0), pad_end))
        if not self._reset:
            filled = max(0, min(self._filled - begin, width))
            positions[:filled] = self._arange[first - row : first - row + filled]
            positions[filled:] = -1
            if self._filled <= begin + width:
                unlabelled.append((max(filled - 1, 0), width))
        tokens[:] = buffer[:-1]
        labels[:] = buffer[1:]
        for a, b in unlabelled:
            labels[a:b] = -100
        for a, b in unreadable:
            positions[a:b] = -1
            labels[max(a - 1, 0) : b] = -100

    @property
    def unreadable(self) -> list[int]:
        """Numbers of the shards that have a place in the layout and are padding now."""
        return [n for n, file in zip(self._numbers, self._files) if file is None and n not in self.left_out]

    def give_up(self, numbers: Iterable[int]) -> None:
        """Makes padding of these shards."""
        for number in numbers:
            self._files[self._numbers.index(number)] = None

    def _read(self, number: int, buffer: memoryview, offset: int) -> bool:
        """False where the shard is unreadable and may be skipped: its documents become padding, nothing else moves."""
        file = self._files[number]
        if file is None:
            return False
        try:
            file.read_into(buffer, offset)
            return True
        except ShardError as error:
            self._on_error(self._numbers[number], error)
            self._files[number] = None
            return False
