"""Is there disk for what a run or a sweep would leave behind? By arithmetic, from the model's configuration alone."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_exp.doctor.check import Check
from qlora_exp.errors import QloraExpError
from qlora_exp.paths import EMBEDDED, OutputPaths

if TYPE_CHECKING:
    from qlora_exp.architecture.shapes import WeightShape
    from qlora_exp.config.schema import Config, ModelConfig
    from qlora_exp.study.types import Axis

HELD_CHECKPOINTS = 3
"""TrainingArguments.save_total_limit of our trainer, and the newest while it is written."""
CHECKPOINT_BESIDES = 500_000
"""Random states, schedule and log of a training, beside adapter, optimizer states and tokenizer."""
CONTAINER_BYTES = 2_000
"""What optimizer.pt adds for a trained tensor: 830 were measured with two states of it."""
TOKENIZER_BYTES = 40_000_000
"""Gemma 3's, the largest of the shipped families; each checkpoint has it."""
INDENTED = 2.5
"""transformers writes tokenizer.json indented; 2.3 times what the embedded one is without."""
RECORD_BYTES = 500_000
"""Record, curve and per-item results of a run, generously, and the head of its adapter's file."""
SIZE_AXES = (
    *("model", "model.variant", "model.path", "targets", "targets.set", "targets.modules"),
    *("lora.dora", "lora.dtype", "training.optimizer", "training.save_every_steps", "training.keep_best"),
)
"""Axes beside lora.r that decide how large an adapter or a checkpoint is."""


def sweep_disk(overrides: Sequence[str], output_root: str | None) -> Check:
    """The bytes of all trials at most (each unfinished, with its checkpoints) beside what is free.

    Raises:
        ConfigError, ModelError, Problems: overrides that can't be meant; as ``run`` or ``sweep`` would say.
    """
    from qlora_exp.config.compose import compose
    from qlora_exp.config.overrides import override_key

    trials, points = _asked(overrides)
    own = [text for text in overrides if override_key(text) == "output_root"]
    outputs = OutputPaths.of(output_root or compose(own).output_root)
    largest = _largest(points)
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
    return _largest([overrides])


def _largest(points: Sequence[Sequence[str]]) -> int:
    """Of the trials at ``points`` the most bytes. A point that can't be composed is none of a sweep's trials.

    Raises:
        ConfigError, ModelError, Problems: no point can be meant.
    """
    from qlora_exp.config.compose import Composer
    from qlora_exp.estimate.estimator import Planner

    composer, planner = Composer(), Planner()
    found: list[int] = []
    refused: QloraExpError | None = None
    for point in points:
        try:
            config = composer.compose(point)
            found.append(_bytes(config, planner.adapted(config.model, config.targets)))
        except QloraExpError as error:
            refused = refused or error
    if not found and refused is not None:
        raise refused
    return max(found)


def _bytes(config: Config, shapes: Sequence[WeightShape]) -> int:
    from qlora_exp.estimate.weights import adapter_bytes

    adapters = adapter_bytes(shapes, config.lora, config.training.optimizer)
    held = adapters.adapter_bytes + RECORD_BYTES
    if config.training.save_every_steps is None and not config.training.keep_best:
        return held
    tensors = len(shapes) * (3 if config.lora.dora else 2)
    besides = tensors * CONTAINER_BYTES + _tokenizer_bytes(config.model) + CHECKPOINT_BESIDES
    return held + HELD_CHECKPOINTS * (adapters.checkpoint_bytes + besides)


def _tokenizer_bytes(model: ModelConfig) -> int:
    """By its file where it is in the package or in ``model.path``."""
    checkpoint = model.checkpoints.get(model.variant.value) or ""
    embedded = EMBEDDED / checkpoint.removeprefix("embedded:") if checkpoint.startswith("embedded:") else None
    folder = Path(model.path).expanduser() if model.path else embedded
    file = folder / "tokenizer.json" if folder is not None else None
    return int(INDENTED * file.stat().st_size) if file is not None and file.is_file() else TOKENIZER_BYTES


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first parent that exists: where it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _asked(overrides: Sequence[str]) -> tuple[int, list[list[str]]]:
    """Number of trials, and overrides of the runs among which the largest is."""
    from qlora_exp.config.compose import check_hydra
    from qlora_exp.config.overrides import is_swept, override_key

    if not any(override_key(text) == "sweeps" or is_swept(text) for text in overrides):
        check_hydra(overrides)
        return 1, [list(overrides)]
    from qlora_exp.orchestration.command import run_overrides, study_spec

    spec = study_spec(overrides).spec
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
