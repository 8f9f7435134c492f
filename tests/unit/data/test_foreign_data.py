"""Data folders from anywhere: whatever their files hold, it is an error of one line that names the file, and nothing is
written outside of the cache or run."""

import copy
import json
import shutil

import pytest
from corpora import edit_manifest, make_config, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titans_pretrain.data import build_reader
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.tokenizer import ENTRY, read_tokenizer_entry
from titans_pretrain.data_prep.tokenizer import load_tokenizer

NAMES = ["../x.tar", "/etc/x.tar", "a/b.tar", "a\\b", "..", ".", "", "-rf", "x; touch PWNED; true", "$(touch PWNED)", "a\n", "a\0b",
         "x'y", "%2e%2e%2fx", "é.tar", ".hidden", 5, None, ["x"]]  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(document, path=()):
    """The paths of all values in a JSON document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def changed(draw, document):
    """The document with one to three of its values replaced or dropped."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            return draw(values)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = copy.deepcopy(draw(values))  # it may be changed in turn
        else:
            del parent[path[-1]]
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    write_corpus(root / "c", [60] * 4, validation=[5])
    return root / "c"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_manifest_is_read_or_named(folder, data):
    document = json.loads((folder / "manifest.json").read_text())
    text = data.draw(st.binary(max_size=60) | changed(document).map(json.dumps) | st.just("[" * 100_000))
    try:
        manifest = Manifest.from_json(text, "HERE/manifest.json")
    except ValueError as error:
        assert str(error).startswith("HERE/manifest.json is not a readable manifest")
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert Manifest.from_json(manifest.to_json()) == manifest
        manifest.fingerprint()


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_only_plain_names(folder, name):
    document = json.loads((folder / "manifest.json").read_text())
    document["splits"]["train"]["shards"][0]["name"] = name
    with pytest.raises(ValueError, match="not a plain file name"):
        Manifest.from_json(json.dumps(document))
    document["splits"]["train"]["shards"][0]["name"] = "train-000000.tar"
    document["splits"]["train"]["shards"][0]["sha256"] = name  # a part of the name in the cache
    with pytest.raises(ValueError, match="sha256"):
        Manifest.from_json(json.dumps(document))


def everything(root) -> set:
    return {str(path.relative_to(root)) for path in root.rglob("*") if "cache" not in path.relative_to(root).parts}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_is_written_outside_the_cache(folder, data, tmp_path, monkeypatch):
    """Whatever a remote manifest says, and however the server answers."""
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    served = tmp_path / "served"
    shutil.rmtree(served, ignore_errors=True)
    shutil.copytree(folder, served)
    document = json.loads((folder / "manifest.json").read_text())
    (served / "manifest.json").write_text(json.dumps(data.draw(changed(document))))
    before = everything(tmp_path)
    config = make_config(f"pipe:cat {served}/{{}} 2>&1", cache_dir=str(tmp_path / "deep/cache"))
    config.model.vocab_size = 1 << 40
    try:
        list(build_reader(config, epochs=1))
    except ValueError as error:
        assert str(served) in str(error)
    assert everything(tmp_path) - before <= {"deep"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokenizer_folder_is_read_or_named(folder, data, tmp_path):
    where = tmp_path / "tokenizer"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(folder / "tokenizer", where)
    entry = json.loads((where / ENTRY).read_text())
    kinds = st.sampled_from(["byte", "sentencepiece", "huggingface"])
    entries = st.builds(lambda kind: entry | {"kind": kind}, kinds) | changed(entry)
    contents = {
        ENTRY: st.binary(max_size=60) | entries.map(lambda d: json.dumps(d).encode()),
        "tokenizer.model": st.binary(max_size=60),
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        document = json.loads((where / name).read_text())
        contents[name] = st.binary(max_size=60) | changed(document).map(lambda d: json.dumps(d).encode())
    for name in data.draw(st.sets(st.sampled_from(sorted(contents)), min_size=1)):
        (where / name).write_bytes(data.draw(contents[name]))
    for read in (read_tokenizer_entry, load_tokenizer):
        try:
            read(where)
        except ValueError as error:
            assert str(where) in str(error)


def test_a_name_reaches_a_command_as_one_argument(tmp_path):
    """Also one that no manifest may hold."""
    from titans_pretrain.data.storage import Folder

    folder = Folder(f"pipe:cat {tmp_path}/{{}}", str(tmp_path / "cache"))
    (tmp_path / "a; touch PWNED").write_text("content")
    assert folder.read("a; touch PWNED") == b"content"
    assert not list(tmp_path.rglob("PWNED"))


def test_a_manifest_runs_no_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "c")

    def change(document):
        document["splits"]["train"]["shards"][0]["name"] = "x; touch PWNED; true"

    edit_manifest(tmp_path / "c", change)
    with pytest.raises(ValueError, match="not a plain file name"):
        build_reader(make_config(f"pipe:cat {tmp_path}/c/{{}}", cache_dir=str(tmp_path / "cache")))
    assert not list(tmp_path.rglob("PWNED"))
