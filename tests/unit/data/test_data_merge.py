"""Parts of a job array, and finished folders, become one folder."""

import pkgutil
from collections import Counter

import pytest
from prepared import SMALL, TOKENIZER, Killed, texts_of, write_lines

from titans_pretrain.data_prep.merge import merge
from titans_pretrain.data_prep.tokenize import TokenizeOptions, tokenize
from titans_pretrain.data_prep.tokenizer import load_tokenizer
from titans_pretrain.data_prep.verify import verify

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_merge_to_the_whole(inputs, tmp_path, parts):
    folder, texts = inputs
    for i in range(parts):
        tokenize([str(folder)], TOKENIZER, tmp_path / "data", TokenizeOptions(**SMALL, part=(i, parts)))
    merged = merge([str(tmp_path / "data")])
    train, validation = (texts_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    if parts <= 5:  # as many files at least: the order of the input
        assert train == [text for text in texts if text in set(train)]
    tokenize([str(folder)], TOKENIZER, tmp_path / "whole", TokenizeOptions(**SMALL))
    assert sorted(validation) == sorted(texts_of(tmp_path / "whole", "validation"))
    assert merged.totals("train")["documents"] == len(train)
    assert verify(tmp_path / "data") == []
    assert not list((tmp_path / "data").glob("part-*"))


@pytest.mark.parametrize("site", ["_link", "write_text"])
def test_killed_merge_is_repeated(inputs, tmp_path, monkeypatch, site):
    for i in range(3):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(**SMALL, part=(i, 3)))
    calls = Counter()

    def dying(*arguments):
        calls[site] += 1
        if calls[site] == 2 or site == "write_text":
            raise Killed
        return original(*arguments)

    original = pkgutil.resolve_name(f"titans_pretrain.data_prep.merge.{site}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"titans_pretrain.data_prep.merge.{site}", dying)
        merge([str(tmp_path / "data")])
    merge([str(tmp_path / "data")])
    assert verify(tmp_path / "data") == []
    assert not list((tmp_path / "data").glob("*part*"))
    with pytest.raises(ValueError, match="finished data folder already"):
        merge([str(tmp_path / "data")])


def test_merge_overwrites_nothing(inputs, tmp_path):
    for i in range(2):
        tokenize([str(inputs[0] / f"{i}.jsonl")], TOKENIZER, tmp_path / f"d{i}", TokenizeOptions(0.0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "my-own.tar").write_text("precious")
    with pytest.raises(ValueError, match="empty folder"):
        merge([str(tmp_path / "d0"), str(tmp_path / "d1")], str(tmp_path / "out"))
    assert (tmp_path / "out" / "my-own.tar").read_text() == "precious"
    with pytest.raises(ValueError, match="finished data folder already"):
        merge([str(tmp_path / "d0"), str(tmp_path / "d1")], str(tmp_path / "d0"))


def test_parts_of_different_runs_do_not_merge(inputs, tmp_path):
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(part=(0, 2)))
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(part=(1, 2), validation=0.5))
    with pytest.raises(ValueError, match="same inputs with the same options"):
        merge([str(tmp_path / "data")])


def test_missing_part_is_named(inputs, tmp_path):
    for i in (0, 2):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(part=(i, 3)))
    with pytest.raises(ValueError, match="part 1 of 3 is missing"):
        merge([str(tmp_path / "data")])
    (tmp_path / "data" / "part-00001-of-00003").mkdir()
    with pytest.raises(ValueError, match="part-00001-of-00003 has no manifest"):
        merge([str(tmp_path / "data")])


def test_merge_of_folders(inputs, tmp_path):
    folder, texts = inputs
    for i in range(2):
        tokenize([str(folder / f"{i}.jsonl")], TOKENIZER, tmp_path / f"d{i}", TokenizeOptions(0.0))
    merge([str(tmp_path / "d0"), str(tmp_path / "d1")], str(tmp_path / "both"))
    assert texts_of(tmp_path / "both", "train") == texts[:80]
    assert verify(tmp_path / "both") == [] == verify(tmp_path / "d0")
    tokenize([str(folder / "2.jsonl")], load_tokenizer("nucleotide"), tmp_path / "n", TokenizeOptions(0.0))
    with pytest.raises(ValueError, match="different tokenizers"):
        merge([str(tmp_path / "d0"), str(tmp_path / "n")], str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="--out"):
        merge([str(tmp_path / "d0"), str(tmp_path / "d1")])


def test_merge_deduplicates_over_all_parts(tmp_path):
    """What a job array cannot know of each other: equal texts in different parts, or on different sides of the split."""
    texts = [f"text {i} " * (i % 30 + 1) for i in range(120)]
    for name, part, validation in (("a", texts[:80], 0.0), ("b", texts[60:], 0.3), ("c", texts[:70], 0.0)):
        write_lines(tmp_path / f"{name}.jsonl", part)
        options = TokenizeOptions(validation, shard_size=8_000)
        tokenize([str(tmp_path / f"{name}.jsonl")], TOKENIZER, tmp_path / name, options)
    held_out = texts_of(tmp_path / "b", "validation")
    merged = merge([str(tmp_path / name) for name in "abc"], str(tmp_path / "all"), deduplicate=True)
    assert texts_of(tmp_path / "all", "validation") == held_out
    assert texts_of(tmp_path / "all", "train") == [text for text in texts if text not in held_out]
    assert merged.source["dropped"] == {"duplicate": 80 + 60 + 70 - 120}
    assert verify(tmp_path / "all") == []
    assert len(merged.splits["train"]) > 3
