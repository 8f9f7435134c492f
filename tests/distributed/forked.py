"""Processes of `titans-pretrain train` that are forked from one that has imported everything: they start in a tenth of the time."""

import os
import sys
from pathlib import Path

from ranks import forked
from test_launch import ROOT, Processes


class ForkedProcesses(Processes):
    """As Processes: each is killed, and ends, by itself."""

    def _start(self, rank: int, environment: dict[str, str], command: list[str]) -> "Forked":
        return Forked(environment, command, self.folder / f"{id(self)}-{rank}.log")

    def __init__(self, folder: Path, world: int, commands: list[list[str]]):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        super().__init__(world, commands)


class Forked:
    """What Processes needs of subprocess.Popen."""

    def __init__(self, environment: dict[str, str], command: list[str], log: Path):
        self._log = log
        self._process = forked(_run, environment, command, str(log))

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"{self._log} ends so:\n{self._log.read_text()[-2000:]}")
        return self._log.read_text(), None

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _run(environment: dict[str, str], command: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    from titans_pretrain.cli import main

    sys.exit(main(["train", *command]))
