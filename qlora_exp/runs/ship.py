"""The model that ships: merged or as it was trained, rounded to its format, and its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.enums import RangeChoice, ShippedModel
from qlora_exp.config.schema import Config
from qlora_exp.config.shipping import ShipConfig
from qlora_exp.estimate.weights_and_optimizer import base_bytes
from qlora_exp.models.base import Base
from qlora_exp.models.fake_quantization import body_linears, round_linears
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
            shapes = [(module.out_features, module.in_features) for _, module in body_linears(merged)]
            count, packed = sum(rows * columns for rows, columns in shapes), packed_bytes(format, shapes)
        size = packed + OTHER_BYTES * (parameters - count)
        shipped = Shipped(ship.model.value, format.name, 8 * packed / count, size)
    if base.device.type != "cpu":
        merged = merged.to(base.device, base.model.dtype)
    return merged.eval(), shipped
