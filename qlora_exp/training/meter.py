"""Memory by phase, and the speed of a card: what a run's figures are read from. Definitions: docs/measures.md."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DENSE_FLOPS_PER_SECOND = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H200 NVL": 835.5e12,
    "H100 HBM3": 989.5e12,
    "H100 NVL": 835.5e12,
    "H100 PCIE": 756.5e12,
    "A100 SXM4": 312e12,
    "A100 PCIE": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100 SXM2": 125e12,
    "V100 PCIE": 112e12,
    "T4": 65e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense 16-bit tensor throughput with 32-bit accumulation, FLOP/s, from the makers' data sheets (half of a figure that
is given with sparsity), by :func:`card_of`. Form factors differ, so each has its own entry; other cards are unknown."""
CARD_PREFIXES = {"NVIDIA", "TESLA", "GEFORCE"}


def card_of(device_name: str) -> str:
    """A driver's device name without maker, line and memory size: ``NVIDIA A100-SXM4-80GB`` is an ``A100 SXM4``."""
    words = device_name.upper().replace("-", " ").split()
    return " ".join(word for word in words if word not in CARD_PREFIXES and not re.fullmatch(r"\d+GB", word))


@dataclass
class Phase:
    """One phase. ``peak_bytes``: CUDA bytes allocated, or on a CPU the resident peak above the phase's start."""

    seconds: float | None = None
    peak_bytes: int | None = None
    anonymous_peak_bytes: int | None = None
    """CPU: ``peak_bytes`` less what mapped files grew by: code at its first use, and weights read where they lie."""
    reserved_bytes: int | None = None
    energy_joules: float | None = None


@dataclass
class Meter:
    """Measures phases on one device; the highest peak of a name is kept when it is entered more than once."""

    device: str
    host_reused: bool = False
    """This process made a run before: its resident peaks are then unknown (``None``)."""
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def source(self) -> str | None:
        if self.device == "cuda":
            return "cuda_allocated"
        return "resident" if resident_bytes() is not None and not self.host_reused else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started_with = self._start()
        mapped = _status_bytes("RssFile")
        joules = energy_joules(self.device)
        clock = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            known = self.phases.setdefault(name, Phase())
            known.seconds = (known.seconds or 0.0) + time.perf_counter() - clock
            peak, reserved = self._peaks(started_with)
            known.peak_bytes = _highest(known.peak_bytes, peak)
            mapped_now = _status_bytes("RssFile")
            if self.device != "cuda" and peak is not None and mapped is not None and mapped_now is not None:
                anonymous = max(0, peak - max(0, mapped_now - mapped))
                known.anonymous_peak_bytes = _highest(known.anonymous_peak_bytes, anonymous)
            known.reserved_bytes = _highest(known.reserved_bytes, reserved)
            spent = energy_joules(self.device)
            if joules is not None and spent is not None:
                known.energy_joules = (known.energy_joules or 0.0) + spent - joules

    def of(self, name: str) -> Phase:
        return self.phases.get(name, Phase())

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _start(self) -> int | None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return None
        return None if self.host_reused or not give_back_freed_memory() else reset_resident_peak()

    def _peaks(self, started_with: int | None) -> tuple[int | None, int | None]:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peak = _status_bytes("VmHWM")
        if peak is None or started_with is None:
            return None, None
        return max(0, peak - started_with), None


def _highest(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None


def resident_bytes() -> int | None:
    """Resident memory of this process now; ``None`` where the system doesn't say."""
    return _status_bytes("VmRSS")


def give_back_freed_memory() -> bool:
    """Hand what has been freed back to the system (glibc's ``malloc_trim``); False where the C library can't.

    The allocator keeps what one phase freed and gives it to the next: its peak would then be too small by that much.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, or a system without one of that kind
        return False
    return True


def reset_resident_peak() -> int | None:
    """Reset the process's resident peak to what is resident now, and return that; ``None`` where it can't be reset.

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
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def energy_joules(device: str) -> float | None:
    """The current card's energy counter (NVML, Volta and later); ``None`` on CPUs and where NVML isn't installed."""
    if device != "cuda":
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
    except Exception:  # NVML has many ways to be absent; energy is then unknown, never a reason to stop
        return None


def energy_counter_is_there() -> bool:
    """Whether a card of this machine counts its energy; torch isn't asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # as in energy_joules
        return False
    return True


def flops_per_token(total_parameters: int, adapter_parameters: int, recomputed: bool) -> float:
    """FLOPs to train one token with a frozen base: 2N forward + 2N backward (activations' gradients only), 2N more
    where the forward pass is recomputed, and 6 per adapter parameter. After Kaplan et al. 2020, section 2.1; the
    attention's own quadratic part is left out."""
    return (6.0 if recomputed else 4.0) * total_parameters + 6.0 * adapter_parameters


def model_flops_utilisation(device_name: str | None, flops_of_a_token: float, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation against the card's dense 16-bit data-sheet figure; ``None`` for an unknown card.

    Recomputation counts as no useful work, so pass :func:`flops_per_token` with ``recomputed=False``.
    """
    peak = DENSE_FLOPS_PER_SECOND.get(card_of(device_name)) if device_name else None
    return tokens_per_second * flops_of_a_token / peak if peak is not None else None


def tensor_bytes(tensors: Any) -> int:
    """Bytes of distinct tensors."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
