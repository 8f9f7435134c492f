"""The config that lies in a run or checkpoint folder, which may be someone else's: it looks nothing up and runs nothing."""

from collections.abc import Sequence
from pathlib import Path

from titans_pretrain.config.load import escape, load_config, parse_overrides
from titans_pretrain.config.schema import Config


def load_run_config(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """FOLDER/config.yaml with overrides; see load_config. Before its data is read: refuse_commands."""
    return load_config(Path(folder) / "config.yaml", overrides, references=False)


def refuse_commands(config: Config, overrides: Sequence[str] = ()) -> None:
    """Raises ValueError if a run's data would be read by a command that the overrides do not give again: by `pipe:`, or by a
    URL of several parts (`a::b://c`), whose parts may run what they read."""
    given = set()
    for override in parse_overrides(overrides):
        if isinstance(data := override.get("data"), dict):
            given |= {data.get("path"), *(data.get("mixture") or ())}
            given |= {path for _, mixture in data.get("mixture_schedule") or () for path in mixture}
    for path in config.data.folders:
        if (path.startswith("pipe:") or ("::" in path and "://" in path)) and escape(path) not in given:
            raise ValueError(
                f"the run's own config reads its data by {path!r}; to allow it, give it again: 'data.path={path}'"
            )
