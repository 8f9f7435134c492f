"""Settings that change in the course of a run: what they say of a step, what is refused, and that they are kept as written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.config import Config, load_config, load_run_config, refuse_commands, save_config
from titans_pretrain.config.schedules import sum_until, value_at

WARM = ["train.batch_warmup=[[0,2],[3,4],[10,8]]", "train.micro_batch=2", "train.global_batch=8"]


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(0, 40))
def test_a_list_means_what_a_walk_over_its_steps_says(gaps, steps):
    pairs, at = [], 0
    for number, gap in enumerate(gaps):
        pairs.append([at, 10 + number])
        at += gap
    values, now = [], 77
    for step in range(steps + 1):
        for start, value in pairs:
            if start == step:
                now = value
        values.append(now)
    assert [value_at(pairs, step, 77) for step in range(steps + 1)] == values
    assert sum_until(pairs, steps, 77) == sum(values[:steps])


def test_a_config_says_what_a_step_has():
    config = load_config(None, [*WARM, "data.seq_len=64", "data.seq_len_warmup=[[0,16],[4,64]]"])
    assert [config.train.batch_at(steps) for steps in (0, 2, 3, 9, 10, 11)] == [2, 2, 4, 4, 8, 8]
    assert [config.data.length_at(steps) for steps in (0, 3, 4, 9)] == [16, 16, 64, 64]
    assert config.warming(3) == {"global_batch": 4, "seq_len": 16}
    assert load_config(None).warming(3) == {}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.batch_warmup=[[0,4],[5,16]]"], "ends with 16, and train.global_batch is 8"),
        (["train.batch_warmup=[[1,4],[5,8]]"], r"begins with step 1: its first pair must be \[0, VALUE\]"),
        (["train.batch_warmup=[[0,4],[5,4],[6,8]]"], r"has \[5, 4\] after \[0, 4\]: steps and values must rise"),
        (["train.batch_warmup=[[0,4],[0,8]]"], r"has \[0, 8\] after \[0, 4\]: steps and values must rise"),
        (["train.batch_warmup=[[0,0],[5,8]]"], "a value must be 1 or more"),
        (["train.batch_warmup=[[0,4,1],[5,8]]"], "two integers of 0 or more"),
        (["train.batch_warmup=[4,8]"], "must be"),
        (["train.batch_warmup=[[0,4.5],[5,8]]"], "must be an integer|must be a valid integer|two integers"),
        (["train.batch_warmup=[[0,3],[5,8]]", "train.micro_batch=2"], r"train.batch_warmup=3 must be a multiple of .*=2; try 4"),
        (["data.seq_len=64", "data.seq_len_warmup=[[0,48],[5,64]]"], "48 tokens, which do not divide data.seq_len=64"),
        (["data.seq_len=64", "data.seq_len_warmup=[[0,8],[5,64]]"], "data.seq_len_warmup=8 must be a multiple of .*chunk_size=16"),
        (
            ["data.seq_len=64", "data.seq_len_warmup=[[0,32],[5,64]]", "parallel.segments_per_rank=4"],
            "data.seq_len_warmup=32 must divide into .* segments",
        ),
        (["data.mixture_schedule=[[5,{a: 1}]]"], "changes data.mixture, which is not set"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[0,{b: 1}]]"], "has 0 tokens after 0: they must rise"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[9,{b: 1}],[8,{a: 1}]]"], "has 8 tokens after 9: they must rise"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[5,{b: 0}]]"], "gives 'b' the weight 0; weights must be positive"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[5,{b: -1}]]"], "weights must be positive"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[5,{b: x}]]"], "weights must be positive"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[5,{}]]"], "names no folder"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[5.5,{b: 1}]]"], r"must be \[TOKENS, "),
        (["data.mixture={a: 1}", "data.mixture_schedule=[{tokens: 5}]"], "must be"),
        (["data.mixture={a: 1}", "data.mixture_schedule=[[5,{b: 1, ./b: 2}]]"], "data.mixture_schedule names .*/b twice"),
        (["data.mixture={a: .inf}"], "weights must be positive"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_clear_line(overrides, told):
    with pytest.raises(ValueError, match=told) as e:
        load_config(None, overrides)
    assert "\n" not in str(e.value)


def test_a_config_keeps_its_schedules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["data.seq_len=64", "data.seq_len_warmup=[[0,16],[4,64]]", "data.mixture={web: 3, code: 1}"]
    config = load_config(None, [*WARM, *more, "data.mixture_schedule=[[100,{web: 1, books: 0.5}],[900,{books: 2}]]"])
    web, code, books = (str(tmp_path / name) for name in ("web", "code", "books"))
    assert config.data.mixture_schedule == [[100, {web: 1, books: 0.5}], [900, {books: 2}]]
    assert config.data.folders == [web, code, books]
    save_config(config, "saved.yaml")
    again = load_config("saved.yaml")
    assert (again.train, again.data) == (config.train, config.data)
    assert load_config(None, ["data.path=x"]).data.folders == [str(tmp_path / "x")] and Config().data.folders == []


def test_a_command_in_the_schedule_of_a_run_folder_is_run_only_if_given_again(tmp_path):
    command = "pipe:cat {}"
    schedule = f'data.mixture_schedule=[[5, {{"{command}": 1}}]]'
    save_config(load_config(None, ["data.mixture={a: 1}", schedule]), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="reads its data by 'pipe:cat {}'"):
        refuse_commands(load_run_config(tmp_path))
    refuse_commands(load_run_config(tmp_path, [schedule]), [schedule])
