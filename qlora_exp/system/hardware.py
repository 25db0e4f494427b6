"""Price per hour of a device, from conf/prices.yaml (edit it to match your prices)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.paths import CONF
from qlora_exp.training.meter import card_of

PRICES = CONF / "prices.yaml"
PRICE_UNIT = "usd_per_hour"


@dataclass(frozen=True)
class Price:
    """Price per hour and its source: ``budget.usd_per_hour``, or the table and the device that was looked up."""

    usd_per_hour: float
    source: str


def price_of(configured: float | None, device_kind: str, device_name: str | None) -> Price | None:
    """Return ``configured`` (``budget.usd_per_hour``), else the table's price of the device; ``None`` without either.

    Raises:
        ConfigError: the table can't be read.
    """
    if configured is not None:
        return Price(configured, f"budget.{PRICE_UNIT}")
    hourly = usd_per_hour(device_kind, device_name, read_prices())
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
