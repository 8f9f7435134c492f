"""The main job end to end, in a few minutes on two CPU cores: `make quickstart`.

Python's own library, or a text of yours (`make quickstart TEXT=my.txt`), becomes a tokenizer and token shards; a small MAG model
is trained on them, interrupted once and resumed, exported for Hugging Face transformers, loaded there, and completes a line,
with its cache as without. Every step is a public command, printed before it runs. A new start replaces the folder.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
INTERRUPTED = 85  # exit code of a training that saved a checkpoint and stopped
PROMPT, TEXT_PROMPT = "def __init__(self", "The"

GENERATE = """
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(prompt, return_tensors="pt")
options = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7}

set_seed(0)
tokens = model.generate(**inputs, **options)[0].tolist()
print(tokenizer.decode(tokens, skip_special_tokens=True))

set_seed(0)  # once more, reading the whole text again for each token: what the cache saves must not be missed
if model.generate(**inputs, **options, use_cache=False)[0].tolist() != tokens:
    sys.exit("error: without its cache the model says something else: with this transformers, generate() cannot be trusted")
""".strip()


def main() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("quickstart-run"), help="folder to write (default: quickstart-run)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="PATTERN",
        help="files to learn from (default: modules and packages a to r of Python's library)",
    )
    parser.add_argument("--prompt", help=f"what the model completes (default: {PROMPT!r}, with --text {TEXT_PROMPT!r})")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over configs/quickstart.yaml")
    args = parser.parse_intermixed_args()
    try:
        text = args.text or [f"{library}/*.py", f"{library}/[a-r]*/*.py"]
        prompt = args.prompt or (TEXT_PROMPT if args.text else PROMPT)
        quickstart(args.work, text, prompt, args.vocab_size, args.overrides)
    except subprocess.CalledProcessError as e:
        sys.exit(f"\nerror: {Path(e.cmd[0]).name} ended with exit code {e.returncode}; what it said stands above")
    except KeyboardInterrupt:
        sys.exit(130)


def quickstart(work: Path, text: list[str], prompt: str, vocab_size: int, overrides: list[str]) -> None:
    started = time.monotonic()
    if work.exists():
        if not (work / ".quickstart").is_file() and any(work.iterdir()):
            sys.exit(
                f"error: {work} holds something that the quickstart did not write; choose another folder with --work"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / ".quickstart").touch()
    tokenizer, data, run, exported = (str(work / name) for name in ("tokenizer", "data", "run", "exported"))
    print(f"The commands below are in {BIN}: run them by name after `source {BIN}/activate`.")

    say(f"A tokenizer from real text: {' '.join(text)}.")
    command("titans-data", "tokenizer", *text, "--vocab-size", str(vocab_size), "--out", tokenizer)

    say("The same text as shards of tokens, three documents in a hundred held out.")
    command("titans-data", "tokenize", *text, "--tokenizer", tokenizer, "--validation", "0.03", "--out", data)
    command("titans-data", "inspect", data, "--sample", "1")

    say("Training, interrupted half-way as Ctrl-C would.")
    config = os.path.relpath(REPOSITORY / "configs" / "quickstart.yaml")
    train = ["titans-pretrain", "train", config, f"data.path={data}", f"run.dir={run}", *overrides]
    interrupt_half_way(train, Path(run))

    say("The same command again goes on from the checkpoint, bit for bit as if nothing had happened.")
    command(*train)

    say("Out to Hugging Face transformers, which needs only this folder.")
    command("titans-pretrain", "export", run, exported)
    script = work / "generate.py"
    script.write_text(GENERATE + "\n")
    print(f"\n$ cat {script}\n{GENERATE}")
    command("python", str(script), exported, prompt)

    say("The same without transformers.")
    command("titans-pretrain", "generate", run, "--prompt", prompt, "--max-new-tokens", "64", "--temperature", "0.7")

    say(f"What came out, {(time.monotonic() - started) / 60:.1f} minutes after the start.")
    command("titans-pretrain", "report", run)


def say(text: str) -> None:
    print(f"\n# {text}", flush=True)


def command(*words: str) -> None:
    """Prints a command and runs it; raises CalledProcessError if it fails."""
    print(f"$ {shlex.join(words)}", flush=True)
    subprocess.run([BIN / words[0], *words[1:]], check=True)


def interrupt_half_way(words: list[str], run: Path) -> None:
    """Runs a training command and stops it by a signal when half of its steps are done."""
    print(f"$ {shlex.join(words)}", flush=True)
    process = subprocess.Popen([BIN / words[0], *words[1:]])
    try:
        while process.poll() is None and _share_done(run) < 0.5:
            time.sleep(0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        code = process.wait()
    finally:
        process.kill()
    if code not in (INTERRUPTED, 0):  # 0: it was faster than the signal
        raise subprocess.CalledProcessError(code, words)


def _share_done(run: Path) -> float:
    """Of the steps of a run, from its own files."""
    metrics, config = run / "metrics.jsonl", run / "config.yaml"
    if not (metrics.exists() and config.exists()):
        return 0.0
    from titans_pretrain.config import load_config

    lines = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((line["step"] for line in lines), default=0) / load_config(config).train.steps


if __name__ == "__main__":
    main()
