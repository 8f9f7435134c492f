"""RUN/events.jsonl: when a run was started, went on and stopped. Not in metrics.jsonl, which a run that was interrupted ends with
as if it had not been."""

import json
import logging
import socket
import time
from pathlib import Path

log = logging.getLogger(__name__)
FILE = "events.jsonl"


def log_event(run_dir: Path, event: str, step: int, **details) -> None:
    """Adds a line; one that cannot be written is a warning."""
    line = {"time": round(time.time(), 1), "event": event, "step": step, "host": socket.gethostname(), **details}
    try:
        with open(run_dir / FILE, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as e:
        log.warning("cannot write %s: %s", run_dir / FILE, e)


def read_events(run_dir: Path) -> list[dict]:
    """The lines that are whole; none where there is no file."""
    try:
        lines = (run_dir / FILE).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
            found.append(
                {"time": float(values["time"]), "event": str(values["event"]), "step": int(values["step"]), **values}
            )
        except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a crash
            continue
    return found
