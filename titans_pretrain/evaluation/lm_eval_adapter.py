"""The class by which lm-eval (EleutherAI's harness, `pip install titans-pretrain[evaluation]`) asks for answers."""

from collections.abc import Callable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

Request = tuple[str, tuple]  # loglikelihood, loglikelihood_rolling or generate_until; and its arguments


class TitansLM(LM):
    """answer: gives an answer for each of some requests. For a model: `partial(answer_requests, model)` of harness.py, and
    `lm_eval.simple_evaluate(TitansLM(...), tasks=[...])` works as with any other model, on one process."""

    def __init__(self, answer: Callable[[Sequence[Request]], list]):
        super().__init__()
        self._answer = answer

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [tuple(found) for found in self._answer([("loglikelihood", r.args) for r in requests])]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._answer([("loglikelihood_rolling", r.args) for r in requests])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answer([("generate_until", r.args) for r in requests])
