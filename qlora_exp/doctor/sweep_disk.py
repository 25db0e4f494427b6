"""Is there disk for what a run or a sweep would leave behind? By arithmetic, from the model's configuration alone."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_exp.doctor.check import Check
from qlora_exp.paths import OutputPaths

if TYPE_CHECKING:
    from qlora_exp.study.types import Axis

KEPT_CHECKPOINTS = 2
"""TrainingArguments.save_total_limit of our trainer."""
CHECKPOINT_OVER_ADAPTER = 3
"""A checkpoint holds the adapter and two optimizer states of its size."""
RECORD_BYTES = 500_000
"""Record, curve and per-item results of a run, generously."""
SIZE_AXES = ("model", "model.variant", "targets", "targets.set")
"""Axes beside lora.r that decide how large an adapter is."""


def sweep_disk(overrides: Sequence[str], output_root: str | None) -> Check:
    """The bytes of all trials at most (each unfinished, with its checkpoints) beside what is free.

    Raises:
        ConfigError, ModelError, Problems: overrides that can't be meant; as ``run`` or ``sweep`` would say.
    """
    from qlora_exp import compose

    trials, points = _asked(overrides)
    outputs = OutputPaths.of(output_root or compose.compose(points[0]).output_root)
    largest = max(trial_bytes(point) for point in points)
    needed = trials * largest
    free = shutil.disk_usage(nearest_folder(outputs.root)).free
    of = f"{trials} trial{'s' if trials != 1 else ''}"
    detail = f"{of} of {_told(largest)} at most need {_told(needed)}; {_told(free)} free for {outputs.root}"
    if needed > free:
        fix = "make room, output_root=DIR on another disk, or qlora-exp clean STUDY as it goes on"
        return Check("sweep's disk", False, detail, fix)
    return Check("sweep's disk", True, detail)


def trial_bytes(overrides: Sequence[str]) -> int:
    """What one trial holds while it is not finished: adapter, checkpoints where it saves any, record."""
    from qlora_exp import compose, plan
    from qlora_exp.planning.planned import Planner

    config = compose.compose(overrides)
    shapes = Planner().adapted(config.model, config.targets)
    parameters = sum(plan.lora_parameters(shape, config.lora.r, config.lora.dora) for shape in shapes)
    adapter = parameters * (4 if plan.adapter_dtype(config.lora) == "float32" else 2)
    saves = config.training.save_every_steps is not None or config.training.keep_best
    return adapter * (1 + (KEPT_CHECKPOINTS * CHECKPOINT_OVER_ADAPTER if saves else 0)) + RECORD_BYTES


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first parent that exists: where it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _asked(overrides: Sequence[str]) -> tuple[int, list[list[str]]]:
    """Number of trials, and overrides of the runs among which the one with the largest adapter is."""
    from qlora_exp import compose

    if not any(compose.key_of(text) == "sweeps" or compose.is_swept(text) for text in overrides):
        return 1, [list(overrides)]
    from qlora_exp.sweep import ask, run_overrides

    spec = ask(overrides).spec
    choices = [[(axis.key, value) for value in _values(axis)] for axis in spec.axes]
    return spec.n_trials, [run_overrides(spec, dict(point)) for point in itertools.product(*choices)]


def _values(axis: Axis) -> Iterator[Any]:
    """Of lora.r its largest, of what else decides the size all, of the others any one."""
    if axis.low is not None and axis.high is not None:
        yield (int(axis.high) if axis.kind.value == "int" else axis.high) if axis.key == "lora.r" else axis.low
    elif axis.key == "lora.r":
        yield max(axis.values)
    elif axis.key in SIZE_AXES:
        yield from axis.values
    else:
        yield axis.values[0]


def _told(size: float) -> str:
    """``1.2 GB``: three figures in the unit that fits."""
    power = max(0, min(4, int(math.log10(size) // 3))) if size >= 1 else 0
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
