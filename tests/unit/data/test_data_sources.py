"""Every input form gives its documents, streaming and in order."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys

import pytest
import zstandard

from titans_pretrain.data_prep.sources import (
    PART_BYTES,
    Documents,
    InputFile,
    ReadOptions,
    extract,
    find_inputs,
    format_of,
    unit_chosen,
)

TEXT_DEFAULTS = ReadOptions()
TEXTS = ["first", "zweites\nDokument", "третий", "4 🙂\n\nend\n"]


def read(files, options=TEXT_DEFAULTS, **where):
    return [
        extract(raw, format_of(files[number], options), options.field)
        for number, _, raw in Documents(files, options, **where)
    ]


def jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_jsonl(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](jsonl(TEXTS) + b"\n"))
    assert read(find_inputs([str(path)])) == TEXTS


def test_jsonl_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, "content"))
    assert read(find_inputs([str(tmp_path)]), ReadOptions(field="content")) == TEXTS


DEEP = '{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("line", [DEEP, '{"text": 1}', '{"other": "x"}', "[]", '{"text": "half', r'{"text": "\ud800"}'])
def test_bad_json_record(line):
    with pytest.raises(ValueError):
        extract(line.encode(), "jsonl", "text")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i}" for i in range(3000)]
    table = pyarrow.table({"text": texts, "score": list(range(3000))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="zstd")
    files = find_inputs([str(tmp_path / "*.parquet")])
    assert read(files) == texts
    assert read(files, first_record=2500) == texts[2500:]
    with pytest.raises(ValueError, match="only text, score"):
        read(files, ReadOptions(field="body"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read(files)


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"x": "a"}], [True], [1.5]])
def test_parquet_column_that_is_no_text(tmp_path, values):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    files = find_inputs([str(tmp_path)])
    assert [raw for _, _, raw in Documents(files, ReadOptions())] == [None] * len(values)
    with pytest.raises(ValueError, match="column 'text' holds no text; --field"):
        read(files)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
def test_parquet_text_of_every_type(tmp_path, kind):
    """Also what says that it is UTF-8 and is not: the record is bad, not the file."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    good = pyarrow.array(["ok", None, "é"])
    column = good.dictionary_encode() if kind == "dictionary" else good.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(find_inputs([str(tmp_path)])) == ["ok", "", "é"]
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"\xff\xfe", b"ok"]).buffers())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    assert [raw for _, _, raw in Documents(find_inputs([str(tmp_path)]), ReadOptions())] == [b"\xff\xfe", b"ok"]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Jsonl.GZ", "a.NDJSON.Zst"])
def test_suffixes_in_any_case(tmp_path, name):
    ending = "." + name.split(".")[2].lower() if name.count(".") > 1 else ""
    (tmp_path / name).write_bytes(COMPRESS[ending](jsonl(TEXTS)))
    assert read(find_inputs([str(tmp_path)], [".jsonl", ".jsonl.gz", ".ndjson.zst"])) == TEXTS


@pytest.mark.parametrize(
    "options, expected",
    [
        (ReadOptions(documents="part"), ["a\nb\n\nc\n---\nd"]),
        (ReadOptions(), ["a\nb\n\nc\n---\nd\n"]),
        (ReadOptions(documents="line"), ["a", "b", "", "c", "---", "d"]),
        (ReadOptions(documents="paragraph"), ["a\nb", "c\n---\nd"]),
        (ReadOptions(separator="---"), ["a\nb\n\nc", "d"]),
    ],
)
def test_text(tmp_path, options, expected):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n---\nd\n")
    assert read(find_inputs([str(tmp_path)]), options) == expected


def test_parts_are_whole_paragraphs_and_lose_no_line(tmp_path):
    paragraphs = [f"{i} " + "word " * (i * 7 % 150) + "\nsecond line" for i in range(200)]
    (tmp_path / "a.txt").write_text("\n\n" + "\n\n\n".join(paragraphs) + "\n")
    parts = read(find_inputs([str(tmp_path)]), ReadOptions(documents="part"))
    assert [p for part in parts for p in part.split("\n\n\n")] == paragraphs
    sizes = [len(part.encode()) for part in parts]
    assert min(sizes[:-1]) >= PART_BYTES - 1 and max(sizes) < PART_BYTES + 900


def test_parts_without_blank_lines_end_at_a_line(tmp_path):
    lines = [f"line {i}" for i in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    parts = read(find_inputs([str(tmp_path)]), ReadOptions(documents="part"))
    assert "\n".join(parts) == "\n".join(lines)
    assert all(4 * PART_BYTES - 1 <= len(part) < 4 * PART_BYTES + 10 for part in parts[:-1])


@pytest.mark.parametrize(
    "names, validation, asked, unit",
    [
        (["a.txt"], 0.01, "auto", "part"),
        (["a.txt"] * 99, 0.01, "auto", "part"),
        (["a.txt"] * 100, 0.01, "auto", "file"),
        (["a.txt"], 0.0, "auto", "file"),  # nothing is to be held out
        (["a.txt", "b.jsonl"], 0.01, "auto", "file"),  # its lines are documents enough
        (["a.txt"], 0.01, "file", "file"),
        (["a.txt"] * 100, 0.01, "paragraph", "paragraph"),
    ],
)
def test_what_a_document_is_where_nobody_says(names, validation, asked, unit, caplog):
    files = [InputFile(name, name, 1) for name in names]
    assert unit_chosen(files, ReadOptions(documents=asked), validation).documents == unit
    assert ("--documents file" in caplog.text) == (unit != asked and unit == "part")  # a choice is told


def test_fasta(tmp_path):
    with gzip.open(tmp_path / "a.fa.gz", "wb") as file:
        file.write(b">one first sequence\nACGT\nacgn\n;comment\n>two\nTTTT\r\nAA\r\n")
    assert read(find_inputs([str(tmp_path)])) == ["ACGTacgn", "TTTTAA"]


def test_folder_is_sorted_filtered_and_skips_hidden_files(tmp_path):
    for name in ("b.py", "a.py", "c.txt", "sub/d.py", ".git/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_inputs([str(tmp_path)], [".py"])
    assert [file.name for file in files] == ["a.py", "b.py", "sub/d.py"]
    assert [file.size for file in files] == [4, 4, 8]
    assert [f.name for f in find_inputs([str(tmp_path / "**/*.py")])] == ["a.py", "b.py", "d.py"]


@pytest.mark.parametrize("path", ["nothing/*.txt", "/no/such/folder"])
def test_no_input_is_an_error(path):
    with pytest.raises(ValueError, match="no input files"):
        find_inputs([path])


def test_standard_input(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(jsonl(TEXTS))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(reading, "rb")))
    assert read(find_inputs(["-"]), ReadOptions(format="jsonl")) == TEXTS


def test_remote(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for i, text in enumerate(TEXTS):
        system.pipe(f"/corpus/{i}.jsonl", jsonl([text]))
    assert read(find_inputs(["memory://corpus/*.jsonl"])) == TEXTS
    assert read(find_inputs(["memory://corpus"])) == TEXTS
    assert read(find_inputs(["memory://corpus/2.jsonl"])) == TEXTS[2:3]
    with pytest.raises(ValueError, match="cannot list"):
        find_inputs(["nosuchprotocol://x"])


def test_resume_position_and_progress(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([f"{name}{i}" for i in range(4)]))
    files = find_inputs([str(tmp_path)])
    assert read(files, numbers=range(1, 3), first_record=2) == ["b2", "b3", "c0", "c1", "c2", "c3"]
    documents = Documents(files, ReadOptions())
    list(documents)
    assert documents.bytes_read == sum(file.size for file in files)


def test_damaged_compression_names_the_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS * 1000))[:-100])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz"):
        read(find_inputs([str(tmp_path)]))


def test_documents_stream(tmp_path):
    """A big file is not read ahead: after one document most of it is still on disk."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 1000] * 20000))
    documents = Documents(find_inputs([str(tmp_path)]), ReadOptions())
    next(iter(documents))
    assert documents.bytes_read < 3 << 20
