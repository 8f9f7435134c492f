"""The baseline: logistic regression on how often each k-mer occurs, its k and its penalty chosen on the validation sequences."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.data.tokenizer import NUCLEOTIDES
from titans_pretrain.genomics.sequences import Labelled

BASES = NUCLEOTIDES.index("N")  # the ids before it, of A C G T, make k-mers
KS = (3, 4, 5)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def kmer_shares(sequence: np.ndarray, k: int) -> np.ndarray:
    """[4**k] float32: the share of each k-mer among all of a sequence, AA..A first and TT..T last; those with an N left out."""
    if len(sequence) < k:
        return np.zeros(BASES**k, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(sequence.astype(np.int64), k)
    codes = (windows @ BASES ** np.arange(k - 1, -1, -1))[(windows < BASES).all(1)]
    return (np.bincount(codes, minlength=BASES**k) / max(1, len(codes))).astype(np.float32)


def kmer_baseline(train: Labelled, validation: Labelled, test: Labelled, classes: int) -> dict:
    """{"accuracy" on the test, "k", "penalty"}"""
    best, best_validation = {}, -1.0
    for k in KS:
        parts = [_features(part, k) for part in (train, validation, test)]
        mean, std = parts[0].mean(0), parts[0].std(0, correction=0)
        x, x_validation, x_test = ((part - mean) / torch.where(std > 0, std, 1.0) for part in parts)
        for penalty in PENALTIES:
            line = _logistic(x, train.labels, classes, penalty)
            if (found := _accuracy(line, x_validation, validation.labels)) > best_validation:
                best_validation = found
                best = {"accuracy": _accuracy(line, x_test, test.labels), "k": k, "penalty": penalty}
    return best


def _features(part: Labelled, k: int) -> Tensor:
    return torch.from_numpy(np.stack([kmer_shares(sequence, k) for sequence in part.sequences]))


def _accuracy(line: tuple[Tensor, Tensor], x: Tensor, labels: Tensor) -> float:
    weights, bias = line
    return ((x @ weights + bias).argmax(-1) == labels).double().mean().item()


def _logistic(x: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Where mean cross-entropy + penalty / 2 * |weights|^2 is least, by L-BFGS. x [N, features]."""
    weights = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights + bias, labels) + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach(), bias.detach()
