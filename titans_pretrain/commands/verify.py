"""Whether checkpoints are as they were written."""

from pathlib import Path

from titans_pretrain.checkpoint import DamagedCheckpoint, check_checkpoint, checkpoints, find_checkpoint


def verify(path: str) -> tuple[list[str], int]:
    """A line for every checkpoint of a run folder, or for one checkpoint folder, and how many of them are damaged."""
    folder = Path(path)
    found = [] if (folder / "trainer.json").is_file() else checkpoints(folder / "checkpoints")
    lines, damaged = [], 0
    for checkpoint in found or [find_checkpoint(folder)]:
        try:
            files = check_checkpoint(checkpoint)
            told = (
                f"{files} files as they were written" if files else "readable; it has no checksums (format version 2)"
            )
        except DamagedCheckpoint as e:
            damaged += 1
            told = f"DAMAGED: {e}"
        lines.append(f"{checkpoint.name}: {told}")
    return lines, damaged
