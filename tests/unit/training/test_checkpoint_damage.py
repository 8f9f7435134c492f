"""Whatever became of a checkpoint's bytes: a ValueError that names the file, and no code of theirs runs."""

import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titans_pretrain.checkpoint import DamagedCheckpoint, check_checkpoint, load_weights, metadata, read_tensors
from titans_pretrain.commands.verify import verify
from titans_pretrain.config import load_config


@pytest.fixture
def trainer(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    return trainer


@pytest.fixture
def old(trainer, tmp_path):
    """The same checkpoint as format version 2 has it: torch's own metadata, no checksums."""
    old = Path(shutil.copytree(trainer.saved, tmp_path / "old"))
    shutil.rmtree(old / "weights")
    dcp.save(read_tensors(trainer.saved), storage_writer=dcp.FileSystemWriter(old / "weights"), no_dist=True)
    (old / "SHA256SUMS").unlink()
    numbers = old / "trainer.json"
    numbers.write_text(numbers.read_text().replace('"version": 3', '"version": 2'))
    return old


def flipped(content: bytes, draw: random.Random) -> bytes:
    """One bit, or a few bytes."""
    changed = bytearray(content)
    if draw.random() < 0.5:
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    else:
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed[: draw.randint(0, len(changed))] if draw.random() < 0.1 else changed)


def test_any_changed_byte_of_any_file_is_found_and_its_file_named(trainer):
    check_checkpoint(trainer.saved)
    draw = random.Random(0)
    files = sorted(path for path in trainer.saved.rglob("*") if path.is_file())
    assert {path.name for path in files} == {
        "SHA256SUMS", "__0_0.distcp", "config.yaml", "metadata.json", "rng.pt", "trainer.json",
    }  # fmt: skip
    for path in files:
        content = path.read_bytes()
        for _ in range(30):
            changed = flipped(content, draw)
            if changed == content:
                continue
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpoint) as e:
                check_checkpoint(trainer.saved)
            assert path.name == "SHA256SUMS" or str(path) in str(e.value)
            assert "\n" not in str(e.value)
        path.unlink()
        with pytest.raises(DamagedCheckpoint, match=path.name):
            check_checkpoint(trainer.saved)
        path.write_bytes(content)
    check_checkpoint(trainer.saved)


def test_every_way_to_read_weights_compares_checksums(trainer):
    path = trainer.saved / "weights/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for read in (read_tensors, lambda c: load_weights(c, trainer.engine.model), check_checkpoint):
        with pytest.raises(DamagedCheckpoint, match="__0_0.distcp is damaged"):
            read(trainer.saved)


def test_what_the_disk_has_lost_is_damage(trainer, monkeypatch):
    """So a run goes on from the checkpoint before; another error of the system is no reason to."""
    lost = [errno.EIO]
    monkeypatch.setattr("hashlib.file_digest", lambda *_: (_ for _ in ()).throw(OSError(lost[0], os.strerror(lost[0]))))
    with pytest.raises(DamagedCheckpoint, match="cannot be read: Input/output error"):
        check_checkpoint(trainer.saved)
    lost[0] = errno.ESTALE
    with pytest.raises(OSError, match="Stale file handle"):
        check_checkpoint(trainer.saved)


def test_sums_are_those_of_coreutils(trainer):
    assert os.system(f"cd {trainer.saved} && sha256sum --check --strict --quiet SHA256SUMS") == 0


def test_verify_tells_of_every_checkpoint(trainer, tmp_path, old):
    trainer.train_step()
    trainer.save(tmp_path)
    assert verify(str(tmp_path)) == ([f"step-0000000{n}: 5 files as they were written" for n in (1, 2)], 0)
    (tmp_path / "checkpoints/step-00000001/rng.pt").write_bytes(b"x")
    lines, damaged = verify(str(tmp_path))
    assert damaged == 1 and "DAMAGED" in lines[0] and "rng.pt" in lines[0] and "as they were written" in lines[1]
    assert verify(str(trainer.saved))[1] == 0
    assert verify(str(old)) == (["old: readable; it has no checksums (format version 2)"], 0)


def test_a_checkpoint_of_format_version_2_goes_on(trainer, old, make_trainer):
    assert check_checkpoint(old) is None
    for name, tensor in read_tensors(trainer.saved).items():
        assert torch.equal(read_tensors(old)[name], tensor)
    straight, resumed = make_trainer(), make_trainer()
    straight.resume(trainer.saved)
    resumed.resume(old)
    assert straight.train_step()["loss"] == resumed.train_step()["loss"] == trainer.train_step()["loss"]
    for (name, ours), theirs in zip(
        resumed.engine.model.named_parameters(), trainer.engine.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "name", ["weights/.metadata", "weights/metadata.json", "trainer.json", "config.yaml", "rng.pt"]
)
def test_without_checksums_damage_is_a_value_error_that_names_the_file(trainer, old, make_trainer, name):
    """Or it is not noticed, where a value became another legal one."""
    checkpoint = old
    if name == "weights/metadata.json":
        shutil.copytree(trainer.saved / "weights", old / "weights", dirs_exist_ok=True)
    path, draw, resumed, noticed = checkpoint / name, random.Random(1), make_trainer(), 0
    content = path.read_bytes()
    for _ in range(100):
        path.write_bytes(flipped(content, draw))
        try:
            if name == "config.yaml":
                load_config(path)
            else:
                check_checkpoint(checkpoint)
                if name in ("trainer.json", "rng.pt"):
                    resumed.resume(checkpoint)
        except ValueError as e:
            noticed += 1
            assert str(path) in str(e) or str(checkpoint) in str(e), e
    assert noticed > 10


class Call:
    """A pickle that runs a command."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("call", ["system", "eval", "getattr", "torch.load", "class"])
def test_a_pickle_runs_nothing(old, tmp_path, call, inside):
    made = tmp_path / "made"
    calls = {
        "system": Call(os.system, f"touch {made}"),
        "eval": Call(eval, f"open({str(made)!r}, 'w')"),
        "getattr": Call(getattr, "text", "upper"),
        "torch.load": Call(torch.load, str(made)),
        "class": Call(Path.touch, made),
    }
    path = old / "weights/.metadata"
    content = pickle.loads(path.read_bytes())
    if inside:
        content.planner_data = calls[call]
    path.write_bytes(pickle.dumps(content if inside else calls[call]))
    with pytest.raises(DamagedCheckpoint, match=r"weights/.metadata is damaged, or no metadata .*no metadata does"):
        read_tensors(old)
    assert not made.exists()


def test_a_pickle_changes_no_class_of_this_process(old):
    """BUILD with a pair sets attributes, and a pickle may hand it a class."""
    before = dict(vars(dcp.Metadata))
    content = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x04\x00\x00\x00evilK\x01s\x86b."
    (old / "weights/.metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        read_tensors(old)
    assert dict(vars(dcp.Metadata)) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t["pieces"][0].update(file="../../../etc/passwd"), "a file of another name"),
        (lambda t: t["pieces"][0].update(file="/etc/passwd"), "a file of another name"),
        (lambda t: t["pieces"][0].update(length=4), "longer than its bytes"),
        (lambda t: t["pieces"][0].update(start=-1), "no sizes"),
        (lambda t: t["pieces"][0].update(offsets=[1, 0]), "ends outside of its tensor"),
        (lambda t: t["pieces"].append(t["pieces"][0]), "do not make up the tensor"),
        (lambda t: t.update(pieces=[]), "do not make up the tensor"),
        (lambda t: t.update(shape=[2, 8, 8]), ""),
        (lambda t: t.update(shape=[8.0, 8]), "no sizes"),
        (lambda t: t.update(dtype="load"), "KeyError"),
    ],
)
def test_metadata_that_does_not_add_up_is_refused(trainer, change, told):
    path = trainer.saved / "weights/metadata.json"
    tensors = json.loads(path.read_text())
    change(tensors["model.hidden.weight"])
    path.write_text(json.dumps(tensors))
    with pytest.raises(DamagedCheckpoint, match=f"metadata.json is damaged.*{told}"):
        metadata.Reader(trainer.saved / "weights").read_metadata()


def test_pieces_that_overlap_are_refused(trainer):
    path = trainer.saved / "weights/metadata.json"
    tensors = json.loads(path.read_text())
    whole = tensors["model.hidden.weight"]["pieces"][0]
    tensors["model.hidden.weight"]["pieces"] = [whole | {"offsets": [o, 0], "sizes": [4, 8]} for o in (0, 0)]
    path.write_text(json.dumps(tensors))
    with pytest.raises(DamagedCheckpoint, match="overlap"):
        metadata.Reader(trainer.saved / "weights").read_metadata()
