"""A real SLURM on this one machine: munged, slurmctld and a slurmd for each of its nodes, as root on loopback.

There is no accounting and no cgroup, so it starts anywhere in seconds; node names do not resolve. Jobs of the partition
`urgent` pre-empt those of `main`, which are told a minute before and queued again; a job that is queued again waits for
`cred_expire` seconds; a node that says nothing for `SlurmdTimeout` is down.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
MinJobAge=300
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10
"""


def why_not() -> str:
    """Return why no cluster can be started here; empty where one can."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{missing[0]} is not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else f"only root can start it, not {getpass.getuser()}"


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its configuration, and the environment in which its commands find it."""

    root: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *words: str, cwd: Path | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        return subprocess.run(
            words, env=self.environment, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
        )

    def start(self, name: str, *words: str) -> None:
        """Start a daemon, called by a short name."""
        with open(self.root / f"{name}.log", "a") as log:
            self.daemons[name] = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        """Start a node, or start it again."""
        self.start(f"slurmd-{node}-says", "slurmd", "-D", "-N", node)

    def kill_node(self, node: str, *, shut_down: bool = False) -> None:
        """Let a node die at once, with all that runs on it; one that is shut down still reports how its tasks end."""
        daemon = self.daemons[f"slurmd-{node}-says"]
        daemon.kill()
        daemon.wait()
        conf = self.environment["SLURM_CONF"]
        tasks = [process for process in psutil.process_iter() if environ(process).get("SLURM_CONF") == conf]
        tasks = [process for process in tasks if environ(process).get("SLURMD_NODENAME") == node]
        parents = {process.ppid() for process in tasks} - {process.pid for process in tasks}
        steps = [] if shut_down else [psutil.Process(pid) for pid in parents]
        for process in [*(step for step in steps if step.name().startswith("slurmstepd")), *tasks]:
            process.kill()

    def clear(self) -> None:
        """End all jobs, and wait until nothing of them runs."""
        self.run("scancel", "--user=root")
        wait_for(lambda: not self.run("squeue", "-h").stdout, self, 30)

    def logs(self) -> str:
        """Return the last lines of what the daemons say, for a failing test."""
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.root.glob("*.log"))
        )


def environ(process: psutil.Process) -> dict[str, str]:
    """Return a process's environment; nothing of one that has ended meanwhile."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def free_ports(count: int) -> int:
    """Return the first of `count` neighbouring ports that nobody listens on."""
    for first in range(17_000 + os.getpid() % 10_000, 60_000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports")


@contextmanager
def cluster(root: Path, *, nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """Start a cluster below `root`, wait until its nodes are idle, and end it with all its jobs."""
    for name in ("state", *(f"spool-n{number + 1}" for number in range(nodes))):
        (root / name).mkdir(parents=True)
    root.chmod(0o755)
    port = free_ports(nodes + 1)
    config = root / "slurm.conf"
    settings = {"controller": port, "first": port + 1, "last": port + nodes, "nodes": nodes, "cpus": cpus}
    config.write_text(CONFIG.format(host=socket.gethostname(), root=root, **settings))
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": PATH}
    inherited = [name for name in environment if name.startswith(("SLURM_JOB", "SBATCH_"))]
    for name in inherited:
        del environment[name]
    munged = ["munged", "--foreground", "--force", f"--socket={root}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={root}/munge.{name}" for name in ("pid", "log", "seed")]
    found = Cluster(root, environment)
    with ExitStack() as stack:
        stack.callback(lambda: [stop(process) for process in reversed(found.daemons.values())])
        found.start("munged-says", *munged)
        wait_for(lambda: (root / "munge.socket").exists(), found)
        found.start("slurmctld-says", "slurmctld", "-D", "-c")
        for number in range(nodes):
            found.start_node(f"n{number + 1}")
        stack.callback(found.clear)
        wait_for(lambda: found.run("sinfo", "-h", "-o", "%t %D").stdout.strip() == f"idle {nodes}", found)
        yield found


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a daemon."""
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(ready: object, found: Cluster, seconds: float = 60) -> None:
    """Wait until `ready()` holds; raises TimeoutError with the daemons' logs."""
    assert callable(ready)
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"the cluster did not start:\n{found.logs()}")
        time.sleep(0.2)
