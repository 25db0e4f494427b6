"""Whether any quantization of a base fits into ``budget.memory_bytes`` by itself."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_exp.config.schema import Config, Quantization
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.device import PlanDevice, device_of
from qlora_exp.estimate.estimator import Planner
from qlora_exp.estimate.weights import smallest_base
from qlora_exp.formatting import bytes_text


def check_a_base_fits(
    planner: Planner, configs: Sequence[Config], memory_bytes: int | None, device: PlanDevice | None = None
) -> None:
    """``device``: for all of them, in place of each one's own.

    Raises:
        ConfigError: no quantization of any of their bases does.
        ModelError: there is no such base.
    """
    if memory_bytes is None or not configs:
        return

    def smallest(config: Config) -> tuple[Quantization, int]:
        there = device or device_of(config)
        return smallest_base(planner.architecture(config.model), config.quantization, there.kind, there.bf16)

    different = {(repr(config.model), repr(config.quantization), config.training.device): config for config in configs}
    mode, least = min(map(smallest, different.values()), key=lambda found: found[1])
    if least > memory_bytes:
        what = f"no quantization of this base fits: {mode.value}, the smallest, takes {bytes_text(least)} by itself"
        hint = f"a smaller model, or more than budget.memory_bytes={least}"
        raise ConfigError(what, f"budget.memory_bytes = {memory_bytes}", hint)
