"""`titans-data`: from text to shards. Heavy modules are imported by the subcommand that needs them."""

import argparse
import logging
import os
import re
import sys
from os.path import expanduser  # of paths: a shell leaves the ~ of --out=~/data as it is

import titans_pretrain

DESCRIPTION = """\
Prepares text for training. In this order:

  tokenizer   learns pieces of words from your text, or takes over a tokenizer that exists
  tokenize    turns the text into numbers, in a data folder: what training reads (a part of it is held out)
  inspect     shows what is in a data folder
  verify      reads a data folder again and says what is damaged
  merge       joins data folders, and the parts that several machines tokenized

A command that was interrupted goes on when it is given again.
"""

EXAMPLES = """\
examples:
  titans-data tokenizer my.txt --out tokenizer --vocab-size 4096       one file, a small vocabulary
  titans-data tokenize my.txt --tokenizer tokenizer --out data
  titans-data inspect data
  titans-pretrain train laptop data.path=data                          what comes next

  titans-data tokenizer corpus/*.jsonl.zst --out tokenizer --vocab-size 32000
  titans-data tokenize corpus/*.jsonl.zst --tokenizer tokenizer --out data
  titans-data verify data

Exit codes: 0 done, 1 verify found damage, 2 something is wrong with what was given (one line says what).
"""

TOKENIZER_EXAMPLES = """\
examples:
  titans-data tokenizer corpus/*.txt --out tokenizer --vocab-size 32000     train sentencepiece BPE
  titans-data tokenizer src/ --suffix .py --out tokenizer                   from a folder of sources
  titans-data tokenizer --from llama2/tokenizer.model --out tokenizer       take an existing one
  titans-data tokenizer --from gpt2/tokenizer.json --eos '<|endoftext|>' --out tokenizer
  titans-data tokenizer --kind byte --out tokenizer
"""

TOKENIZE_EXAMPLES = """\
examples:
  titans-data tokenize fineweb/*.parquet --tokenizer tokenizer --out data
  titans-data tokenize src/ --suffix .py .md --tokenizer tokenizer --out data --validation 0.02
  titans-data tokenize corpus.jsonl.gz --field content --deduplicate --min-characters 200 --tokenizer tokenizer --out data
  zcat books.txt.gz | titans-data tokenize - --documents paragraph --tokenizer byte --out data
  titans-data tokenize genome.fa.gz --tokenizer nucleotide --out data
  titans-data tokenize corpus/ --tokenizer tokenizer --out data --shard $SLURM_ARRAY_TASK_ID/64   then: titans-data merge data

A killed run goes on where it stopped when the same command is given again. The result does not depend on --workers.
"""


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        status = options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `titans-data inspect data | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "titans-data", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {titans_pretrain.__version__}")
    told = "one of the above; `titans-data COMMAND --help` shows its options"
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, help=told)
    _add_tokenizer(commands)
    _add_tokenize(commands)
    _add_merge(commands)
    _add_verify(commands)
    _add_inspect(commands)
    return parser


def _add_command(commands, name: str, text: str, examples: str, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument("--suffix", nargs="+", default=[], help="of folders and globs, only files that end so")
    group.add_argument("--format", choices=("text", "jsonl", "parquet", "fasta"), help="default: by the file's suffix")
    group.add_argument("--field", default="text", help="JSON field or parquet column with the text (default: text)")
    group.add_argument(
        "--documents",
        choices=("auto", "file", "part", "paragraph", "line"),
        default="auto",
        help="what a document is in a text file; part: paragraphs up to about 4 KiB (default: auto, the file, or its parts "
        "where files are too few to hold one out)",
    )
    group.add_argument("--separator", metavar="LINE", help="in text files, this line stands between documents")
    group.add_argument("--skip-bad-records", action="store_true", help="count unreadable records instead of stopping")


def _read_options(options):
    from titans_pretrain.data_prep.sources import ReadOptions

    return ReadOptions(options.format, options.field, options.documents, options.separator)


def _add_tokenizer(commands) -> None:
    parser = _add_command(commands, "tokenizer", "train or import a tokenizer", TOKENIZER_EXAMPLES, _tokenizer)
    parser.add_argument(
        "inputs", nargs="*", type=expanduser, metavar="INPUT", help="files, folders, globs, URLs or - to train from"
    )
    parser.add_argument("--out", required=True, type=expanduser, metavar="DIR", help="folder to write")
    parser.add_argument("--kind", choices=("sentencepiece", "byte", "nucleotide"), default="sentencepiece")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces to train (default: 32000)")
    parser.add_argument("--sample-lines", type=int, default=400_000, help="lines to train from (default: 400000)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of lines (default: 0)")
    parser.add_argument(
        "--from", dest="existing", type=expanduser, metavar="PATH", help="an existing .model or tokenizer.json"
    )
    parser.add_argument("--eos", metavar="PIECE", help="for --from tokenizer.json: the piece that ends a document")
    _add_reading(parser)


def _tokenizer(options) -> None:
    from pathlib import Path

    from titans_pretrain.data_prep.shards import writing
    from titans_pretrain.data_prep.tokenizer import load_tokenizer, refuse_another

    if options.existing:
        tokenizer = load_tokenizer(options.existing, options.eos)
    elif options.kind != "sentencepiece":
        tokenizer = load_tokenizer(options.kind)
    else:
        tokenizer = _train(options)
    entry = tokenizer.entry
    refuse_another(entry, Path(options.out))
    with writing(options.out):
        tokenizer.save(options.out)
    print(f"{options.out}: {entry.kind}, {entry.vocab_size} ids, eos {entry.eos_id}, {entry.fingerprint[:12]}")


def _train(options):
    from titans_pretrain.data_prep.progress import progress_bar
    from titans_pretrain.data_prep.sources import Documents, extract, find_inputs, format_of, unit_chosen
    from titans_pretrain.data_prep.train_tokenizer import sample_lines, train_sentencepiece

    if not options.inputs:
        raise ValueError("nothing to train from: give INPUT files, or --from, or --kind byte")
    files = find_inputs(options.inputs, options.suffix)
    read = unit_chosen(files, _read_options(options), validation=0.0)
    documents = Documents(files, read)

    def texts():
        with progress_bar(sum(file.size for file in files), "reading") as bar:
            for number, record, raw in documents:
                try:
                    yield extract(raw, format_of(files[number], read), read.field)
                except ValueError as error:
                    if not options.skip_bad_records:
                        raise ValueError(
                            f"{files[number].path}, record {record}: {error}; --skip-bad-records would leave it out"
                        ) from None
                bar.update(documents.bytes_read - bar.n)

    lines = sample_lines(texts(), options.sample_lines, options.seed)
    print(f"training {options.vocab_size} pieces from {len(lines)} lines", file=sys.stderr)
    return train_sentencepiece(lines, options.vocab_size)


def _add_tokenize(commands) -> None:
    parser = _add_command(commands, "tokenize", "turn documents into shards", TOKENIZE_EXAMPLES, _tokenize)
    parser.add_argument(
        "inputs",
        nargs="+",
        type=expanduser,
        metavar="INPUT",
        help="files, folders, globs, URLs, or - for standard input",
    )
    parser.add_argument(
        "--tokenizer", required=True, type=expanduser, metavar="DIR", help="folder, or `byte`, or `nucleotide`"
    )
    parser.add_argument("--out", required=True, type=expanduser, metavar="DATA_DIR", help="data folder to write")
    parser.add_argument("--validation", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--workers", type=int, default=None, help="worker processes (default: one per core)")
    parser.add_argument("--shard-size", type=_size, default="128M", help="size of a tar, as 64M or 1G (default: 128M)")
    parser.add_argument(
        "--shard", type=_part, default=(0, 1), metavar="i/N", help="do part i (from 0) of N, for job arrays"
    )
    parser.add_argument("--checkpoint-seconds", type=float, default=10.0, help=argparse.SUPPRESS)
    _add_reading(parser)
    group = parser.add_argument_group("cleaning")
    group.add_argument("--deduplicate", action="store_true", help="of equal texts keep the first")
    group.add_argument("--min-characters", type=int, default=1)
    group.add_argument("--max-characters", type=int)
    group.add_argument("--min-letters", type=float, default=0.0, metavar="SHARE", help="of letters, digits and blanks")
    group.add_argument("--must-match", metavar="REGEX", help="keep only texts in which this is found")
    group.add_argument("--must-not-match", metavar="REGEX", help="drop texts in which this is found")


def _tokenize(options) -> None:
    from titans_pretrain.data_prep.tokenize import CleanOptions, TokenizeOptions, tokenize
    from titans_pretrain.data_prep.tokenizer import load_tokenizer

    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation must lie in [0, 1), got {options.validation}")
    clean = CleanOptions(
        options.deduplicate,
        options.min_characters,
        options.max_characters,
        options.min_letters,
        options.must_match,
        options.must_not_match,
        options.skip_bad_records,
    )
    workers = options.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    manifest = tokenize(
        options.inputs,
        load_tokenizer(options.tokenizer),
        options.out,
        TokenizeOptions(
            options.validation,
            options.shard_size,
            options.shard,
            tuple(options.suffix),
            _read_options(options),
            clean,
        ),
        workers=workers if workers > 1 else 0,
        progress=True,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    _print_totals(manifest)
    if options.shard == (0, 1):
        if not any(manifest.splits.values()):
            print("note: the input holds no document to keep; nothing can be trained from this", file=sys.stderr)
        elif options.validation and not manifest.splits["validation"]:
            print(
                "note: no document was held out for validation; raise --validation into another --out", file=sys.stderr
            )


def _print_totals(manifest) -> None:
    for split, shards in manifest.splits.items():
        totals = manifest.totals(split)
        print(
            f"{split:<11}{totals['documents']:>12,} documents {totals['tokens']:>15,} tokens "
            f"{totals['bytes']:>15,} bytes {len(shards):>6} shards"
        )
    dropped = manifest.source.get("dropped", {})
    if dropped:
        print("dropped    " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 64M or 1G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write i/N with i from 0 to N-1, as 0/8")
    return int(match[1]), int(match[2])


def _add_merge(commands) -> None:
    parser = _add_command(
        commands,
        "merge",
        "join the parts of a job array, or several data folders, into one",
        "examples:\n  titans-data merge data                     the parts inside, made with --shard i/N\n"
        "  titans-data merge books web code --out all\n",
        _merge,
    )
    parser.add_argument("--deduplicate", action="store_true", help="of equal texts keep the first, over all of them")
    parser.add_argument("folders", nargs="+", type=expanduser, metavar="DATA_DIR")
    parser.add_argument(
        "--out", type=expanduser, metavar="DATA_DIR", help="default: the one folder given, whose parts then disappear"
    )


def _merge(options) -> None:
    from titans_pretrain.data_prep.merge import merge

    _print_totals(merge(options.folders, options.out, deduplicate=options.deduplicate))


def _add_verify(commands) -> None:
    parser = _add_command(
        commands,
        "verify",
        "read everything again and say what is damaged",
        "examples:\n  titans-data verify data\n  titans-data verify data --quick\n",
        _verify,
    )
    parser.add_argument("folder", type=expanduser, metavar="DATA_DIR")
    parser.add_argument("--quick", action="store_true", help="sizes and index tables only, not the content")


def _verify(options) -> int:
    from titans_pretrain.data_prep.verify import verify

    findings = verify(options.folder, quick=options.quick, progress=True)
    for finding in findings:
        print(finding)
    print(f"{options.folder}: " + (f"{len(findings)} findings" if findings else "as the manifest says"))
    return 1 if findings else 0


def _add_inspect(commands) -> None:
    parser = _add_command(
        commands,
        "inspect",
        "totals, document lengths, documents as text",
        "examples:\n  titans-data inspect data\n  titans-data inspect data --split validation --document 0 5 9\n"
        "  titans-data inspect data --png lengths.png\n",
        _inspect,
    )
    parser.add_argument("folder", type=expanduser, metavar="DATA_DIR")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--document", type=int, nargs="+", metavar="N", help="show these documents in full")
    parser.add_argument("--sample", type=int, default=3, help="begin of so many documents (default: 3)")
    parser.add_argument("--png", type=expanduser, metavar="FILE", help="draw the histogram of document lengths")


def _inspect(options) -> None:
    from titans_pretrain.data_prep.inspect import inspect

    inspect(options.folder, options.split, options.document, options.sample, options.png)
