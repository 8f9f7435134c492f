"""A real Slurm on this machine, for tests: munged, slurmctld and one slurmd per node, in a folder of their own, on free ports.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge; no systemd, no cgroups, no root. The nodes claim more CPUs, memory
and GPUs than the machine has, so that the templates are scheduled as they are. Nothing of it outlives the process that started it.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian has daemons, and a user's PATH often does not
NODES = ("n1", "n2")

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire: a requeued job starts again only so many seconds later, 121 by default
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldLogFile={root}/log/slurmctld
SlurmdLogFile={root}/log/slurmd.%n
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmdTimeout=15
KillWait=5
MessageTimeout=10
BatchStartTimeout=10
MinJobAge=86400
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=512000 Gres=gpu:8 State=UNKNOWN"
# 22.05 loads a cgroup plugin though nothing uses it, and 23.11 and later have one that does nothing
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint={root}/cgroup\nConstrainCores=no\nConstrainRAMSpace=no\n"


def why_not() -> str | None:
    """The reason why no Slurm can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine: apt-get install slurmctld slurmd slurm-client munge"
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return f"this machine's own name, {socket.gethostname()}, does not resolve"
    return None


class Slurm:
    """Inside `with` it runs, two nodes named n1 and n2. `env` is the environment of its users."""

    def __init__(self, root: Path):
        self.root = root
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Slurm":
        try:
            self._write()
            munge = self.root / "munge"
            files = [f"--{n}-file={munge / n}" for n in ("key", "pid", "log", "seed")]
            self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
            self.wait(lambda: (munge / "socket").exists(), 20, "munged")
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self.node_up(node)
            self.wait(lambda: self.idle() == set(NODES), 60, "the nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def _write(self) -> None:
        for name in ("munge", "state", "log", *(f"spool.{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(NODES))
        for i in range(8):  # files to count; no job opens them
            (self.root / f"gpu{i}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-7]\n")
        (self.root / "cgroup.conf").write_text(CGROUP.format(root=self.root))
        nodes = "\n".join(NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, ports[1:], strict=True))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        # Two clusters on one machine: jobs with one number would take the same port for their processes.
        values = {"root": self.root, "host": host, "user": user, "port": ports[0], "nodes": nodes}
        values["first_job"] = random.SystemRandom().randrange(1, 60000)
        (self.root / "slurm.conf").write_text(CONFIG.format(**values))

    def _start(self, name: str, *command: str, **env: str) -> None:
        """Runs a daemon in the foreground, as a child that dies with this process."""
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self.env | env, cwd=self.root,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def node_up(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def node_fails(self, node: str) -> None:
        """A power cut of one node: its slurmd, the jobs' steps on it, and whatever these started, all at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        _kill(self._steps(node))

    def _steps(self, node: str) -> list[int]:
        """Processes of Slurm's that look after jobs on a node, known by its files that they hold open."""
        own = (f"{self.root}/log/slurmd.{node}", f"{self.root}/spool.{node}/")
        return [
            pid for pid in _processes()
            if _read(pid, "comm") == b"slurmstepd\n" and any(path.startswith(own) for path in _open_files(pid))
        ]  # fmt: skip

    def stop(self) -> None:
        """Ends all jobs and all daemons, whatever state they are in."""
        with contextlib.suppress(AssertionError, subprocess.SubprocessError, OSError):
            self("scancel", "--user", str(os.getuid()), seconds=10)
            self.wait(lambda: not any(self._steps(node) for node in NODES), 10, "the ends of the jobs")
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for node in NODES:
            _kill(self._steps(node))

    def __call__(self, *command: object, seconds: float = 60, **env: str) -> str:
        """What a command prints as a user of this Slurm; raises if it fails or takes longer."""
        done = subprocess.run(
            [str(word) for word in command], env=self.env | env, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def idle(self) -> set[str]:
        with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
            return set(self("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())
        return set()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", "Restarts": "0", ...}."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, condition: Callable[[], object], seconds: float, what: str, log: Path | None = None) -> None:
        """Until `condition()` holds; raises with the logs that tell why it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [log] if log else sorted((self.root / "log").iterdir())
                told = [
                    f"{path}:\n{path.read_text(errors='replace')[-4000:] if path.exists() else 'not there'}"
                    for path in logs
                ]
                queue = subprocess.run(["squeue"], env=self.env, capture_output=True, text=True, timeout=60).stdout
                raise AssertionError("\n".join([f"waited {seconds:.0f} s for {what}", queue, *told]))
            time.sleep(0.2)

    def ends(self, job: str, seconds: float, log: Path | None = None) -> str:
        """The state in which a job ends."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.wait(lambda: self.job(job)["JobState"] in final, seconds, f"job {job} to end", log)
        return self.job(job)["JobState"]


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # gone, or someone else's
        return b""


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{name}")


def _kill(pids: list[int]) -> None:
    """Kills processes and all that they started."""
    stats = {pid: _read(pid, "stat") for pid in _processes()}
    parents = {pid: int(stat.rpartition(b")")[2].split()[1]) for pid, stat in stats.items() if stat}
    doomed = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in doomed:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
