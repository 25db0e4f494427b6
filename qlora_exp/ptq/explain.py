"""The arithmetic of one group of one layer: range, scale, zero point, and weights to codes and back."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from qlora_exp.architecture.shapes import WeightShape
from qlora_exp.data.items import Item
from qlora_exp.errors import ExportError, nearest
from qlora_exp.export.finished_run import check_run
from qlora_exp.export.task_check import CheckItems, items_to_check
from qlora_exp.models.inspect import describe
from qlora_exp.models.tuning import merged_tuned
from qlora_exp.paths import RunPaths
from qlora_exp.ptq.ptq_config import Calibration, PtqConfig
from qlora_exp.ptq.quantize_run import check_formats, layer_inputs, layer_weight, quantize_weight, quantized_shapes
from qlora_exp.quantizers.affine import AffineWeight, grouped

SHOWN_WEIGHTS = 10


def explain_layer(paths: RunPaths, settings: PtqConfig, layer: str, group: int) -> list[str]:
    """Return, for each format of ``settings``, the arithmetic of one group of one layer of the run's merged model.

    ``layer``: a name, or a unique end of one, e.g. ``layers.3.mlp.down_proj``.

    Raises:
        ExportError: there is no such layer or group.
    """
    run = check_run(paths)
    shapes = quantized_shapes(describe(run.config.model))
    shape = _named(layer, shapes)
    formats = settings.formats()
    check_formats(formats, [shape], run.record.run_id)
    fewest = min(format.groups(shape.out_features, shape.in_features) for format in formats)
    if not 0 <= group < fewest:
        raise ExportError(f"{shape.name} has no group {group}", f"--index {group}", f"0 to {fewest - 1}")
    items: tuple[Item, ...] = ()
    if settings.calibration is Calibration.activations:
        questions = items_to_check(run.config, run.record, paths, run.tokenizer, 1, tolerance=0)
        items = questions.splits.train[: settings.rows] if isinstance(questions, CheckItems) else ()
    model, _ = merged_tuned(run.config, paths.weights)
    weight = layer_weight(model, shape)
    inputs = layer_inputs(model.eval(), [shape], items).get(shape.name)
    lines = [f"{shape.name}: {shape.out_features:,} × {shape.in_features:,} weights"]
    for format in formats:
        lines += ["", *group_arithmetic(weight, quantize_weight(weight, format, settings.calibration, inputs), group)]
    return lines


def group_arithmetic(weight: Tensor, quantized: AffineWeight, group: int) -> Iterator[str]:
    """Yield the arithmetic of group ``group`` of ``weight`` (rows, columns), line by line."""
    format = quantized.format
    scaled = weight.float() if quantized.input_scale is None else weight.float() * quantized.input_scale
    values = grouped(scaled, format)[group]
    scale, zero = float(quantized.scale[group]), int(quantized.zero_point[group])
    smallest, largest = format.code_range
    low, high = (smallest - zero) * scale, (largest - zero) * scale
    yield f"{format.name}, group {group}: {len(values):,} weights from {values.min():.6g} to {values.max():.6g}"
    yield f"  codes {smallest} to {largest} stand for {low:.6g} to {high:.6g}"
    if format.symmetric:
        yield f"  scale = {high:.6g} / {largest} = {scale:.6g} (float16), no zero point"
    else:
        yield f"  scale = ({high:.6g} − {low:.6g}) / {largest} = {scale:.6g} (float16)"
        yield f"  zero point = {-low:.6g} / {scale:.6g} = {zero}"
    yield f"  {'weight':>12} {'/ scale':>9} {'code':>5} {'back':>12} {'error':>10}"
    for value, code in zip(
        values[:SHOWN_WEIGHTS].tolist(), quantized.codes[group][:SHOWN_WEIGHTS].tolist(), strict=True
    ):
        back = (code - zero) * scale
        yield f"  {value:12.6g} {value / scale:9.3f} {code:5d} {back:12.6g} {back - value:10.2g}"


def _named(layer: str, shapes: list[WeightShape]) -> WeightShape:
    found = [shape for shape in shapes if shape.name == layer] or [
        shape for shape in shapes if shape.name.endswith(f".{layer}")
    ]
    if len(found) == 1:
        return found[0]
    names = [shape.name for shape in (found or shapes)]
    what = f"{layer!r} is {len(found)} layers" if found else f"there is no quantized layer {layer!r}"
    raise ExportError(what, f"--explain {layer}", f"e.g. {', '.join(names[:3])}" if found else nearest(layer, names))
