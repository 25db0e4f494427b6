"""Measures memory, seconds and energy by phase, and model FLOPs utilisation. Definitions: docs/measures.md."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qlora_exp.system.cards import data_sheet_flops
from qlora_exp.system.gpus import (
    DEVICE_ORDER,
    DEVICES_VARIABLE,
    UUID_PREFIXES,
    Card,
    cards,
    is_partitioned,
    visible_devices,
)


@dataclass
class Phase:
    """Measurements of one phase. ``peak_bytes``: CUDA bytes allocated; on a CPU, resident peak above the phase's
    start."""

    seconds: float | None = None
    peak_bytes: int | None = None
    anonymous_peak_bytes: int | None = None
    """CPU: ``peak_bytes`` minus the growth of mapped files (code at its first use, memory-mapped weights)."""
    reserved_bytes: int | None = None
    energy_joules: float | None = None


@dataclass
class Meter:
    """Measures phases on one device. For a phase that is entered again, seconds add up and the highest peak counts."""

    device: str
    process_reused: bool = False
    """Whether this process has made a run before. Its resident peaks are then unknown (``None``)."""
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def source(self) -> str | None:
        """What the peaks measure: ``cuda_allocated`` or ``resident``; ``None``: nothing."""
        if self.device == "cuda":
            return "cuda_allocated"
        return "resident" if resident_bytes() is not None and not self.process_reused else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the code in the ``with`` block as phase ``name``."""
        resident_before = self._start()
        mapped_before = _status_bytes("RssFile")
        joules_before = energy_joules(self.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            measured = self.phases.setdefault(name, Phase())
            measured.seconds = (measured.seconds or 0.0) + time.perf_counter() - started
            peak, reserved = self._peaks(resident_before)
            measured.peak_bytes = _highest(measured.peak_bytes, peak)
            mapped_now = _status_bytes("RssFile")
            if self.device != "cuda" and peak is not None and mapped_before is not None and mapped_now is not None:
                anonymous = max(0, peak - max(0, mapped_now - mapped_before))
                measured.anonymous_peak_bytes = _highest(measured.anonymous_peak_bytes, anonymous)
            measured.reserved_bytes = _highest(measured.reserved_bytes, reserved)
            joules_now = energy_joules(self.device)
            if joules_before is not None and joules_now is not None:
                measured.energy_joules = (measured.energy_joules or 0.0) + joules_now - joules_before

    def of(self, name: str) -> Phase:
        """Return the measurements of phase ``name``, empty if it wasn't entered."""
        return self.phases.get(name, Phase())

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _start(self) -> int | None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what an earlier phase had reserved isn't this phase's
            torch.cuda.reset_peak_memory_stats()
            return None
        return None if self.process_reused or not trim_heap() else reset_resident_peak()

    def _peaks(self, resident_before: int | None) -> tuple[int | None, int | None]:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peak = _status_bytes("VmHWM")
        if peak is None or resident_before is None:
            return None, None
        return max(0, peak - resident_before), None


def _highest(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return max(known) if known else None


def outside_allocator_bytes(device: str) -> int | None:
    """Return the bytes in use on the current GPU outside torch's allocator of this process; ``None`` if unknown."""
    if device != "cuda":
        return None
    try:
        import torch

        free, total = torch.cuda.mem_get_info()
        return max(0, int(total) - int(free) - int(torch.cuda.memory_reserved()))
    except Exception:  # the context is unusable, or was never made
        return None


def resident_bytes() -> int | None:
    """Return this process's resident memory in bytes; ``None`` if unknown."""
    return _status_bytes("VmRSS")


def trim_heap() -> bool:
    """Return freed memory to the system with glibc's ``malloc_trim``; False if the C library has no such function.

    Otherwise the next phase would reuse memory that this phase freed, and its measured peak would be too small.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return True


def reset_resident_peak() -> int | None:
    """Reset the process's resident peak to its current resident memory, and return that; ``None`` if it fails.

    Linux: proc(5), ``/proc/self/clear_refs``, value 5.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_bytes()


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else None


def energy_joules(device: str) -> float | None:
    """Return this process's share of the current GPU's energy, in joules since the first call; ``None`` on a CPU or
    without NVML (Volta or later).

    The GPU counts its energy for all processes. What it used between two calls is divided evenly among the processes
    that are on it at the second one, so that the sum over trials on one GPU is the GPU's.
    """
    if device != "cuda":
        return None
    try:
        import pynvml
        import torch

        processes = 1
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = _gpu_handle(pynvml, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        counter = float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
        with suppress(pynvml.NVMLError):  # not for every kind of GPU
            processes = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return _energy.add(uuid, counter, processes)
    except Exception:  # NVML fails in many ways where it isn't available; an unknown energy must not stop a run
        return None


@cache
def _gpu_handle(nvml: Any, uuid: str) -> Any:
    """Return NVML's handle of a GPU. NVML is initialized once, and stays so until the process ends."""
    nvml.nvmlInit()
    return nvml.nvmlDeviceGetHandleByUUID(uuid)


@dataclass
class _EnergyShare:
    """This process's share of a GPU's energy so far, in joules."""

    uuid: str | None = None
    counter: float = 0.0
    joules: float = 0.0

    def add(self, uuid: str, counter: float, processes: int) -> float:
        """Add this process's share of what GPU ``uuid`` used since the last call, and return the sum."""
        if self.uuid == uuid:  # NVML lists no process in some containers: this one is there
            self.joules += max(0.0, counter - self.counter) / max(1, processes)
        self.uuid, self.counter = uuid, counter
        return self.joules


_energy = _EnergyShare()


def has_energy_counter() -> bool:
    """Return whether each GPU that this process may use counts its energy, without torch.

    An instance of a partitioned GPU (MIG) doesn't: NVML counts the energy of the whole GPU.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that isn't there.
    """
    variable, order = os.environ.get(DEVICES_VARIABLE), os.environ.get(DEVICE_ORDER)
    usable = visible_devices(cards(), variable, lambda entry: Card(-1, entry), order)
    return bool(usable) and all(_counts_energy(card) for card in usable)


def _counts_energy(card: Card) -> bool:
    try:
        import pynvml

        pynvml.nvmlInit()
        # An index that CUDA and NVML may count differently stands for any card.
        by_index = not card.uuid.startswith(UUID_PREFIXES)
        get = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
        handle = get(max(card.index, 0) if by_index else card.uuid)
        if card.uuid.startswith("MIG-") or is_partitioned(handle):
            return False
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # as in energy_joules
        return False
    return True


def model_flops_utilisation(device_name: str | None, flops_of_a_token: float, tokens_per_second: float) -> float | None:
    """Return FLOPs per second relative to the card's dense 16-bit data-sheet figure; ``None`` if that is unknown.

    Recomputation and padding aren't useful work: ``flops_of_a_token`` leaves them out.
    """
    peak = data_sheet_flops(device_name)
    return tokens_per_second * flops_of_a_token / peak if peak is not None else None


def tensor_bytes(tensors: Any) -> int:
    """Return bytes of the distinct tensors among ``tensors``."""
    bytes_by_id: dict[int, int] = {}
    for tensor in tensors:
        bytes_by_id[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(bytes_by_id.values())
