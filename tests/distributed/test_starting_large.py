"""What a start costs a rank of many: groups that it makes, memory that it takes, bytes that it reads of a checkpoint."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from parity import case, fresh, run_and_save, running_engine

from titans_pretrain.checkpoint import checkpoint_name, load_checkpoint
from titans_pretrain.checkpoint.metadata import Reader
from titans_pretrain.checkpoint.spread import readers_of

ROOT = Path(__file__).parents[2]
MOST_GROUPS = 10  # that a rank makes: dp x cp, dp, cp, tp x pp, tp, pp, and four of the ring


def starting(*arguments: str) -> dict[str, str]:
    """What a rank of 1,024 pretended processes prints."""
    command = [sys.executable, "-m", "benchmarks.startup", "--pretend", "1024", *arguments]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return dict(re.findall(r"^(.+): (.+)$", text, re.MULTILINE))


def test_a_rank_of_1024_makes_its_own_groups_and_none_of_the_model():
    found = starting("parallel.tp=8", "parallel.pp=4", "parallel.cp=4", "--rank", "777")
    assert int(found["groups made"]) <= MOST_GROUPS
    assert int(found["bytes allocated"]) < 2**20
    assert int(found["parameters of the rank"]) < 1.1 * int(found["parameters"]) / 32


def saved(folder: Path) -> Path:
    """A checkpoint of one process."""
    run_and_save(case("mag", model__layers=2), 1, folder)
    return folder / "checkpoints" / checkpoint_name(1)


def bytes_read(settings: dict, checkpoint: Path) -> Counter:
    """On a rank that goes on from a checkpoint: bytes of the pieces of each tensor that it reads."""
    config, model = fresh(settings)
    found, read_data = Counter(), Reader.read_data

    def counted(reader, plan, planner):
        for item in plan.items:
            found[item.storage_index.fqn] += reader.storage_data[item.storage_index].length
        return read_data(reader, plan, planner)

    with running_engine(config, model) as (engine, _), mock.patch.object(Reader, "read_data", counted):
        load_checkpoint(checkpoint, engine.model, engine.optimizer, engine.tensor_group, engine.data_group)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"parallel__cp": 2}, marks=pytest.mark.slow),
        pytest.param({"parallel__zero_stage": 3}, marks=pytest.mark.slow),
    ],
)
def test_ranks_with_the_same_parameters_read_them_once(ranks, tmp_path, changes):
    checkpoint = saved(tmp_path)
    settings = case("mag", model__layers=2, **changes)
    read = ranks(4).run(bytes_read, settings, checkpoint)
    stored = Counter()
    for index, piece in Reader(checkpoint / "weights").read_metadata().storage_data.items():
        stored[index.fqn] += piece.length
    assert sum(read, Counter()) == stored
    assert max(r.total() for r in read) < 1.2 * stored.total() / 4


@pytest.mark.slow
def test_under_zero_1_weights_are_read_once_and_moments_by_who_keeps_them(ranks, tmp_path):
    checkpoint = saved(tmp_path)
    read = ranks(4).run(bytes_read, case("mag", model__layers=2, parallel__zero_stage=1), checkpoint)
    times = Counter(name for r in read for name in r)
    assert all(n == 1 for name, n in times.items() if name.startswith("model."))
    again = sum(n - 1 for n in times.values())
    assert again <= 2 * 2 * 3  # of both moments in both groups of parameters, where one of the three cuts falls


def damage(checkpoint: Path, name: str) -> None:
    pieces = Reader(checkpoint / "weights").read_metadata().storage_data
    piece = next(p for index, p in pieces.items() if index.fqn == name)
    with open(checkpoint / "weights" / piece.relative_path, "r+b") as file:
        file.seek(piece.offset)
        file.write(bytes(piece.length))


def refusal(settings: dict, checkpoint: Path) -> str:
    try:
        bytes_read(settings, checkpoint)
    except (ValueError, OSError) as e:
        return str(e)
    return ""


def test_what_one_of_the_readers_cannot_read_is_told_on_all(ranks, tmp_path):
    checkpoint = saved(tmp_path)
    damage(checkpoint, "exp_avg.layers.1.mlp.down_proj.weight")
    told = ranks(2).run(refusal, case("mag", model__layers=2), checkpoint)
    assert all(str(checkpoint) in message for message in told), told


def test_readers_have_equal_shares():
    sizes = {f"{i}": 1 + i % 7 for i in range(100)} | {"large": 50}
    readers = readers_of(sizes, 8)
    shares = Counter()
    for name, rank in readers.items():
        shares[rank] += sizes[name]
    assert readers.keys() == sizes.keys() and set(shares) == set(range(8))
    assert max(shares.values()) - min(shares.values()) <= 7
    assert readers_of(dict(reversed(sizes.items())), 8) == readers
