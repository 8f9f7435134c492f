"""Bounds of dependencies are those that the tests run with: constraints.txt the newest, requirements-oldest.txt the oldest."""

import itertools
import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = {
    "flash-attn",
    "wandb",
    "lm-eval",
    "datasets",
    "accelerate",
    "peft",
    "trl",
}  # of extras that the tests go without
# Reached through interfaces that are private, or that new versions rename and change.
CHANGING = {"torch", "transformers", "tokenizers", "deepspeed", "megatron-core", "webdataset", "pydantic", "omegaconf"}


def pinned(file: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {name.replace("_", "-"): pin for name, _, pin in (line.partition("==") for line in lines if line)}


def bounds() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    return {r.name: r for r in map(Requirement, listed) if r.name != project["name"]}


def test_every_dependency_has_a_version_that_its_bounds_allow():
    newest = pinned("constraints.txt")
    assert set(bounds()) - NOT_INSTALLED <= set(newest)
    for name, requirement in bounds().items():
        assert name in NOT_INSTALLED or newest[name] in requirement.specifier, requirement


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_what_changes_is_bound_to_what_was_tested(name):
    specifiers = {s.operator: s.version for s in bounds()[name].specifier}
    newest, oldest = pinned("constraints.txt")[name], pinned("requirements-oldest.txt").get(name)
    if "==" in specifiers:
        assert specifiers["=="] == newest and oldest is None
        return
    lower, upper = (specifiers[operator].split(".") for operator in (">=", "<"))
    tested = (oldest or newest).split(".")
    assert tested[: len(lower)] == lower and not any(map(int, tested[len(lower) :])), (
        "the lower bound is another version"
    )
    # the next release of the newest one's series is the first that is not allowed
    at = len(upper) - 1
    assert upper == [*newest.split(".")[:at], str(int(newest.split(".")[at]) + 1)], "the upper bound is another version"


@pytest.mark.skipif("TESTED_WITH" not in os.environ, reason="not from `make test`, which says with what it runs")
def test_the_tests_run_with_the_versions_that_they_claim():
    for name, pin in pinned(os.environ["TESTED_WITH"]).items():
        assert name in NOT_INSTALLED or version(name).partition("+")[0] == pin, name
