"""Finished items on disk, so that an evaluation that was stopped goes on where it was.

FOLDER/TASK.jsonl           a first line that says of what the results are, then {"key": ..., ...} per finished item
FOLDER/TASK.rank-3.jsonl    the same, of a process that is not the first, until the task is done
"""

import json
from collections.abc import Sequence
from pathlib import Path

from titans_pretrain.checkpoint.store import write_text
from titans_pretrain.checkpoint.together import from_all, rank
from titans_pretrain.disk import sync


class ItemLog:
    """identity: all that decides the results (JSON-able). `finished` has the results of every process that ran before.

    Call the constructor and `gather` on all processes at once. Raises ValueError, on every process, for a file that has results of
    something else."""

    def __init__(self, folder: Path, task: str, identity: dict):
        self._folder, self._task = folder, task
        self._identity = json.loads(json.dumps(identity))  # as it comes back from a file
        self._path = folder / (f"{task}.jsonl" if rank() == 0 else f"{task}.rank-{rank()}.jsonl")
        found, refused = {}, None
        try:
            for path in sorted(folder.glob(f"{task}.jsonl")) + sorted(folder.glob(f"{task}.rank-*.jsonl")):
                found |= self._read(path)
        except ValueError as e:
            refused = str(e)
        told = from_all((found, refused))
        for _, reason in told:
            if reason is not None:
                raise ValueError(reason)
        self.finished: dict[str, dict] = {}
        for others, _ in told:
            self.finished |= others
        if rank() == 0:
            self._write(self.finished)
            for part in folder.glob(f"{task}.rank-*.jsonl"):  # of however many processes there were before
                part.unlink()
        from_all(None)
        if rank():
            self._write({})
        self._file = open(self._path, "a")  # noqa: SIM115, open as long as the task runs

    def append(self, key: str, result: dict) -> None:
        self.finished[key] = result
        self._file.write(json.dumps({"key": key} | result) + "\n")
        self._file.flush()

    def gather(self, keys: Sequence[str]) -> dict[str, dict]:
        """The results of all items, from all processes, in the order of `keys`; the first process then has them in one file."""
        self.close()
        everything: dict[str, dict] = {}
        for others in from_all(self.finished):
            everything |= others
        if rank() == 0:
            self._write(everything)
        from_all(None)
        if rank():
            self._path.unlink()
        return {key: everything[key] for key in keys}

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            sync(self._path)

    def _write(self, results: dict[str, dict]) -> None:
        lines = [self._identity, *({"key": key} | result for key, result in results.items())]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def _read(self, path: Path) -> dict[str, dict]:
        complete = path.read_text().rpartition("\n")[0]  # a process that was killed may leave half a line behind that
        try:
            header, *rows = [json.loads(line) for line in complete.split("\n")]
        except ValueError:
            raise ValueError(f"{path} is damaged; remove it to evaluate anew") from None
        old, new = _flatten(header), _flatten(self._identity)
        for key in sorted(old | new):
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"{path} has results of {key}={old.get(key)}, and this is {key}={new.get(key)}; "
                    "give another folder as --out, or remove that file"
                )
        return {row.pop("key"): row for row in rows}


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
