"""Checkpoint folders: whole or not at all, found, and refused when they do not fit."""

import pytest
import torch
from torch import nn

from titans_pretrain.checkpoint import (
    DamagedCheckpoint,
    find_checkpoint,
    latest_checkpoint,
    load_weights,
    model_tensors,
    state,
    store,
)
from titans_pretrain.checkpoint.optimizer_states import MOMENTS, states_of


def test_a_failed_write_leaves_the_earlier_checkpoint_and_no_rest(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    before = {p.name: p.read_bytes() for p in trainer.saved.rglob("*") if p.is_file()}
    trainer.train_step()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_config", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    assert {p.name: p.read_bytes() for p in latest_checkpoint(tmp_path).rglob("*") if p.is_file()} == before


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".writing-step-00000004").mkdir()
    (tmp_path / ".writing-latest").write_text("x")
    (tmp_path / "step-00000002").mkdir()
    store.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_find_checkpoint_takes_a_run_or_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    assert (
        find_checkpoint(tmp_path)
        == find_checkpoint(tmp_path / "checkpoints")
        == find_checkpoint(trainer.saved)
        == trainer.saved
    )


def test_find_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run or checkpoint folder .*gone"):
        find_checkpoint(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-00000009\n")
    with pytest.raises(ValueError, match="names 'step-00000009', which is not there"):
        find_checkpoint(tmp_path)


def test_tied_tensors_are_stored_once_and_empty_ones_kept():
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    model.none, model.nothing = nn.Parameter(torch.zeros(0, 2)), nn.Parameter(torch.zeros(0, 2))
    assert sorted(model_tensors(model)) == ["a.weight", "none", "nothing"]


def test_weights_of_another_shape_are_refused(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    trainer.engine.model.hidden = nn.Linear(8, 9)
    with pytest.raises(ValueError, match="does not fit the model: 2 tensors differ, the first is hidden.bias"):
        load_weights(trainer.saved, trainer.engine.model)


def test_a_parameter_that_is_missing_here_is_named_with_its_shape(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    trainer.engine.model.hidden = nn.Identity()
    with pytest.raises(
        ValueError, match=r"6 tensors differ, the first is hidden.bias \(\[8\] there, no such tensor here\)"
    ):
        trainer.resume(trainer.saved)


@pytest.mark.parametrize("damaged", ["metadata.json", "__0_0.distcp"])
def test_what_cannot_be_read_is_told_in_one_line(make_trainer, tmp_path, damaged):
    """Also where nobody compared checksums."""
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    file = trainer.saved / "weights" / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    told = "cannot read .*step-00000001: .*go on from an earlier one|weights/metadata.json is damaged"
    with pytest.raises((OSError, DamagedCheckpoint), match=told) as error:
        trainer.resume(trainer.saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_loaded_optimizer_state_lies_where_adamw_would_put_it(options):
    """Fused kernels read the step count on the parameter's device."""
    model = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.defaults |= options
    states_of(optimizer).load(dict(model.named_parameters()), 3, lambda kind, tensors: None)
    for held in optimizer.state.values():
        assert held["step"].device.type == ("meta" if options else "cpu")
        assert {held[moment].device.type for moment in MOMENTS} == {"meta"}


@pytest.mark.parametrize(("version", "told"), [(4, "reads up to 3; update it"), (1, "with the version that wrote it")])
def test_a_checkpoint_of_another_format_is_refused(make_trainer, tmp_path, version, told):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    numbers = trainer.saved / "trainer.json"
    numbers.write_text(numbers.read_text().replace('"version": 3', f'"version": {version}'))
    with pytest.raises(ValueError, match=f"format version {version}.* {told}"):
        trainer.resume(trainer.saved)
