"""The model that ships: merged or as it was trained, rounded to its format, and its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.enums import RangeChoice, ShippedModel
from qlora_exp.config.schema import Config
from qlora_exp.config.shipping import ShipConfig
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.weights_and_optimizer import base_bytes
from qlora_exp.models.base import Base
from qlora_exp.models.fake_quantization import body_linears, matrix_of, round_linears
from qlora_exp.models.merging import dequantized_base, merge_into
from qlora_exp.models.tuning import adapter_loader, merged_tuned
from qlora_exp.quantizers.weight_formats import packed_bytes, weight_format
from qlora_exp.records.shipped import Shipped
from qlora_exp.records.types import Plan

OTHER_BYTES = 2
"""Embeddings, head, norms and biases ship in 16 bits, and an adapter, too."""


def ship_of(config: Config) -> ShipConfig | None:
    """Return how the run ships: ``ship``, or the format that ``training.qat`` trained for; ``None``: not asked."""
    qat = config.training.qat
    if qat.format is not None:
        return ShipConfig(ShippedModel.merged, qat.format, qat.symmetric, qat.group, RangeChoice.minmax)
    return config.ship if config.ship.model is not None else None


def check_format(architecture: Architecture, config: Config) -> None:
    """Check that the format to which weights are rounded fits the model's layers, before anything is loaded.

    Raises:
        ConfigError: a layer's inputs aren't divisible by the group.
    """
    ship = ship_of(config)
    if ship is None or ship.format is None or ship.model is ShippedModel.trained:
        return
    key = "training.qat" if config.training.qat.format is not None else "ship"
    format = weight_format(ship.format, ship.symmetric, ship.group)
    widths = sorted({shape.in_features for shape in architecture.weights})
    odd = [width for width in widths if format.group is not None and width % format.group]
    if odd:
        what = f"a layer has {odd[0]} inputs, which {format.name} can't divide into groups of {format.group}"
        fits = [str(size) for size in (256, 128, 64, 32, 16) if not any(width % size for width in widths)]
        hint = (
            f"{key}.group={fits[0] if fits else 'channel'}" if ship.format.startswith("int") else f"{key}.format=int4"
        )
        raise ConfigError(what, f"{key}.format = {ship.format}", hint)


def shipped_model(
    config: Config, ship: ShipConfig, plan: Plan, trained: Any, base: Base, architecture: Architecture, folder: Path
) -> tuple[Any, Shipped]:
    """Return the model to score, and what it is. ``folder``: what the run trained. ``trained`` is
    returned as it is for ``ship.model=trained``."""
    assert ship.model is not None
    if ship.model is ShippedModel.trained:
        held = base_bytes(architecture, config.quantization, "bfloat16").total_bytes
        size = held + OTHER_BYTES * (0 if config.method.kind in TUNES_WEIGHTS else plan.trainable_parameters)
        return trained, Shipped(ship.model.value, None, None, size)
    if ship.model is ShippedModel.merged_into_dequantized:
        merged = merge_into(dequantized_base(config, base), folder, adapter_loader(config))
    else:
        merged, _ = merged_tuned(config, folder)
    parameters = sum(parameter.numel() for parameter in merged.parameters())
    if ship.format is None:
        shipped = Shipped(ship.model.value, None, None, OTHER_BYTES * parameters)
    else:
        format = weight_format(ship.format, ship.symmetric, ship.group)
        if config.training.qat.format is None:  # else merged_tuned() has rounded the weights
            count, packed = round_linears(merged, format, search=ship.calibration is RangeChoice.mse)
        else:
            matrices = [matrix_of(module).shape for _, module in body_linears(merged)]
            shapes = [(rows, columns) for rows, columns in matrices]
            count, packed = sum(rows * columns for rows, columns in shapes), packed_bytes(format, shapes)
        size = packed + OTHER_BYTES * (parameters - count)
        shipped = Shipped(ship.model.value, format.name, 8 * packed / count, size)
    if base.device.type != "cpu":
        merged = merged.to(base.device, base.model.dtype)
    return merged.eval(), shipped
