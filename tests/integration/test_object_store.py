"""`titans-pretrain train` with `train.checkpoint_store` on a server that speaks S3: killed in an upload, on another disk, without its store."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from test_train import SMALL, TINY, assert_same_tensors, without_clocks

from titans_pretrain import cli
from titans_pretrain.checkpoint.remote import RemoteStore
from titans_pretrain.checkpoint.store import latest_checkpoint
from titans_pretrain.data import storage
from titans_pretrain.training.loggers import read_metrics

STEPS = ["train.steps=6", "train.checkpoint_every=2", "train.eval_every=3", "train.keep_checkpoints=2"]


@pytest.fixture
def train(data, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)

    def train(run_dir: Path, *overrides: str) -> int:
        return cli.main(["train", str(TINY), *SMALL, f"data.path={data}", f"run.dir={run_dir}", *STEPS, *overrides])

    return train


KILLED = """
import os, signal, sys
from titans_pretrain import cli
from titans_pretrain.checkpoint.remote import RemoteStore
put = RemoteStore._put
def killed(store, source, name):
    if "step-00000002" not in name and "weights/__0_0" in name:  # the second one, whichever is next
        system, root = store._place
        system.pipe_file(f"{root}/{name}", source.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    put(store, source, name)
RemoteStore._put = killed
sys.exit(cli.main(sys.argv[1:]))
"""


def test_killed_in_an_upload_and_gone_on_with_on_another_disk(train, data, bucket, tmp_path, capsys):
    """The same bits as a run that nothing disturbs, and the same lines of metrics; no secret is written anywhere."""
    store = f"train.checkpoint_store={bucket}/runs/one"
    assert train(tmp_path / "straight") == 0
    arguments = ["train", str(TINY), *SMALL, f"data.path={data}", f"run.dir={tmp_path}/first", *STEPS, store]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert RemoteStore(f"{bucket}/runs/one").complete() == ["step-00000002"]
    capsys.readouterr()

    second = tmp_path / "second"  # the first disk is lost
    assert train(second, store) == 0
    told = capsys.readouterr().out
    assert f"{second} has no checkpoint; copied step-00000002 from {bucket}/runs/one" in told
    assert f"goes on from {second}/checkpoints/step-00000002 (step 2)" in told
    assert_same_tensors(latest_checkpoint(tmp_path / "straight"), latest_checkpoint(second))
    assert without_clocks(second) == without_clocks(tmp_path / "straight")
    assert RemoteStore(f"{bucket}/runs/one").complete() == ["step-00000004", "step-00000006"]

    third = tmp_path / "third"  # a copy of the store is a run folder
    fsspec.filesystem("s3").get(f"{bucket}/runs/one", str(third), recursive=True)
    assert cli.main(["verify", str(third)]) == 0 and cli.main(["eval", str(third), "--batches", "1"]) == 0
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert secret.decode() not in killed.stdout + killed.stderr + told


def test_other_runs_start_from_a_store(train, bucket, tmp_path, capsys):
    assert train(tmp_path / "run", f"train.checkpoint_store={bucket}") == 0
    assert train(tmp_path / "weights", f"train.init_from={bucket}/checkpoints/step-00000004", "train.steps=1") == 0
    assert [line["step"] for line in read_metrics(tmp_path / "weights/metrics.jsonl") if "loss" in line] == [1]
    assert train(tmp_path / "all", f"train.resume={bucket}", "train.steps=7") == 0
    assert [line["step"] for line in read_metrics(tmp_path / "all/metrics.jsonl") if "loss" in line] == [7]
    assert latest_checkpoint(tmp_path / "all").name == "step-00000007"
    told = capsys.readouterr().out
    assert f"starts with the weights of {tmp_path}/weights/init_from/checkpoints/step-00000004" in told
    assert f"goes on from {tmp_path}/all/resume/checkpoints/step-00000006 (step 6)" in told
    assert train(tmp_path / "none", f"train.resume={bucket}/nothing") == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_store_decides_when_the_folder_is_empty(train, bucket, s3_server, tmp_path, capsys):
    store = f"train.checkpoint_store={bucket}"
    assert train(tmp_path / "run", store) == 0
    capsys.readouterr()
    assert train(tmp_path / "new", store, "train.resume=never") == 2
    assert f"{bucket} holds step-00000006 and train.resume=never would train over it" in capsys.readouterr().err
    s3_server.stop()
    try:
        assert train(tmp_path / "new", store) == 2, "it must not begin anew"
        assert f"error: {bucket}/checkpoints: failed 2 times" in capsys.readouterr().err
        assert train(tmp_path / "run", store, "train.steps=7") == 87
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(
            f"error: {tmp_path}/run/checkpoints/step-00000007 is on disk, but {bucket} did not take it: "
        )
        assert told.endswith("the same command tries again")
    finally:
        s3_server.start()
    assert train(tmp_path / "run", store, "train.steps=7") == 0
    assert RemoteStore(bucket).complete()[-1] == "step-00000007"


def test_a_folder_is_a_store_too_but_not_the_run_s_own(train, tmp_path, capsys):
    store = tmp_path / "other disk"
    assert train(tmp_path / "run", f"train.checkpoint_store={store}") == 0
    assert latest_checkpoint(store).name == "step-00000006"
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    assert (
        "newest checkpoint step-00000006, 0:0" in (told := capsys.readouterr().out)
        and "(step 6 is in the store)" in told
    )
    for url in (f"{tmp_path}/run", f"{tmp_path}/run/../run", f"file://{tmp_path}/run"):
        assert train(tmp_path / "run", f"train.checkpoint_store={url}", "train.steps=7") == 2
        assert "is the run folder itself" in capsys.readouterr().err
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 2


@pytest.mark.parametrize("key", ["checkpoint_store", "resume", "init_from"])
@pytest.mark.parametrize("url", ["sftp://me:hunter2@host/x", "https://host/x?X-Amz-Signature=hunter2"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(train, tmp_path, capsys, key, url):
    assert train(tmp_path / "run", f"train.{key}={url}") == 2
    told = capsys.readouterr().err
    assert "a config is no place for secrets" in told and not (tmp_path / "run").exists()
    assert "hunter2" not in told and f"override 'train.{key}=" in told
