"""Settings that change in the course of a run, as lists of [from, value]. Standard library only."""

import itertools
import math

Steps = list[list[int]]  # [[steps done, value from then on], ...]; empty: the same value all along


def check_warmup(key: str, pairs: Steps, end_key: str, end: int) -> None:
    """Raises ValueError unless the pairs begin at step 0, rise in steps and values, and end with `end`, which is `end_key`'s value."""
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)):
            raise ValueError(f"{key} has {pair!r}: must be [STEP, VALUE], two integers of 0 or more")
    if not pairs:
        return
    if pairs[0][0] != 0:
        raise ValueError(f"{key} begins with step {pairs[0][0]}: its first pair must be [0, VALUE]")
    for (step, value), (later, larger) in itertools.pairwise(pairs):
        if not (step < later and value < larger):
            raise ValueError(f"{key} has {[later, larger]} after {[step, value]}: steps and values must rise")
    if pairs[0][1] < 1:
        raise ValueError(f"{key} has {pairs[0]}: a value must be 1 or more")
    if pairs[-1][1] != end:
        raise ValueError(f"{key} ends with {pairs[-1][1]}, and {end_key} is {end}: it must end with that")


def check_mixtures(key: str, pairs: list) -> None:
    """Raises ValueError unless each pair is [TOKENS, {FOLDER: WEIGHT, ...}], with tokens that rise from above 0 and positive weights."""
    before = 0
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], dict)):
            raise ValueError(f"{key} has {pair!r}: must be [TOKENS, {{FOLDER: WEIGHT, ...}}]")
        tokens, weights = pair
        if not tokens > before:
            raise ValueError(f"{key} has {tokens} tokens after {before}: they must rise, from data.mixture's 0 on")
        check_weights(f"{key} from {tokens} tokens on", weights)
        before = tokens


def check_weights(key: str, weights: dict) -> None:
    """Raises ValueError unless these are weights of a mixture: some, each a positive number."""
    if not weights:
        raise ValueError(f"{key} names no folder; give {{FOLDER: WEIGHT, ...}}")
    for folder, weight in weights.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ValueError(f"{key} gives {folder!r} the weight {weight}; weights must be positive")


def value_at(pairs: Steps, steps: int, end: int) -> int:
    """The value after so many steps: what the next one has. end: of an empty list."""
    return next((value for start, value in reversed(pairs) if start <= steps), end)


def sum_until(pairs: Steps, steps: int, end: int) -> int:
    """The sum of the first so many steps' values."""
    pairs = pairs or [[0, end]]
    stops = [start for start, _ in pairs[1:]] + [steps]
    return sum(value * max(0, min(stop, steps) - start) for (start, value), stop in zip(pairs, stops, strict=True))
