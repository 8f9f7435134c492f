"""Every kind of damage is found, and the shard is named."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from corpora import edit_manifest, write_corpus

from titans_pretrain.data_prep.shards import save_index, sha256_of
from titans_pretrain.data_prep.tokenizer import NucleotideTokenizer
from titans_pretrain.data_prep.verify import verify

SHARD = "train-000001.tar"
INDEX = SHARD + ".idx.npy"


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "data", [50] * 20, validation=[30])
    assert verify(tmp_path / "data") == verify(tmp_path / "data", quick=True) == []
    return tmp_path / "data"


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def rewrite_with_checksum(folder, change_bytes):
    """Damage that the checksum cannot see, because it was written so."""
    path = folder / SHARD
    path.write_bytes(change_bytes(path.read_bytes()))

    def change(document):
        entry = document["splits"]["train"]["shards"][1]
        entry["sha256"], entry["bytes"] = sha256_of(path), path.stat().st_size

    edit_manifest(folder, change)


def shard_entry(folder, **values):
    edit_manifest(folder, lambda document: document["splits"]["train"]["shards"][1].update(values))


def swap_index_rows(folder):
    index = np.load(folder / INDEX)
    save_index(folder / INDEX, index[::-1].copy())


DAMAGES = {
    "truncated": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:1000]), SHARD, "truncated", True),
    "longer": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x"), SHARD, "1 bytes too long", True),
    "missing": (lambda f: (f / SHARD).unlink(), SHARD, "No such file", True),
    "flipped token": (lambda f: flip(f / SHARD, 520), SHARD, "content changed", False),
    "flipped header": (lambda f: flip(f / SHARD, 3), SHARD, "content changed", False),
    "no index": (lambda f: (f / INDEX).unlink(), INDEX, "unreadable", True),
    "cut index": (lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes()[:-8]), INDEX, "unreadable", True),
    "swapped index": (swap_index_rows, INDEX, "does not describe", False),
    "documents": (lambda f: shard_entry(f, documents=7), INDEX, r"the manifest says int64 \(7, 2\)", True),
    "tokens": (lambda f: shard_entry(f, tokens=7), INDEX, "the manifest says 7", True),
    "stray file": (lambda f: shutil.copy(f / SHARD, f / "train-000999.tar"), "train-000999.tar", "not in", True),
    "left-over": (lambda f: (f / "train.partial.tar").touch(), "train.partial.tar", "not in the manifest", True),
    "foreign tokenizer": (lambda f: NucleotideTokenizer().save(f / "tokenizer"), "tokenizer", "foreign", True),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer", "not a tokenizer folder", True),
    "id outside": (
        lambda f: rewrite_with_checksum(f, lambda b: b[:512] + b"\xff\xff" + b[514:]),
        SHARD,
        "1 ids outside the vocabulary of 259",
        False,
    ),
    "no eos": (
        lambda f: rewrite_with_checksum(f, lambda b: b[: 512 + 98] + b"\x00\x00" + b[512 + 100 :]),
        SHARD,
        "1 documents do not end with eos",
        False,
    ),
    "named twice": (lambda f: shard_entry(f, name="train-000000.tar"), "train-000000.tar", "named twice", True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(folder, damage):
    harm, name, message, quick_finds = DAMAGES[damage]
    harm(folder)
    findings = verify(folder)
    assert findings
    assert any(line.startswith(name + ":") for line in findings), findings
    assert any(__import__("re").search(message, line) for line in findings), findings
    assert bool(verify(folder, quick=True)) == quick_finds


def test_flip_anywhere_is_found(folder):
    size = (folder / SHARD).stat().st_size
    for offset in np.random.default_rng(0).integers(0, size, 20):
        flip(folder / SHARD, int(offset))
        assert verify(folder) == [f"{SHARD}: content changed, sha256 differs"]
        flip(folder / SHARD, int(offset))
    assert verify(folder) == []


def test_no_manifest_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no manifest"):
        verify(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", json.dumps({"version": 99})])
def test_unreadable_manifest_is_an_error(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="not a readable manifest"):
        verify(folder)


def test_fixture_is_a_real_tar(folder):
    with tarfile.open(folder / SHARD) as tar:
        assert len(tar.getnames()) == 2 * len(np.load(folder / INDEX))
