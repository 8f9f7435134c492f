"""Whether DeepSpeed reads every key of the `deepspeed:` block. DeepSpeed itself is asked: it passes over what it does not know."""

from titans_pretrain.config import Config
from titans_pretrain.config.check import did_you_mean
from titans_pretrain.parallel.zero_settings import zero_settings


class _Watched(dict):
    """Remembers which keys were asked for; so do its copies, in the same set."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key) -> bool:
        self.read.add(key)
        return super().__contains__(key)


def check_block(config: Config) -> None:
    """Raises ValueError for a key that DeepSpeed would not read and for a value that it refuses. Where DeepSpeed is not installed
    nobody can tell."""
    if not (config.deepspeed and config.parallel.zero_stage):
        return
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    except ImportError:
        return
    settings = _Watched(zero_settings(config, 1))
    try:
        DeepSpeedConfig(settings)
    except Exception as e:  # pydantic's, assertions, its own: one line of any
        raise ValueError(f"deepspeed: {_first_error(e)}") from e
    for key in config.deepspeed:
        if key not in settings.read:
            raise ValueError(
                f"unknown key deepspeed.{key}, which DeepSpeed would not read{did_you_mean(key, settings.read)}"
            )


def _first_error(e: Exception) -> str:
    """pydantic's with the key and the part of the configuration."""
    if not hasattr(e, "errors"):
        return " ".join(str(e).split())
    first = e.errors()[0]
    told = "unknown key" if first["type"] == "extra_forbidden" else f"{first['msg']}, got {first['input']!r}"
    return f"{'.'.join(map(str, first['loc']))}: {told} ({e.title})"
