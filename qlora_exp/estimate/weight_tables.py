"""Weight sizes: one model at 32, 16, 8 and 4 bits, and its adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.table import Table

from qlora_exp.architecture.run_plan import compute_dtype
from qlora_exp.config.schema import Config, Quantization
from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.estimator import Planner
from qlora_exp.estimate.weights_and_optimizer import adapter_bytes, in_mode
from qlora_exp.formatting import bytes_text, simple_table

BITS_SHOWN = {
    Quantization.fp32: 32,
    Quantization.bf16: 16,
    Quantization.fp16: 16,
    Quantization.int8: 8,
    Quantization.nf4: 4,
    Quantization.fp4: 4,
}


@dataclass(frozen=True)
class Size:
    """Bytes of one model's base in one mode; ``remainder_dtype`` is the dtype of its unquantized tensors."""

    quantization: str
    bits: int
    remainder_dtype: str
    base_weight_bytes: int
    quantization_state_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Sizes:
    """A model's sizes on one device, and those of its configured adapters."""

    model: str
    device: str
    total_parameters: int
    modes: tuple[Size, ...]
    r: int
    target_modules: tuple[str, ...]
    trainable_parameters: int
    adapter_bytes: int


def sizes_of(config: Config, device: PlanDevice) -> Sizes:
    """Return the sizes of ``config``'s model in every mode on ``device``, and of its adapters.

    Raises:
        ModelError: it can't be described, or the targets match nothing in it.
    """
    planner = Planner(device)
    adapted = planner.adapted(config.model, config.targets)
    adapters = adapter_bytes(adapted, config.lora, config.training.optimizer)
    return Sizes(
        model=config.model.family,
        device=device.name,
        total_parameters=planner.architecture(config.model).total_parameters,
        modes=tuple(_size(config, mode, planner, device) for mode in BITS_SHOWN),
        r=config.lora.r,
        target_modules=tuple(sorted({shape.name.rsplit(".", 1)[-1] for shape in adapted})),
        trainable_parameters=adapters.trainable_parameters,
        adapter_bytes=adapters.adapter_bytes,
    )


def sizes_table(sizes: Sizes) -> Table:
    """Return a table with one row per mode."""
    table = simple_table("quantization", "bits", "unquantized dtype", "weights", "quantization state", "total")
    for size in sizes.modes:
        parts = (size.base_weight_bytes, size.quantization_state_bytes, size.total_bytes)
        rest = size.remainder_dtype if size.bits < 16 else ""
        table.add_row(size.quantization, str(size.bits), rest, *(bytes_text(part) for part in parts))
    return table


def adapters_text(sizes: Sizes) -> str:
    """Return a sentence with the size of the adapters."""
    modules, count = ", ".join(sizes.target_modules), f"{sizes.trainable_parameters:,}"
    return f"adapters, r = {sizes.r} on {modules}: {count} parameters, {bytes_text(sizes.adapter_bytes)}"


def _size(config: Config, mode: Quantization, planner: Planner, device: PlanDevice) -> Size:
    quantization = in_mode(config.quantization, mode)
    base = planner.base(replace(config, quantization=quantization), device)
    return Size(
        quantization=mode.value,
        bits=BITS_SHOWN[mode],
        remainder_dtype=compute_dtype(quantization, device.kind, device.bf16),
        base_weight_bytes=base.base_weight_bytes,
        quantization_state_bytes=base.quantization_state_bytes,
        total_bytes=base.total_bytes,
    )
