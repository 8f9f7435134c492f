"""Memory and speed of generation with an exported model, over the length of the prompt.

    python -m benchmarks.generation                    # all variants, prompts up to 1M tokens
    python -m benchmarks.generation --quick
    python -m benchmarks.generation --only mag --lengths 1024 10240

Each point is `generate()` in a process of its own, greedy, on a model with random weights: what it holds does not depend on them.
"""

import argparse
import json
import time

from benchmarks.common import GIB, Bar, argument_parser, describe_setup, finish, reset_peak, resident_bytes, run_point
from titans_pretrain.evaluation.figures import markdown_table

VARIANTS = ("lmm", "mac", "mag", "mal")
LENGTHS = (1024, 10_240, 65_536, 262_144, 1_048_576)
NEW = 64  # tokens generated behind the prompt
MIB = GIB / 1024


def measure(point: dict) -> dict:
    import torch

    from titans_pretrain.config import MacConfig, MemoryConfig, ModelConfig
    from titans_pretrain.hf.cache_titans import TitansCache
    from titans_pretrain.hf.configuration_titans import TitansConfig
    from titans_pretrain.hf.modeling_titans import CACHE_NAME, TitansForCausalLM

    torch.manual_seed(0)
    config = ModelConfig(
        point["variant"], dim=64, layers=2, heads=2, vocab_size=512, window=128, memory=MemoryConfig(heads=2),
        mac=MacConfig(segment=128),
    )  # fmt: skip
    model = TitansForCausalLM(TitansConfig.from_model_config(config)).eval()

    def generate(prompt: torch.Tensor, cache: TitansCache, new: int) -> tuple[torch.Tensor, float]:
        """The prompt and `new` tokens; seconds."""
        start = time.perf_counter()
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0, **{CACHE_NAME: cache},
        )  # fmt: skip
        return written, time.perf_counter() - start

    prompt = torch.randint(config.vocab_size, (1, point["tokens"]))
    generate(prompt[:, :64], TitansCache(), 4)  # what is loaded once
    before = resident_bytes()
    reset_peak()
    cache = TitansCache()
    written, read = generate(prompt, cache, 1)
    _, more = generate(written, cache, NEW)
    state = sum(x.nbytes for x in _tensors(cache.content.states))
    return point | {
        "peak": resident_bytes(peak=True), "before": before, "state": state, "read": point["tokens"] / read,
        "written": NEW / more,
    }  # fmt: skip


def _tensors(part) -> list:
    import torch

    if isinstance(part, torch.Tensor):
        return [part]
    parts = vars(part).values() if hasattr(part, "__dict__") else part if isinstance(part, tuple | list) else ()
    return [x for inner in parts for x in _tensors(inner)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS)
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of the prompt")
    parser.add_argument("--quick", action="store_true", help="short prompts: whether it works")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(args.point)))
        return
    setup = describe_setup(1, "transformers")
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    points, rows = [], []
    for variant in args.only:
        for tokens in (64, 512) if args.quick else args.lengths:
            points.append(found := run_point("benchmarks.generation", {"variant": variant, "tokens": tokens}))
            more, state = (found["peak"] - found["before"]) / MIB, found["state"] / MIB
            rows.append(
                [f"{variant}, {tokens}", f"{found['peak'] / MIB:.0f}", f"{more:.1f}", f"{state:.2f}",
                 f"{found['read']:.0f}", f"{found['written']:.0f}"]
            )  # fmt: skip
            print(", ".join(rows[-1]), flush=True)
    header = ["prompt", "peak, MiB", "over the loaded model, MiB", "state, MiB", "read, tokens/s", "written, tokens/s"]
    print("\n" + markdown_table(header, rows))
    bars = []
    for variant in args.only:
        peaks = {p["tokens"]: p["peak"] for p in points if p["variant"] == variant}
        states = {p["state"] for p in points if p["variant"] == variant and p["tokens"] >= 1024}
        for long, short, limit in ((262_144, 1024, 1.05), (1_048_576, 10_240, 1.5)):
            if {long, short} <= peaks.keys():
                bars.append(
                    Bar(
                        f"{variant}: peak of {long} tokens over that of {short}",
                        peaks[long] / peaks[short],
                        limit,
                        "x",
                        False,
                    )
                )
        if states:
            bars.append(Bar(f"{variant}: largest state over the smallest", max(states) / min(states), 1.0, "x", False))
    finish(args, setup, points, bars)


if __name__ == "__main__":
    main()
