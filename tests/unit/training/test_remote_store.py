"""Checkpoints in an object store: a real server that speaks S3, or a folder. What a reader finds there, whatever happens to the writer."""

import json
import os
import random
import threading
from collections.abc import Callable

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_trainer import assert_same, run, weights

from titans_pretrain.checkpoint import DamagedCheckpoint, check_checkpoint, checkpoints, latest_checkpoint
from titans_pretrain.checkpoint.checksums import SUMS, write_sums
from titans_pretrain.checkpoint.remote import RemoteStore, fetch_checkpoint
from titans_pretrain.checkpoint.store import checkpoint_name, point_latest, prune_checkpoints, superseded
from titans_pretrain.data import storage
from titans_pretrain.training.events import read_events
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.mirror import Mirror


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)


@pytest.fixture(params=["s3", "folder"])
def url(request, tmp_path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("bucket") + "/runs/one"


def make(run_dir, step: int, loss: float | None = None, salt: str = ""):
    """A checkpoint of a few small files."""
    folder = run_dir / "checkpoints" / checkpoint_name(step)
    (folder / "weights").mkdir(parents=True)
    (folder / "trainer.json").write_text(
        json.dumps({"step": step} | ({} if loss is None else {"validation_loss": loss}))
    )
    (folder / "weights/__0_0.distcp").write_bytes(f"{salt}{step}".encode() * 1000)
    (folder / "weights/metadata.json").write_text("{}")
    write_sums(folder, {})
    point_latest(folder)
    return folder


def content(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(*steps: int) -> list[str]:
    return [checkpoint_name(step) for step in steps]


def everything(url: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return sorted(path.removeprefix(root + "/") for path in system.find(root))


def test_what_is_copied_comes_back(url, tmp_path):
    store = RemoteStore(url + "/")
    assert store.complete() == [] and fetch_checkpoint(url, tmp_path / "copy") is None
    for step in (99_999_999, 100_000_000):  # a digit more
        path = make(tmp_path, step)
        assert store.upload(path) == sum(len(x) for name, x in content(path).items() if name != SUMS)
        store.point_latest(path.name)
    assert store.complete() == names(99_999_999, 100_000_000)
    found = fetch_checkpoint(url, tmp_path / "copy")
    assert found == latest_checkpoint(tmp_path / "copy") and found.name == checkpoint_name(100_000_000)
    assert content(found) == content(tmp_path / "checkpoints" / found.name)
    by_name = fetch_checkpoint(f"{url}/checkpoints/{checkpoint_name(99_999_999)}", tmp_path / "other")
    assert content(by_name) == content(tmp_path / "checkpoints" / by_name.name)
    assert fetch_checkpoint(f"{url}/checkpoints/", tmp_path / "third").name == found.name


class Killed(BaseException):
    """Ends whoever is in the middle of it."""


@pytest.fixture
def dies_at(monkeypatch):
    """dies_at(system, n): the n-th change of a store does not happen, nor any later one; None: none dies. Returns a counter."""

    reals: dict[tuple, Callable] = {}

    def arm(url: str, n: int | None) -> list[int]:
        system, count = fsspec.core.url_to_fs(url)[0], [0]
        for name in ("put_file", "pipe_file", "rm_file"):
            real = reals.setdefault((id(system), name), getattr(system, name))

            def call(*args, real=real, **options):
                count[0] += 1
                if n is not None and count[0] >= n:
                    raise Killed
                return real(*args, **options)

            monkeypatch.setattr(system, name, call)
        return count

    return arm


def test_a_reader_never_finds_half_a_checkpoint_wherever_the_writer_dies(url, tmp_path, dies_at):
    """A run at step 1 and 2 of which 3 takes the place of another 3 and 1 is given up; the writer dies before every change in turn (in S3,
    which takes a while, before every fourth)."""
    other = make(tmp_path / "other", 3, salt="another ")
    old = [make(tmp_path / "run", step) for step in (1, 2)]
    new = make(tmp_path / "run", 3)
    expected = {path.name: content(path) for path in (*old, new)}

    def write():
        store = RemoteStore(url)
        store.upload(new)
        store.point_latest(new.name)
        store.prune(2, 0, 0)

    n, seen = 1 - (each := 4 if url.startswith("s3:") else 1), set()
    while True:
        n += each
        system, root = fsspec.core.url_to_fs(url)
        counting = dies_at(url, None)
        if system.find(root):
            system.rm(root, recursive=True)
        store = RemoteStore(url)
        for path in (*old, other):
            store.upload(path)
        store.point_latest(old[-1].name)  # whoever wrote the other 3 went back
        before = counting[0]
        dies_at(url, n)
        try:
            write()
            died = False
        except Killed:
            died = True
        dies_at(url, None)
        found = fetch_checkpoint(url, tmp_path / f"copy-{n}")
        seen.add(found.name)
        assert content(found) == expected[found.name], n
        write()  # the next process
        assert RemoteStore(url).complete() == names(2, 3)
        assert content(fetch_checkpoint(url, tmp_path / f"again-{n}")) == expected[new.name]
        assert not any(checkpoint_name(1) in path for path in everything(url))
        if not died:
            break
    assert before > 10 and n > 10 and seen == set(names(2, 3))


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "sums cut", "sums changed"])
def test_a_damaged_object_gives_way_to_the_checkpoint_before(url, tmp_path, capsys, damage):
    store = RemoteStore(url)
    paths = [make(tmp_path, step) for step in (1, 2)]
    for path in paths:
        store.upload(path)
    store.point_latest(paths[-1].name)
    system, root = fsspec.core.url_to_fs(url)
    weights, sums = (f"{root}/checkpoints/{paths[1].name}/{name}" for name in ("weights/__0_0.distcp", SUMS))
    whole = system.cat_file(weights), system.cat_file(sums)
    if damage == "missing":
        system.rm_file(weights)
    elif damage.startswith("sums"):
        system.pipe_file(sums, whole[1][:-3] if damage == "sums cut" else whole[1].replace(b"  ", b" ", 1))
    else:
        system.pipe_file(weights, whole[0][:-1] if damage == "cut" else whole[0][:50] + b"!" + whole[0][51:])
    found = fetch_checkpoint(url, tmp_path / "copy")
    assert content(found) == content(paths[0])
    told = capsys.readouterr().err
    assert told.startswith("WARNING: ") and (SUMS if "sums" in damage else "weights/__0_0.distcp") in told
    assert [p.name for p in (tmp_path / "copy/checkpoints").iterdir() if p.is_dir()] == [paths[0].name]
    with pytest.raises(DamagedCheckpoint):
        fetch_checkpoint(f"{url}/checkpoints/{paths[1].name}", tmp_path / "named")
    system.rm_file(f"{root}/checkpoints/{paths[0].name}/trainer.json")
    with pytest.raises(DamagedCheckpoint, match="no checkpoint in .* is whole"):
        fetch_checkpoint(url, tmp_path / "none")


def test_the_store_keeps_what_the_folder_keeps(url, tmp_path):
    """Its listing beside the folder's own, over 12 checkpoints, with losses that rise and fall."""
    store, draw = RemoteStore(url), random.Random(3)
    for step in range(1, 13):
        path = make(tmp_path, step, draw.choice([None, draw.uniform(1, 3)]))
        store.upload(path)
        store.point_latest(path.name)
        store.prune(2, 5, 2)
        prune_checkpoints(tmp_path / "checkpoints", 2, every=5, best=2)
        assert store.complete() == [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert set(names(5, 10, 11, 12)) < set(store.complete())
    assert superseded(names(1, 2), lambda name: None, 0) == []


def test_what_cannot_be_read_now_is_not_given_up_for_it(url, tmp_path, monkeypatch):
    """The best checkpoint is the first one, and its trainer.json does not answer."""
    store = RemoteStore(url)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        store.upload(path := make(tmp_path, step, loss))
    store.point_latest(path.name)
    system = fsspec.core.url_to_fs(url)[0]
    read = system.cat_file

    def silent(path, **options):
        if path.endswith("trainer.json"):
            raise OSError("no answer")
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(system, "cat_file", silent)
        with pytest.raises(storage.ShardError, match="no answer"):
            store.prune(1, 0, 1)
    assert store.complete() == names(1, 2, 3)
    store.prune(1, 0, 1)
    assert store.complete() == names(1, 3)


def test_a_file_that_arrives_by_half_is_sent_again(tmp_path, monkeypatch):
    store, path, put = RemoteStore(str(tmp_path / "store")), make(tmp_path, 1), LocalFileSystem.put_file
    halves = [1]

    def cut(system, source, target, **options):
        put(system, source, target, **options)
        if target.endswith("distcp") and halves[0]:
            halves[0] -= 1
            os.truncate(target, 10)

    monkeypatch.setattr(LocalFileSystem, "put_file", cut)
    store.upload(path)
    store.point_latest(path.name)
    assert content(fetch_checkpoint(store.url, tmp_path / "copy")) == content(path)
    halves[0] = 2
    with pytest.raises(storage.ShardError, match="failed 2 times .10 of 1000 bytes arrived"):
        store.upload(path)


def test_a_bucket_that_is_not_there_is_no_empty_store(bucket, tmp_path):
    with pytest.raises(ValueError, match="s3://misspelled/run/checkpoints: no such file"):
        fetch_checkpoint("s3://misspelled/run", tmp_path)
    with pytest.raises(ValueError, match="s3://misspelled/run"):
        RemoteStore("s3://misspelled/run").upload(make(tmp_path, 1))
    assert "misspelled" not in fsspec.filesystem("s3").ls("", refresh=True)
    with pytest.raises(ValueError, match="nosuch://x: Protocol not known"):
        RemoteStore("nosuch://x").complete()


# The hook, in a training of a stub.


def mirrored(make_trainer, run_dir, url: str, **train):
    trainer = make_trainer(checkpoint_store=url, **train)
    run_dir.mkdir(exist_ok=True)
    mirror = Mirror(trainer.config.train, run_dir, lambda: False)
    mirror.start()
    trainer.hooks.append(mirror)
    return trainer, mirror


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_from_the_store_on_another_disk(make_trainer, url, tmp_path, background):
    settings = {
        "steps": 5,
        "schedule": "constant",  # so that more steps change nothing of the first ones
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "keep_every": 2,
        "checkpoint_async": background,
    }
    trainer, mirror = mirrored(make_trainer, tmp_path / "run", url, **settings)
    run(trainer, tmp_path / "run")
    assert mirror.missing is None
    assert RemoteStore(url).complete() == names(2, 4, 5)
    assert {"metrics.jsonl", "events.jsonl", "checkpoints/latest"} < set(everything(url))
    copied = [event["step"] for event in read_events(tmp_path / "run") if event["event"] == "copied"]
    assert copied == sorted(set(copied)) and copied[-1] == 5

    found = fetch_checkpoint(url, tmp_path / "new", ("metrics.jsonl",))
    check_checkpoint(found)
    settings["steps"] = 9
    resumed, mirror = mirrored(make_trainer, tmp_path / "new", url, **settings)
    resumed.resume(found)
    run(resumed, tmp_path / "new")
    assert mirror.missing is None and RemoteStore(url).complete() == names(2, 4, 6, 8, 9)
    straight = run(make_trainer(**settings | {"steps": 9}), tmp_path / "straight")
    assert_same(weights(resumed), weights(straight))
    assert [line["step"] for line in read_metrics(tmp_path / "new/metrics.jsonl")] == list(range(1, 10))


def test_a_store_that_is_down_stops_nothing_and_gets_all_that_is_kept_later(
    make_trainer, bucket, s3_server, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    settings = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 2, "keep_every": 3}
    s3_server.stop()
    try:
        trainer, mirror = mirrored(make_trainer, tmp_path, bucket, **settings)
        run(trainer, tmp_path)
    finally:
        s3_server.start()
    assert trainer.step == 4 and latest_checkpoint(tmp_path).name == checkpoint_name(4)
    assert "step-00000004 is on disk, but s3://" in mirror.missing and "Could not connect" in mirror.missing
    assert "training goes on, and it is tried again with the next" in caplog.text
    assert everything(bucket) == []
    assert "never-to-be-seen" not in caplog.text + mirror.missing
    again, mirror = mirrored(make_trainer, tmp_path, bucket, **settings | {"steps": 5})  # the same command
    again.resume(latest_checkpoint(tmp_path))
    run(again, tmp_path)
    assert mirror.missing is None
    assert RemoteStore(bucket).complete() == names(3, 4, 5)


def test_nothing_left_to_train_still_copies(make_trainer, url, tmp_path):
    trainer = run(make_trainer(steps=2), tmp_path)
    again, mirror = mirrored(make_trainer, tmp_path, url, steps=2)
    again.resume(trainer.saved)
    run(again, tmp_path)
    assert mirror.missing is None and RemoteStore(url).complete() == names(2)


def test_a_slow_store_gets_the_newest_and_what_it_copies_stays_on_disk(make_trainer, tmp_path, monkeypatch, caplog):
    """One copy takes as long as four steps, and one checkpoint is kept."""
    url, go, started = str(tmp_path / "store"), threading.Event(), threading.Event()
    upload, order = RemoteStore.upload, []

    def slow(store, checkpoint):
        order.append(checkpoint.name)
        started.set()
        assert go.wait(60)
        return upload(store, checkpoint)

    monkeypatch.setattr(RemoteStore, "upload", slow)
    trainer, mirror = mirrored(make_trainer, tmp_path / "run", url, steps=6, checkpoint_every=1, keep_checkpoints=1)
    step = trainer.train_step

    def stepping():
        if trainer.step == 1:
            assert started.wait(60)
        if trainer.step == 5:
            there = [p.name for p in checkpoints(tmp_path / "run/checkpoints")]
            assert there == names(1, 4, 5), "what is copied, what was to be next, and the newest"
            go.set()
        return step()

    trainer.train_step = stepping
    run(trainer, tmp_path / "run")
    assert order[0] == checkpoint_name(1) and order[-1] == checkpoint_name(6) and len(order) <= 3
    assert "step-00000001 is still being copied" in caplog.text
    assert mirror.missing is None and RemoteStore(url).complete() == names(6)


def test_old_ones_that_cannot_be_removed_are_no_missing_checkpoint(make_trainer, tmp_path, monkeypatch, caplog):
    def refused(*policy):
        raise OSError("no permission to delete")

    monkeypatch.setattr(RemoteStore, "prune", refused)
    trainer, mirror = mirrored(make_trainer, tmp_path, str(tmp_path / "store"), steps=2)
    run(trainer, tmp_path)
    assert mirror.missing is None and "step-00000002 is copied, but not what is older" in caplog.text


def test_a_stopped_run_does_not_wait_for_ever(make_trainer, tmp_path, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(RemoteStore, "upload", lambda store, checkpoint: hangs.wait(60))
    monkeypatch.setattr("titans_pretrain.training.mirror.PATIENCE", 1)
    trainer = make_trainer(checkpoint_store=str(tmp_path / "store"), steps=2)
    mirror = Mirror(trainer.config.train, tmp_path, lambda: True)
    trainer.hooks.append(mirror)
    run(trainer, tmp_path)
    assert "was not copied to" in mirror.missing and "within 1 s" in mirror.missing
    hangs.set()


def test_a_run_that_went_back_takes_the_store_along(make_trainer, url, tmp_path, caplog):
    settings = {"checkpoint_every": 1, "keep_checkpoints": 0}
    trainer, _ = mirrored(make_trainer, tmp_path, url, steps=4, **settings)
    run(trainer, tmp_path)
    (tmp_path / "checkpoints/latest").write_text(checkpoint_name(2))
    back, mirror = mirrored(make_trainer, tmp_path, url, steps=3, lr=1.0, **settings)
    back.resume(latest_checkpoint(tmp_path))
    run(back, tmp_path)
    assert mirror.missing is None and "holds step-00000004, later than step-00000002" in caplog.text
    assert RemoteStore(url).complete() == names(1, 2, 3)
    found = fetch_checkpoint(url, tmp_path / "copy")
    assert content(found) == content(tmp_path / "checkpoints" / checkpoint_name(3))


def test_what_another_run_left_under_the_same_steps_is_replaced(make_trainer, url, tmp_path):
    store = RemoteStore(url)
    for step in (1, 2):
        other = make(tmp_path / "other", step, salt="another ")
        store.upload(other)
        store.point_latest(other.name)
    trainer, mirror = mirrored(make_trainer, tmp_path / "run", url, steps=2, checkpoint_every=1)
    run(trainer, tmp_path / "run")
    assert mirror.missing is None and store.complete() == names(1, 2)
    for name in names(1, 2):
        found = fetch_checkpoint(f"{url}/checkpoints/{name}", tmp_path / "copy")
        assert content(found) == content(tmp_path / "run/checkpoints" / name)


def test_what_is_removed_loses_its_sums_first(tmp_path, monkeypatch):
    store, removed, remove = RemoteStore(str(tmp_path / "store")), [], LocalFileSystem.rm_file
    for step in (1, 2):
        store.upload(path := make(tmp_path, step))
    store.point_latest(path.name)
    monkeypatch.setattr(LocalFileSystem, "rm_file", lambda system, path: removed.append(path) or remove(system, path))
    store.prune(1, 0, 0)
    assert removed[0].endswith(f"{checkpoint_name(1)}/{SUMS}") and len(removed) == 4
