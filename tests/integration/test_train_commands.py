"""The commands around training: eval, generate, report, export, doctor, and --help."""

import html.parser
import importlib.metadata
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.checkpoint import find_checkpoint, load_model
from titans_pretrain.checkpoint.checksums import SUMS, write_sums
from titans_pretrain.commands.generate import Sampling, Writer, generate_tokens, pick_token
from titans_pretrain.data import build_reader, unigram_entropy
from titans_pretrain.training.health import NAMES
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.norms import GROUPS, KINDS

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run folder of a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    overrides = ["train.steps=12", "train.eval_every=6", "train.eval_batches=3", "train.lr=1e-2"]
    assert cli.main(["train", str(TINY), f"data.path={data}", f"run.dir={folder}", *overrides]) == 0
    return folder


def table(text: str) -> dict[str, str]:
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in text.splitlines())}


def test_eval_equals_the_validation_in_training(run, capsys):
    assert cli.main(["eval", str(run)]) == 0
    found = table(capsys.readouterr().out)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert found["validation loss"] == f"{last['validation_loss']:.4f}"
    assert found["tokens"] == f"{last['validation_tokens']:,}"
    assert found["checkpoint"] == str(find_checkpoint(run))


def test_eval_of_more_batches_than_there_are_reads_every_target_once(run, capsys):
    """Against the sum over the rows of the whole split by hand."""
    assert cli.main(["eval", str(run), "--batches", "1000", "train.micro_batch=4"]) == 0
    found = table(capsys.readouterr().out)
    model, config = load_model(run)
    loss, targets = 0.0, 0
    with torch.no_grad():
        for batch in build_reader(config, split="validation", epochs=1):
            count = int((batch.labels != -100).sum())
            loss += float(model(batch.tokens, labels=batch.labels, positions=batch.positions).loss) * count
            targets += count
    assert found["tokens"] == f"{targets:,}"
    assert float(found["validation loss"]) == pytest.approx(loss / targets, abs=1e-4)


def test_unknown_options_are_refused(run, capsys):
    for arguments in (["eval", str(run), "--batch", "3", "--nope", "x"], ["report", str(run), "train.steps=3"]):
        with pytest.raises(SystemExit) as e:
            cli.main(arguments)
        assert e.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_report(run, data, capsys):
    assert cli.main(["report", str(run)]) == 0
    found = table(capsys.readouterr().out)
    lines = read_metrics(run / "metrics.jsonl")
    assert found["steps"] == "12 of 12"
    assert found["validation loss"].startswith(f"{lines[-1]['validation_loss']:.4f} (perplexity")
    assert found["unigram entropy"].startswith(f"{unigram_entropy(data, 'validation'):.4f}")
    assert found["loss curve"] == str(run / "loss.png")
    assert {"tokens/s", "peak memory", "training loss", "tokens", "MFU", "epochs"} <= found.keys()


def test_report_tells_what_was_skipped_and_undone(run, capsys, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    steps[0] |= {"skipped": 1, "loss": math.nan}
    steps[-1] |= {"skipped": 2}
    back = {"step": steps[-1]["step"], "tokens": 1, "rolled_back_to": 3}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, back]))
    assert cli.main(["report", str(copy)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"skipped steps +2 \(1 of them spikes\)", out)
    assert re.search(rf"rollbacks +at step {back['step']} to 3", out)
    assert "nan" not in out
    page = (copy / "report.html").read_text()
    assert "no update: not finite" in page and "no update: a spike" in page and "back to the weights of step 3" in page


def test_report_writes_a_page_that_needs_nothing_else(run, capsys, tmp_path):
    copy = tmp_path / "<run> & more"
    shutil.copytree(run, copy)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line and line["step"] % 4 == 0:
            line |= {f"memory.{i}.{name}": i + line["step"] / 100 for i in range(11) for name in NAMES}
            line |= {f"{kind}.{group}": line["step"] / 10 for kind in KINDS for group in GROUPS if group != "attention"}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes() + b'{"time": 1, "ev')  # cut off
    assert cli.main(["report", str(copy)]) == 0
    assert str(copy / "report.html") in capsys.readouterr().out
    page = (copy / "report.html").read_text()

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append(tag)
            for name, value in attributes:
                assert name not in ("src", "onload") and (name != "href" or value.startswith("#")), (tag, name, value)
                assert name not in ("href", "xlink:href") or value.startswith("#"), value

    found: list[str] = []
    Tags().feed(page)
    assert "script" not in found and found.count("svg") == 1 + 7 + len(KINDS) + len(NAMES)
    assert "feed_forward" in page and ">attention<" not in page
    assert "&lt;run&gt; &amp; more" in page and "<run>" not in page
    assert "started, " in page and "finished, " in page and "layer 10" in page and "layer 5" not in page
    assert all(label in page for label in NAMES.values())


def test_report_of_no_run_is_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a run folder: it needs config.yaml and metrics.jsonl" in capsys.readouterr().err


def test_a_run_is_evaluated_from_anywhere(data, tmp_path, monkeypatch, capsys):
    """Its data was given relative to another folder."""
    monkeypatch.chdir(data.parent)
    options = ["data.path=data", f"run.dir={tmp_path}/run", "train.steps=1", "train.eval_every=0", "model.dim=32"]
    assert cli.main(["train", str(TINY), *options]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["eval", "run", "--batches", "1"]) == 0
    assert table(capsys.readouterr().out)["tokens"]
    assert cli.main(["report", "run"]) == 0
    assert "validation tokens" in table(capsys.readouterr().out)["unigram entropy"]


def test_a_foreign_run_executes_nothing(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    command = f"pipe:touch {tmp_path}/ran; cat {data}/{{}}"
    checkpoint = find_checkpoint(tmp_path / "run")
    for folder in (tmp_path / "run", checkpoint):
        text = (folder / "config.yaml").read_text()
        changed = text.replace(f"path: {data}", f"path: '{command}'").replace(
            "cache_dir: null", f"cache_dir: {tmp_path}/cache"
        )
        assert changed != text
        (folder / "config.yaml").write_text(changed)
    (checkpoint / SUMS).unlink()
    write_sums(checkpoint, {})  # as whoever changes a file can
    assert cli.main(["eval", str(tmp_path / "run"), "--batches", "1"]) == 2
    assert "the run's own config reads its data by 'pipe:touch" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "not known: the run's own config" in table(capsys.readouterr().out)["unigram entropy"]
    assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert not (tmp_path / "ran").exists()
    assert cli.main(["eval", str(tmp_path / "run"), "--batches", "1", f"data.path={command}"]) == 0
    assert (tmp_path / "ran").exists()


def test_report_of_a_folder_that_is_only_to_be_read(run, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(run))

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # for root every folder can be written
    assert cli.main(["report", str(run)]) == 0
    found = table(capsys.readouterr().out)
    assert found["loss curve"].startswith("not drawn: [Errno 30] Read-only file system")
    assert found["steps"] == "12 of 12"


@pytest.mark.parametrize(
    ("name", "text"), [("metrics.jsonl", "{]\n"), ("config.yaml", "train: [\n"), ("config.yaml", "a: 1\n")]
)
def test_a_broken_file_of_a_run_is_named(run, tmp_path, capsys, name, text):
    for kept in ("metrics.jsonl", "config.yaml"):
        (tmp_path / kept).write_text((run / kept).read_text())
    (tmp_path / name).write_text(text)
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and error.count("\n") == 1


def test_greedy_generation_equals_the_argmax_of_full_passes(run, monkeypatch):
    """Also when the prompt is read in pieces that end inside a chunk."""
    model, _ = load_model(run)
    prompt = list(b"memory learns while it reads")
    full = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            full.append(int(model(torch.tensor([full])).logits[0, -1].argmax()))
    for prefill in (1024, 7):
        monkeypatch.setattr("titans_pretrain.commands.generate.PREFILL", prefill)
        sampling = Sampling(max_new_tokens=20, temperature=0.0)
        assert list(generate_tokens(model, prompt, sampling, eos_id=None)) == full[len(prompt) :]
    stop = full[len(prompt) + 5]
    found = list(generate_tokens(model, prompt, sampling, eos_id=stop))
    assert found == full[len(prompt) : full.index(stop, len(prompt))]


def test_sampling_limits():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    random = torch.Generator().manual_seed(0)

    def drawn(**limits) -> set[int]:
        return {pick_token(logits, Sampling(**({"temperature": 1.0} | limits)), random) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0.0) == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.5) == {1}
    assert drawn(top_p=0.51) == {1, 3}
    assert drawn(top_p=0.9) == {1, 2, 3}
    assert drawn(top_k=1, top_p=1.0) == {1}
    share = sum(pick_token(logits, Sampling(temperature=0.5), random) == 1 for _ in range(2000)) / 2000
    assert share == pytest.approx(0.25 / (0.01 + 0.25 + 0.0225 + 0.0625), abs=0.05)  # squares, normalised


def test_generate_command_is_reproducible_and_starts_with_the_prompt(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main(["generate", str(run), "--prompt", "memory", "--max-new-tokens", "30", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("memory") for text in texts)


def test_samples_are_the_texts_of_the_seeds_that_follow(run, capsys):
    options = ["--prompt", "memory", "--max-new-tokens", "12"]
    texts = []
    for seed in ("5", "6", "7"):
        assert cli.main(["generate", str(run), *options, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert cli.main(["generate", str(run), *options, "--seed", "5", "--num-samples", "3"]) == 0
    assert capsys.readouterr().out == "---\n".join(texts)
    assert len(set(texts)) == 3


def test_a_text_is_read_once_and_completed_later(run, tmp_path, monkeypatch, capsys):
    state, greedy = str(tmp_path / "book.state"), ["--greedy", "--max-new-tokens", "9"]
    assert cli.main(["generate", str(run), "--prompt", "it reads a memory", "--save-state", state]) == 0
    tokens = len(Writer(str(run)).tokenizer.encode("it reads a memory"))
    assert capsys.readouterr().out == f"read {tokens} tokens; wrote {state}\n"
    writer = Writer(str(run), state=state)
    ids = [int(i) for text in ("it reads a memory", " of it") for i in writer.tokenizer.encode(text)]
    expected = writer.tokenizer.decode(
        list(generate_tokens(writer.model, ids, Sampling(9, 0.0), writer.tokenizer.entry.eos_id))
    )
    assert cli.main(["export", str(run), str(tmp_path / "exported")]) == 0  # the same model, by another way
    for source in (run, tmp_path / "exported"):
        capsys.readouterr()
        assert cli.main(["generate", str(source), "--load-state", state, "--prompt", " of it", *greedy]) == 0
        assert capsys.readouterr().out == f" of it{expected}\n"
    monkeypatch.setattr("builtins.input", _typing(["", "and"]))  # an empty line first: there is nothing to say yet
    options = ["--load-state", state, "--interactive", "--save-state", state, *greedy]
    assert cli.main(["generate", str(run), *options]) == 0
    shown = capsys.readouterr()
    read = Writer(str(run), state=state).start.tokens
    assert shown.err.count("tokens read]") == 1 and shown.err.endswith(f"{read} tokens read]\n") and read > tokens + 4
    assert cli.main(["generate", str(run), "--load-state", str(tmp_path / "gone"), "--prompt", "a"]) == 2
    assert "no state file" in capsys.readouterr().err


def test_an_export_is_a_run_again(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert cli.main(["import", str(tmp_path / "exported"), str(tmp_path / "imported")]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path}/imported/checkpoints/step-00000000\n")
    weights = [load_model(path)[0].state_dict() for path in (run, tmp_path / "imported")]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    assert cli.main(["generate", str(tmp_path / "imported"), "--prompt", "it", "--max-new-tokens", "2"]) == 0
    assert cli.main(["import", str(tmp_path / "exported"), str(tmp_path / "imported")]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_a_conversation_goes_on_from_all_that_was_said(run, monkeypatch, capsys):
    """Each answer is the completion of the whole text so far; an empty line asks for more of the last one."""
    writer, sampling = Writer(str(run)), Sampling(max_new_tokens=9, temperature=0.0)
    lines = ["", "memory", "it reads", ""]
    answers = ["".join(pieces) for pieces in writer.converse(lines, sampling)]
    assert len(answers) == 3  # nothing was there to go on from at the first
    context, said = writer.context, ""
    for line, answer in zip(lines[1:], answers):
        said += ("\n" if said and line else "") + line
        (pieces,) = writer.complete(said, sampling)
        assert answer == "".join(pieces)
        said += answer
    with torch.no_grad():
        whole = writer.model(torch.tensor([writer.tokenizer.encode(said).tolist()])).logits[0, -1]
    torch.testing.assert_close(context.logits, whole, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("builtins.input", _typing(lines))
    assert cli.main(["generate", str(run), "--interactive", "--greedy", "--max-new-tokens", "9"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(answer + "\n" for answer in answers)
    assert shown.err.count("tokens/s, ") == 3
    assert shown.err.endswith(f"{len(writer.tokenizer.encode(said)):,} tokens read]\n")


def _typing(lines):
    """An input() that ends with Ctrl-D."""
    left = list(lines)

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    return read


def test_nothing_is_printed_before_the_checkpoint_is_found(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "gone"), "--prompt", "once"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "no run or checkpoint folder" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be 0 or more, got -1.0"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples must be 1 or more, got 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
    ],
)
def test_bad_generation_options_are_one_line(run, capsys, arguments, message):
    assert cli.main(["generate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_export_generates_the_same_text(run, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert cli.main(["export", str(run), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    texts = []
    for source in (run, find_checkpoint(run), tmp_path / "exported"):
        assert cli.main(["generate", str(source), "--prompt", "it reads", "--greedy", "--max-new-tokens", "30"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_doctor_finds_this_machine_fit(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for package in ("deepspeed", "megatron-core"):
        installed = importlib.util.find_spec(package.partition("-")[0])
        version = importlib.metadata.version(package) if installed else "not installed"
        assert f"{package:<30}{version} (distributed training)\n" in out
    assert f"{'memory scan':<30}ok" in out
    assert f"{'torch':<30}{torch.__version__}" in out


def test_doctor_reports_a_scan_that_differs(capsys, monkeypatch):
    from titans_pretrain.commands import doctor

    scan = doctor.memory_scan

    def off(*args, backend, **kwargs):
        y, state = scan(*args, backend=backend, **kwargs)
        return (y if backend == "reference" else y * (1 + 1e-6)), state

    monkeypatch.setattr(doctor, "memory_scan", off)
    assert cli.main(["doctor"]) == 1
    assert f"{'memory scan':<30}FAILED: differs from its reference" in capsys.readouterr().out


def test_help_lists_the_commands_and_loads_nothing_heavy(capsys):
    code = (
        "import sys\nfrom titans_pretrain.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'omegaconf', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for command in ("train", "config", "plan", "eval", "generate", "export", "import", "report", "verify", "doctor"):
        assert f"\n    {command} " in out
        with pytest.raises(SystemExit) as e:
            cli.main([command, "--help"])
        assert e.value.code == 0
        assert f"examples:\n  titans-pretrain {command}" in capsys.readouterr().out
