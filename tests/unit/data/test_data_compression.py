"""Compressed files: all of every member, or an error. The libraries' own one-shot functions are the oracle for whole files."""

import bz2
import gzip
import io
import lzma
import os
import random

import pytest
import zstandard

from titans_pretrain.data_prep.compression import BLOCK, decompressed

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # a zstd frame without content, as pzstd writes

each = pytest.mark.parametrize("ending", COMPRESS)


def read(content: bytes, ending: str) -> bytes:
    return decompressed(io.BytesIO(content), "a" + ending).read()


def words(size: int) -> bytes:
    chance = random.Random(size)
    return b" ".join(chance.choice([b"ab", b"cde", b"\n", b"%d" % size]) for _ in range(size))


@each
@pytest.mark.parametrize("sizes", [[0], [1], [5], [30_000], [20_000, 0, 7], [3] * 50, [0, 0]])
def test_all_members(ending, sizes):
    contents = [words(size) for size in sizes]
    content = b"".join(COMPRESS[ending](part) for part in contents)
    assert read(content, ending) == b"".join(contents)
    assert read(content, ending.upper()) == b"".join(contents)


@each
def test_more_than_a_block_of_input_and_of_output(ending):
    noise, blank = (
        os.urandom(5 * BLOCK),
        bytes(1 << 24),
    )  # one that does not compress, one that compresses a thousandfold
    content = COMPRESS[ending](noise) + COMPRESS[ending](blank)
    assert len(content) > 5 * BLOCK
    assert read(content, ending) == noise + blank
    stream = decompressed(io.BytesIO(content), ending)
    lines = 0
    while block := stream.read(12_345):
        lines += len(block)
    assert lines == len(noise) + len(blank)


@each
def test_cut_anywhere_is_an_error(ending):
    """Except between two members: nothing in such a file says that there was more."""
    first, second = COMPRESS[ending](words(60)), COMPRESS[ending](words(90))
    whole = first + second
    for length in range(len(whole)):
        if length == len(first):
            continue
        with pytest.raises((OSError, EOFError)):
            read(whole[:length], ending)


@each
@pytest.mark.parametrize("tail", [b"garbage", b"\0\0garbage", b"\x1f"])
def test_other_bytes_behind_are_an_error(ending, tail):
    with pytest.raises((OSError, EOFError)):
        read(COMPRESS[ending](words(50)) + tail, ending)


@each
def test_a_damaged_second_member_is_an_error(ending):
    second = bytearray(COMPRESS[ending](words(400)))
    second[1] ^= 0xFF  # of its header
    with pytest.raises((OSError, EOFError)):
        read(COMPRESS[ending](words(50)) + bytes(second), ending)


@each
def test_zeros_pad_members(ending):
    parts = [words(50), words(70)]
    content = b"".join(COMPRESS[ending](part) + bytes(4) for part in parts) + bytes(2 * BLOCK)
    assert read(content, ending) == b"".join(parts)


def test_skippable_frames():
    content = SKIPPABLE + zstandard.compress(b"one") + SKIPPABLE + zstandard.compress(b"two") + SKIPPABLE
    assert read(content, ".zst") == b"onetwo"
    with pytest.raises(EOFError):
        read(content[:-1], ".zst")


def test_a_file_without_compression_is_left_alone():
    raw = io.BytesIO(b"text")
    assert decompressed(raw, "a.txt") is raw
