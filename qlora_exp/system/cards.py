"""Cards: names, memory, data-sheet throughput; and prices per hour, from conf/prices.yaml (edit it to match yours)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.paths import CONF

CARDS: dict[str, tuple[int, bool, str]] = {
    "t4": (15_360, False, "T4"),
    "v100_16gb": (16_384, False, "V100 SXM2"),
    "v100_32gb": (32_768, False, "V100 SXM2"),
    "rtx3060_12gb": (12_288, True, "RTX 3060"),
    "rtx3090": (24_576, True, "RTX 3090"),
    "rtx4060ti_16gb": (16_380, True, "RTX 4060 Ti"),
    "rtx4070": (12_282, True, "RTX 4070"),
    "rtx4080": (16_376, True, "RTX 4080"),
    "rtx4090": (24_564, True, "RTX 4090"),
    "rtx5090": (32_607, True, "RTX 5090"),
    "rtxa6000": (49_140, True, "RTX A6000"),
    "a10g": (23_028, True, "A10G"),
    "l4": (23_034, True, "L4"),
    "l40s": (46_068, True, "L40S"),
    "a100_40gb": (40_960, True, "A100 SXM4"),
    "a100_80gb": (81_920, True, "A100 SXM4"),
    "h100_80gb": (81_559, True, "H100 HBM3"),
    "h200": (143_771, True, "H200"),
}
"""Card → (memory in MiB as nvidia-smi shows it, whether it has bfloat16, its name in conf/prices.yaml). From the
makers' data sheets, not measured."""
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
"""Dense 16-bit tensor throughput with 32-bit accumulation, FLOP/s, by :func:`card_of`. From the makers' data sheets
(half of a figure with sparsity). Form factors differ, so each has an entry; other cards are unknown."""
CARD_PREFIXES = {"NVIDIA", "TESLA", "GEFORCE"}

PRICES = CONF / "prices.yaml"
PRICE_UNIT = "usd_per_hour"


@dataclass(frozen=True)
class Price:
    """Price per hour and its source: ``budget.usd_per_hour``, or the table and the device that was looked up."""

    usd_per_hour: float
    source: str


def card_of(device_name: str) -> str:
    """Return a card's name without maker, line and memory size: ``NVIDIA A100-SXM4-80GB`` gives ``A100 SXM4``."""
    words = device_name.upper().replace("-", " ").split()
    return " ".join(word for word in words if word not in CARD_PREFIXES and not re.fullmatch(r"\d+GB", word))


def data_sheet_flops(device_name: str | None) -> float | None:
    """Return a card's dense 16-bit FLOP/s from its data sheet; ``None`` if that is unknown."""
    return DENSE_FLOPS_PER_SECOND.get(card_of(device_name)) if device_name else None


def price_of(
    configured: float | None, device_kind: str, device_name: str | None, table: Mapping[str, float] | None = None
) -> Price | None:
    """Return ``configured`` (``budget.usd_per_hour``), else the table's price of the device; ``None`` without either.

    ``table``: US dollars per hour by device; ``None``: conf/prices.yaml is read.

    Raises:
        ConfigError: the table can't be read.
    """
    if configured is not None:
        return Price(configured, f"budget.{PRICE_UNIT}")
    hourly = usd_per_hour(device_kind, device_name, table if table is not None else read_prices())
    looked_up = "cpu" if device_kind == "cpu" else device_name
    return Price(hourly, f"conf/prices.yaml: {looked_up}") if hourly is not None else None


def usd_per_hour(device_kind: str, device_name: str | None, table: Mapping[str, float]) -> float | None:
    """Return the price of a device by its driver's name; ``None`` if the table lacks it."""
    if device_kind == "cpu":
        return table.get("cpu")
    by_card = {card_of(name): price for name, price in table.items()}
    return by_card.get(card_of(device_name)) if device_name else None


def read_prices(path: Path = PRICES) -> dict[str, float]:
    """Return US dollars per hour by device.

    Raises:
        ConfigError: the file can't be read, has another unit, or a price isn't a number of at least 0.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the price table can't be read: {reason}", str(path), "restore it") from None
    if not isinstance(raw, dict) or list(raw) != [PRICE_UNIT]:
        units = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        hint = f"one key, {PRICE_UNIT}: prices are US dollars an hour; {nearest(units, [PRICE_UNIT])}"
        raise ConfigError(f"the price table has the unit {units}", str(path), hint)
    table = raw[PRICE_UNIT]
    if not isinstance(table, dict):
        raise ConfigError(
            "the price table has no devices", f"{path}: {PRICE_UNIT}", "one line a device, such as T4: 0.53"
        )
    for name, price in table.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
            what = f"the price of {name} is {price!r}"
            raise ConfigError(what, f"{path}: {PRICE_UNIT}.{name}", "US dollars an hour, a number of at least 0")
    return {str(name): float(price) for name, price in table.items()}
