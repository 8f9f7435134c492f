"""Language modelling and common sense without examples, by lm-eval's own tasks (`pip install titans-pretrain[evaluation]`).

lm-eval is asked twice, by its public `simple_evaluate`: first it says which requests its tasks make, and hears nothing; then, when all
have been answered (over all processes, and over several starts), it hears the answers and computes its metrics. What it is told:

    loglikelihood            of a continuation; nothing before it stands for the end of a document, as in training
    loglikelihood_rolling    of a whole document, read at once with the state carried: there is no window
    generate_until           greedy

`harness.data` is a folder for machines without a network: TASK/SPLIT.parquet or .jsonl, or TASK.parquet or .jsonl where the task reads
one split, with the columns of the task's own data set.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from titans_pretrain.config.check import at_least, setting
from titans_pretrain.evaluation.figures import markdown_table
from titans_pretrain.evaluation.model import LanguageModel
from titans_pretrain.evaluation.paper import COMMON_SENSE
from titans_pretrain.evaluation.tasks import Item, check_options
from titans_pretrain.evaluation.texts import Texts

# The paper's columns: heading, lm-eval's task, its metric, and what makes it the paper's unit
COLUMNS = (
    ("Wiki ppl", "wikitext", "word_perplexity,none", 1),
    ("LMB ppl", "lambada_openai", "perplexity,none", 1),
    ("LMB acc", "lambada_openai", "acc,none", 100),
    ("PIQA", "piqa", "acc,none", 100),
    ("Hella", "hellaswag", "acc_norm,none", 100),
    ("Wino", "winogrande", "acc,none", 100),
    ("ARC-e", "arc_easy", "acc,none", 100),
    ("ARC-c", "arc_challenge", "acc_norm,none", 100),
    ("SIQA", "social_iqa", "acc,none", 100),
    ("BoolQ", "boolq", "acc,none", 100),
)
# Folders of lm-eval with these tasks: to look through all of them takes long
FOLDERS = {
    "lambada_openai": "lambada",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "social_iqa": "siqa",
    "boolq": "super_glue/boolq",
}
ROUNDED = 64  # requests of about the same length are read together, padded at their ends


@dataclass(frozen=True)
class Options:
    tasks: list = setting(lambda: list(dict.fromkeys(c[1] for c in COLUMNS)), "names of lm-eval's tasks")
    data: str | None = setting(
        None, "folder of the tasks' data, for machines without a network; null: from the Hugging Face hub"
    )
    limit: int | None = setting(None, "documents of each task; null: all")
    fewshot: int = setting(0, "examples before each question")
    generated: int = setting(256, "tokens of an answer at most, where the task does not say")

    def __post_init__(self):
        check_options(self, "harness")
        at_least("harness.limit", 1 if self.limit is None else self.limit, 1)
        at_least("harness.fewshot", self.fewshot, 0)
        at_least("harness.generated", self.generated, 1)
        if not self.tasks:
            raise ValueError("harness.tasks is empty; give names of lm-eval's tasks")


class Harness:
    Options = Options

    def __init__(self, options: Options, model: LanguageModel, texts: Texts):
        self._options, self._model = options, model
        try:
            self._version = importlib.metadata.version("lm_eval")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError("the task harness needs lm-eval: pip install 'titans-pretrain[evaluation]'") from None

    def identity(self) -> dict:
        return {"lm_eval": self._version}

    @cached_property
    def _requests(self) -> dict[str, tuple[str, tuple]]:
        """Every request that the tasks make, once, by its key."""
        found = {}

        def note(requests: Sequence[tuple[str, tuple]]) -> list:
            found.update({request_key(request): request for request in requests})
            return [
                {"loglikelihood": (0.0, False), "loglikelihood_rolling": 0.0, "generate_until": ""}[kind]
                for kind, _ in requests
            ]

        self._ask(note)
        return found

    def items(self) -> list[Item]:
        items = []
        for key, (kind, arguments) in self._requests.items():
            texts = arguments[:2] if kind == "loglikelihood" else arguments[:1]
            tokens = sum(len(self._model.tokenizer.encode(text)) for text in texts)
            items.append(Item(key, tokens if kind == "generate_until" else max(1, -(-tokens // ROUNDED)) * ROUNDED))
        return items

    def run(self, items: Sequence[Item]) -> list[dict]:
        requests = [self._requests[item.key] for item in items]
        return [{"answer": answer} for answer in answer_requests(self._model, requests, self._options.generated)]

    def report(self, results: Mapping[str, dict], folder: Path) -> tuple[dict, str]:
        answered = self._ask(lambda requests: [results[request_key(request)]["answer"] for request in requests])
        figures = {
            task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in answered["results"].items()
        }
        return figures, "## lm-eval\n\n" + _table(figures, self._options, self._version)

    def _ask(self, answer) -> dict:
        """What lm-eval's evaluation returns, with these answers."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        from titans_pretrain.evaluation.lm_eval_adapter import TitansLM

        tasks = self._options.tasks
        known = Path(lm_eval.__file__).parent / "tasks"
        folders = [known / FOLDERS.get(task, task) for task in tasks]
        quick = all((folder).is_dir() for folder in folders)
        manager = TaskManager(
            include_defaults=not quick, include_path=sorted(set(map(str, folders))) if quick else None
        )
        if unknown := [task for task in tasks if task not in manager.task_index]:
            raise ValueError(f"harness.tasks has {unknown[0]!r}, which lm-eval {self._version} does not know")
        with tempfile.TemporaryDirectory() as folder:
            given = [self._with_local_data(task, manager, Path(folder)) for task in tasks]
            return lm_eval.simple_evaluate(
                TitansLM(answer),
                tasks=given,
                task_manager=manager,
                num_fewshot=self._options.fewshot,
                limit=self._options.limit,
                bootstrap_iters=0,
                log_samples=False,
            )

    def _with_local_data(self, task: str, manager, folder: Path) -> str:
        """The task's name; with harness.data the path of a file that has the task with its data there."""
        if self._options.data is None:
            return task
        files = find_local(Path(self._options.data).expanduser(), task)
        kind = "parquet" if next(iter(files.values())).suffix == ".parquet" else "json"
        if len(files) == 1 and "" in files:  # whichever split the task reads
            files = {split: files[""] for split in ("train", "validation", "test")}
        changed = {
            "include": str(manager.task_index[task].yaml_path),
            "task": task,
            "dataset_path": kind,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file.resolve()) for split, file in files.items()}},
        }
        path = folder / f"{task}.yaml"
        path.write_text(json.dumps(changed))  # JSON is YAML
        return str(path)


def find_local(folder: Path, task: str) -> dict[str, Path]:
    """Split -> file; the split is "" for a file that has the task's name. Raises ValueError if there is none."""
    found = {}
    for ending in ("jsonl", "parquet"):
        if (folder / f"{task}.{ending}").is_file():
            found = {"": folder / f"{task}.{ending}"}
        elif files := sorted((folder / task).glob(f"*.{ending}")):
            found = {file.stem: file for file in files}
    if not found:
        raise ValueError(
            f"{folder} has no data of {task}: neither {task}.parquet or .jsonl nor {task}/SPLIT.parquet or .jsonl"
        )
    return found


def request_key(request: tuple[str, tuple]) -> str:
    """Equal for requests that have the same answer."""
    kind, arguments = request
    return f"{kind}/{hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:32]}"


def answer_requests(model: LanguageModel, requests: Sequence[tuple[str, tuple]], generated: int = 256) -> list:
    """Answers of one batch, JSON-able, in order. generated: tokens at most where a request does not say."""
    answers: dict[int, object] = {}
    scored = [i for i, (kind, _) in enumerate(requests) if kind == "loglikelihood"]
    if scored:
        pairs = [encode_pair(model.tokenizer, *requests[i][1]) for i in scored]
        answers |= dict(zip(scored, map(list, model.score(pairs)), strict=True))
    for i, (kind, arguments) in enumerate(requests):
        if kind == "loglikelihood_rolling":
            ids = [model.tokenizer.entry.eos_id, *model.tokenizer.encode(arguments[0]).tolist()]
            answers[i] = (
                -sum(float(nats.double().sum()) for nats in model.losses(np.array([ids]))) if len(ids) > 1 else 0.0
            )
        elif kind == "generate_until":
            answers[i] = _generate_until(model, *arguments, generated)
    return [answers[i] for i in range(len(requests))]


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Both are parts of one encoding; blanks that end the context go to the continuation, whose first word they belong to."""
    blanks = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
    before, whole = tokenizer.encode(context).tolist(), tokenizer.encode(context + continuation).tolist()
    if not before:
        return [tokenizer.entry.eos_id], whole
    at = min(len(before), len(whole) - 1)
    return whole[:at], whole[at:]


def _generate_until(model: LanguageModel, context: str, settings: Mapping, generated: int) -> str:
    if settings.get("do_sample") or settings.get("temperature", 0.0) > 0:
        raise ValueError("a task asks for sampled answers; only greedy ones are supported")
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    tokenizer = model.tokenizer
    ids = tokenizer.encode(context).tolist() or [tokenizer.entry.eos_id]

    def ended(row: int, said: list[int]) -> bool:
        return any(end in tokenizer.decode(said) for end in until)

    text = tokenizer.decode(model.generate(np.array([ids]), settings.get("max_gen_toks", generated), ended)[0])
    return text[: min((text.index(end) for end in until if end in text), default=len(text))]


def _table(figures: Mapping[str, Mapping[str, float]], options: Options, version: str) -> str:
    def cell(task: str, metric: str, unit: int) -> float | None:
        value = figures.get(task, {}).get(metric)
        return None if value is None else unit * value

    ours = [cell(*column[1:]) for column in COLUMNS]
    accuracies = [value for value, column in zip(ours, COLUMNS, strict=True) if column[3] == 100]
    ours.append(None if None in accuracies else float(np.mean(accuracies)))
    header = ["", *(column[0] for column in COLUMNS), "mean"]
    rows = [["this model", *("" if value is None else f"{value:.2f}" for value in ours)]]
    rows += [[f"paper: {name}", *(f"{value:.2f}" for value in values)] for name, values in COMMON_SENSE.items()]
    shot = "zero-shot" if options.fewshot == 0 else f"{options.fewshot}-shot"
    part = "" if options.limit is None else f", the first {options.limit} documents of each task"
    text = f"lm-eval {version}, {shot}{part}; mean of the accuracies.\n\n{markdown_table(header, rows)}\n"
    others = [task for task in options.tasks if task not in {column[1] for column in COLUMNS}]
    lines = [[task, name, f"{value:.4f}"] for task in others for name, value in figures.get(task, {}).items()]
    return text + (f"\n{markdown_table(['task', 'metric', 'value'], lines)}\n" if lines else "")
