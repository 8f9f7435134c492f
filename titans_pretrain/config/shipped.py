"""The configs and Slurm templates that come with the package."""

from pathlib import Path


def _shipped(name: str) -> Path:
    """Installed, these folders stand in the package's folder; in the repository beside it."""
    return next((folder for parent in Path(__file__).parents[1:3] if (folder := parent / name).is_dir()), Path(name))


FOLDER, SLURM = _shipped("configs"), _shipped("slurm")


def find_config(name: str | Path) -> Path:
    """A file as it is named; else a shipped one by its name, such as tiny or model/titans-340m; else the name as it is."""
    shipped = FOLDER / f"{name}.yaml"
    return shipped if not Path(name).is_file() and shipped.is_file() else Path(name)


def shipped_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
