"""Text cut to a length, and the places between its sentences."""

import random

import numpy as np
import pytest

from titans_pretrain.evaluation.haystack import Haystack, split_sentences

TEXT = "It was a dark night. Was it?\nRain fell: 3.5 inches.\n\nThen it was over."
SENTENCES = [np.array([1, 1]), np.array([2]), np.array([3, 3, 3])]


def test_a_haystack_is_repeated_and_begins_anywhere():
    ids, places = Haystack(SENTENCES, anywhere=False).cut(15, random.Random(0))
    assert ids.tolist() == [1, 1, 2, 3, 3, 3] * 2 + [1, 1, 2]
    assert places.tolist() == [0, 2, 3, 6, 8, 9, 12, 14, 15]
    begins = set()
    for seed in range(20):
        ids, places = Haystack(SENTENCES, anywhere=True).cut(8, random.Random(seed))
        begins.add(int(ids[0]))
        assert len(ids) == 8 and (places[0], places[-1]) == (0, 8)
        # between places, one sentence, whole but for the last
        assert all(len(set(part.tolist())) == 1 for part in np.split(ids, places[1:-1]))
    assert begins == {1, 2, 3}
    ids, places = Haystack(SENTENCES, anywhere=False).cut(0, random.Random(0))
    assert (ids.tolist(), places.tolist()) == ([], [0])
    with pytest.raises(ValueError, match="the text to hide something in is empty"):
        Haystack([np.array([], int)], anywhere=False)


def test_sentences_join_to_the_text():
    assert "".join(split_sentences(TEXT)) == TEXT
    assert split_sentences("One. Two!\n\nAt 3.5 three") == ["One.", " Two!", "\n", "\n", "At 3.5 three"]
