"""Every key of the schema, read off the dataclasses: its default, its meaning, and which one a wrong name means."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator
from functools import cache

from titans_pretrain.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Key:
    default: typing.Any  # as a file says it: null where the value follows from others
    meaning: str  # with the legal values, where they are few


@cache
def all_keys(schema: type = Config) -> dict[str, Key]:
    """{"model.variant": Key("mag", "..."), ...} in the order of the schema."""
    return dict(_keys_of(schema, ""))


def _keys_of(cls: type, at: str) -> Iterator[tuple[str, Key]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys_of(hints[field.name], f"{at}{field.name}.")
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            legal = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
            told = f" ({', '.join(map(str, legal))})" if len(legal) > 1 else ""
            yield at + field.name, Key(default, field.metadata.get("meaning", "") + told)


def add_defaults(values: dict, schema: type = Config) -> None:
    """Puts the default of every absent key into nested dicts; a value that is no group where one belongs stays as it is."""
    for name, key in all_keys(schema).items():
        group, (*path, last) = values, name.split(".")
        for part in path:
            group = group.setdefault(part, {}) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group.setdefault(last, key.default)


def nearest_key(name: str, schema: type = Config) -> str | None:
    """The legal key that a wrong one means: by its last part, so that train.seq_len finds data.seq_len, or by its spelling."""
    last = name.rpartition(".")[2]
    keys = all_keys(schema)
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}  # of several keys, the first
    if last in by_last:
        return by_last[last]
    whole = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    return next(iter(whole or [by_last[n] for n in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]), None)


def unknown_key(name: str, siblings: Iterable[str], schema: type = Config) -> str:
    """What is wrong with a key that the schema does not have."""
    near = nearest_key(name, schema)
    return f"unknown key {name}; " + (f"did you mean {near}?" if near else f"legal here: {', '.join(siblings)}")
