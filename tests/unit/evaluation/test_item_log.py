"""What is on disk of an evaluation that was stopped."""

import json

import pytest

from titans_pretrain.evaluation.item_log import ItemLog

IDENTITY = {"model": "m", "options": {"samples": 3, "lengths": [1, 2]}}


def test_finished_items_are_there_the_next_time(tmp_path):
    log = ItemLog(tmp_path, "t", IDENTITY)
    assert log.finished == {}
    log.append("b", {"x": 1})
    log.append("a", {"x": [2.5]})
    log.close()
    log = ItemLog(tmp_path, "t", IDENTITY)
    assert log.finished == {"b": {"x": 1}, "a": {"x": [2.5]}}
    log.append("c", {"x": 3})
    assert list(log.gather(["a", "b", "c"]).items()) == [("a", {"x": [2.5]}), ("b", {"x": 1}), ("c", {"x": 3})]


def test_half_a_line_is_cut_off(tmp_path):
    log = ItemLog(tmp_path, "t", IDENTITY)
    log.append("a", {"x": 1})
    log.close()
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write('{"key": "b", "x": 2}'[:-3])
    log = ItemLog(tmp_path, "t", IDENTITY)
    assert log.finished == {"a": {"x": 1}}
    log.append("c", {"x": 3})
    log.close()
    assert [json.loads(line)["key"] for line in (tmp_path / "t.jsonl").read_text().splitlines()[1:]] == ["a", "c"]


def test_parts_of_other_processes_are_taken_in(tmp_path):
    header = json.dumps(IDENTITY) + "\n"
    (tmp_path / "t.jsonl").write_text(header + '{"key": "a", "x": 1}\n')
    (tmp_path / "t.rank-3.jsonl").write_text(header + '{"key": "b", "x": 2}\n{"key": "c"')
    (tmp_path / "other.jsonl").write_text("of another task")
    log = ItemLog(tmp_path, "t", IDENTITY)
    assert log.finished == {"a": {"x": 1}, "b": {"x": 2}}
    log.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "t.jsonl"]
    assert ItemLog(tmp_path, "t", IDENTITY).finished == {"a": {"x": 1}, "b": {"x": 2}}


def test_results_of_something_else_are_refused(tmp_path):
    ItemLog(tmp_path, "t", IDENTITY).close()
    other = IDENTITY | {"options": {"samples": 4, "lengths": [1, 2]}}
    with pytest.raises(
        ValueError, match=r"has results of options.samples=3, and this is options.samples=4; give another"
    ):
        ItemLog(tmp_path, "t", other)
    (tmp_path / "t.jsonl").write_text("{}{\n")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        ItemLog(tmp_path, "t", IDENTITY)
