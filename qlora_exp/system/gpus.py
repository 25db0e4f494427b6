"""The machine's GPUs, and the choice of one for this process. Imports neither torch nor the rest of this package.

If a process sees several GPUs, transformers splits every batch over them (DataParallel), which TRL refuses.
Therefore CUDA_VISIBLE_DEVICES limits each process to one GPU before torch is imported.
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


class HasIndexAndUuid(Protocol):
    """A GPU with an index and a UUID."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...


T = TypeVar("T", bound=HasIndexAndUuid)


@dataclass(frozen=True)
class Card:
    """One GPU, or one instance of a partitioned GPU (MIG). ``uuid`` is its entry in CUDA_VISIBLE_DEVICES: its UUID, or
    its index if the UUID is unknown."""

    index: int
    uuid: str
    name: str = ""
    free_bytes: int | None = None


def use_one_gpu(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Limit this process to the visible GPU with the most free memory; return its entry in CUDA_VISIBLE_DEVICES.

    Returns ``None`` and changes nothing if at most one GPU is visible, or if torch has initialized CUDA already.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return None
    variable = environment.get(DEVICES_VARIABLE)
    usable = visible_devices(cards(), variable, lambda entry: Card(-1, entry))
    if len(usable) < 2:
        return None
    by_index = variable is not None and any(entry.strip().isdecimal() for entry in variable.split(","))
    if by_index and environment.get(DEVICE_ORDER) != "PCI_BUS_ID" and len({card.name for card in usable}) > 1:
        # CUDA counts the fastest card first, the driver counts by slot: which card an index means is unknown here.
        chosen = (variable or "").split(",")[0].strip()
    else:
        chosen = max(usable, key=lambda card: card.free_bytes or 0).uuid  # the first of equal ones
    environment[DEVICES_VARIABLE] = chosen
    return chosen


def visible_devices(known: Sequence[T], variable: str | None, unknown: Callable[[str], T]) -> list[T]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES (``variable``) leaves visible, in its order.

    As in CUDA, the list ends at the first invalid entry. ``unknown`` makes a GPU from an entry that can't be looked up:
    an instance of a partitioned GPU, or a UUID if only indices are known.
    """
    if variable is None or not known:
        return list(known)
    unlisted = ("MIG-", "GPU-") if all(gpu.uuid == str(gpu.index) for gpu in known) else ("MIG-",)
    visible: list[T] = []
    for entry in (part.strip() for part in variable.split(",")):
        matches = [gpu for gpu in known if entry and (entry == str(gpu.index) or gpu.uuid.startswith(entry))]
        if not matches and not entry.startswith(unlisted):
            break
        visible.append(matches[0] if matches else unknown(entry))
    return visible


def cards() -> tuple[Card, ...]:
    """Return the machine's GPUs from NVML, nvidia-smi or the driver's files, whichever answers first; may be empty."""
    return next((gpus for read in (_by_nvml, _by_nvidia_smi, _by_driver, _by_device_files) if (gpus := read())), ())


def _by_nvml() -> tuple[Card, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_described(index, part) for index, handle in enumerate(handles) for part in _instances(handle))
    except Exception:  # NVML fails in many ways where it isn't available
        return ()


def _instances(handle: object) -> list[object]:
    """Return the instances of a partitioned GPU (MIG), else the GPU itself."""
    import pynvml

    try:
        if not pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return [handle]
        limit = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except pynvml.NVMLError:  # the GPU doesn't support MIG
        return [handle]
    instances = []
    for number in range(limit):
        try:
            instances.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except pynvml.NVMLError:  # no such instance
            continue
    return instances or [handle]


def _described(index: int, handle: object) -> Card:
    import pynvml

    uuid, name = (_text(read(handle)) for read in (pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName))
    return Card(index, uuid, name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).free))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _by_nvidia_smi() -> tuple[Card, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    gpus = []
    for line in output.splitlines():
        index, uuid, free, name = (part.strip() for part in (*line.split(",", 3), "", "", "", "")[:4])
        if index.isdecimal() and uuid:
            gpus.append(Card(int(index), uuid, name, int(free) * 2**20 if free.isdecimal() else None))
    return tuple(gpus)


def _by_driver() -> tuple[Card, ...]:
    """Read the driver's folders, one per GPU, named and sorted by slot."""
    gpus = []
    for index, file in enumerate(sorted(DRIVER_FILES.glob("*/information"))):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ()
        fields = dict(re.findall(r"^([^:\n]+?)\s*:\s*(.*?)\s*$", text, re.MULTILINE))
        uuid = fields.get("GPU UUID", "")
        gpus.append(Card(index, uuid if uuid.startswith("GPU-") and "?" not in uuid else str(index),
                          fields.get("Model", "")))  # fmt: skip
    return tuple(gpus)


def _by_device_files() -> tuple[Card, ...]:
    numbers = sorted(int(file.name[6:]) for file in DEVICE_FILES.glob("nvidia[0-9]*") if file.name[6:].isdecimal())
    return tuple(Card(index, str(index)) for index, _ in enumerate(numbers))  # CUDA counts from 0 without gaps
