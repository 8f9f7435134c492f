"""`titans-data` as its users run it: as a process."""

import glob
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from titans_pretrain.data_prep.cli import main

COMMAND = [sys.executable, "-m", "titans_pretrain.data_prep"]
SOURCES = str(Path(os.__file__).parent / "*.py")  # Python's own modules, about 5 MB


def run(*arguments, check=True, **options):
    result = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    run("tokenizer", SOURCES, "--out", folder, "--vocab-size", 2000, "--sample-lines", 20000)
    return folder


def test_from_text_to_batches(tokenizer, tmp_path):
    from types import SimpleNamespace

    from titans_pretrain.data import build_reader, unigram_entropy

    data = tmp_path / "data"
    out = run("tokenize", SOURCES, "--tokenizer", tokenizer, "--out", data, "--validation", 0.05).stdout
    assert "train" in out and "validation" in out
    assert run("verify", data).stdout == f"{data}: as the manifest says\n"
    shown = run("inspect", data, "--png", tmp_path / "lengths.png").stdout
    assert "tokenizer  sentencepiece, 2000 ids" in shown and "share of tokens" in shown and "--- document 0" in shown
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    source = run("inspect", data, "--document", 0).stdout
    header, _, text = source.partition("\n")
    name = json.loads(header[header.index("{") :])["source"]
    assert text == (Path(os.__file__).parent / name).read_text() + "\n"

    config = SimpleNamespace(
        data=SimpleNamespace(
            path=str(data),
            seq_len=512,
            mixture={},
            reset_documents=True,
            split_long_documents=True,
            cache_dir=None,
            on_bad_shard="stop",
        ),
        train=SimpleNamespace(seed=0, micro_batch=2),
        model=SimpleNamespace(vocab_size=2000, document_multiple=16),
    )
    batch = next(build_reader(config))
    assert batch.tokens.shape == (2, 512)
    assert 3 < unigram_entropy(data) < 7.6


def test_tokenizer_is_reproducible(tokenizer, tmp_path):
    run("tokenizer", SOURCES, "--out", tmp_path / "again", "--vocab-size", 2000, "--sample-lines", 20000)
    assert hashes(tmp_path / "again") == hashes(tokenizer)


def test_standard_input(tmp_path):
    text = "one\ntwo\n\nthree\n"
    run("tokenize", "-", "--documents", "line", "--tokenizer", "byte", "--out", tmp_path / "d", input=text)
    assert "two" in run("inspect", tmp_path / "d", "--document", 1).stdout


def test_one_text_file_is_enough(tmp_path):
    """A first corpus: the README's commands, from one file to rows of both splits."""
    (tmp_path / "my.txt").write_text("".join(Path(path).read_text() for path in sorted(glob.glob(SOURCES))))
    run("tokenizer", "my.txt", "--out", "tokenizer", "--vocab-size", 1000, cwd=tmp_path)
    done = run("tokenize", "my.txt", "--tokenizer", "tokenizer", "--out", "data", cwd=tmp_path)
    assert done.stderr.count("\n") == 1 and "1 text file: read in parts" in done.stderr
    splits = json.loads((tmp_path / "data" / "manifest.json").read_text())["splits"]
    assert splits["validation"]["documents"] > 0 and splits["train"]["documents"] > 100


def test_home_is_expanded(tmp_path):
    """A shell leaves the ~ of --out=~/data alone, and of what is quoted."""
    (tmp_path / "a.txt").write_text("text")
    home = {"env": {**os.environ, "HOME": str(tmp_path)}, "cwd": tmp_path}
    run("tokenizer", "--kind", "byte", "--out=~/tokenizer", **home)
    run("tokenize", "~/*.txt", "--tokenizer=~/tokenizer", "--out=~/a", "--documents", "file", "--validation", 0, **home)
    run("merge", "~/a", "~/a", "--out=~/all", **home)
    assert "2 documents" in run("inspect", "~/all", "--png=~/lengths.png", **home).stdout
    run("verify", "~/all", **home)
    seen = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}  # matplotlib has its own there
    assert seen == {"a.txt", "tokenizer", "a", "all", "lengths.png"}


def test_another_tokenizer_is_not_overwritten(tmp_path):
    run("tokenizer", "--kind", "byte", "--out", tmp_path)
    before = hashes(tmp_path)
    refused = run("tokenizer", "--kind", "nucleotide", "--out", tmp_path, check=False)
    assert refused.returncode == 2 and "already holds another tokenizer" in refused.stderr
    run("tokenizer", "--kind", "byte", "--out", tmp_path)
    assert hashes(tmp_path) == before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").write_text("precious")
    assert run("tokenizer", "--kind", "byte", "--out", tmp_path / "theirs", check=False).returncode == 2
    assert (tmp_path / "theirs" / "tokenizer.json").read_text() == "precious"


def test_a_full_disk_is_one_line(tmp_path):
    """As the kernel does it: no file may pass a size. With room again the same command gives the same bytes."""
    arguments = ["tokenize", SOURCES, "--tokenizer", "byte", "--workers", 1, "--checkpoint-seconds", 0, "--out"]

    def run_on_full_disk(*arguments):
        size = 3000 if arguments[0] == "tokenizer" else 3_000_000
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        done = run(*arguments, check=False, preexec_fn=limit)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"error: cannot write to {arguments[-1]}: File too large" in done.stderr

    run_on_full_disk("tokenizer", "--kind", "byte", "--out", tmp_path / "tokenizer")
    run_on_full_disk(*arguments, tmp_path / "data")
    run(*arguments, tmp_path / "data")
    run(*arguments, tmp_path / "whole")
    assert hashes(tmp_path / "data") == hashes(tmp_path / "whole")


def test_job_array(tmp_path):
    """Four parts at the same time, then merged: as many tokens as in one run."""
    arguments = ["tokenize", SOURCES, "--tokenizer", "byte", "--out", tmp_path / "d", "--workers", 1]
    jobs = [subprocess.Popen([*COMMAND, *map(str, arguments), "--shard", f"{i}/4"]) for i in range(4)]
    assert [job.wait() for job in jobs] == [0] * 4
    run("merge", tmp_path / "d")
    run("verify", tmp_path / "d")
    run(*arguments[:4], "--out", tmp_path / "whole", "--workers", 1)
    totals = [json.loads((tmp_path / d / "manifest.json").read_text())["splits"]["train"] for d in ("d", "whole")]
    assert totals[0]["tokens"] == totals[1]["tokens"] and totals[0]["documents"] == totals[1]["documents"]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_and_go_on(tokenizer, tmp_path, workers):
    """kill -9 in the middle, several times; the result is that of an undisturbed run, byte for byte."""
    arguments = ["tokenize", SOURCES, "--tokenizer", tokenizer, "--deduplicate", "--shard-size", "500K"]
    run(*arguments, "--out", tmp_path / "whole", "--workers", workers)
    out = tmp_path / "killed"
    progress = out / "progress.json"
    killed_at = []

    def documents_read() -> int:
        return json.loads(progress.read_text())["read"] if progress.exists() else 0

    def run_and_kill() -> bool:
        """False if the run was finished before it could be killed."""
        before = documents_read()
        command = [*COMMAND, *arguments, "--out", out, "--workers", workers, "--checkpoint-seconds", 0]
        job = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(lambda: documents_read() > before or job.poll() is not None)
        workers_of_job = children_of(job.pid) if job.poll() is None else []
        job.send_signal(signal.SIGKILL)
        if job.wait() == 0:
            return False
        killed_at.append(documents_read())
        assert not (out / "manifest.json").exists(), "an unfinished folder must not read as a finished one"
        assert run("verify", out, check=False).returncode == 2
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers_of_job))
        return True

    for _ in range(3):
        if not run_and_kill():
            break
    assert killed_at and killed_at[0] > 0
    run(*arguments, "--out", out, "--workers", workers)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert "as the manifest says" in run("verify", out).stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tokenize", "/no/such", "--tokenizer", "byte", "--out", "{out}"], "no input files at /no/such"),
        (["tokenize", __file__, "--tokenizer", "/no/such", "--out", "{out}"], "no tokenizer at /no/such"),
        (["tokenize", __file__, "--tokenizer", "byte", "--out", "{out}", "--validation", "2"], "--validation"),
        (["tokenize", __file__, "--tokenizer", "byte", "--out", "{out}", "--must-match", "("], "no regular expression"),
        (
            ["tokenize", __file__, "--validation", "0", "--tokenizer", "byte", "--out", "/proc/no"],
            "cannot write to /proc/no",
        ),
        (["tokenize", __file__, "--tokenizer", __file__ + ".json", "--out", "{out}"], "no tokenizer at"),
        (["tokenizer", "--kind", "byte", "--out", "/proc/no"], "/proc/no"),
        (["tokenizer", "--out", "{out}"], "nothing to train from"),
        (["verify", "{out}"], "no manifest"),
        (["inspect", "{out}"], "manifest.json"),
        (["merge", "{out}"], "no parts"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    result = run(*[a.replace("{out}", str(tmp_path / "out")) for a in arguments], check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


def test_an_error_of_the_system_is_one_line(monkeypatch, capsys):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "lengths.png")

    monkeypatch.setattr("titans_pretrain.data_prep.inspect.inspect", refused)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "data", "--png", "lengths.png"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'lengths.png'\n"


def test_usage_errors(tmp_path):
    result = run("tokenize", "x", "--tokenizer", "byte", "--out", tmp_path, "--shard", "4/4", check=False)
    assert result.returncode == 2 and "0/8" in result.stderr and "Traceback" not in result.stderr


def test_damage_exits_with_one(tmp_path):
    run("tokenize", SOURCES, "--tokenizer", "byte", "--out", tmp_path / "d")
    with open(tmp_path / "d" / "train-000000.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    result = run("verify", tmp_path / "d", check=False)
    assert result.returncode == 1 and "train-000000.tar: content changed" in result.stdout


@pytest.mark.parametrize("command", [[], ["tokenizer"], ["tokenize"], ["merge"], ["verify"], ["inspect"]])
def test_help_has_examples_and_loads_nothing_heavy(command):
    out = run(*command, "--help").stdout
    assert "examples:" in out and "titans-data" in out
    if not command:  # in the order in which they are used
        order = [out.index(f"\n  {name} ") for name in ("tokenizer", "tokenize", "inspect", "verify")]
        assert order == sorted(order)
    code = (
        "import sys\nfrom titans_pretrain.data_prep.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'sentencepiece', 'tokenizers', 'pyarrow') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()[-1]
    assert loaded == "[]"
