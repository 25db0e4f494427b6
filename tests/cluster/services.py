"""A Slurm with one node and a Ray cluster with two, on the loopback, each with ports and files that no other uses."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.faults.sweeps import wait_until
from tests.faults.test_postgres import free_port

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

SLURM_CONF = """
ClusterName=qloraexp
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
"""``cred_expire`` is also how long a requeued job waits: two minutes by default."""


def has_slurm() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name) for name in SLURM_PROGRAMS)


class Slurm:
    """One controller and one node; ``environment`` leads its commands to it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qlora-exp-slurm-"))
        self.folder.chmod(0o755)
        self.processes: list[subprocess.Popen[bytes]] = []
        host = socket.gethostname().partition(".")[0]
        text = SLURM_CONF.format(host=host, folder=self.folder, controller_port=free_port(), node_port=free_port())
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        user, munge = pwd.getpwnam("munge"), self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        munge.chmod(0o755)
        for path in (munge, munge / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
        files = [f"--{name}={munge / name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        files[1] = f"--key-file={munge / 'key'}"
        as_munge = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._start(["munged", "--foreground", *files], **as_munge)
        wait_until((munge / "socket").exists, "munged doesn't start", seconds=30)
        self._start(["slurmctld", "-D"])
        self._start(["slurmd", "-D", "-N", socket.gethostname().partition(".")[0]])
        wait_until(lambda: "idle" in self.command("sinfo", "-h", "-o", "%T"), "the node isn't idle", seconds=60)

    def _start(self, command: list[str], **options: Any) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, **options))

    def command(self, *words: str) -> str:
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60).stdout

    def jobs(self) -> dict[str, str]:
        """States by id of the array's members."""
        return dict(line.split() for line in self.command("squeue", "-h", "-r", "-o", "%i %T").splitlines())

    def stop(self) -> None:
        if self.jobs():
            self.command("scancel", f"--user={pwd.getpwuid(os.geteuid()).pw_name}")
            deadline = time.monotonic() + 20  # the steps' daemons outlive slurmd
            while self.jobs() and time.monotonic() < deadline:
                time.sleep(0.5)
        for process in reversed(self.processes):
            kill_tree(process.pid)
            process.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)


class Ray:
    """A head and nodes; each has room for one worker. The nodes know none of the driver's variables."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qr-"))  # a socket's path is short
        self.port = free_port()
        while 10002 <= self.port <= 19999:  # the ports of Ray's workers
            self.port = free_port()
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self._start(head)
        wait_until(lambda: answers(self.port), "Ray's head doesn't start", seconds=90)
        self.add_node()

    def add_node(self) -> None:
        before = self.raylets()
        self._start([f"--address={self.address}"])
        wait_until(lambda: self.raylets() > before, "no further node", seconds=90)

    def _start(self, arguments: list[str]) -> None:
        hidden = ("QLORA_EXP_STORAGE", "RAY_ADDRESS")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"RAY_memory_monitor_refresh_ms": "0", "RAY_DISABLE_USAGE_STATS": "1"}
        options = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *options]
        with (self.folder / "out").open("ab") as log:
            self.nodes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def raylets(self) -> int:
        return sum(
            any(child.name() == "raylet" for child in children(node.pid)) for node in self.nodes if node.poll() is None
        )

    def kill_node(self) -> None:
        """Kill the newest node with all its processes."""
        node = self.nodes.pop()
        kill_tree(node.pid)
        node.wait(timeout=30)

    def stop(self) -> None:
        while self.nodes:
            self.kill_node()
        shutil.rmtree(self.folder, ignore_errors=True)


class TrackingServer:
    """MLflow's own server, with a database that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = [
            f"--backend-store-uri=sqlite:///{self.folder}/served.db",
            f"--artifacts-destination={self.folder}/files",
        ]
        command = [sys.executable, "-m", "mlflow", "server", *store, f"--port={self.port}", "--workers=1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: answers(self.port), "the MLflow server doesn't start", seconds=90)

    def stop(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait(timeout=30)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def children(pid: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(pid).children(recursive=True) if child.is_running()]
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    for process in [*children(pid)]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
