"""Every key of the configuration with its value, its default and what it means."""

import functools
import json

from titans_pretrain.config import Config
from titans_pretrain.config.keys import all_keys

WIDTH = 40  # of key=value; a longer one pushes its meaning to the right


def list_keys(config: Config | None = None) -> str:
    """One line a key, groups apart: `key=value`, as an override says it, then the meaning, and the default where the value is
    another. config: whose values; None: the defaults."""
    lines, group = [], None
    for name, key in all_keys().items():
        if group not in (None, name.rpartition(".")[0]):
            lines.append("")
        group = name.rpartition(".")[0]
        value = key.default if config is None else functools.reduce(getattr, name.split("."), config)
        changed = f" (default {as_text(key.default)})" if value != key.default else ""
        lines.append(f"{f'{name}={as_text(value)}':<{WIDTH}}  {key.meaning}{changed}")
    return "\n".join(lines)


def as_text(value) -> str:
    """A value as YAML and overrides have it."""
    return value if isinstance(value, str) else json.dumps(value)
