"""The `titans-pretrain` command. Handlers import what they need, so that --help answers at once."""

import argparse
import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import titans_pretrain
from titans_pretrain.config.keys import nearest_key
from titans_pretrain.config.paths import expand_home

_EXAMPLES = """examples:
  titans-pretrain plan configs/340m-mag.yaml                       size, FLOPs, memory and tokens before anything runs
  titans-pretrain config configs/tiny.yaml                         every setting, what it means and what it is there
  titans-pretrain train configs/tiny.yaml data.path=DATA           train; the same command again goes on where it stopped
  titans-pretrain report runs/tiny                                 what came out
  titans-pretrain generate runs/tiny --prompt "def main("          complete a text
  titans-pretrain export runs/tiny exported/                       a folder for Hugging Face transformers
  titans-pretrain import exported/ runs/imported                   and back

Exit codes: 0 done, 1 doctor found a fault, 2 something is wrong with what was given (one line says what), 85 a signal stopped the training after
a checkpoint was saved, 86 it hung, 87 all is done but the last checkpoint could not be copied to train.checkpoint_store; forecast and classify end with 128 and the signal's number. TITANS_DEBUG=1 shows the whole traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value after an option: they come back as unknown
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        hint = _as_settings(rest) if hasattr(args, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    # Before torch loads OpenMP, whose threads spin for long while they wait: on cores that other programs use too a step
    # on two threads took 50 times as long as on one. Short spins cost little on idle cores and sleep on busy ones.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        for name in ("config", "path", "out", "folder"):
            if getattr(args, name, None):
                setattr(args, name, expand_home(getattr(args, name)))
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        if os.environ.get("TITANS_DEBUG") == "1":
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2


def _as_settings(arguments: Sequence[str]) -> str:
    """What settings that were given as options look like: key=value."""
    meant = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="-"):
        name, _, value = argument.partition("=")
        if argument.startswith("-") and (key := nearest_key(name.lstrip("-").replace("-", "_"))):
            meant.append(f"{key}={value or ('VALUE' if following.startswith('-') else following)}")
    return f"; settings have no dashes: {' '.join(meant)}" if meant else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titans-pretrain",
        description="Pretrain Titans language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {titans_pretrain.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, *examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="\n  ".join(["examples:", *(f"titans-pretrain {name} {example}".rstrip() for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "train",
        _train,
        "train as a config says, or go on",
        "configs/tiny.yaml data.path=DATA train.lr=1e-3",
        "configs/tiny.yaml data.path=DATA train.steps=2000 run.dir=~/runs/longer",
    )
    _add_config(sub)

    sub = command(
        "config",
        _config,
        "list every setting with its value, its meaning, and its default where that is another",
        "",
        "configs/340m-mag.yaml model.variant=mac",
    )
    _add_config(sub, required=False)

    sub = command(
        "plan",
        _plan,
        "print size, FLOPs, layout, memory and tokens of a config",
        "configs/340m-mag.yaml data.path=DATA",
        "configs/1.3b-mag.yaml --processes 32 parallel.tp=2 parallel.cp=4",
    )
    _add_config(sub)
    sub.add_argument(
        "--processes", type=int, metavar="N", help="of the run (default: as few as the degrees of parallel.* allow)"
    )

    sub = command(
        "eval",
        _eval,
        "measure the loss of a checkpoint on held-out text, or what it does in tasks",
        "runs/tiny --batches 64",
        "runs/tiny/checkpoints/step-00000010 data.path=OTHER --split train",
        "exported/ --tasks perplexity,niah data.path=DATA niah.lengths=[2K,4K] niah.samples=20",
        "--list",
    )
    _add_evaluation(sub)

    sub = command(
        "generate",
        _generate,
        "complete a text",
        'runs/tiny --prompt "def main(" --top-p 0.9 --seed 1',
        'runs/tiny --prompt "def main(" --num-samples 4',
        "runs/tiny --interactive",
        "runs/tiny --prompt - --save-state book.state < book.txt",
        'runs/tiny --load-state book.state --prompt "Who was"',
    )
    _add_run(sub, "run, checkpoint or exported folder")
    prompt = sub.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to complete; - reads it from standard input")
    prompt.add_argument(
        "--interactive",
        action="store_true",
        help="complete each line that is typed, with all before it in mind; an empty line asks for more, Ctrl-D ends",
    )
    sub.add_argument("--load-state", metavar="FILE", help="go on from the text that this state was saved behind")
    sub.add_argument(
        "--save-state",
        metavar="FILE",
        help="read the prompt, keep what the model knows of it, and complete nothing; with --interactive, at the end",
    )
    sub.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="completions of the prompt, each with a seed of its own"
    )
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    sub.add_argument("--greedy", action="store_true", help="always the likeliest token; the three below have no effect")
    sub.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 is bolder towards the likely (default: 0.8)"
    )
    sub.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest only (default: 0, all)"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that hold P together (default: 1)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sub = command(
        "export", _export, "write a folder for Hugging Face transformers", "runs/tiny exported/ --dtype bfloat16"
    )
    _add_run(sub)
    sub.add_argument("out", metavar="OUT", help="folder to write")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default: float32)",
    )
    sub.add_argument("--ema", action="store_true", help="the moving average of the weights, of a run with train.ema")

    sub = command(
        "import",
        _import,
        "make a run of an exported folder, or of one that was fine-tuned with Hugging Face transformers",
        "exported/ runs/imported",
    )
    sub.add_argument("path", metavar="EXPORT", help="folder with config.json and safetensors")
    sub.add_argument("out", metavar="RUN", help="run folder to write: a checkpoint of step 0")
    sub.add_argument("--tokenizer", metavar="FOLDER", help="of the run (default: the export's own)")

    sub = command("report", _report, "print what a run reached", "runs/tiny")
    _add_run(sub, "run folder")

    sub = command("verify", _verify, "compare checkpoints with the checksums in them", "runs/tiny")
    _add_run(sub)

    _add_slurm(command)
    _add_tasks(command)

    sub = command(
        "doctor", _doctor, "check this machine: versions, devices, kernels, known faults, the memory scan", "", "--json"
    )
    sub.add_argument("--json", action="store_true", help="everything as one JSON object")
    return parser


def _add_slurm(command) -> None:
    sub = command(
        "submit",
        _submit,
        "train in a Slurm job, with the config as it is now",
        "340m-mag --nodes 2 --gpus-per-node 8 --time 24:00:00 data.path=DATA",
        "tiny --gpus-per-node 0 --dry-run data.path=DATA",
        "340m-mag --sbatch=--qos=long --sbatch=--mem-per-cpu=4G data.path=DATA",
    )
    _add_config(sub)
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    sub.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="one process each (default: 1; with train.device=cpu 0)"
    )
    sub.add_argument("--tasks-per-node", type=int, metavar="N", help="processes where there are no GPUs (default: 1)")
    sub.add_argument(
        "--time", metavar="LIMIT", help="after which the job goes back into the queue, as 4:00:00 or 2-0 (days)"
    )
    sub.add_argument("--partition", metavar="NAME")
    sub.add_argument("--account", metavar="NAME")
    sub.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch; again for more"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the script and do nothing")
    sub = command("status", _status, "say in three lines where a run stands", "runs/tiny")
    _add_run(sub, "run folder")
    sub = command(
        "check-node",
        _check_node,
        "check that this node is fit for a job, and print the job's folder",
        "tiny",
        "--folder data",
    )
    _add_config(sub, required=False)
    sub.add_argument("--folder", metavar="DIR", help="that the job writes, where it is no run (default: this one)")


def _add_tasks(command) -> None:
    """What is no language model: each has a schema of its own."""
    sub = command(
        "forecast",
        _forecast,
        "train a forecaster of time series and measure it",
        "forecasting/ett series.path=ETTh1.csv",
        "forecasting/ett series.path=ETTh1.csv model.variant=mag series.horizons=[96] run.dir=runs/mag",
    )
    _add_config(sub)
    sub = command(
        "classify",
        _classify,
        "train a classifier of DNA sequences, pretrained or not, and measure it",
        "genomics/classify data.path=human_nontata_promoters head.init_from=runs/pretrain",
    )
    _add_config(sub)


def _add_config(sub: argparse.ArgumentParser, required: bool = True) -> None:
    sub.add_argument(
        "config",
        metavar="CONFIG",
        nargs=None if required else "?",
        help="YAML file, or the name of a shipped one, such as tiny",
    )
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over those of the file, e.g. model.variant=mac"
    )


def _add_run(sub: argparse.ArgumentParser, what: str = "run or checkpoint folder") -> None:
    sub.add_argument("path", metavar="RUN", help=what)


def _add_evaluation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "path", metavar="RUN", nargs="?", help="run or checkpoint folder; with --tasks also an exported one"
    )
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that differ from the run's, e.g. data.path=DATA, and of tasks",
    )
    sub.add_argument("--split", default="validation", help="split of the data (default: validation)")
    sub.add_argument("--batches", type=int, help="micro-batches to read (default: train.eval_batches of the run)")
    sub.add_argument(
        "--tasks", metavar="A,B", help="instead of the loss: these tasks, on one process or under torchrun"
    )
    sub.add_argument("--list", action="store_true", help="list the tasks and their settings")
    sub.add_argument(
        "--out", metavar="FOLDER", help="results of tasks (default: RUN/evaluation/STEP, or EXPORT-evaluation)"
    )
    sub.add_argument(
        "--at-once", type=int, default=8, metavar="N", help="items of a task that are read at once (default: 8)"
    )
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of tasks (default: auto)")


def _train(args) -> int:
    from titans_pretrain.config import load_config

    config = load_config(args.config, args.overrides)  # before torch is imported: a typo answers at once
    from titans_pretrain.commands.train import train

    logging.basicConfig(format="%(message)s")
    logging.captureWarnings(True)
    if os.environ.get("RANK", "0") == "0":  # choices are the same on all processes
        logging.getLogger("titans_pretrain").setLevel(logging.INFO)
    return train(config)


def _submit(args) -> None:
    from titans_pretrain.config import load_config

    config = load_config(args.config, args.overrides)
    from titans_pretrain.commands.submit import job_script, resources, submit

    options = resources(config, args.nodes, args.gpus_per_node, args.tasks_per_node)
    options |= {name: value for name in ("time", "partition", "account") if (value := getattr(args, name))}
    print((job_script if args.dry_run else submit)(config, options, args.sbatch))


def _status(args) -> None:
    from titans_pretrain.commands.status import status

    print(status(args.path))


def _check_node(args) -> None:
    from titans_pretrain.commands.check_node import check_node
    from titans_pretrain.config import load_config

    config = load_config(args.config, args.overrides) if args.config else None
    folder = Path(config.run.dir if config else args.folder or ".").absolute()
    check_node(folder, config)
    print(folder)


def _config(args) -> None:
    from titans_pretrain.commands.config import list_keys
    from titans_pretrain.config import load_config

    if args.config and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    print(list_keys(load_config(args.config, args.overrides) if args.config or args.overrides else None))


def _plan(args) -> None:
    from titans_pretrain.config import load_config

    config = load_config(args.config, args.overrides)
    from titans_pretrain.commands.plan import plan

    print(plan(config, args.processes))


def _eval(args) -> None:
    from titans_pretrain.commands.evaluate import evaluate, evaluate_tasks, list_tasks

    if args.list:
        return print(list_tasks())
    if args.path is None:
        raise ValueError("eval needs a run, checkpoint or exported folder; --list tells the tasks")
    if args.tasks is None:
        return print(evaluate(args.path, args.overrides, args.split, args.batches))
    if args.batches is not None:
        raise ValueError(
            "--batches is of the loss on a split, not of --tasks; tasks have settings of their own, see --list"
        )
    options = {"split": args.split, "out": args.out, "batch_size": args.at_once, "device": args.device}
    if table := evaluate_tasks(args.path, args.tasks, args.overrides, **options):
        print(table)


def _generate(args) -> None:
    from titans_pretrain.commands.generate import Sampling, Writer

    sampling = Sampling(
        args.max_new_tokens, 0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.seed
    )
    writer = Writer(args.path, args.device, args.load_state)
    if args.interactive:
        for pieces in writer.converse(_typed_lines(), sampling):
            _print_pieces(pieces)
            told = f"[{writer.tokens_per_second:.1f} tokens/s, {writer.context.tokens:,} tokens read]"
            print(told, file=sys.stderr)
        if args.save_state and writer.context.tokens:
            writer.save(args.save_state)
        return
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.save_state:
        read = writer.read(prompt)
        writer.save(args.save_state)
        print(f"read {read:,} tokens; wrote {args.save_state}")
        return
    for i, pieces in enumerate(writer.complete(prompt, sampling, args.num_samples)):
        print("---\n" * (i > 0) + prompt, end="", flush=True)
        _print_pieces(pieces)


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "")


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _export(args) -> None:
    from titans_pretrain.hf.export import export_checkpoint

    export_checkpoint(args.path, args.out, args.dtype, average=args.ema)
    print(f"wrote {args.out}")


def _import(args) -> None:
    from titans_pretrain.hf.importing import import_export

    print(f"wrote {import_export(args.path, args.out, args.tokenizer)}")


def _report(args) -> None:
    from titans_pretrain.commands.report import report

    print(report(args.path))


def _verify(args) -> None:
    from titans_pretrain.commands.verify import verify

    lines, damaged = verify(args.path)
    print("\n".join(lines))
    if damaged:
        raise ValueError(f"{damaged} of {len(lines)} checkpoints are damaged")


def _forecast(args) -> int:
    from titans_pretrain.config.load import load_as
    from titans_pretrain.forecasting.config import ForecastConfig

    config = load_as(ForecastConfig, args.config, args.overrides)
    from titans_pretrain.forecasting.run import forecast

    return forecast(config)


def _classify(args) -> int:
    from titans_pretrain.config.load import load_as
    from titans_pretrain.genomics.config import ClassifyConfig

    config = load_as(ClassifyConfig, args.config, args.overrides)
    from titans_pretrain.genomics.run import classify

    return classify(config)


def _doctor(args) -> int:
    from titans_pretrain.commands.doctor import doctor

    return doctor(args.json)
