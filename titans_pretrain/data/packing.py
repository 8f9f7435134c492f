"""Which document goes where: shuffling and packing as pure functions of a seed and document lengths.

Sizes used here: T = `seq_len`, tokens per sample (one row of a batch); m = `document_multiple`, what documents are
padded to, so that each starts on a chunk of the memory.

Documents are laid out one after the other on a *stream* of samples; sample s is the stream's range [sT, (s+1)T).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
OPEN_SAMPLES = 64  # samples that wait for a document that fits, when documents are kept whole


def hash_key(*numbers: int) -> int:
    """One 64-bit key of several integers (splitmix64, Steele et al. 2014, chained)."""
    key = 0
    for number in numbers:
        key = (key + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


def permutation(n: int, key: int) -> np.ndarray:
    """A random order of range(n), int64 [n], the same on every machine and with every numpy release.

    Sorts the indices by splitmix64(key + index): a bijection of 64-bit integers, so no two sort keys are equal and
    the kind of sort cannot matter. (numpy's own generators may change between releases.)
    """
    keys = np.arange(n, dtype=np.uint64)
    keys += np.uint64(key)  # wraps
    keys += np.uint64(0x9E3779B97F4A7C15)
    keys ^= keys >> np.uint64(30)
    keys *= np.uint64(0xBF58476D1CE4E5B9)
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys)


@dataclass
class Layout:
    """Where each document begins on the stream: `start` is ascending, `document[i]` begins at `start[i]`."""

    start: np.ndarray  # int64 [n]
    document: np.ndarray  # int64 [n], indices into the lengths
    samples: int


def lay_out(lengths: np.ndarray, order: np.ndarray, seq_len: int, multiple: int, split_documents: bool) -> Layout:
    """Places the documents, in this order.

    lengths:          int64 [n], tokens of each document
    order:            int64 [n], the sequence in which they are placed
    split_documents:  True: back to back, cut wherever a sample ends. False: a document that fits into one sample is
                      never cut, it waits for a sample with room (best fit among the last few open ones); a longer one
                      starts a sample and fills as many as it needs.
    """
    padded = -(-lengths[order] // multiple) * multiple
    if split_documents:
        end = np.cumsum(padded)
        samples = -(-int(end[-1]) // seq_len) if len(end) else 0
        return Layout(end - padded, order, samples)
    start = np.empty(len(padded), np.int64)
    room: list[tuple[int, int]] = []  # (free tokens at its end, sample), ascending: the best fit is one bisection away
    samples = 0
    for i, size in enumerate(padded.tolist()):
        best = bisect_left(room, (size, -1))
        if best < len(room):
            free, sample = room.pop(best)
            start[i] = (sample + 1) * seq_len - free
        else:
            start[i] = samples * seq_len
            samples += -(-size // seq_len)
            sample = samples - 1
            free = samples * seq_len - int(start[i])
        if free - size >= multiple:
            insort(room, (free - size, sample))
            if len(room) > OPEN_SAMPLES:
                room.pop(0)  # the fullest has the least to lose
    ascending = np.argsort(start)
    return Layout(start[ascending], order[ascending], samples)
