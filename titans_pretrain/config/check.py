"""Checks that every config dataclass makes of its own fields. Standard library only: they travel with an HF export."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from functools import cache

_TOLD = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
}


def setting(default, meaning: str) -> typing.Any:
    """A field of a config dataclass, with what its key means: for `titans-pretrain config` and the documentation.

    default: a value, or what makes one (dict)."""
    made = {"default_factory" if callable(default) else "default": default}
    return dataclasses.field(**made, metadata={"meaning": meaning})


def check_fields(config, at: str = "") -> None:
    """Raises ValueError unless every field of a dataclass holds what its annotation says: one of the legal values, a truth value,
    a number, a text, a group of keys.

    at: the dotted key of `config`, as "model.memory". Whoever makes a config in Python is told the same as whoever writes YAML.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if any(_fits(value, kind) for kind in kinds):
            continue
        legal = " or ".join(_told(kind) for kind in kinds)
        choices = [str(c) for kind in kinds if typing.get_origin(kind) is typing.Literal for c in typing.get_args(kind)]
        raise ValueError(f"{at + '.' * bool(at)}{name} = {value!r}: must be {legal}{did_you_mean(value, choices)}")


def did_you_mean(name, legal: Iterable[str]) -> str:
    """The end of a message: the legal name that is nearest to a wrong one, if any is near."""
    near = difflib.get_close_matches(str(name), list(legal), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def at_least(key: str, value, least) -> None:
    if not value >= least:
        raise ValueError(f"{key} must be {least} or more, got {value}")


def positive(key: str, value) -> None:
    if not value > 0:
        raise ValueError(f"{key} must be positive, got {value}")


@cache
def _hints(cls: type) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value, kind) -> bool:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return any(type(value) is type(legal) and value == legal for legal in typing.get_args(kind))
    if kind is typing.Any:
        return True
    if kind in (int, float):  # True is an int to Python
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _told(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    plain = typing.get_origin(kind) or kind
    return _TOLD.get(plain) or f"a {plain.__name__}"
