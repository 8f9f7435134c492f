"""Whatever bytes a file holds, it gives documents, or one line that names the file."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pretrain.data_prep.sources import Documents, ReadOptions, extract, find_inputs, format_of
from titans_pretrain.data_prep.tokenize import CleanOptions, TokenizeOptions, tokenize
from titans_pretrain.data_prep.tokenizer import ByteTokenizer

NAMES = [
    name + ending
    for name in ("a.txt", "a.jsonl", "a.fa")
    for ending in ("", ".gz", ".zst", ".bz2", ".xz")
] + ["a.parquet"]  # fmt: skip
FRAGMENTS = [
    b'{"text": "x"}',
    b'{"text": ',
    b"[[[[",
    b"\n",
    b"\r\n",
    b"\n\n",
    b'"\\ud800"',
    b"\xff\xfe",
    b"\0",
    b">s\nACGT",
    b"1e999",
    b"NaN",
]
bytes_strategy = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def table() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", "two", "drei"] * 20, "n": list(range(60))}), file)
    return file.getvalue()


def check(path, options: ReadOptions) -> None:
    files = find_inputs([str(path)])
    try:
        records = [raw for _, _, raw in Documents(files, options)]
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for raw in records:
        try:
            extract(raw, format_of(files[0], options), options.field).encode()
        except ValueError as error:
            assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(bytes_strategy, st.sampled_from(NAMES), st.sampled_from(["file", "part", "paragraph", "line"]))
def test_any_bytes(folder, content, name, unit):
    (folder / name).write_bytes(content)
    check(folder / name, ReadOptions(documents=unit))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_table(folder, table, data):
    content = bytearray(table)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    (folder / "b.parquet").write_bytes(content[:cut])
    check(folder / "b.parquet", ReadOptions())


@settings(max_examples=15, deadline=None)
@given(st.lists(bytes_strategy.map(lambda line: line.replace(b"\n", b" ")), max_size=6))
def test_any_lines_are_counted_or_kept(folder, tmp_path_factory, lines):
    """With --skip-bad-records no line stops a run, and each is kept or counted."""
    (folder / "c.jsonl").write_bytes(b"\n".join(lines))
    out = tmp_path_factory.mktemp("out") / "data"
    options = TokenizeOptions(0.0, clean=CleanOptions(skip_bad_records=True))
    manifest = tokenize([str(folder / "c.jsonl")], ByteTokenizer(), out, options)
    records = sum(bool(line) and not line.isspace() for line in lines)
    assert manifest.totals("train")["documents"] + sum(manifest.source["dropped"].values()) == records
