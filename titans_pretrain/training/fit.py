"""A short training on one device towards a measured task: the weights that validate best are kept."""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_pretrain.checkpoint.store import make_folder, write_text
from titans_pretrain.config import save_config
from titans_pretrain.config.fit import FitConfig
from titans_pretrain.disk import sync
from titans_pretrain.training.engine import compute_dtype
from titans_pretrain.training.loggers import JsonlLogger
from titans_pretrain.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from titans_pretrain.training.signals import StopRequest

BEST = "best.safetensors"
RESULTS = "metrics.json"


@dataclass(frozen=True)
class Fitted:
    step: int  # the last one
    best_step: int
    best: float  # the validation's number there
    stopped: signal.Signals | None  # what ended it before its time


def fit(
    model: nn.Module,
    train: FitConfig,
    examples: Iterator,
    loss: Callable[[object], Tensor],
    validate: Callable[[], float],
    run_dir: Path,
    *,
    validated: str,
    say: Callable[[str], None] = print,
) -> Fitted:
    """Trains `model` in place and leaves it with its best weights, which lie in RUN/best.safetensors too.

    examples: endless batches; loss: a scalar of one; validate: the number that shall be small, called `validated` in the logs;
    say: gets the lines for a person. RUN/metrics.jsonl has a line for each step and each validation. A signal ends the training
    after its step. Raises ValueError for a loss or a gradient that is not finite.
    """
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, train)
    logger = JsonlLogger(run_dir / "metrics.jsonl", 0, 0)
    step, best_step, best, since = 0, 0, math.inf, 0
    with contextlib.closing(logger), StopRequest() as stop:
        while step < train.steps and stop.received is None and not (train.patience and since >= train.patience):
            step += 1
            model.train()
            with compute_dtype(device, train.precision):
                value = loss(next(examples))
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
            rate = learning_rate(step, train)
            numbers = {"step": step, "loss": float(value.detach()), "grad_norm": float(norm), "lr": rate}
            if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
                raise ValueError(
                    f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}: not finite; lower train.lr"
                )
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
            logger.log(numbers)
            if step % train.log_every == 0:
                say(f"step {step}/{train.steps}  loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}")
            if step % train.eval_every == 0 or step == train.steps or stop.received is not None:
                model.eval()
                with torch.no_grad(), compute_dtype(device, train.precision):
                    found = validate()
                logger.log({"step": step, validated: found})
                better = found < best
                since = 0 if better else since + 1
                if better:
                    best_step, best = step, found
                    save_weights(model, run_dir / BEST)
                say(f"step {step}/{train.steps}  {validated} {found:.4f}" + " (best)" * better)
    if not best_step:
        raise ValueError(f"no {validated} was found: stopped before the first one, or none was a number")
    load_weights(model, run_dir / BEST)
    model.eval()
    return Fitted(step, best_step, best, stop.received)


def open_run(config, run_dir: str | Path) -> Path:
    """Makes the folder of a new run and writes its config.yaml. Raises ValueError where one lies already."""
    run_dir = Path(run_dir)
    if (run_dir / "config.yaml").exists():
        raise ValueError(f"{run_dir} holds a run already; give another folder, run.dir=FOLDER, or remove it")
    make_folder(run_dir)
    save_config(config, run_dir / "config.yaml")
    return run_dir


def write_results(run_dir: Path, results: dict) -> None:
    """RUN/metrics.json."""
    write_text(run_dir / RESULTS, json.dumps(results, indent=1) + "\n")


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's parameters, whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".writing-{path.name}")
    save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, temporary)
    sync(temporary)
    temporary.replace(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts parameters that save_weights wrote into a model of the same shape."""
    from safetensors.torch import load_file

    there = load_file(path)
    own = dict(model.named_parameters())
    if there.keys() != own.keys() or any(there[name].shape != p.shape for name, p in own.items()):
        raise ValueError(f"{path} does not fit the model; is the config beside it the one that it was trained with?")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(there[name])
