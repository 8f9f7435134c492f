import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pretrain.data.packing import hash_key, lay_out, permutation


@pytest.mark.parametrize("n", [0, 1, 2, 17, 1000])
def test_permutation_is_a_bijection(n):
    assert sorted(permutation(n, 7).tolist()) == list(range(n))


def test_permutation_is_frozen():
    """A resumed run must find the order it left: these values may change only with ORDER_VERSION."""
    assert permutation(10, hash_key(1, 2)).tolist() == [1, 3, 7, 9, 2, 8, 6, 4, 5, 0]
    assert hash_key(0) != hash_key(0, 0) != hash_key(0, 0, 0)


def test_permutation_mixes():
    n = 20000
    order = permutation(n, hash_key(3))
    distance = np.abs(order - np.arange(n)).mean() / n
    assert abs(distance - 1 / 3) < 0.01  # of two independent uniform numbers
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    other = permutation(n, hash_key(4))
    assert (order == other).sum() < 10


lengths_strategy = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(lengths_strategy, st.sampled_from([1, 4, 8]), st.integers(0, 10))
def test_split_layout_is_dense(lengths, multiple, seed):
    lengths = np.array(lengths)
    layout = lay_out(lengths, permutation(len(lengths), seed), 32, multiple, True)
    padded = -(-lengths[layout.document] // multiple) * multiple
    assert layout.start.tolist() == [0, *np.cumsum(padded)[:-1].tolist()]
    assert layout.samples == -(-int(padded.sum()) // 32)
    assert sorted(layout.document.tolist()) == list(range(len(lengths)))


@settings(max_examples=200)
@given(lengths_strategy, st.sampled_from([1, 4, 8]), st.integers(0, 10))
def test_whole_layout_never_cuts_what_fits(lengths, multiple, seed):
    lengths = np.array(lengths)
    layout = lay_out(lengths, permutation(len(lengths), seed), 32, multiple, False)
    size = lengths[layout.document]
    end = layout.start + size
    assert sorted(layout.document.tolist()) == list(range(len(lengths)))
    assert (layout.start[1:] >= layout.start[:-1] + -(-size[:-1] // multiple) * multiple).all(), "documents overlap"
    assert (layout.start % multiple == 0).all()
    assert end.max() <= layout.samples * 32
    fits = size <= 32
    assert (layout.start[fits] // 32 == (end[fits] - 1) // 32).all()
    assert (layout.start[~fits] % 32 == 0).all()


def test_whole_layout_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 2048, 5000)
    layout = lay_out(lengths, np.arange(5000), 2048, 1, False)
    assert lengths.sum() / (layout.samples * 2048) > 0.97
