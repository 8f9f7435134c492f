"""Part 4, train: the command itself on the card: one process, ZeRO over it, and a ring of two, line by line alike.

The ring's two processes compute on the CPU: NCCL takes no two of them on one card, and gloo moves no device tensors between two."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.harness import Session

ROOT = Path(__file__).parents[2]
NEEDED = {
    "one process": ["omegaconf", "pydantic", "fsspec"],
    "ZeRO 1": ["deepspeed", "megatron"],
    "ring, cp 2": ["megatron"],
}
LIMIT = 1e-3  # relative, of every loss and gradient norm: float32 on two kinds of device


def train(s: Session) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list] = {}
        for side, launcher, settings in (
            ("one process", [], {}),
            ("ZeRO 1", ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"], {"parallel.zero_stage": 1}),
            (
                "ring, cp 2", ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
                {"parallel.cp": 2, "train.device": "cpu"},
            ),
        ):  # fmt: skip
            missing = [n for n in [*NEEDED["one process"], *NEEDED[side]] if importlib.util.find_spec(n) is None]
            if missing:
                s.write(
                    test="train", side=side, skipped=f"{', '.join(dict.fromkeys(missing))} not installed; see --wheels"
                )
                continue
            s.point(
                lambda test, side, run=(launcher, settings): _train(s, side, *run, Path(folder), found),
                test="train",
                side=side,
            )


def _train(s: Session, side: str, launcher: list, settings: dict, folder: Path, found: dict) -> dict:
    from benchmarks.data import write_corpus

    data = folder / "data"
    if not data.exists():
        write_corpus(data, 20000, mean_length=200)
    run = folder / side.replace(" ", "-").replace(",", "")
    settings = {
        "data.path": data, "run.dir": run, "model.vocab_size": 320, "train.device": s.device.type, "train.steps": 2, "train.eval_every": 0,
        "train.warmup_steps": 1, "train.log_every": 1,
    } | settings  # fmt: skip
    command = [sys.executable, "-m", *launcher, "titans_pretrain", "train", "configs/tiny.yaml"]
    command += [f"{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    if done.returncode:
        told = (
            [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines() or ["no output"]
        )
        raise RuntimeError(told[0][:300])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found[side] = [line[name] for line in lines for name in ("loss", "grad_norm")]
    alone = found.get("one process")
    if alone is None or side == "one process":
        return {"numbers": found[side], "held": None}
    off = max(abs(a - b) / abs(b) for a, b in zip(found[side], alone, strict=True))
    return {"numbers": found[side], "off": off, "held": off <= LIMIT}
