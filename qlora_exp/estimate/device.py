"""The device that a plan is for: a CPU, a CUDA card in general, or a card by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from qlora_exp.architecture.run_plan import compute_dtype
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.targets import layers_without_adapters
from qlora_exp.config.allowed_values import QUANTIZED
from qlora_exp.config.enums import DeviceChoice
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError, nearest
from qlora_exp.records.types import Device
from qlora_exp.system.cards import CARDS, card_of
from qlora_exp.system.gpus import DEVICE_ORDER, DEVICES_VARIABLE, Card, cards, visible_devices

BYTES_PER_MIB = 2**20
SAME_MEMORY = 0.05
"""Relative difference: cards with one name that differ by more are different cards of the table."""
DEVICE_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SEVERAL = re.compile(r"\s*(\d+)\s*[x×*]\s*(\S+)\s*")
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class PlanDevice:
    """``kind`` is ``cpu`` or ``cuda``. ``memory_bytes`` and ``card`` (the driver's name for it, without its maker) are
    ``None`` if no card is named."""

    name: str
    kind: str
    bf16: bool
    memory_bytes: int | None
    card: str | None = None

    @property
    def hardware(self) -> Device:
        """The device as a run's record describes it."""
        return Device(self.kind, self.card, 1, self.memory_bytes, None, None, self.bf16)


CUDA = PlanDevice("cuda", "cuda", bf16=True, memory_bytes=None)


def device_by_name(name: str) -> PlanDevice:
    """Return the device of ``plan.device=NAME``: ``cpu``, ``cuda`` (any card with bfloat16) or a card.

    Raises:
        ConfigError: there is no such card.
    """
    if name == "cpu":
        from qlora_exp.system import memory_limits

        return PlanDevice("cpu", "cpu", bf16=False, memory_bytes=memory_limits.total_bytes())
    if name == "cuda":
        return CUDA
    if name not in CARDS:
        what = f"there is no card {name!r}"
        raise ConfigError(what, f"plan.device={name}", nearest(name, ("cpu", "cuda", *CARDS)))
    memory_mib, bf16, card = CARDS[name]
    return PlanDevice(name, "cuda", bf16, memory_mib * BYTES_PER_MIB, card)


def device_of(config: Config) -> PlanDevice:
    """Return the device on which ``config`` runs by default: ``training.device`` if it is set; else CUDA for a model of
    the Hub, and this machine's GPU, or its CPU without one, for a model on disk or in the package.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that isn't there.
    """
    chosen = config.training.device
    if chosen is not DeviceChoice.auto:
        return device_by_name(chosen.value)
    local = config.model.path is not None or (config.model.checkpoint or "embedded:").startswith("embedded:")
    if not local:
        return CUDA
    return gpu_here() or device_by_name("cpu")


@lru_cache(maxsize=1)
def gpu_here() -> PlanDevice | None:
    """Return the GPU that a run takes on this machine, without importing torch; ``None``: it takes the CPU."""
    if "+cpu" in version("torch"):
        return None
    known, order = cards(), os.environ.get(DEVICE_ORDER)
    visible = visible_devices(known, os.environ.get(DEVICES_VARIABLE), lambda entry: Card(-1, entry), order)
    if not visible:
        return None
    card = max(visible, key=lambda card: card.free_bytes or 0)
    same = {name: (mib, bf16) for name, (mib, bf16, title) in CARDS.items() if title.upper() == card_of(card.name)}
    size = card.total_bytes
    names = [name for name, (mib, _) in same.items() if size and abs(mib * BYTES_PER_MIB / size - 1) < SAME_MEMORY]
    bf16 = all(bf16 for _, bf16 in same.values())
    return PlanDevice(names[0] if names else "cuda", "cuda", bf16, size, card.name or None)


def device_notes(config: Config, device: PlanDevice, architecture: Architecture) -> Iterator[str]:
    """Yield what a user should know about ``config`` on ``device`` before paying for it."""
    quantization, targets = config.quantization, config.targets
    if quantization.mode in QUANTIZED and architecture.experts:
        names = tuple(experts.name for experts in architecture.experts)
        elements = sum(tensor.elements for tensor in architecture.others if tensor.name.startswith(names))
        share = f"{elements / architecture.total_parameters:.0%} of the parameters belong to experts"
        yield f"{share}, and bitsandbytes doesn't quantize those: they are 3-dimensional parameters, not linear layers"
    names_left = layers_without_adapters(architecture)
    if names_left and targets.modules is None and targets.set == "all_linear":
        yield f"{', '.join(names_left)} get no adapters: PEFT regards these names as experts' layers"
    dtype = compute_dtype(quantization, device.kind, device.bf16)
    if device.kind == "cuda" and not device.bf16 and dtype == "bfloat16":
        yield f"{device.name} has no bfloat16: torch emulates it, which is slow; quantization=fp16 is faster"


def size_bytes(text: str) -> int:
    """Return the bytes of ``24GB`` (10⁹) or ``24GiB`` (2³⁰), or a card's memory by its name.

    Raises:
        ConfigError: no number, an unknown unit or none.
    """
    if text in CARDS:
        return CARDS[text][0] * BYTES_PER_MIB
    several = SEVERAL.fullmatch(text)
    if several:
        count, one = several.groups()
        what = "a run uses the memory of one GPU: several can't be added up"
        hint = f"--fit {one}; {count} GPUs train {count} trials of a sweep at once: workers.count={count}"
        raise ConfigError(what, f"--fit {text}", hint)
    match = SIZE.fullmatch(text)
    if not match:
        what = "a memory size is a number above 0 with a unit, or a card's name"
        raise ConfigError(what, f"--fit {text}", f"e.g. --fit 24GB; {nearest(text, CARDS)}")
    number, unit = match.groups()
    if float(number) == 0:
        raise ConfigError("the memory size must be above 0", f"--fit {text}", "e.g. --fit 24GB")
    factor = DEVICE_UNITS.get(unit) or {name.upper(): value for name, value in DEVICE_UNITS.items()}.get(unit.upper())
    if factor is None:
        what = f"{unit!r} is not a unit of memory" if unit else "the size has no unit"
        raise ConfigError(what, f"--fit {text}", f"e.g. --fit {number}GB; units: {', '.join(DEVICE_UNITS)}")
    return round(float(number) * factor)
