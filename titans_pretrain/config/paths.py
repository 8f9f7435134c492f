"""Folders that a config names: absolute, so that they mean the same from anywhere."""

import os
import re
from urllib.parse import urlsplit

from titans_pretrain.config.schema import Config


def locate(config: Config) -> None:
    """Expands `~` in every path of a config, and makes all but the run folder absolute. URLs and `pipe:` commands stay as they
    are. Raises ValueError for a home folder that does not exist and for one folder given twice."""
    data, train = config.data, config.train
    if config.run.dir:
        config.run.dir = expand_home(config.run.dir)
    if data.path:
        data.path = _absolute(data.path)
    if data.cache_dir:
        data.cache_dir = _absolute(data.cache_dir)
    if train.resume not in ("auto", "never"):
        train.resume = _absolute(_without_secrets("train.resume", train.resume))
    if train.init_from:
        train.init_from = _absolute(_without_secrets("train.init_from", train.init_from))
    if train.checkpoint_store:
        train.checkpoint_store = _absolute(_without_secrets("train.checkpoint_store", train.checkpoint_store))
    data.mixture = _located("data.mixture", data.mixture)
    data.mixture_schedule = [[n, _located("data.mixture_schedule", mix)] for n, mix in data.mixture_schedule]


def _located(key: str, mixture: dict[str, float]) -> dict[str, float]:
    folders = [_absolute(path) for path in mixture]
    for i, path in enumerate(folders):
        if path in folders[:i]:
            raise ValueError(f"{key} names {path} twice; give each folder once")
    return dict(zip(folders, mixture.values(), strict=True))


def expand_home(path: str) -> str:
    """`~/x` in the home folder. Raises ValueError for `~name` where nobody has that name."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no such home folder; a folder of that name is ./{path}")
    return expanded


def _without_secrets(key: str, path: str) -> str:
    """Raises ValueError for a URL with a password or a query in it: a config is written into logs, checkpoints and exports."""
    url = urlsplit(path)
    if "://" in path and (url.password is not None or url.query):
        raise ValueError(
            f"{key} is a URL with {'a password' if url.password is not None else 'a query'} in it, and a config is no place for "
            "secrets; give them to the driver by environment variables or its own files"
        )
    return path


def hide_secrets(text: str) -> str:
    """A text in which URLs have neither names with passwords nor queries."""
    return re.sub(r"(://[^\s?']*\?)[^\s']*", r"\1...", re.sub(r"://[^/@\s]*:[^/@\s]*@", "://...@", text))


def _absolute(path: str) -> str:
    return path if path.startswith("pipe:") or "://" in path else os.path.abspath(expand_home(path))
