"""Whatever stands in a file or an override: a config, or a ValueError that names it; and what is saved comes back."""

import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from titans_pretrain.config import load_config, save_config
from titans_pretrain.config.keys import all_keys

KEYS = [
    *all_keys(),
    "model",
    "model.memory",
    "data",
    "include",
    "data.mixture.x",
    "model.pattern.0",
    "model.pattern[0]",
    "nope",
    "",
]
# texts that mean something to YAML, to omegaconf or to a path
MARKS = ["${", "}", "${run.name}", "${oc.env:HOME}", "${nope:}", "~", "~x", "[", "{", "}", "!!binary ", "!!python/name:os.system ", "&a ", "*a", "\0", "\\", "1e999", "0x_", "2001-02-30", "\n", ": ", "- ", "???", "|", "%", "@", "\ufeff", "\x85", "\udcff"]  # fmt: skip
TEXT = st.one_of(st.text(max_size=8), st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=5).map("".join))
# numbers of layers stay small: a config may be as large as it says
NUMBERS = st.integers(-2, 2000) | st.floats() | st.sampled_from([10**400, -(10**20), 2**63, True])
LEAVES = st.one_of(st.none(), TEXT, NUMBERS, st.dates(), st.binary(max_size=2))
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT | st.integers(0, 3), v, max_size=3), max_leaves=5
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def nested(pairs) -> dict:
    values: dict = {}
    for name, value in pairs:
        group, (*path, last) = values, name.split(".")
        for part in path:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                break
        else:
            group[last] = value
    return values


def loads(text: bytes, overrides: list[str], said: str) -> None:
    """A config that survives being saved, or an error of one line with `said` in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.yaml"
        path.write_bytes(text)
        try:
            config = load_config(path, overrides)
        except ValueError as e:
            assert re.search(said, str(e)), e
            assert len(str(e).splitlines()) == 1, e
            return
        save_config(config, path)
        assert repr(load_config(path)) == repr(config)  # not ==: nan


@quick
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3))
@example([("model", 3), ("version", 1)])
@example([("model.layers", 10**9)])
@example([("model.dim", 10**400)])
def test_any_values_of_a_file(pairs):
    try:
        text = yaml.dump(nested(pairs), allow_unicode=True).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    loads(text, [], r"fuzzed\.yaml")


@quick
@given(st.one_of(TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=30)))
@example(b"[" * 3000)
@example(b"a: " * 3000)
@example(b"{" * 3000 + b"}" * 3000)
@example(b"1: {2: [3]}")
@example(b"train: {steps: " + b"1" * 5000 + b"}")
@example(b"run: {name: ${run.name}}")
@example(b"run: {name: ${run.dir}, dir: ${run.name}}")
@example(b"model: ${train}\ntrain: ${model}")
@example(b"a: &a [*a]")
def test_any_bytes_of_a_file(text):
    loads(text, [], r"fuzzed\.yaml")


@quick
@given(
    st.lists(
        st.one_of(st.tuples(st.sampled_from(KEYS), TEXT | NUMBERS.map(str)).map("=".join), TEXT), min_size=1, max_size=3
    )
)
@example(["data=[1]", "data.path=3"])
@example(["model.layers=1000000000"])
@example(["train.lr=" + "[" * 3000])
def test_any_overrides(overrides):
    loads(b"", overrides, r"override")


def test_a_number_beyond_all_measure():
    for key in all_keys():
        loads(b"", [f"{key}={10**400}"], "override")


@pytest.mark.parametrize(
    "name", ["1e5", "${x}", "\\${x}", "\\\\${x", "null", "0x1f", "2001-01-01", "a: b", " ", "é\u2028", "12:30"]
)
def test_a_text_that_looks_like_something_else_is_saved_as_that_text(name, tmp_path):
    (tmp_path / "a.yaml").write_text("")
    config = load_config(tmp_path / "a.yaml")
    config.run.name = config.train.resume = name
    config.data.path = f"pipe:cat {name}"
    save_config(config, tmp_path / "b.yaml")
    found = load_config(tmp_path / "b.yaml")
    assert (found.run.name, found.data.path) == (config.run.name, config.data.path)
