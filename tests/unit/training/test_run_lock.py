"""Who may train in a run folder."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from titans_pretrain.training import run_lock
from titans_pretrain.training.run_lock import RunLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds become hundredths."""
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "GONE_AFTER", 0.4)
    monkeypatch.setattr(run_lock, "PAUSE", 0.02)


def locked_by(run_dir, **owner):
    """A lock as another process leaves it."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "lock").write_text(
        json.dumps({"host": "node7", "pid": 4321, "process": ["boot", "pid:[1]", "99"]} | owner)
    )


def test_a_second_run_is_refused_with_host_and_pid(tmp_path):
    code = (
        "import sys, pathlib\nfrom titans_pretrain.training.run_lock import RunLock\n"
        "with RunLock(pathlib.Path(sys.argv[1])):\n    print('has it', flush=True)\n    input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on {os.uname().nodename} trains in {tmp_path}"):
            RunLock(tmp_path).__enter__()
        other.kill()  # and is not waited for: it stays in the list of processes, dead
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with RunLock(tmp_path):  # at once
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    finally:
        other.kill()
        other.communicate()


def test_it_is_taken_over_with_one_line_when_the_pid_has_another_process(tmp_path, capsys):
    me = run_lock._process(os.getpid())
    locked_by(tmp_path, host="here", pid=os.getpid(), process=[*me[:2], "1"])
    with RunLock(tmp_path):
        pass
    assert capsys.readouterr().out == f"takes over {tmp_path}/lock: process {os.getpid()} on here is gone\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("age", [0.0, 100.0])
def test_one_of_another_host_is_taken_over_when_it_gives_no_sign_of_life(tmp_path, capsys, age):
    locked_by(tmp_path)
    then = time.time() - age
    os.utime(tmp_path / "lock", (then, then))
    start = time.monotonic()
    with RunLock(tmp_path):
        assert (time.monotonic() - start > 0.3) == (age == 0.0)  # watched first, unless it is old
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("takes over") and "process 4321 on node7 is gone" in lines[-1]
    assert len(lines) == 1 + (age == 0.0)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": [1], "process": 3}', "\x00"])
def test_a_lock_that_nobody_can_read_is_watched_too(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with RunLock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_one_of_another_host_that_gives_signs_of_life_is_refused(tmp_path):
    locked_by(tmp_path)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.03):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 4321 on node7 trains in"):
            RunLock(tmp_path).__enter__()
    finally:
        stop.set()
        thread.join()
    assert os.listdir(tmp_path) == ["lock"]


def test_the_owner_gives_signs_of_life_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a/run"
    with RunLock(folder):
        before = (folder / "lock").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (folder / "lock").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not folder.exists()
    folder.mkdir()
    with RunLock(folder):
        (folder / "mine").touch()
    assert os.listdir(folder) == ["mine"]


def test_whose_lock_was_taken_ends_without_another_word(tmp_path, monkeypatch, capfd):
    """As a process that was stopped for minutes."""
    ended = threading.Event()
    monkeypatch.setattr(run_lock.os, "_exit", lambda code: ended.set())
    with RunLock(tmp_path):
        locked_by(tmp_path)
        assert ended.wait(10)
    assert "process 4321 on node7 has taken over" in capfd.readouterr().err
    assert json.loads((tmp_path / "lock").read_text())["pid"] == 4321  # and is not removed


def test_a_lock_that_is_gone_is_told_once(tmp_path, capfd):
    with RunLock(tmp_path):
        (tmp_path / "lock").unlink()
        time.sleep(0.5)  # ten beats
    assert capfd.readouterr().err.count("is gone; has its disk been unmounted") == 1


def test_of_many_at_once_one_has_it(tmp_path):
    """Over a stale lock too: each of these processes' threads counts as the owner that it writes down."""
    locked_by(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))
    has, refused, ready = [], [], threading.Barrier(8)

    def contend(number):
        lock = RunLock(tmp_path)
        lock._me = lock._me | {"number": number}
        ready.wait()
        try:
            lock.__enter__()
            has.append(lock)
        except ValueError:
            refused.append(number)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(has), len(refused)) == (1, 7)
    has[0].__exit__()
