"""``training.micro_batch_tokens``: the smallest value that a task allows, and the one that ``auto`` stands for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from qlora_exp.architecture.run_plan import compute_dtype, shape_multiples
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.allowed_values import AUTO_TOKENS
from qlora_exp.config.enums import Checkpointing
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.workload import RowLengths
from qlora_exp.records.types import Device

ENOUGH_TOKENS = 8192
"""With micro-batches of this size, ``auto`` doesn't buy larger ones with gradient checkpointing, which costs a quarter
to a third of the speed. An assumption, not measured."""
PRECISION = 64
"""The value that ``auto`` finds is too small by at most this fraction of it (1/64)."""


def longest_row_tokens(config: Config, architecture: Architecture, device: Device, rows: RowLengths | None) -> int:
    """Return the longest training row in tokens as it is padded alone; ``training.max_length`` if rows are unknown."""
    length = config.training.max_length
    compute = compute_dtype(config.quantization, device.kind, device.bf16)
    multiple, _ = shape_multiples(compute, device.kind, length, architecture.positions)
    if rows is not None:
        length = min(length, rows.longest_tokens)
    return math.ceil(length / multiple) * multiple


def check_holds_longest_row(config: Config, longest: int) -> None:
    """Raise :class:`ConfigError` if a micro-batch can't hold a row of ``longest`` tokens."""
    limit = config.training.micro_batch_tokens
    if isinstance(limit, int) and limit < longest:
        what = f"the longest training row has {longest} tokens, more than a micro-batch may have"
        hint = f"at least training.micro_batch_tokens={longest}, or a smaller training.max_length"
        raise ConfigError(what, f"training.micro_batch_tokens = {limit}", hint)


def micro_batch_note(config: Config, tokens: int) -> str:
    """Return the plan's note on its micro-batches of at most ``tokens`` tokens."""
    chosen = ", the largest that is predicted to fit" if config.training.micro_batch_tokens == AUTO_TOKENS else ""
    return f"micro-batches have at most {tokens:,} tokens{chosen}"


def choose_for_memory(config: Config, cuda: bool, longest: int, rows: int, fits: Callable[[Config], bool]) -> Config:
    """Return ``config`` with the largest micro-batch that fits in place of ``micro_batch_tokens=auto``, and with
    ``gradient_checkpointing`` on or off.

    ``longest``: tokens of the longest row. ``rows``: rows of a step. ``fits``: whether a configuration without ``auto``
    is predicted to fit. If not even the longest row fits, it is the micro-batch: the memory limit refuses it later.
    """

    def largest(checkpointing: Checkpointing) -> Config:
        def of(tokens: int) -> Config:
            training = replace(config.training, micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
            return replace(config, training=training)

        low, high = longest, longest * rows
        if fits(of(high)):
            return of(high)
        while high - low > low // PRECISION + 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(of(middle)) else (low, middle)
        return of(low)

    choice = config.training.gradient_checkpointing
    if choice is not Checkpointing.auto:
        return largest(choice)
    without = largest(Checkpointing.off)
    tokens = without.training.micro_batch_tokens
    assert isinstance(tokens, int)
    if not cuda or (fits(without) and tokens >= min(ENOUGH_TOKENS, longest * rows)):
        return without
    return largest(Checkpointing.on)
