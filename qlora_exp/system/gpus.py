"""The machine's GPUs, and the choice of one for this process. Doesn't import torch.

If a process sees several GPUs, transformers splits every batch over them (DataParallel), which TRL refuses.
Therefore CUDA_VISIBLE_DEVICES limits each process to one GPU before torch is imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from qlora_exp.errors import ConfigError

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
DEVICE_ORDER = "CUDA_DEVICE_ORDER"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch reads its allocator's settings; the second is the older name."""
GROWING_SEGMENTS = "expandable_segments:True"
DRIVER_FILES = Path("/proc/driver/nvidia/gpus")
DEVICE_FILES = Path("/dev")
NVIDIA_SMI_SECONDS = 10.0
UUID_PREFIXES = ("GPU-", "MIG-")
NO_DEVICES = ("nodevfiles", "none", "void")
"""Words in CUDA_VISIBLE_DEVICES, in lower case, that are meant to hide all GPUs: Slurm's and common ones. CUDA takes
them for invalid entries, with this effect."""


class HasIdentity(Protocol):
    """A GPU with its index, UUID and product name."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=HasIdentity)


@dataclass(frozen=True)
class Card:
    """One GPU, or one instance of a partitioned GPU (MIG). ``uuid`` is its entry in CUDA_VISIBLE_DEVICES: its UUID, or
    its index if the UUID is unknown."""

    index: int
    uuid: str
    name: str = ""
    free_bytes: int | None = None
    total_bytes: int | None = None
    """Known from NVML alone."""


def use_one_gpu(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Limit this process to the visible GPU with the most free memory; return its entry in CUDA_VISIBLE_DEVICES.

    Returns ``None`` and changes nothing if at most one GPU is visible, or if torch has initialized CUDA already.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that isn't there.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return None
    order, variable = environment.get(DEVICE_ORDER), environment.get(DEVICES_VARIABLE)
    usable = visible_devices(cards(), variable, lambda entry: Card(-1, entry), order)
    if len(usable) < 2:
        return None
    environment[DEVICES_VARIABLE] = max(usable, key=lambda card: card.free_bytes or 0).uuid  # the first of equal ones
    return environment[DEVICES_VARIABLE]


def allocator_setting(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variable with which torch's CUDA allocator fragments less; empty if the user has set one.

    Batches differ in length, and a trial process trains with several micro-batches. Segments of fixed size then leave
    gaps that no later tensor fits into; segments that grow don't. torch reads the variable when it first uses CUDA.
    """
    if any(name in environment for name in ALLOCATOR_VARIABLES):
        return {}
    return {ALLOCATOR_VARIABLES[0]: GROWING_SEGMENTS}


def visible_devices(
    known: Sequence[T], variable: str | None, unknown: Callable[[str], T], order: str | None = None
) -> list[T]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES (``variable``) leaves visible, in its order.

    As in CUDA, an empty or negative entry ends the list. ``unknown`` makes a GPU from an entry that can't be looked up:

    * an index among different cards, unless CUDA_DEVICE_ORDER (``order``) is PCI_BUS_ID: CUDA counts the fastest card
      first, the driver counts by slot;
    * an instance of a partitioned GPU that NVML doesn't list, or the UUID of a partitioned GPU;
    * a UUID if only indices are known.

    Raises:
        ConfigError: an entry names no GPU, several, or one that an earlier entry names.
    """
    if variable is None or not known:
        return list(known)
    counted_by_slot = order == "PCI_BUS_ID" or len({gpu.name for gpu in known}) == 1
    visible: list[T] = []
    for entry in (part.strip() for part in variable.split(",")):
        if not entry or entry.startswith("-") or entry.lower() in NO_DEVICES:
            break
        if entry.isdecimal():
            matches = [gpu for gpu in known if gpu.index == int(entry)][:1]  # CUDA uses the first instance of a GPU
            if matches and not counted_by_slot:
                matches = [unknown(entry)]
        else:
            matches = [gpu for gpu in known if entry.startswith(UUID_PREFIXES) and gpu.uuid.startswith(entry)]
            if not matches and _cannot_be_looked_up(entry, known):
                matches = [unknown(entry)]
        if len(matches) != 1:
            raise _visible_devices_error(
                f"{entry!r} is {'more than one GPU' if matches else 'no GPU'}", variable, known
            )
        if matches[0].uuid in {gpu.uuid for gpu in visible}:
            raise _visible_devices_error(f"{entry!r} is a GPU that is named before", variable, known)
        visible += matches
    return visible


def _cannot_be_looked_up(entry: str, known: Sequence[HasIdentity]) -> bool:
    """Return whether ``entry`` may be the UUID of a GPU or instance that is not among ``known``."""
    if entry.startswith("MIG-"):
        return entry.startswith("MIG-GPU-") or not _lists_instances()  # the former: names before driver 470
    only_indices = all(gpu.uuid == str(gpu.index) for gpu in known)
    partitioned = any(gpu.uuid.startswith("MIG-") for gpu in known)
    return entry.startswith("GPU-") and (only_indices or partitioned)


def _visible_devices_error(what: str, variable: str, known: Sequence[HasIdentity]) -> ConfigError:
    names = ", ".join(f"{gpu.index} ({gpu.uuid})" if gpu.uuid != str(gpu.index) else gpu.uuid for gpu in known)
    hint = f"this machine has: {names}; {DEVICES_VARIABLE}=-1 hides all"
    return ConfigError(what, f"{DEVICES_VARIABLE}={variable}", hint)


def cards() -> tuple[Card, ...]:
    """Return the machine's GPUs from NVML, nvidia-smi or the driver's files, whichever answers first; may be empty."""
    return next((gpus for read in (_by_nvml, _by_nvidia_smi, _by_driver, _by_device_files) if (gpus := read())), ())


def _by_nvml() -> tuple[Card, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_described(index, part) for index, handle in enumerate(handles) for part in instances(handle))
    except Exception:  # NVML fails in many ways where it isn't available
        return ()


def instances(handle: object) -> list[object]:
    """Return the instances of a partitioned GPU (MIG), else the GPU itself."""
    import pynvml

    if not is_partitioned(handle):
        return [handle]
    parts: list[object] = []
    try:
        most = int(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    except pynvml.NVMLError:  # a driver that knows the mode, but doesn't list instances
        most = 0
    for number in range(most):
        try:
            parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except pynvml.NVMLError:  # no such instance
            continue
    return parts or [handle]


def _lists_instances() -> bool:
    """Return whether NVML says which instances of partitioned GPUs there are, if any."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return not any(is_partitioned(handle) and instances(handle) == [handle] for handle in handles)
    except Exception:  # as in _by_nvml
        return False


def is_partitioned(handle: object) -> bool:
    """Return whether NVML's GPU ``handle`` is divided into instances (MIG)."""
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # the GPU doesn't support MIG
        return False


def _described(index: int, handle: object) -> Card:
    import pynvml

    uuid, name = (_text(read(handle)) for read in (pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName))
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Card(index, uuid, name, int(memory.free), int(memory.total))


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
