"""What saving costs a training step: written before it goes on, or from a copy while it does.

    python -m benchmarks.checkpoint --folder /where/runs/are     # a model of 100M parameters with AdamW's moments, 1.2 GiB
    python -m benchmarks.checkpoint --quick

Both in turn, in one process. The first asynchronous save makes the buffers that the later ones use again, and is shown apart.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import GIB, Bar, argument_parser, describe_setup, finish
from titans_pretrain.checkpoint.saver import Saver
from titans_pretrain.config import load_config
from titans_pretrain.evaluation.figures import markdown_table
from titans_pretrain.models import build_model
from titans_pretrain.training.optimizer import build_optimizer

REPETITIONS = 5


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it works")
    args = parser.parse_args()
    setup = describe_setup(torch.get_num_threads())
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    sizes = ["model.dim=64"] if args.quick else ["model.dim=768", "model.layers=10", "model.vocab_size=32000"]
    config = load_config("configs/tiny.yaml", [*sizes, "model.memory.heads=4", "train.keep_checkpoints=1"])
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.train)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = 3 * sum(p.nbytes for p in model.parameters())
    savers = {"synchronous": Saver(False), "asynchronous": Saver(True)}
    stalls, whole = {name: [] for name in savers}, {name: [] for name in savers}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for step in range(1, REPETITIONS + 2):
            for name, saver in savers.items():
                numbers = {"step": step, "tokens": 0, "validated": 0, "reader": {}}
                start = time.perf_counter()
                saver.save(Path(folder, name), config, model, optimizer, numbers)
                stalls[name].append(time.perf_counter() - start)
                saver.wait()
                whole[name].append(time.perf_counter() - start)
    rows = [
        [
            name,
            f"{stalls[name][0]:.3f}",
            f"{statistics.median(stalls[name][1:]):.3f}",
            f"{statistics.median(whole[name][1:]):.3f}",
        ]
        for name in savers
    ]
    print(f"{held / GIB:.2f} GiB of weights and moments\n")
    print(markdown_table(["save", "first stall, s", "stall, s", "until it is on disk, s"], rows))
    share = statistics.median(stalls["asynchronous"][1:]) / statistics.median(stalls["synchronous"][1:])
    points = [{"stalls": stalls, "whole": whole, "bytes": held}]
    finish(
        args,
        setup,
        points,
        [Bar("stall of an asynchronous save over a synchronous one", share, 0.15, "", at_least=False)],
    )


if __name__ == "__main__":
    main()
