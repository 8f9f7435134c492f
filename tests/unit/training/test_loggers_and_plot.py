"""What a run's numbers become: metrics.jsonl and its broken lines, one wandb run over all resumes, loss.png."""

import json
import math
import sys
import threading
from types import SimpleNamespace

import pytest

from titans_pretrain.config import Config
from titans_pretrain.training import plot
from titans_pretrain.training.loggers import JsonlLogger, WandbLogger, read_metrics


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"nothing", b"[1]", b"3", b'{"loss": 1}', b'{"step": "1"}', b'{"step": 1, "loss": null}', b"[" * 100_000],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for read in (lambda: read_metrics(path), lambda: JsonlLogger(path, 3, 0)):
        with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not a line of metrics: .*; remove it") as e:
            read()
        assert "\n" not in str(e.value)
    assert path.read_bytes().endswith(b'{"step": 3}\n')  # nothing is lost


def test_numbers_that_are_not_finite_are_numbers(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity}\n')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_sees_one_run_over_all_resumes(tmp_path, monkeypatch):
    started = []

    class Wandb:
        def init(self, **options):
            started.append(options)

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    config = Config()
    config.run.wandb = "titans"
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        WandbLogger(config, tmp_path / folder)
    ids = [options["id"] for options in started]
    assert ids[0] == ids[1] != ids[2]
    assert all(options["resume"] == "allow" and options["project"] == "titans" for options in started)
    assert all(id.isalnum() for id in ids)


def test_a_wandb_that_does_not_finish_holds_nobody(tmp_path, monkeypatch, caplog):
    never = threading.Event()
    run = SimpleNamespace(finish=lambda: never.wait(60))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    monkeypatch.setattr("titans_pretrain.training.loggers.PATIENCE", 0.01)
    config = Config()
    config.run.wandb = "titans"
    WandbLogger(config, tmp_path).close()
    never.set()
    assert "wandb is off: TimeoutError: no answer" in caplog.text


def write_steps(folder, steps: int):
    lines = [{"step": i, "tokens": i * 10_000_000, "loss": 3.0 + 1 / i} for i in range(1, steps + 1)]
    lines.append({"step": steps, "tokens": steps * 10_000_000, "validation_loss": 3.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure that is saved."""
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig

    def kept(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        found.append(figure.axes[0])

    monkeypatch.setattr(Figure, "savefig", kept)
    return found


def test_the_curve_has_a_smoothed_line_readable_ticks_and_the_unigram_entropy(tmp_path, axes):
    write_steps(tmp_path, 200)
    assert plot.plot_loss(tmp_path, unigram_entropy=2.75) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (ax,) = axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["training", "training, smoothed", "validation", "unigram entropy"]
    assert list(lines["unigram entropy"].get_ydata()) == [2.75, 2.75]
    assert {"0", "500M", "1G"} <= {text.get_text() for text in ax.get_xticklabels()}
    plot.plot_loss(tmp_path)
    assert "unigram entropy" not in {line.get_label() for line in axes[1].get_lines()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    assert plot.smoothed([2.0] * 7) == pytest.approx([2.0] * 7)
    assert plot.smoothed([math.nan, 2.0, math.nan, 2.0])[1:] == pytest.approx([2.0] * 3)  # of skipped steps
    assert plot.smoothed([1.0, 3.0]) == [1.0, 3.0]  # as few steps as a picture can show one by one
    losses = [float(i % 7) for i in range(200)]
    keep = 1 - plot.SMOOTHED / 200
    for t in (0, 1, 50, 199):
        weights = [keep ** (t - i) for i in range(t + 1)]
        expected = sum(w * x for w, x in zip(weights, losses)) / sum(weights)
        assert plot.smoothed(losses)[t] == pytest.approx(expected)


def test_a_picture_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write_steps(tmp_path, 3)

    def broken(*args, **kwargs):
        raise OSError(122, "Disk quota exceeded", "loss.png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(OSError, match="Disk quota"):
        plot.plot_loss(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_picture_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run/loss.png").symlink_to(tmp_path / "precious")
    write_steps(tmp_path / "run", 3)
    plot.plot_loss(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "run/loss.png").is_symlink()
