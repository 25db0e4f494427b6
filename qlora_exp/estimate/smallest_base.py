"""Whether any quantization of a base model fits into ``budget.memory_bytes``, without adapters and training."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_exp.config.schema import Config, Quantization
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.device import PlanDevice, device_of
from qlora_exp.estimate.estimator import Planner
from qlora_exp.estimate.weights_and_optimizer import smallest_base
from qlora_exp.formatting import bytes_text


def check_a_base_fits(
    planner: Planner, configs: Sequence[Config], memory_bytes: int | None, device: PlanDevice | None = None
) -> None:
    """Check that some quantization of some base fits. ``device``: replaces each configuration's own.

    Raises:
        ConfigError: no quantization of any of their bases fits.
        ModelError: there is no such base.
    """
    if memory_bytes is None or not configs:
        return

    def smallest(config: Config) -> tuple[Quantization, int]:
        target = device or device_of(config)
        return smallest_base(planner.architecture(config.model), config.quantization, target.kind, target.bf16)

    distinct = {(repr(config.model), repr(config.quantization), config.training.device): config for config in configs}
    mode, minimum = min(map(smallest, distinct.values()), key=lambda mode_and_bytes: mode_and_bytes[1])
    if minimum > memory_bytes:
        what = f"no quantization of this base fits: {mode.value}, the smallest, takes {bytes_text(minimum)} by itself"
        hint = f"a smaller model, or more than budget.memory_bytes={minimum}"
        raise ConfigError(what, f"budget.memory_bytes = {memory_bytes}", hint)
