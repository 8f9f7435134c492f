"""The picture of `titans-data inspect --png`."""

import numpy as np

from titans_pretrain.data_prep.inspect import _draw


def test_lengths_are_plain_numbers(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    labels, save = [], Figure.savefig

    def kept(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        (axes,) = figure.axes
        labels.extend(text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels()))

    monkeypatch.setattr(Figure, "savefig", kept)
    edges = 2 ** np.arange(5, 14)
    _draw(str(tmp_path / "lengths.png"), "corpus", "train", edges, np.full(8, 25_000))
    assert {"64", "1,024", "20,000"} <= set(labels)
    assert not any("^" in label for label in labels)
