"""The machine, the software versions, and the identity of the process that owns a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

from qlora_exp.config.enums import DeviceChoice
from qlora_exp.errors import ConfigError
from qlora_exp.paths import PACKAGE
from qlora_exp.records.types import Device, Environment, Process
from qlora_exp.system import heap, memory_limits

RECORDED_PACKAGES = (
    "qlora-exp", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "hydra-core", "optuna", "mlflow", "evaluate", "scikit-learn", "numpy", "pyarrow",
)  # fmt: skip
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
"""MLflow decides on telemetry when it is imported."""
GIT_SECONDS = 5.0
"""Time-out of git and nvidia-smi: a repository on a slow network disk must not delay a run."""


def probe(device_choice: DeviceChoice = DeviceChoice.auto) -> Environment:
    """Return this machine's environment for ``training.device=device_choice``. Imports torch, no other ML library.

    Raises:
        ConfigError: ``cuda`` was chosen and torch finds no CUDA device.
    """
    import torch

    return _environment(_device(device_choice), torch.get_num_threads())


def probe_without_torch() -> Environment:
    """Return this machine's environment for a run without training: the device is the CPU, torch isn't imported."""
    return _environment(_cpu_device(), None)


def _environment(device: Device, torch_threads: int | None) -> Environment:
    commit, dirty = git_state(PACKAGE)
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=package_versions(),
        device=device,
        cpu_cores=available_cores(),
        memory_bytes=memory_limits.total_bytes(),
        torch_threads=torch_threads,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        git_commit=commit,
        git_dirty=dirty,
        glibc_tunables=heap.malloc_tunables(),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def process_identity() -> Process:
    """Return this process's identity, with which another process can check whether it is alive.

    Parts that the system doesn't report are ``None`` (systems other than Linux).
    """
    return Process(os.getpid(), _state_and_start(os.getpid())[1], _boot_id(), _host(), _pid_namespace())


def is_alive(process: Process) -> bool | None:
    """Return whether ``process`` still runs on this machine; a reused pid doesn't count as the same process.

    ``None``: it belongs to another host or container, whose processes aren't visible here. If its start time or boot
    is unknown, the pid alone decides. A zombie counts as dead.
    """
    boot_id = _boot_id()
    rebooted = process.boot_id is not None and boot_id is not None and process.boot_id != boot_id
    if process.host != _host() and (process.host is not None or rebooted):
        return None
    if rebooted:
        return False
    namespace = _pid_namespace()
    if process.pid_namespace is not None and namespace is not None and process.pid_namespace != namespace:
        return None
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it exists but belongs to another user
    state, start_ticks = _state_and_start(process.pid)
    if state in ("Z", "X"):
        return False
    return process.start_ticks is None or start_ticks is None or start_ticks == process.start_ticks


def is_alive_if_visible(process: Process) -> bool | None:
    """As :func:`is_alive`, but ``None`` for a process of another boot: two machines may share a host name."""
    boot_id = _boot_id()
    if process.boot_id is not None and boot_id is not None and process.boot_id != boot_id:
        return None
    return is_alive(process)


@lru_cache
def package_versions() -> dict[str, str]:
    """Return installed versions by distribution name, without importing the packages."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def available_cores() -> int | None:
    """Return the number of cores that this process may use: its affinity, or all cores if that is unknown."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count()


@lru_cache
def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return commit and dirty flag of the checkout whose top folder holds ``folder``.

    ``(None, None)`` for an installed wheel, even if its environment lies inside some other repository.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve().parent:
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a read-only git command; ``None`` without git, repository or commit."""
    try:
        process = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return process.stdout.strip()


def _device(choice: DeviceChoice) -> Device:
    import torch

    cuda = torch.cuda.is_available()
    if choice is DeviceChoice.cuda and not cuda:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = f" among CUDA_VISIBLE_DEVICES={visible or repr('')}" if visible is not None else ""
        raise ConfigError(
            f"training.device=cuda, but torch finds no CUDA device{among}",
            "training.device",
            "training.device=auto or cpu; qlora-exp doctor says what torch was built for",
        )
    return _cuda_device() if cuda and choice is not DeviceChoice.cpu else _cpu_device()


def _cuda_device() -> Device:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return Device(
        kind="cuda",
        name=properties.name,
        count=torch.cuda.device_count(),
        memory_bytes=int(properties.total_memory),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=_nvidia_driver(),
        # By default torch returns True for older cards, too, which emulate bf16 slowly.
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def _cpu_device() -> Device:
    flags = _cpu_fields().get("flags", "").split()
    return Device(
        kind="cpu",
        name=cpu_name(),
        count=1,
        memory_bytes=memory_limits.total_bytes(),
        compute_capability=None,
        driver=None,
        bf16="avx512_bf16" in flags or "amx_bf16" in flags,
    )


def cpu_name() -> str | None:
    """Return the processor's name as the kernel reports it."""
    return _cpu_fields().get("model name") or platform.processor() or platform.machine() or None


def _nvidia_driver() -> str | None:
    """Return the driver's version from its kernel module, else from nvidia-smi."""
    version = memory_limits.read(Path("/sys/module/nvidia/version")).strip()
    if version:
        return version
    try:
        process = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = process.stdout.split()
    return lines[0] if lines else None


@lru_cache
def _cpu_fields() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo; empty if that file doesn't exist."""
    fields: dict[str, str] = {}
    for line in memory_limits.read(Path("/proc/cpuinfo")).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _state_and_start(pid: int) -> tuple[str | None, int | None]:
    """Return the state of ``pid`` and clock ticks from boot to its start: fields 3 and 22 of /proc/<pid>/stat."""
    text = memory_limits.read(Path(f"/proc/{pid}/stat"))
    fields = text.rpartition(")")[2].split()  # field 2, the name, may hold spaces and ``)``
    return (fields[0], int(fields[19])) if fields else (None, None)


def _boot_id() -> str | None:
    return memory_limits.read(Path("/proc/sys/kernel/random/boot_id")).strip() or None


def _pid_namespace() -> str | None:
    """Return this process's pid namespace. Containers with the same host name each count pids from 1."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _host() -> str | None:
    return platform.node() or None
