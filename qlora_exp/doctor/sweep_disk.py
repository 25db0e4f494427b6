"""Is the disk large enough for a run or a sweep? Computed from the model's configuration alone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.compose import Composer, check_hydra, compose
from qlora_exp.config.overrides import is_swept, override_key
from qlora_exp.doctor.machine_checks import Check, nearest_folder
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.planner import Planner
from qlora_exp.estimate.weights_and_optimizer import trained_bytes
from qlora_exp.formatting import bytes_text
from qlora_exp.orchestration.command import run_overrides, study_spec
from qlora_exp.paths import EMBEDDED, OutputPaths

if TYPE_CHECKING:
    from qlora_exp.architecture.shapes import WeightShape
    from qlora_exp.config.schema import Config, ModelConfig
    from qlora_exp.study.types import Axis

MAX_CHECKPOINTS = 3
"""TrainingArguments.save_total_limit of our trainer, plus the newest while it is written."""
CHECKPOINT_OVERHEAD_BYTES = 500_000
"""Random states, schedule and log in a checkpoint, in addition to adapter, optimizer states and tokenizer."""
CONTAINER_BYTES = 2_000
"""What optimizer.pt adds per trained tensor; 830 were measured with two optimizer states."""
TOKENIZER_BYTES = 40_000_000
"""Gemma 3's, the largest of the shipped families; each checkpoint contains it."""
INDENTATION_FACTOR = 2.5
"""transformers indents tokenizer.json; the embedded one grows 2.3 times by that."""
RECORD_BYTES = 500_000
"""Upper estimate for a run's record, curve and per-item results, and the header of its adapter's file."""
SIZE_AXES = (
    *("model", "model.variant", "model.id", "model.instruct_id", "model.path", "model.instruct_path"),
    *("targets", "targets.set", "targets.modules"),
    *("lora.dora", "lora.dtype", "training.optimizer", "training.save_every_steps", "training.keep_best"),
)
"""Axes besides lora.r that change the size of an adapter or a checkpoint."""


def sweep_disk(overrides: Sequence[str], output_root: str | None) -> Check:
    """Compare the most bytes that all trials can hold, checkpoints included, with the free space.

    Raises:
        ConfigError, ModelError, Problems: invalid overrides, with the messages of ``run`` and ``sweep``.
    """
    trials, points = _trials_and_points(overrides)
    output_overrides = [text for text in overrides if override_key(text) == "output_root"]
    outputs = OutputPaths.of(output_root or compose(output_overrides).output_root)
    largest = _largest(points)
    needed = trials * largest
    free = shutil.disk_usage(nearest_folder(outputs.root)).free
    count = f"{trials} trial{'s' if trials != 1 else ''}"
    need = f"{count} of {bytes_text(largest)} at most need {bytes_text(needed)}"
    detail = f"{need}; {bytes_text(free)} free for {outputs.root}"
    if needed > free:
        fix = "free disk space, set output_root=DIR on another disk, or run qlora-exp clean STUDY during the sweep"
        return Check("sweep's disk", False, detail, fix)
    return Check("sweep's disk", True, detail)


def trial_bytes(overrides: Sequence[str]) -> int:
    """Return the bytes of an unfinished trial: adapter, record, and checkpoints if it saves any."""
    return _largest([overrides])


def _largest(points: Sequence[Sequence[str]]) -> int:
    """Return the bytes of the largest trial among ``points``. Invalid points are skipped: a sweep never runs them.

    Raises:
        ConfigError, ModelError, Problems: no point is valid.
    """
    composer, planner = Composer(), Planner()
    sizes: list[int] = []
    first_error: QloraExpError | None = None
    for point in points:
        try:
            config = composer.compose(point)
            sizes.append(_bytes(config, planner.architecture(config.model), planner.adapted(config)))
        except QloraExpError as error:
            first_error = first_error or error
    if not sizes and first_error is not None:
        raise first_error
    return max(sizes)


def _bytes(config: Config, architecture: Architecture, shapes: Sequence[WeightShape]) -> int:
    adapters = trained_bytes(architecture, shapes, config, "float32")
    finished_bytes = adapters.adapter_bytes + RECORD_BYTES
    if config.training.save_every_steps is None and not config.training.keep_best:
        return finished_bytes
    tensors = len(shapes) * (3 if config.lora.dora else 2)
    other_bytes = tensors * CONTAINER_BYTES + _tokenizer_bytes(config.model) + CHECKPOINT_OVERHEAD_BYTES
    return finished_bytes + MAX_CHECKPOINTS * (adapters.checkpoint_bytes + other_bytes)


def _tokenizer_bytes(model: ModelConfig) -> int:
    """Return the size of a saved tokenizer: from its file if that is in the package or in ``model.path``."""
    checkpoint = model.checkpoint or ""
    embedded = EMBEDDED / checkpoint.removeprefix("embedded:") if checkpoint.startswith("embedded:") else None
    folder = Path(model.variant_path).expanduser() if model.variant_path else embedded
    file = folder / "tokenizer.json" if folder is not None else None
    return int(INDENTATION_FACTOR * file.stat().st_size) if file is not None and file.is_file() else TOKENIZER_BYTES


def _trials_and_points(overrides: Sequence[str]) -> tuple[int, list[list[str]]]:
    """Return the number of trials, and the overrides of the candidates for the largest one."""
    if not any(override_key(text) == "sweeps" or is_swept(text) for text in overrides):
        check_hydra(overrides)
        return 1, [list(overrides)]
    spec = study_spec(overrides).spec
    choices = [[(axis.key, value) for value in _values(axis)] for axis in spec.axes]
    return spec.n_trials, [run_overrides(spec, dict(point)) for point in itertools.product(*choices)]


def _values(axis: Axis) -> Iterator[Any]:
    """Yield the values to try: the largest lora.r, all of the other size axes, one of any other axis."""
    if axis.low is not None and axis.high is not None:
        yield (int(axis.high) if axis.kind.value == "int" else axis.high) if axis.key == "lora.r" else axis.low
    elif axis.key == "lora.r":
        yield max(axis.values)
    elif axis.key in SIZE_AXES:
        yield from axis.values
    else:
        yield axis.values[0]
