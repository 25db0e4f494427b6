"""Post-training quantization of a run: its merged model in integers, by layer, and what that costs on its task."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_exp.analysis.contrasts import interval
from qlora_exp.analysis.item_groups import GROUP_COLUMN, group_means
from qlora_exp.analysis.paired_shares import Z_TWO_SIDED_95, paired_bounds
from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.data.items import Item
from qlora_exp.errors import ExportError
from qlora_exp.export.finished_run import FinishedRun, check_run
from qlora_exp.export.task_check import CheckItems, answer_items, items_to_check
from qlora_exp.models.inspect import describe
from qlora_exp.models.tuning import merged_tuned
from qlora_exp.paths import RunPaths
from qlora_exp.ptq.memory_check import KEPT_TOKENS, check_quantize_memory
from qlora_exp.ptq.ptq_config import Calibration, PtqConfig
from qlora_exp.quantizers.affine import (
    AffineFormat,
    AffineWeight,
    output_error,
    quantize_activation_aware,
    quantize_affine,
)
from qlora_exp.records.files import write_json

QUANTIZATION_SCHEMA_VERSION = 1
UNQUANTIZED_BITS = 16
"""Embeddings, head, norms and biases ship in 16 bits."""


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer. ``stored_bytes``: packed codes, scales and zero points."""

    name: str
    rows: int
    columns: int
    scale_low: float
    scale_high: float
    zero_point_low: int | None
    """``None``: the format is symmetric."""
    zero_point_high: int | None
    clipped_share: float
    weight_error: float
    """‖W − Ŵ‖ / ‖W‖."""
    output_error: float | None
    """‖X (W − Ŵ)ᵀ‖ / ‖X Wᵀ‖ on the inputs X of the calibration rows; ``None`` without calibration rows."""
    stored_bytes: int


@dataclass(frozen=True)
class Change:
    """The score before and after quantization, on the same items. ``difference``: after − before, with its 95 %
    interval over items (groups of items count as one); ``None``: unknown."""

    before: float
    after: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class QuantizedResult:
    """One format. ``model_bytes``: the packed layers, and all other weights in 16 bits."""

    format: str
    bits: int
    symmetric: bool
    granularity: int | str
    calibration: str
    bits_per_weight: float
    """Of the quantized layers, with scales and zero points."""
    model_bytes: int
    loss_per_item: Change | None
    """Nats."""
    accuracy: Change | None
    """Or the share of exact matches, for tasks without labels."""
    layers: tuple[LayerResult, ...]


@dataclass(frozen=True)
class QuantizationResults:
    """The content of ``quantization.json``."""

    schema_version: int
    run_id: str
    created_at: str
    base: str
    trained_against: str
    """The quantization mode in which the run trained its adapter."""
    split: str
    items: int
    calibration_rows: int
    """Rows of the training split whose inputs the layers saw."""
    data_fingerprint: str | None
    merged_bytes: int
    """The merged model in 16 bits."""
    not_quantized_share: float
    """Share of the weights that stay in 16 bits."""
    trained_loss_per_item: float | None
    """Of the run as it was trained (its quantized base with the adapter), on the same items."""
    why_not_scored: str | None
    results: tuple[QuantizedResult, ...]


def quantize_run(
    paths: RunPaths,
    settings: PtqConfig,
    on_step: Callable[[str], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> tuple[QuantizationResults, Path]:
    """Quantize the run's merged model in each format of ``settings``; return the results and the file that has them.

    Raises:
        ConfigError, ExportError, ModelError: the run, its base or a format can't be used, or the machine's memory is
            too small.
    """
    run = check_run(paths)
    architecture = describe(run.config.model)
    formats = settings.formats()
    check_formats(formats, quantized_shapes(architecture), run.record.run_id)
    if (warning := check_quantize_memory(architecture, settings, formats, run.record.run_id)) is not None:
        on_warning(warning)
    questions = items_to_check(run.config, run.record, paths, run.tokenizer, settings.items, tolerance=0)
    calibration_items = questions.splits.train[: settings.rows] if isinstance(questions, CheckItems) else ()
    on_step("merge")
    model, _ = merged_tuned(run.config, paths.weights)
    model.eval()
    inputs = layer_inputs(model, quantized_shapes(architecture), calibration_items)
    before = None
    if isinstance(questions, CheckItems):
        on_step("score the merged model")
        before = answer_items(model, questions, run.config.evaluation.batch_size)
    several = len(formats) > 1  # else the weights are read once, and need no copy
    shapes = quantized_shapes(architecture)
    originals = {shape.name: layer_weight(model, shape).clone() for shape in shapes if several}
    results = []
    for format in formats:
        on_step(format.name)
        layers = []
        for shape in quantized_shapes(architecture):
            weight = originals[shape.name] if several else layer_weight(model, shape)
            quantized = quantize_weight(weight, format, settings.calibration, inputs.get(shape.name))
            layers.append(_layer_result(shape, weight, quantized, inputs.get(shape.name)))
            layer_weight(model, shape).copy_(quantized.dequantized())
        after = None
        if isinstance(questions, CheckItems):
            after = answer_items(model, questions, run.config.evaluation.batch_size)
        results.append(_result(format, settings, layers, architecture, before, after))
    quantization = _quantization(run, architecture, questions, len(calibration_items), results)
    write_json(paths.quantization, quantization)
    return quantization, paths.quantization


def quantize_weight(
    weight: Tensor, format: AffineFormat, calibration: Calibration, inputs: Tensor | None
) -> AffineWeight:
    """Quantize one layer's weight as ``calibration`` says. Without inputs, ``activations`` is ``mse``."""
    if calibration is Calibration.activations and inputs is not None:
        return quantize_activation_aware(weight, format, inputs)
    return quantize_affine(weight, format, search=calibration is not Calibration.minmax)


def quantized_shapes(architecture: Architecture) -> list[WeightShape]:
    """Return the layers that are quantized: those that bitsandbytes quantizes, so that the two can be compared."""
    return [shape for shape in architecture.weights if shape.quantizable]


def check_formats(formats: Sequence[AffineFormat], shapes: Sequence[WeightShape], where: str) -> None:
    """Raise :class:`ExportError` if a group size doesn't divide a layer's inputs."""
    for format in formats:
        size = format.granularity
        if isinstance(size, int):
            odd = [shape for shape in shapes if shape.in_features % size]
            if odd:
                what = f"groups of {size} don't divide the {odd[0].in_features} inputs of {odd[0].name}"
                divisors = [n for n in (256, 128, 64, 48, 32, 16) if all(s.in_features % n == 0 for s in shapes)]
                hint = f"--group {', '.join(map(str, divisors[:3]))} or channel" if divisors else "--group channel"
                raise ExportError(what, f"--group {size} ({where})", hint)


def layer_weight(model: nn.Module, shape: WeightShape) -> Tensor:
    """Return the layer's weight as (rows, columns) = (outputs, inputs), a view that may be written to."""
    module = model.get_submodule(shape.name)
    weight = module.weight.data
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def layer_inputs(model: Any, shapes: Sequence[WeightShape], items: Sequence[Item]) -> dict[str, Tensor]:
    """Return name → up to :data:`KEPT_TOKENS` inputs (tokens, columns) of the layer, spread evenly over ``items``."""
    kept: dict[str, list[Tensor]] = {shape.name: [] for shape in shapes}
    if not items:
        return {}
    quota = math.ceil(KEPT_TOKENS / len(items))

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1])
            step = max(1, len(rows) // quota)
            kept[name].append(rows[::step][:quota].float().clone())

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in kept]
    try:
        for item in items:
            ids = torch.tensor([item.prompt_ids + item.completion_ids + item.end_ids], device=model.device)
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows)[:KEPT_TOKENS] for name, rows in kept.items() if rows}


def _layer_result(shape: WeightShape, weight: Tensor, quantized: AffineWeight, inputs: Tensor | None) -> LayerResult:
    dequantized = quantized.dequantized()
    symmetric = quantized.format.symmetric
    return LayerResult(
        name=shape.name,
        rows=quantized.rows,
        columns=quantized.columns,
        scale_low=float(quantized.scale.min()),
        scale_high=float(quantized.scale.max()),
        zero_point_low=None if symmetric else int(quantized.zero_point.min()),
        zero_point_high=None if symmetric else int(quantized.zero_point.max()),
        clipped_share=quantized.clipped_share(weight),
        weight_error=float((weight.float() - dequantized).norm() / weight.float().norm().clamp(min=1e-12)),
        output_error=None if inputs is None else output_error(weight, dequantized, inputs),
        stored_bytes=math.ceil(quantized.stored_bits / 8),
    )


def _result(
    format: AffineFormat,
    settings: PtqConfig,
    layers: Sequence[LayerResult],
    architecture: Architecture,
    before: pa.Table | None,
    after: pa.Table | None,
) -> QuantizedResult:
    weights = sum(layer.rows * layer.columns for layer in layers)
    stored = sum(layer.stored_bytes for layer in layers)
    loss = accuracy = None
    if before is not None and after is not None:
        loss = _change(before, after, "loss_sum_nats")
        accuracy = next((c for name in ("correct", "exact") if (c := _change(before, after, name)) is not None), None)
    return QuantizedResult(
        format=format.name,
        bits=format.bits,
        symmetric=format.symmetric,
        granularity=format.granularity,
        calibration=settings.calibration.value,
        bits_per_weight=8 * stored / weights,
        model_bytes=stored + (architecture.total_parameters - weights) * UNQUANTIZED_BITS // 8,
        loss_per_item=loss,
        accuracy=accuracy,
        layers=tuple(layers),
    )


def _change(before: pa.Table, after: pa.Table, column: str) -> Change | None:
    """Return the change of the mean of ``column``; ``None``: the task doesn't have it."""
    first, second = before[column].to_pylist(), after[column].to_pylist()
    if None in first or None in second:
        return None
    groups = None
    if GROUP_COLUMN in before.column_names:
        groups = dict(zip(before["item_id"].to_pylist(), before[GROUP_COLUMN].to_pylist(), strict=True))
    if groups is None and isinstance(first[0], bool):
        # A t interval over items of which none has changed would be a single point.
        lost = sum(a and not b for a, b in zip(first, second, strict=True))
        won = sum(b and not a for a, b in zip(first, second, strict=True))
        low, high = paired_bounds(won, lost, len(first), Z_TWO_SIDED_95)
        shares = sum(first) / len(first), sum(second) / len(second)
        return Change(*shares, shares[1] - shares[0], low, high)
    ids = before["item_id"].to_pylist()
    # All groups count the same, so the two means are over groups, too.
    by_group = [
        np.array(list(group_means(dict(zip(ids, map(float, values), strict=True)), groups).values()))
        for values in (first, second)
    ]
    difference = interval((by_group[1] - by_group[0])[None], "items", trained=True)
    means = [float(values.mean()) for values in by_group]
    return Change(means[0], means[1], difference.value, difference.low, difference.high)


def _quantization(
    run: FinishedRun,
    architecture: Architecture,
    questions: Any,
    calibration_rows: int,
    results: Sequence[QuantizedResult],
) -> QuantizationResults:
    scored = isinstance(questions, CheckItems)
    weights = sum(shape.in_features * shape.out_features for shape in quantized_shapes(architecture))
    trained = questions.answers["loss_sum_nats"].to_pylist() if scored else []
    return QuantizationResults(
        schema_version=QUANTIZATION_SCHEMA_VERSION,
        run_id=run.record.run_id,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base=run.model.name,
        trained_against=run.config.quantization.mode.value,
        split=run.config.evaluation.split.value,
        items=len(questions.items) if scored else 0,
        calibration_rows=calibration_rows,
        data_fingerprint=run.record.data.fingerprint if run.record.data else None,
        merged_bytes=architecture.total_parameters * UNQUANTIZED_BITS // 8,
        not_quantized_share=1 - weights / architecture.total_parameters,
        trained_loss_per_item=math.fsum(trained) / len(trained) if trained else None,
        why_not_scored=None if scored else questions.why,
        results=tuple(results),
    )
