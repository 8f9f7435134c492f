"""A checkpoint written under any layout goes on under any other: the same tensors to the bit, and the same training."""

import functools
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parity import CALM, case, resume_each, run_and_save, start_and_save

from titans_pretrain.checkpoint import check_checkpoint, checkpoint_name, checksums, load_model, read_tensors
from titans_pretrain.checkpoint.metadata import Reader
from titans_pretrain.commands.train import _owning
from titans_pretrain.training.run_lock import RunLock

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"parallel__tp": 2}),
    "pp2": (2, {"parallel__pp": 2}),
    "cp2": (2, {"parallel__cp": 2}),
    "zero1": (2, {"parallel__zero_stage": 1}),
    "zero2": (2, {"parallel__zero_stage": 2}),
    "zero3": (2, {"parallel__zero_stage": 3}),
    "zero1-bf16": (2, {"parallel__zero_stage": 1, "train__precision": "bf16"}),
    "tp2-pp2": (4, {"parallel__tp": 2, "parallel__pp": 2}),
}
EXACT = [name for name in LAYOUTS if "bf16" not in name]
QUICK = {"one", "tp2", "zero1", "zero3"}
BEFORE, AFTER = 3, 2
LIMITS = {"model": 1e-6, "exp_avg": 2e-5, "exp_avg_sq": 2e-5}  # difference() between steps 3 and 5: 7e-3, 1, 1
LIMITS_BF16 = {"model": 1e-3}


def values(layout: str = "one", **changes) -> dict:
    pattern = ["mag", {"variant": "transformer", "window": None, "kv_heads": 2}]
    hybrid = {"model__pattern": pattern, "model__layers": 2, "model__qk_norm": True}
    return case("mag", **hybrid, **CALM, train__micro_batch=2, **LAYOUTS[layout][1], **changes)


def on(ranks, world: int, f, *args) -> list:
    return [f(*args)] if world == 1 else ranks(world).run(f, *args)


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """run(layout, steps): the checkpoint after so many steps from the start."""
    made: dict[tuple[str, int], Path] = {}

    def get(layout: str, steps: int = BEFORE) -> Path:
        if (layout, steps) not in made:
            folder = tmp_path_factory.mktemp(layout)
            on(ranks, LAYOUTS[layout][0], run_and_save, values(layout), steps, folder)
            made[layout, steps] = folder / "checkpoints" / checkpoint_name(steps)
        return made[layout, steps]

    return get


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    """expected(source): what one process ends with; from the start, or from a checkpoint that has the rounding of bfloat16."""

    @functools.cache
    def get(source: str) -> dict[str, torch.Tensor]:
        if source in EXACT:
            return read_tensors(run("one", BEFORE + AFTER))
        folder = tmp_path_factory.mktemp("alone")
        resume_each(values(), [run(source)], AFTER, folder)
        return read_tensors(folder / "0" / "checkpoints" / checkpoint_name(BEFORE + AFTER))

    return get


def difference(ours: dict, theirs: dict, kind: str) -> float:
    """Largest of max |a - b| / max |b| over the tensors of a kind; b counts as at least the root mean square of them all."""
    named = {name: t for name, t in theirs.items() if name.startswith(f"{kind}.")}
    least = torch.cat([t.flatten() for t in named.values()]).square().mean().sqrt()
    return max(float((ours[name] - t).abs().max() / max(t.abs().max(), least)) for name, t in named.items())


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[] if n in {"one", "zero1"} else [pytest.mark.slow]) for n in LAYOUTS]
)
def test_a_layout_goes_on_from_every_other(ranks, run, expected, tmp_path, layout, request):
    slow = "slow" in {mark.name for mark in request.node.own_markers}
    sources = list(LAYOUTS) if slow else sorted(QUICK)
    checkpoints = [run(source) for source in sources]
    on(ranks, LAYOUTS[layout][0], resume_each, values(layout), checkpoints, AFTER, tmp_path)
    for number, (source, checkpoint) in enumerate(zip(sources, checkpoints, strict=True)):
        folder = tmp_path / str(number) / "checkpoints"
        assert_equal(read_tensors(folder / checkpoint_name(BEFORE)), read_tensors(checkpoint), source)
        after = read_tensors(folder / checkpoint_name(BEFORE + AFTER))
        if source == layout:
            assert_equal(after, read_tensors(run(layout, BEFORE + AFTER)), source)
        limits = LIMITS if layout in EXACT else LIMITS_BF16
        found = {kind: difference(after, expected(source), kind) for kind in limits}
        assert all(found[kind] <= limit for kind, limit in limits.items()), f"{found}, from {source}"


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], source: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{name}, from {source}"


@pytest.mark.parametrize(
    "layout", [n if n in {"cp2", "zero1"} else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_ranks_share_the_writing_and_write_nothing_twice(run, layout):
    world, weights = LAYOUTS[layout][0], run(layout) / "weights"
    pieces = Reader(weights).read_metadata().storage_data.values()
    written = Counter()
    for piece in pieces:
        written[piece.relative_path] += piece.length
    assert written == {file.name: file.stat().st_size for file in weights.glob("*.distcp")}
    assert len(written) == world and max(written.values()) < 1.5 * sum(written.values()) / world


@pytest.mark.parametrize("layout", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in LAYOUTS])
def test_one_process_reads_the_model_of_any_layout(run, layout):
    """As export, generation and evaluation do."""
    model, _ = load_model(run(layout))
    tensors = read_tensors(run(layout))
    for name, p in model.named_parameters():
        assert torch.equal(p, tensors[f"model.{name}"].to(p.dtype))


def refusal(rank_settings: list[dict], checkpoint: Path, run_dir: Path) -> str:
    """On every rank, each with its own settings: the error of going on from a checkpoint."""
    try:
        resume_each(rank_settings[dist.get_rank()], [checkpoint], 1, run_dir)
    except (ValueError, OSError) as e:
        return str(e)
    return ""


@pytest.mark.parametrize(("layout", "wrong"), [("tp2", [0, 1]), ("pp2", [1])])
def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(ranks, run, tmp_path, layout, wrong):
    """Also where it fits this rank's pipeline stage."""
    settings = [values(layout, **({"model__ffn_dim": 64} if rank in wrong else {})) for rank in range(2)]
    layer = min(wrong)
    told = rf"does not fit the model: .* first is layers.{layer}.mlp.down_proj.weight \(\[32, 128\] there, \[32, 64\] here\)"
    for message in ranks(2).run(refusal, settings, run("one"), tmp_path):
        assert re.search(told, message), message


def test_what_one_rank_cannot_read_is_told_on_every_rank(ranks, run, tmp_path):
    damaged = shutil.copytree(run("pp2"), tmp_path / "damaged")
    pieces = Reader(damaged / "weights").read_metadata().storage_data
    piece = next(p for index, p in pieces.items() if index.fqn == "exp_avg.layers.1.mlp.down_proj.weight")
    with open(damaged / "weights" / piece.relative_path, "r+b") as file:
        file.seek(piece.offset)
        file.write(bytes(piece.length))
    for message in ranks(2).run(refusal, [values("pp2")] * 2, damaged, tmp_path):
        assert re.search(
            f"weights/{piece.relative_path} is damaged: its checksum is not the one in SHA256SUMS", message
        ), message


def hashed_by_each(checkpoint: Path) -> tuple[int, list[str]]:
    """On every rank: how many files check_checkpoint says, and those that this rank read for it."""
    read, hash_files = [], checksums.hash_files

    def watched(folder, files):
        found = hash_files(folder, files)
        read.extend(found)
        return found

    checksums.hash_files = watched
    try:
        return check_checkpoint(checkpoint), read
    finally:
        checksums.hash_files = hash_files


def test_ranks_share_the_checking_and_hash_nothing_twice(ranks, run):
    answers = ranks(2).run(hashed_by_each, run("tp2"))
    read = [name for _, names in answers for name in names]
    files = {str(p.relative_to(run("tp2"))) for p in run("tp2").rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert sorted(read) == sorted(files) and {count for count, _ in answers} == {len(files)}
    assert all(names for _, names in answers)


@pytest.mark.parametrize("layout", ["tp2", "zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_of_any_layout_starts_with_the_weights_alone(ranks, run, tmp_path, layout):
    source = run("one")
    assert set(ranks(2).run(start_and_save, values(layout), source, tmp_path)) == {0}
    found, expected = read_tensors(tmp_path / "checkpoints/step-00000000"), read_tensors(source)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name] if name.startswith("model.") else torch.zeros_like(tensor)), name


def lock_refusal(run_dir: Path) -> str:
    try:
        with _owning(run_dir):
            return ""
    except ValueError as e:
        return str(e)


def test_the_first_rank_locks_the_run_folder_for_all(ranks, tmp_path):
    with RunLock(tmp_path):
        messages = ranks(2).run(lock_refusal, tmp_path)
    assert [f"process {os.getpid()} on " in message for message in messages] == [True, True]
    assert ranks(2).run(lock_refusal, tmp_path) == ["", ""]
    assert list(tmp_path.iterdir()) == []


def fail_on_one_rank(settings: dict, run_dir: Path) -> str:
    from titans_pretrain.checkpoint import state

    class Full(state.Writer):
        def write_data(self, *args):
            raise OSError(28, "No space left on device")

    writer = state.Writer
    if dist.get_rank() == 1:
        state.Writer = Full
    try:
        run_and_save(settings, 1, run_dir)
    except OSError as e:
        return str(e)
    finally:
        state.Writer = writer
    return ""


def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_nothing(ranks, tmp_path):
    for message in ranks(2).run(fail_on_one_rank, values(), tmp_path):
        assert "step 1: cannot write" in message and "No space left on device" in message
    assert list((tmp_path / "checkpoints").iterdir()) == []
