"""Tokenizers: lossless, reproducible, and the same ids in Hugging Face form."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.data_prep.huggingface import PROBES, differing_texts
from titans_pretrain.data_prep.tokenizer import (
    CONTROLS,
    ByteTokenizer,
    NucleotideTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from titans_pretrain.data_prep.train_tokenizer import sample_lines, train_sentencepiece

AWKWARD = [
    *PROBES,
    *CONTROLS.values(),
    "text <|titans_eos|> in the middle",
    "\n\n\n",
    "a\n",
    "\r\n \r\n",
    "".join(chr(c) for c in range(0x20, 0x250)),
    "⁧مرحبا⁩ \u202e reversed",
    "ﷺ ﬃ Ǆ ß ẞ İ ı",
    "1 23 456 7890 ٠١٢٣ ①②",
    "\ue000\uf8ff\ufffe\uffff\ufdd0",
]
text_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture(scope="module")
def trained(source_files):
    lines = sample_lines((path.read_text() for path in source_files), 20000, seed=0)
    return train_sentencepiece(lines, 1000)


@pytest.fixture(scope="module")
def fast(trained, tmp_path_factory):
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_sample_is_seeded_and_uniform():
    texts = ["\n".join(f"{i} {j}" for j in range(100)) for i in range(100)]
    one = sample_lines(texts, 500, seed=1)
    assert one == sample_lines(texts, 500, seed=1)
    assert one != sample_lines(texts, 500, seed=2)
    assert len(one) == len(set(one)) == 500
    third = sum(int(line.split()[0]) < 33 for line in one)
    assert 130 < third < 200  # 165 expected, standard deviation 10


def test_sample_cuts_long_lines():
    assert "".join(sample_lines(["x" * 10000], 10, 0)) == "x" * 10000


def test_training_is_reproducible(source_files, trained):
    lines = sample_lines((path.read_text() for path in source_files), 20000, seed=0)
    again = train_sentencepiece(lines, 1000)
    assert again.definition == trained.definition
    assert again.entry == trained.entry


def test_too_many_or_too_few_pieces_is_an_error():
    with pytest.raises(ValueError, match="lower --vocab-size"):
        train_sentencepiece(["a b c"], 5000)
    for size in (100, 0, -1):
        with pytest.raises(ValueError, match="raise --vocab-size"):
            train_sentencepiece(["a b c"], size)


@pytest.mark.parametrize("text", AWKWARD)
def test_sentencepiece_is_lossless(trained, text):
    assert trained.decode(trained.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text_strategy)
def test_word_by_word_gives_the_ids_of_the_whole(trained, text):
    assert trained._words_are_independent
    assert trained.encode(text).tolist() == trained._model.encode(text)


def test_word_by_word_on_real_text(trained, source_files, monkeypatch):
    for limit in (10**6, 500):  # the second forgets its words all the time
        monkeypatch.setattr("titans_pretrain.data_prep.tokenizer.CACHED_CHARACTERS", limit)
        for path in source_files:
            text = path.read_text()
            assert trained.encode(text).tolist() == trained._model.encode(text)
    for text in [*AWKWARD, "▁ ▁▁a ▁b", " \n ", "  \n\n  x"]:
        assert trained.encode(text).tolist() == trained._model.encode(text)


def test_a_model_with_prefix_is_encoded_whole(source_files):
    """Llama's way: a blank before the text, runs of blanks kept. A word is then no text of its own."""
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = source_files[0].read_text().split("\n")
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    text = "def f(x):\n    return x\n\nprint(1)"
    assert not tokenizer._words_are_independent
    assert tokenizer.encode(text).tolist() == tokenizer._model.encode(text)
    assert tokenizer.entry.pad_id is None and tokenizer.entry.filler_id == tokenizer.entry.eos_id


def test_pieces_over_several_words_are_encoded_whole(source_files):
    """Trained without splitting at blanks, pieces such as `in the` exist: words are not independent."""
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(source_files[0].read_text().split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_by_whitespace=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert not tokenizer._words_are_independent
    text = source_files[0].read_text()
    assert tokenizer.encode(text).tolist() == tokenizer._model.encode(text)


def test_huggingface_ids_are_equal(trained, fast, source_files):
    documents = [path.read_text() for path in source_files[:20]]
    chance = random.Random(0)
    everything = "".join(documents) + "".join(AWKWARD)
    fuzz = ["".join(chance.choices(everything, k=chance.randrange(60))) for _ in range(500)]
    assert differing_texts(trained, fast, [*AWKWARD, *documents, *fuzz]) == []


@settings(max_examples=300, deadline=None)
@given(text_strategy)
def test_huggingface_ids_are_equal_on_any_text(trained, fast, text):
    assert differing_texts(trained, fast, [text]) == []


def test_a_difference_would_be_found(trained, fast):
    from tokenizers import Tokenizer, normalizers

    other = Tokenizer.from_str(fast.to_str())
    other.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert differing_texts(trained, other, AWKWARD)


@pytest.mark.parametrize("make", [ByteTokenizer, NucleotideTokenizer])
def test_builtin_tokenizers_have_a_huggingface_form(make, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = make()
    tokenizer.save(tmp_path)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert differing_texts(tokenizer, fast, [*AWKWARD, "acgtNNN" * 50]) == []
    assert fast.get_vocab_size() == tokenizer.entry.vocab_size
    for name in ("eos", "bos", "pad"):
        assert fast.token_to_id(CONTROLS[name]) == getattr(tokenizer.entry, name + "_id")


def test_transformers_loads_every_kind(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    for tokenizer in (trained, ByteTokenizer(), NucleotideTokenizer()):
        folder = tmp_path / tokenizer.entry.kind
        tokenizer.save(folder)
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded.eos_token_id == tokenizer.entry.eos_id
        assert loaded.pad_token_id == tokenizer.entry.pad_id
        assert loaded.bos_token_id == tokenizer.entry.bos_id
        for text in AWKWARD:
            assert loaded(text)["input_ids"] == tokenizer.encode(text).tolist()
            if tokenizer.entry.kind != "nucleotide":
                assert loaded.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé\n").tolist() == [97, 195, 169, 10]
    assert tokenizer.decode([97, 195, 169, 256]) == "aé"


def test_nucleotides():
    tokenizer = NucleotideTokenizer()
    assert tokenizer.encode("ACGTNacgtnUuRY-é").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 3, 4, 4, 4, 4]
    assert tokenizer.decode([0, 1, 2, 3, 4, 5]) == "ACGTN"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "nucleotide", "huggingface"])
def test_folder_gives_the_tokenizer_back(kind, trained, tmp_path):
    if kind == "huggingface":
        trained.save(tmp_path / "source")
        tokenizer = load_tokenizer(tmp_path / "source" / "tokenizer.json")
    else:
        tokenizer = {"sentencepiece": trained, "byte": ByteTokenizer(), "nucleotide": NucleotideTokenizer()}[kind]
    assert tokenizer.entry.kind == kind
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.entry == tokenizer.entry == read_tokenizer_entry(tmp_path / "saved")
    for text in AWKWARD:
        assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_imported_huggingface_tokenizer_has_the_same_ids(trained, tmp_path):
    trained.save(tmp_path)
    imported = load_tokenizer(tmp_path / "tokenizer.json")
    for text in AWKWARD:
        assert imported.encode(text).tolist() == trained.encode(text).tolist()
        assert imported.decode(imported.encode(text)) == text
    assert imported.entry.eos_id == trained.entry.eos_id


def test_huggingface_tokenizer_without_eos_is_an_error(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="--eos"):
        load_tokenizer(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json", eos=CONTROLS["eos"]).entry.eos_id == trained.entry.eos_id
    with pytest.raises(ValueError, match="not in this tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json", eos="</s>")


def test_fingerprint_sees_every_change(trained, tmp_path):
    trained.save(tmp_path)
    before = read_tokenizer_entry(tmp_path).fingerprint
    model = tmp_path / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b" ")
    assert read_tokenizer_entry(tmp_path).fingerprint != before
    trained.save(tmp_path)
    entry = json.loads((tmp_path / "titans_tokenizer.json").read_text())
    (tmp_path / "titans_tokenizer.json").write_text(json.dumps(entry | {"eos_id": 5}))
    assert read_tokenizer_entry(tmp_path).fingerprint != before


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_what_is_no_tokenizer(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="holds neither"):
        load_tokenizer(Path(tmp_path) / "..")
