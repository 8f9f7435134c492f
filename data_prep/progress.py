"""Progress for people at a terminal, and now and then a line in the log file of a job."""

import sys


def progress_bar(total: int, name: str | None = None, disable: bool = False):
    """A tqdm bar over bytes: MB/s, share done, time left."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    seconds = 0.1 if terminal else 30.0
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=name,
        disable=disable,
        mininterval=seconds,
        delay=0 if terminal else seconds,
    )
