"""Which GPU and how many threads each trial process gets."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.config.enums import DeviceChoice, Engine
from qlora_exp.errors import ConfigError, QloraExpError, raise_all
from qlora_exp.records.files import write_json
from qlora_exp.system import heap
from qlora_exp.system.environment import available_cores
from qlora_exp.system.gpus import DEVICE_ORDER, DEVICES_VARIABLE, allocator_setting, instances
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
    """One GPU, with the processes that use it if NVML reports them."""

    index: int
    uuid: str
    name: str
    users: tuple[GpuUser, ...] = ()


def assign(
    gpus: Sequence[Gpu], visible: str | None, slots: int | None, own_pids: Collection[int] = ()
) -> tuple[str | None, ...]:
    """Return each slot's GPU (its UUID), ``None`` without GPUs. If there are more slots than GPUs, they share them in
    turn.

    Args:
        visible: CUDA_VISIBLE_DEVICES; only those GPUs are used, in that order.
        slots: number of trial processes; ``None``: one per GPU, or one.
        own_pids: processes that may hold memory.

    Raises:
        ConfigError, Problems: other processes hold memory on GPUs that would be used; they are named. Or ``visible``
            names a GPU that isn't there.
    """
    usable = visible_gpus(gpus, visible, lambda entry: Gpu(-1, entry, ""), os.environ.get(DEVICE_ORDER))
    count = slots if slots is not None else max(1, len(usable))
    if not usable:
        return (None,) * count
    chosen = usable[:count]
    raise_all([_gpu_in_use_error(gpu, user) for gpu in chosen for user in gpu.users if user.pid not in own_pids])
    return tuple(chosen[slot % len(chosen)].uuid for slot in range(count))


def _gpu_in_use_error(gpu: Gpu, user: GpuUser) -> QloraExpError:
    memory = f"{user.memory_bytes / 2**30:.1f} GiB" if user.memory_bytes is not None else "memory"
    holder = f"process {user.pid}{f' ({user.name})' if user.name else ''}"
    return ConfigError(
        f"GPU {gpu.index} is in use: {holder} holds {memory} on it",
        f"{gpu.name}, {gpu.uuid}",
        "wait for it, end it, or choose other GPUs with CUDA_VISIBLE_DEVICES",
    )


def inventory() -> tuple[Gpu, ...]:
    """Return the machine's GPUs and the processes on them (only NVML reports those); empty without GPUs."""
    return _by_nvml() or tuple(Gpu(card.index, card.uuid, card.name) for card in cards_here())


def nvml_works() -> bool:
    """Return whether the processes that use the GPUs can be seen."""
    return bool(_by_nvml())


def _by_nvml() -> tuple[Gpu, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_gpu_of(index, part) for index, handle in enumerate(handles) for part in instances(handle))
    except Exception:  # no NVML: missing package, library, driver or GPU each raise differently
        return ()


def _gpu_of(index: int, handle: object) -> Gpu:
    import pynvml

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


def assign_slots(engine: Engine, device: DeviceChoice, count: int | None) -> tuple[str | None, ...]:
    """Return :func:`assign` for this machine, given how the study's trials run."""
    uses_gpu = engine is not Engine.sleep and device is not DeviceChoice.cpu
    gpus = inventory() if uses_gpu else ()
    return assign(gpus, os.environ.get(DEVICES_VARIABLE), count, _own_pids() if gpus else ())


def _own_pids() -> set[int]:
    """Return this process and its descendants: trial processes may hold memory before their first trial."""
    import psutil

    me = psutil.Process()
    return {me.pid, *(child.pid for child in me.children(recursive=True))}


def threads_per_process(requested: int | None, slots: int, kept: Path) -> int:
    """Return ``training.threads`` if set, else the cores divided by the number of slots.

    The study's first worker writes the number to ``kept``. The study keeps it on other machines, since results are
    bit-equal only at equal thread counts.
    """
    if requested is not None:
        return requested
    try:
        return max(1, int(json.loads(kept.read_text(encoding="utf-8"))["threads"]))
    except (OSError, ValueError, KeyError, TypeError):
        threads = max(1, (available_cores() or 1) // slots)
        write_json(kept, {"threads": threads})
        return threads


def environment_of(gpu: str | None, threads: int) -> Mapping[str, str]:
    """Return a trial process's environment variables; libraries read them at import."""
    fixed = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if gpu is None:
        return {**fixed, **heap.environment_for_training()}
    return {**fixed, DEVICES_VARIABLE: gpu, **allocator_setting()}
