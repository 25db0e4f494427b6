"""Which GPU and how many threads each trial host gets."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.config.schema import DeviceChoice, Engine
from qlora_exp.errors import ConfigError, QloraExpError, raise_all
from qlora_exp.records.files import write_json
from qlora_exp.system import heap
from qlora_exp.system.environment import available_cores
from qlora_exp.system.gpus import DEVICES_VARIABLE
from qlora_exp.system.gpus import cards as cards_here
from qlora_exp.system.gpus import visible_devices as visible_gpus


@dataclass(frozen=True)
class GpuUser:
    """A process that holds memory on a GPU."""

    pid: int
    name: str | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU, with the processes that use it where NVML tells of them."""

    index: int
    uuid: str
    name: str
    users: tuple[GpuUser, ...] = ()


def assign(
    gpus: Sequence[Gpu], visible: str | None, slots: int | None, own_pids: Collection[int] = ()
) -> tuple[str | None, ...]:
    """Each slot's GPU (its UUID), ``None`` where there is none. Slots beyond the GPUs share them in turn.

    Args:
        visible: CUDA_VISIBLE_DEVICES; only those GPUs are used, in that order.
        slots: how many hosts; ``None``: one per GPU, or one.
        own_pids: processes that may hold memory.

    Raises :class:`ConfigError` or :class:`Problems` naming whoever holds memory on one of the GPUs that would be used.
    """
    usable = visible_gpus(gpus, visible, lambda entry: Gpu(-1, entry, ""))
    count = slots if slots is not None else max(1, len(usable))
    if not usable:
        return (None,) * count
    chosen = usable[:count]
    raise_all([_occupied(gpu, user) for gpu in chosen for user in gpu.users if user.pid not in own_pids])
    return tuple(chosen[slot % len(chosen)].uuid for slot in range(count))


def _occupied(gpu: Gpu, user: GpuUser) -> QloraExpError:
    held = f"{user.memory_bytes / 2**30:.1f} GiB" if user.memory_bytes is not None else "memory"
    who = f"process {user.pid}{f' ({user.name})' if user.name else ''}"
    return ConfigError(
        f"GPU {gpu.index} is in use: {who} holds {held} on it",
        f"{gpu.name}, {gpu.uuid}",
        "wait for it, end it, or choose other GPUs with CUDA_VISIBLE_DEVICES",
    )


def inventory() -> tuple[Gpu, ...]:
    """The machine's GPUs and who uses them, which NVML alone tells; empty where there are no GPUs."""
    return _by_nvml() or tuple(Gpu(card.index, card.uuid, card.name) for card in cards_here())


def nvml_works() -> bool:
    """Whether the processes that use the GPUs can be seen."""
    return bool(_by_nvml())


def _by_nvml() -> tuple[Gpu, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(_described(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except Exception:  # NVML has many ways to be absent
        return ()


def _described(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    users = tuple(
        GpuUser(int(process.pid), _name_of(int(process.pid)), process.usedGpuMemory)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    )
    return Gpu(index, _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle)), users)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _name_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def slots_of(engine: Engine, device: DeviceChoice, count: int | None) -> tuple[str | None, ...]:
    """:func:`assign` on this machine, for a study whose trials run so."""
    uses_gpu = engine is not Engine.sleep and device is not DeviceChoice.cpu
    gpus = inventory() if uses_gpu else ()
    return assign(gpus, os.environ.get(DEVICES_VARIABLE), count, _own_pids() if gpus else ())


def _own_pids() -> set[int]:
    """This process and what it has started: its hosts may hold memory before they have a trial."""
    import psutil

    me = psutil.Process()
    return {me.pid, *(child.pid for child in me.children(recursive=True))}


def threads_per_host(asked: int | None, slots: int, kept: Path) -> int:
    """``training.threads``, or the cores divided among the slots. The study's first worker fixes it in ``kept``; a
    study that is gone on with elsewhere keeps it, since results are bit-equal at equal thread counts only."""
    if asked is not None:
        return asked
    try:
        return max(1, int(json.loads(kept.read_text(encoding="utf-8"))["threads"]))
    except (OSError, ValueError, KeyError, TypeError):
        threads = max(1, (available_cores() or 1) // slots)
        write_json(kept, {"threads": threads})
        return threads


def environment_of(gpu: str | None, threads: int) -> Mapping[str, str]:
    """A host's environment variables, read by libraries when they are imported."""
    fixed = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**fixed, **heap.environment()} if gpu is None else {**fixed, DEVICES_VARIABLE: gpu}
