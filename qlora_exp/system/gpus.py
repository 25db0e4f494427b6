"""Which GPUs this machine has, and the one that this process trains on. Imports neither torch nor anything of ours.

A process that sees several GPUs would have transformers split every batch over them (DataParallel), which TRL refuses.
So each process is limited to one, by CUDA_VISIBLE_DEVICES, before torch is imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
DEVICE_ORDER = "CUDA_DEVICE_ORDER"
DRIVER_FILES = Path("/proc/driver/nvidia/gpus")
DEVICE_FILES = Path("/dev")
NVIDIA_SMI_SECONDS = 10.0


class Numbered(Protocol):
    """A GPU by its number and its UUID."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...


T = TypeVar("T", bound=Numbered)


@dataclass(frozen=True)
class Card:
    """One GPU, or one instance of a partitioned GPU (MIG). ``uuid`` names it in CUDA_VISIBLE_DEVICES; where nothing
    gives its UUID, that is its number."""

    index: int
    uuid: str
    name: str = ""
    free_bytes: int | None = None


def use_one_gpu(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Limit this process to one GPU, the visible one with the most free memory, and return its name for CUDA.

    Returns ``None`` and changes nothing where at most one is visible, or where CUDA has begun in this process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return None
    given = environment.get(DEVICES_VARIABLE)
    usable = visible_devices(cards(), given, lambda entry: Card(-1, entry))
    if len(usable) < 2:
        return None
    numbers = given is not None and any(entry.strip().isdecimal() for entry in given.split(","))
    if numbers and environment.get(DEVICE_ORDER) != "PCI_BUS_ID" and len({card.name for card in usable}) > 1:
        # CUDA numbers the fastest card first, and the driver by their slots: what a number means isn't known.
        chosen = (given or "").split(",")[0].strip()
    else:
        chosen = max(usable, key=lambda card: card.free_bytes or 0).uuid  # the first of equals
    environment[DEVICES_VARIABLE] = chosen
    return chosen


def visible_devices(known: Sequence[T], variable: str | None, unknown: Callable[[str], T]) -> list[T]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; the list ends at the first entry that names none.

    ``unknown`` makes a GPU of an entry that can't be looked up: an instance of a partitioned GPU, or a UUID where only
    numbers are known.
    """
    if variable is None or not known:
        return list(known)
    unlisted = ("MIG-", "GPU-") if all(gpu.uuid == str(gpu.index) for gpu in known) else ("MIG-",)
    found: list[T] = []
    for entry in (part.strip() for part in variable.split(",")):
        named = [gpu for gpu in known if entry and (entry == str(gpu.index) or gpu.uuid.startswith(entry))]
        if not named and not entry.startswith(unlisted):
            break
        found.append(named[0] if named else unknown(entry))
    return found


def cards() -> tuple[Card, ...]:
    """The machine's GPUs by NVML, else by nvidia-smi, else by the driver's files; empty where there are none."""
    return next((found for look in (_by_nvml, _by_nvidia_smi, _by_driver, _by_device_files) if (found := look())), ())


def _by_nvml() -> tuple[Card, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_described(index, one) for index, handle in enumerate(handles) for one in _instances(handle))
    except Exception:  # NVML has many ways to be absent
        return ()


def _instances(handle: object) -> list[object]:
    """The instances of a GPU that is partitioned, else the GPU itself."""
    import pynvml

    try:
        if not pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return [handle]
        most = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except pynvml.NVMLError:  # it can't be partitioned
        return [handle]
    found = []
    for number in range(most):
        try:
            found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except pynvml.NVMLError:  # no such instance
            continue
    return found or [handle]


def _described(index: int, handle: object) -> Card:
    import pynvml

    uuid, name = (_text(ask(handle)) for ask in (pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName))
    return Card(index, uuid, name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).free))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _by_nvidia_smi() -> tuple[Card, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    found = []
    for line in told.splitlines():
        index, uuid, free, name = (part.strip() for part in (*line.split(",", 3), "", "", "", "")[:4])
        if index.isdecimal() and uuid:
            found.append(Card(int(index), uuid, name, int(free) * 2**20 if free.isdecimal() else None))
    return tuple(found)


def _by_driver() -> tuple[Card, ...]:
    """One folder a GPU, named after its slot: their order is that of the slots."""
    found = []
    for index, file in enumerate(sorted(DRIVER_FILES.glob("*/information"))):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ()
        fields = dict(re.findall(r"^([^:\n]+?)\s*:\s*(.*?)\s*$", text, re.MULTILINE))
        uuid = fields.get("GPU UUID", "")
        found.append(Card(index, uuid if uuid.startswith("GPU-") and "?" not in uuid else str(index),
                          fields.get("Model", "")))  # fmt: skip
    return tuple(found)


def _by_device_files() -> tuple[Card, ...]:
    numbers = sorted(int(file.name[6:]) for file in DEVICE_FILES.glob("nvidia[0-9]*") if file.name[6:].isdecimal())
    return tuple(Card(index, str(index)) for index, _ in enumerate(numbers))  # CUDA counts those that there are
