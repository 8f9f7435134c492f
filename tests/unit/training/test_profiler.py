"""Which steps are recorded, and that the recording changes nothing."""

import gzip
import json
import os
import signal

from test_trainer import assert_same, run, weights

from titans_pretrain.config import load_config
from titans_pretrain.training.profiler import Profiler


def test_named_steps_and_those_asked_for_by_a_signal(make_trainer, tmp_path):
    trainer = make_trainer(steps=6)
    step = trainer.train_step

    def stepping():
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGUSR2)
        return step()

    trainer.train_step = stepping
    before = signal.getsignal(signal.SIGUSR2)
    with Profiler(tmp_path, [2], rank=1) as profiler:
        trainer.hooks = [profiler]
        run(trainer, tmp_path)
    assert signal.getsignal(signal.SIGUSR2) == before
    names = ["step-00000002-rank-1", "step-00000005-rank-1"]  # asked for in the fourth
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == sorted(
        f"{name}{end}" for name in names for end in (".json.gz", ".txt")
    )
    events = json.loads(gzip.decompress((tmp_path / f"profile/{names[0]}.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    assert "aten::addmm" in (tmp_path / f"profile/{names[1]}.txt").read_text()
    assert_same(weights(trainer), weights(run(make_trainer(steps=6), tmp_path / "twin")))


def test_what_cannot_be_written_is_a_warning(make_trainer, tmp_path, caplog):
    (tmp_path / "profile").write_text("no folder")
    trainer = make_trainer(steps=2)
    with Profiler(tmp_path, [1]) as profiler:
        trainer.hooks = [profiler]
        run(trainer, tmp_path)
    assert trainer.step == 2 and "the profile of step 1 is not written" in caplog.text


def test_steps_are_given_as_a_list():
    assert load_config("configs/tiny.yaml", ["run.profile_steps=[10,11]"]).run.profile_steps == [10, 11]
