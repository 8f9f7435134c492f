"""Texts for the fine-tuned protocol of `babilong`, from the training files of the bAbI tasks: JSON lines for `titans-data tokenize`.

python -m titans_pretrain.evaluation.babilong_texts TOKENIZER OUT.jsonl 5000 babilong.facts=FOLDER babilong.text=BOOKS 'babilong.lengths=[0,1K,2K]'
titans-data tokenize OUT.jsonl --tokenizer TOKENIZER --out data-babilong
titans-pretrain train CONFIG data.path=data-babilong train.init_from=runs/PRETRAINED run.dir=runs/babilong
"""

import json
import sys

from titans_pretrain.data_prep.tokenizer import load_tokenizer
from titans_pretrain.evaluation.babilong import training_texts
from titans_pretrain.evaluation.tasks import build_options, split_overrides
from titans_pretrain.evaluation.texts import Texts


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or not arguments[2].isdecimal():
        print(__doc__)
        return 0 if "--help" in arguments else 2
    tokenizer, out, samples, *overrides = arguments
    try:
        of_run, of_tasks = split_overrides(overrides)
        if of_run:
            raise ValueError(f"{of_run[0]!r} is no setting of babilong")
        options = build_options("babilong", of_tasks.get("babilong", {}))
        with open(out, "w") as file:
            for text in training_texts(options, load_tokenizer(tokenizer), Texts(None), int(samples)):
                file.write(json.dumps({"text": text}) + "\n")
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
