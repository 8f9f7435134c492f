"""Coding or not: windows of a real genome, classified by a pretrained model, by one from scratch, and by k-mers.

    apt-get download gbrowse-data && dpkg -x gbrowse-data_*.deb x
    python -m benchmarks.genomics x/var/lib/gbrowse/databases

Two chromosomes of yeast (S. cerevisiae) and their annotation (SGD), which Debian's gbrowse-data has. Windows lie wholly within coding
sequence, or touch nothing that is annotated; as many of each. Chromosome II is for training (windows overlap) and for pretraining,
chromosome I for the test (they do not). Folders stay in --out; the task there has the layout of GenomicsBenchmarks.
"""

import json
import random
from pathlib import Path

from benchmarks.common import Bar, argument_parser, describe_setup, finish
from titans_pretrain.evaluation.figures import markdown_table

WINDOW, TRAINING_STRIDE, PIECE = 128, 32, 8192
CHROMOSOMES = {"train": "II", "test": "I"}
NOT_FEATURES = ("chromosome", "region")  # lines of the annotation that are no part of a gene, a repeat, a site
MODEL = ("model.dim=32", "model.heads=2", "model.memory.heads=2")
FIT = (
    "train.steps=200",
    "train.batch=32",
    "train.eval_every=100",
    "train.patience=0",
    "train.lr=2e-3",
    "data.validation=0.05",
)
PRETRAIN = ("data.seq_len=512", "train.steps=200", "train.eval_batches=4", "train.checkpoint_every=0")


def read_genome(folder: Path) -> dict[str, str]:
    """{"I": bases, "II": bases}"""
    found = {}
    for number, name in (("I", "chr1.fa"), ("II", "chr2.fa")):
        header, *lines = (folder / "yeast_scaffolds" / name).read_text().split("\n")
        assert header == f">chr{number}", header
        found[number] = "".join(lines).upper()
    return found


def read_annotation(folder: Path, chromosome: str, length: int) -> tuple[bytearray, bytearray]:
    """Two masks of a chromosome's bases: coding, and annotated at all."""
    coding, annotated = bytearray(length), bytearray(length)
    for line in (folder / "yeast_chr1+2/yeast_chr1+2.gff3").read_text().split("\n"):
        fields = line.split("\t")
        if len(fields) < 9 or fields[0] != f"chr{chromosome}":
            continue
        start, end = int(fields[3]) - 1, int(fields[4])
        if fields[2] == "chromosome":
            assert end == length, "the annotation is of another assembly"
        if fields[2] == "CDS":
            coding[start:end] = b"\1" * (end - start)
        if fields[2] not in NOT_FEATURES:
            annotated[start:end] = b"\1" * (end - start)
    return coding, annotated


def write_task(source: Path, out: Path) -> dict[str, int]:
    """OUT/yeast_coding in GenomicsBenchmarks' layout, and OUT/genome.txt with pieces of chromosome II. Returns windows of a class."""
    genome, draw, counts = read_genome(source), random.Random(0), {}
    for split, chromosome in CHROMOSOMES.items():
        bases = genome[chromosome]
        coding, annotated = read_annotation(source, chromosome, len(bases))
        stride = TRAINING_STRIDE if split == "train" else WINDOW
        starts = range(0, len(bases) - WINDOW + 1, stride)
        classes = {
            "coding": [s for s in starts if all(coding[s : s + WINDOW])],
            "intergenic": [s for s in starts if not any(annotated[s : s + WINDOW])],
        }
        counts[split] = min(map(len, classes.values()))
        for name, found in classes.items():
            folder = out / "yeast_coding" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for start in draw.sample(found, counts[split]):
                (folder / f"{start}.txt").write_text(bases[start : start + WINDOW])
    bases = genome[CHROMOSOMES["train"]]
    (out / "genome.txt").write_text("\n".join(bases[i : i + PIECE] for i in range(0, len(bases), PIECE)) + "\n")
    return counts


def pretrain(out: Path) -> None:
    from titans_pretrain.cli import main
    from titans_pretrain.data_prep.cli import main as data_main

    try:
        data_main(
            f"tokenize {out}/genome.txt --documents line --tokenizer nucleotide --out {out}/data --validation 0.1 --workers 1".split()
        )
    except SystemExit as e:
        if e.code:
            raise
    if main(["train", "genomics/pretrain", f"data.path={out}/data", f"run.dir={out}/pretrain", *MODEL, *PRETRAIN]):
        raise SystemExit("the pretraining did not finish")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DATABASES")
    parser.add_argument("--out", type=Path, default=Path("runs/genomics"), metavar="DIR")
    args = parser.parse_args()
    setup = describe_setup(1)
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n", flush=True)
    counts = write_task(args.folder, args.out)
    print(
        f"windows of {WINDOW} bases of a class: {counts['train']:,} to train on, {counts['test']:,} to test\n",
        flush=True,
    )

    from titans_pretrain.config.load import load_as
    from titans_pretrain.genomics.config import ClassifyConfig
    from titans_pretrain.genomics.run import classify

    pretrain(args.out)
    init = f"head.init_from={args.out}/pretrain"
    runs = {
        "lmm from scratch": ("genomics/scratch", MODEL),
        "lmm pretrained": ("genomics/classify", [init]),
        "lmm pretrained, head alone trained": ("genomics/classify", [init, "head.trained=head"]),
    }
    points = []
    for i, (name, (config, settings)) in enumerate(runs.items()):
        own = [f"data.path={args.out}/yeast_coding", f"run.dir={args.out}/classify-{i}"]
        code = classify(load_as(ClassifyConfig, config, [*own, *FIT, *settings]), lambda line: print(line, flush=True))
        if code:
            raise SystemExit(code)
        points.append({"name": name} | json.loads((args.out / f"classify-{i}/metrics.json").read_text()))
    kmers = points[0]["kmers"]
    accuracies = {p["name"]: p["test_accuracy"] for p in points}
    accuracies |= {f"logistic regression on {kmers['k']}-mers": kmers["accuracy"]}
    print("\n" + markdown_table(["", "test accuracy, %"], [[n, f"{100 * a:.1f}"] for n, a in accuracies.items()]))
    bars = [
        Bar(
            "pretrained over from scratch", 100 * (points[1]["test_accuracy"] - points[0]["test_accuracy"]), 0, "points"
        ),
        Bar("pretrained over k-mers", 100 * (points[1]["test_accuracy"] - kmers["accuracy"]), 0, "points"),
    ]
    finish(args, setup, points, bars)


if __name__ == "__main__":
    main()
