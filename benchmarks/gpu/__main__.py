"""Everything about a GPU that only a GPU can tell, in one command and at most eight minutes.

  python -m benchmarks.gpu                             # from a copy of the source tree: needs torch >= 2.11, triton, numpy
  python -m benchmarks.gpu --only proof scan --minutes 4
  python -m benchmarks.gpu --wheels DIR                # packages that are missing, from files; there is no network
  python -m benchmarks.gpu --quick --device cpu        # every line of it, on tiny sizes, without a GPU

proof    versions, known faults, each ptxas, witnesses in whole numbers, errors against float64, 20 equal runs, compute-sanitizer
scan     the memory scan alone over the card's own ceilings, beside torch and peers
step     training steps of 170M, 760M and 1.3B beside transformers, up to 1M tokens; their parts; the first step
train    `titans-pretrain train` with ZeRO and on a ring, equal to one process

Each part runs in a process of its own, within a share of the time, and its results are on disk as they come:
benchmarks/results/DATE-gpu-CARD.json and .md. What was not reached says so.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARES = {"proof": 100, "scan": 140, "step": 190, "train": 50}  # seconds of eight minutes
GRACE = 30  # seconds in which a point that has begun may end
PACKAGES = (
    "omegaconf",
    "pydantic",
    "fsspec",
    "pyyaml",
    "tqdm",
    "deepspeed",
    "megatron-core",
    "titans-pytorch",
    "flash-linear-attention",
)


def main() -> None:
    args = parse_arguments()
    from torch import cuda

    if args.device == "cuda" and not cuda.is_available():
        print(
            "error: no CUDA device is seen. This needs an NVIDIA GPU with its driver, torch >= 2.11 built for CUDA, triton and numpy; "
            "--quick --device cpu tries every line of it without one",
            file=sys.stderr,
        )
        sys.exit(2)
    if args.part:
        run_part(args)
        return
    begin = time.time()
    card = re.sub(r"[^A-Za-z0-9]+", "-", cuda.get_device_name() if args.device == "cuda" else "cpu").strip("-")
    date = datetime.date.today().isoformat()
    setup = {"date": date, "card": card, "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip()}
    target = args.out / f"{date}-gpu-{card}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    points: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels:
            setup["wheels"] = install(args.wheels, Path(folder) / "site", environment)
        for i, part in enumerate(args.only):
            left = begin + 60 * args.minutes - GRACE - time.time()
            ahead = sum(SHARES[p] for p in args.only[i:])
            until = time.time() + left * SHARES[part] / ahead
            points += supervise(part, args, Path(folder) / f"{part}.jsonl", until, environment, points, setup, target)
            write(points, setup | {"minutes": round((time.time() - begin) / 60, 1)}, args.quick, target)
    print(target.with_suffix(".md").read_text())
    print(f"wrote {target}.json and .md")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART", help=" ".join(SHARES)
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default: 8)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="files of packages that are missing here")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def install(wheels: Path, target: Path, environment: dict) -> str:
    """What of PACKAGES is among these files, into a folder that the parts' processes look into last; their names."""
    from importlib.metadata import PackageNotFoundError, version

    done = []
    for package in PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--find-links",
                str(wheels),
                "--target",
                str(target),
            ]
            if subprocess.run([*command, package], capture_output=True).returncode == 0:
                done.append(package)
            elif subprocess.run([*command, "--no-deps", package], capture_output=True).returncode == 0:
                done.append(f"{package} (alone)")
    environment["PYTHONPATH"] += os.pathsep + str(target)
    return ", ".join(done) or "none that is missing here"


def supervise(
    part, args, file: Path, until: float, environment: dict, before: list, setup: dict, target: Path
) -> list[dict]:
    """The part's points, from its own process, which is ended GRACE after its time."""
    if until - time.time() < 5:
        return [{"part": part, "skipped": "the clock is spent"}]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--part",
        part,
        "--file",
        str(file),
        "--until",
        str(until),
        "--device",
        args.device,
    ]
    print(f"{part}: {until - time.time():.0f} s", file=sys.stderr, flush=True)
    errors = file.with_suffix(".err")
    with errors.open("w") as f:
        child = subprocess.Popen(
            [*command, *(["--quick"] if args.quick else [])], stderr=f, stdout=f, env=environment, cwd=ROOT
        )
        ended, seen = None, 0
        while child.poll() is None:
            time.sleep(0.5)
            if time.time() > until + GRACE:
                child.kill()
                child.wait()
                ended = {"part": part, "skipped": "the clock is spent: ended in the middle of a point"}
            found = read(file, part)
            if len(found) > seen:
                seen = len(found)
                write(before + found, setup, args.quick, target)
    if child.returncode and ended is None:
        told = [line for line in errors.read_text().splitlines() if line.strip()] or ["no output"]
        ended = {"part": part, "failed": f"exit code {child.returncode}: {told[-1][:300]}"}
    return read(file, part) + ([ended] if ended else [])


def read(file: Path, part: str) -> list[dict]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [{"part": part, **json.loads(line)} for line in lines if line.endswith("\n")]


def write(points: list[dict], setup: dict, quick: bool, target: Path) -> None:
    from benchmarks.gpu.report import figures, markdown

    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(figures(points, setup, quick), indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(points, setup, quick) + "\n")


def run_part(args: argparse.Namespace) -> None:
    from importlib import import_module

    from torch import device

    from benchmarks.gpu.harness import Session

    part = getattr(import_module(f"benchmarks.gpu.{args.part}"), args.part)
    part(Session(args.file, device(args.device), args.until, args.quick))


if __name__ == "__main__":
    main()
