import pytest

from titans_pretrain.evaluation.run import batches
from titans_pretrain.evaluation.tasks import (
    TASKS,
    Item,
    build_options,
    format_length,
    parse_lengths,
    parse_tasks,
    split_overrides,
    task_class,
)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_what_the_runner_calls(name):
    cls = task_class(name)
    build_options(name, {})
    assert all(field.metadata["meaning"] for field in cls.Options.__dataclass_fields__.values())
    assert all(callable(getattr(cls, method)) for method in ("identity", "items", "run", "report"))


def test_names_and_settings_that_there_are_not():
    assert parse_tasks("perplexity, perplexity") == ["perplexity"]
    with pytest.raises(ValueError, match="--tasks perplexty: there are .*; did you mean perplexity?"):
        parse_tasks("perplexty")
    with pytest.raises(ValueError, match="--tasks is empty"):
        parse_tasks(",")
    with pytest.raises(ValueError, match=r"perplexity.token: there are .*; did you mean tokens?"):
        build_options("perplexity", {"token": 3})
    with pytest.raises(ValueError, match=r"perplexity.sequences = 'x': must be an integer"):
        build_options("perplexity", {"sequences": "x"})


def test_overrides_of_the_run_and_of_tasks():
    of_run, of_tasks = split_overrides(["data.path=x", "perplexity.tokens=2K", "perplexity.reset=8"])
    assert (of_run, of_tasks) == (["data.path=x"], {"perplexity": {"tokens": "2K", "reset": 8}})
    with pytest.raises(ValueError, match="'perplexity=3' sets no key"):
        split_overrides(["perplexity=3"])


def test_lengths():
    assert parse_lengths("k", [100, "2K", "1M", "10m"]) == [100, 2048, 2**20, 10 * 2**20]
    assert [format_length(n) for n in (0, 100, 2048, 3 * 2**20)] == ["0", "100", "2K", "3M"]
    for wrong in ("K", "1.5K", True, -1):
        with pytest.raises(ValueError, match="a length is a number of tokens"):
            parse_lengths("k", [wrong])


def test_batches_are_of_one_length_the_longest_first():
    items = [Item("a", 1), Item("b", 9), Item("c", 1), Item("d", 9), Item("e", 9)]
    assert [[item.key for item in batch] for batch in batches(items, 2)] == [["b", "d"], ["e"], ["a", "c"]]
