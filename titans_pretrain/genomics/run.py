"""From a config to a classifier that is measured: fine-tuning, a baseline, a table."""

import dataclasses
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from titans_pretrain.checkpoint import find_checkpoint, find_tokenizer, load_weights
from titans_pretrain.checkpoint.store import write_text
from titans_pretrain.config import ModelConfig, load_run_config
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.data_prep.tokenizer import NucleotideTokenizer
from titans_pretrain.genomics.config import ClassifyConfig
from titans_pretrain.genomics.kmers import kmer_baseline
from titans_pretrain.genomics.model import Classifier
from titans_pretrain.genomics.paper import paper_rows
from titans_pretrain.genomics.sequences import Labelled, held_out, read_benchmark
from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.training.engine import compute_dtype, pick_device
from titans_pretrain.training.fit import fit, open_run, write_results

ENTRY = NucleotideTokenizer().entry


def with_model(config: ClassifyConfig) -> ClassifyConfig:
    """The config with the model of head.init_from in it. Raises ValueError for a model that reads no bases, and for a config that
    says another model."""
    model = config.model
    if config.head.init_from:
        checkpoint = find_checkpoint(config.head.init_from)
        model = load_run_config(checkpoint).model
        if config.model not in (ModelConfig(), model):
            raise ValueError("the model is that of head.init_from: leave out model.*, or head.init_from")
        found = read_tokenizer_entry(find_tokenizer(config.head.init_from))
        if found.kind != ENTRY.kind:
            raise ValueError(
                f"{checkpoint} was trained on tokens of {found}; pretrain on data of `titans-data tokenize --tokenizer nucleotide`"
            )
    if model.vocab_size < ENTRY.vocab_size:
        raise ValueError(f"model.vocab_size={model.vocab_size}: the nucleotide tokenizer has {ENTRY.vocab_size} ids")
    return dataclasses.replace(config, model=model)


def build_classifier(config: ClassifyConfig, classes: int) -> Classifier:
    """config: as with_model gives it. Pretrained weights or fresh ones, and a fresh head, from train.seed."""
    device = pick_device(config.train.device)
    with torch.device("meta"):
        backbone = TitansForCausalLM(config.model)
    backbone.to_empty(device=device)
    torch.manual_seed(config.train.seed)
    if config.head.init_from:
        load_weights(find_checkpoint(config.head.init_from), backbone)
    else:
        backbone.init_weights()
    return Classifier(backbone, classes, config.head).to(device)


def classify(config: ClassifyConfig, say: Callable[[str], None] = print) -> int:
    """Trains in `run.dir` and measures on the test. Returns the exit code: 0, or 128 and the signal's number where one ended the
    training; the best weights so far are there, and are not measured."""
    if not config.data.path:
        raise ValueError("data.path is not set; give the folder of a data set, e.g. data.path=human_nontata_promoters")
    config = with_model(config)
    benchmark = read_benchmark(config.data.path, config.data.max_length)
    train, validation = held_out(benchmark.train, config.data.validation, config.train.seed)
    classes = len(benchmark.classes)
    model = build_classifier(config, classes)
    device = model.head.weight.device
    run_dir = open_run(config, config.run.dir or f"runs/{benchmark.name}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"{benchmark.name}: {len(train):,} sequences to train on, {len(validation):,} to validate, {len(benchmark.test):,} to test, "
        f"{classes} classes; {'+'.join(config.model.variants)}, {trained:,} trained parameters; run folder {run_dir}"
    )

    def logits(part: Labelled) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, lengths, labels = (x.to(device) for x in part.padded(ENTRY.filler_id))
        return model(tokens, lengths).float(), labels

    def loss(part: Labelled) -> torch.Tensor:
        return F.cross_entropy(*logits(part))

    @torch.no_grad()
    def accuracy(labelled: Labelled) -> float:
        right = 0
        with compute_dtype(device, config.train.precision):
            for part in labelled.batches(config.train.batch):
                found, labels = logits(part)
                right += int((found.argmax(-1) == labels).sum())
        return right / len(labelled)

    began = time.process_time()
    fitted = fit(
        model, config.train, train.shuffled(config.train.batch, config.train.seed), loss,
        lambda: 1 - accuracy(validation), run_dir, validated="validation_error", say=say,
    )  # fmt: skip
    seconds = time.process_time() - began
    if fitted.stopped:
        told = f"stopped by {fitted.stopped.name}: the best weights, of step {fitted.best_step}, are in {run_dir}"
        print(told, file=sys.stderr)
        return 128 + fitted.stopped
    results = {
        "data": benchmark.name,
        "classes": benchmark.classes,
        "test_accuracy": accuracy(benchmark.test),
        "test_sequences": len(benchmark.test),
        "majority": _majority(train, benchmark.test),
        "kmers": kmer_baseline(train, validation, benchmark.test, classes),
        "model": "+".join(config.model.variants),
        "start": "pretrained" if config.head.init_from else "from scratch",
        "trained": config.head.trained,
        "validation_accuracy": 1 - fitted.best,
        "steps": fitted.step,
        "best_step": fitted.best_step,
        "trained_parameters": trained,
        "cpu_seconds": round(seconds, 1),
    }
    write_results(run_dir, results)
    write_text(run_dir / "table.md", table(results) + "\n")
    say(table(results))
    return 0


def _majority(train: Labelled, test: Labelled) -> float:
    """Accuracy of always naming the training's most frequent class."""
    return (test.labels == train.labels.bincount().argmax()).double().mean().item()


def table(results: dict) -> str:
    """The accuracies of metrics.json in Markdown, with the paper's rows for the same data set where it has them."""
    kmers = results["kmers"]
    what = results["start"] + (", head alone trained" if results["trained"] == "head" else "")
    rows = {
        f"{results['model']}, {what}": f"{100 * results['test_accuracy']:.1f}",
        f"logistic regression on {kmers['k']}-mers": f"{100 * kmers['accuracy']:.1f}",
        "most frequent class": f"{100 * results['majority']:.1f}",
    } | {f"paper: {name}": f"{percent:.1f}" for name, percent in paper_rows(results["data"]).items()}
    return "\n".join(
        [
            f"Top-1 accuracy on the {results['test_sequences']:,} test sequences of {results['data']}, percent",
            "",
            "| | accuracy |",
            "|---|---|",
            *(f"| {name} | {percent} |" for name, percent in rows.items()),
        ]
    )
