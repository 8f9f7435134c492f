"""Downloads that are still running when a run ends: given up at once, and nothing of them stays."""

import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from corpora import make_config, write_corpus

from titans_pretrain.data import Stopped, build_reader
from titans_pretrain.data.background import Background
from titans_pretrain.data.storage import STALE, Folder


@pytest.fixture
def slow(tmp_path):
    """A data path whose tars beyond the first come without end; the command leaves its process id in `pid`."""
    write_corpus(tmp_path / "c", [60] * 24)
    script = tmp_path / "slow.sh"
    script.write_text(
        f"case $1 in train-000000.tar|*.json|*.npy) cat {tmp_path}/c/$1 ;; *) echo start; echo $$ > {tmp_path}/pid; sleep 600; esac\n"
    )
    return f"pipe:sh {script} {{}}"


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_close_ends_the_command_and_removes_what_came(slow, tmp_path):
    folder = Folder(slow, str(tmp_path / "cache"))
    background = Background()
    download = background.submit(folder.local, "train-000001.tar")
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() and list(tmp_path.rglob("*.part")))
    folder.close()
    with pytest.raises(CancelledError):
        download.result(30)
    assert not list(tmp_path.rglob("*.part")) and not list((tmp_path / "cache").rglob("*.tar"))
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    with pytest.raises(CancelledError):
        folder.local("train-000002.tar")


def test_a_process_ends_without_waiting_for_its_downloads(slow, tmp_path):
    """The next window is on its way; the interpreter has nothing more to do."""
    program = f"""
import sys, time, pathlib
sys.path.insert(0, {os.path.dirname(__file__)!r})
from corpora import make_config
from titans_pretrain.data import build_reader, packing, window
window.WINDOW_SHARDS = 1
window.permutation = lambda n, key: packing.np.arange(n)
reader = build_reader(make_config({slow!r}, cache_dir={str(tmp_path / "cache")!r}))
pid = pathlib.Path({str(tmp_path / "pid")!r})
while not (pid.exists() and pid.read_text() and list(pid.parent.rglob('*.part'))):
    if reader is not None and reader._sources[0]._following is None:
        next(reader)
    time.sleep(0.01)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=True)
    assert done.stdout == "done\n" and not done.stderr
    assert not list(tmp_path.rglob("*.part"))
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_a_reader_closes_its_folders(slow, tmp_path):
    reader = build_reader(make_config(slow, cache_dir=str(tmp_path / "cache")))
    reader.close()
    with pytest.raises(CancelledError):
        next(reader)


def test_a_stop_ends_the_waiting_for_a_batch_and_loses_nothing(tmp_path):
    write_corpus(tmp_path / "c", [60] * 4)
    expected = next(build_reader(make_config(tmp_path / "c")))
    stop, there = threading.Event(), threading.Event()
    reader = build_reader(make_config(tmp_path / "c"), stopped=stop.is_set)
    (source,) = reader._sources
    local = source.folder.local
    source.folder.local = lambda *args, **options: there.wait(30) and local(*args, **options)
    stop.set()
    for _ in range(2):
        with pytest.raises(Stopped):
            next(reader)
    there.set()
    reader._ahead[1].result()
    assert torch.equal(next(reader).tokens, expected.tokens)


def test_partial_files_of_killed_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    write_corpus(tmp_path / "c", [60] * 4)
    folder = Folder(f"pipe:cat {tmp_path}/c/{{}}", str(tmp_path / "cache"))
    target = folder.local("manifest.json")
    old, new = (target.with_name(f"manifest.json.{name}.part") for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 2 * STALE,) * 2)
    folder.local("manifest.json", fresh=True)
    assert new.exists() and not old.exists()


def test_background_gives_results_and_errors():
    background = Background(3)
    assert background.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        background.map(lambda x: 1 / x, [1, 0, 2])
    assert background.submit(int, "5").result() == 5


def test_a_thread_owns_nothing_that_it_was_given_once_its_result_is_seen():
    """A tensor that it freed while the interpreter ends would abort the process."""

    class Thing:
        pass

    background = Background()
    for _ in range(200):
        thing = Thing()
        seen = weakref.ref(thing)
        future = background.submit(lambda given: given is not None, thing)
        del thing
        assert future.result() and seen() is None
