"""Checks, before a weight is read, that the memory is enough to quantize a run's merged model."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.errors import ExportError
from qlora_exp.formatting import bytes_text
from qlora_exp.ptq.ptq_config import PtqConfig
from qlora_exp.system.memory_limits import available_bytes, total_bytes

_FLOAT32 = 4
LAYER_COPIES = 6
"""Float32 copies of one layer in addition to its weight while it is quantized: values in groups, codes, the dequantized
weight, its error. Measured with 4,096 × 4,096 weights: 4.2 (minmax), 5.4 (mse), 6.0 (activations)."""
KEPT_TOKENS = 512
"""Input vectors that are kept of each layer: enough for an error of a few percent, and 8 MB a layer at width 4,096."""


def predicted_bytes(architecture: Architecture, settings: PtqConfig, formats: int) -> int:
    """Return what ``quantize`` takes in addition to the program: the merged model in float32, its layers once more if
    there are several formats, one layer at work, and the inputs that the layers saw."""
    layers = [shape for shape in architecture.weights if shape.quantizable]
    matrices = [shape.in_features * shape.out_features for shape in layers]
    copies = sum(matrices) if formats > 1 else 0
    inputs = sum(shape.in_features for shape in layers) * KEPT_TOKENS if settings.rows else 0
    elements = architecture.total_parameters + copies + LAYER_COPIES * max(matrices, default=0) + inputs
    return _FLOAT32 * elements


def check_quantize_memory(
    architecture: Architecture, settings: PtqConfig, formats: Sequence[object], where: str
) -> str | None:
    """Return a warning if other programs hold the memory that ``quantize`` needs; ``None``: there is enough, or it is
    unknown.

    Raises:
        ExportError: the machine, or this process's control group, has less memory than that.
    """
    needed, total, available = predicted_bytes(architecture, settings, len(formats)), total_bytes(), available_bytes()
    fewer = "one format at a time: --bits, --symmetric or --asymmetric, and --group with one value each"
    if total is not None and needed > total:
        what = f"quantizing needs {bytes_text(needed)} of memory, and the machine has {bytes_text(total)}"
        one = predicted_bytes(architecture, settings, 1)
        hint = fewer if len(formats) > 1 and one <= total else "a machine with more memory, or a smaller model"
        raise ExportError(what, where, hint)
    if available is not None and needed > available:
        less = f"; with less memory: {fewer}" if len(formats) > 1 else ""
        return f"quantizing needs {bytes_text(needed)}, and {bytes_text(available)} of memory are free{less}"
    return None
