"""What is not done on the word of a run folder: it may come from anyone."""

from collections.abc import Sequence

from titans_pretrain.config import Config


def refuse_commands(config: Config, typed: Sequence[str] = ()) -> None:
    """Raises ValueError if reading the data of a run's config.yaml runs a command that is not in `typed`, the user's own
    overrides."""
    for path in [config.data.path or "", *config.data.mixture]:
        if path.startswith("pipe:") and not any(path in text for text in typed):
            raise ValueError(
                f"the run's config.yaml reads its data with the command {path!r}, and may come from anyone; "
                f"if you trust it, give the command yourself (eval RUN data.path='pipe:...')"
            )
