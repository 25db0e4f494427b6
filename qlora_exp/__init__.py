"""qlora-exp: experiment tracking and sweeps for LoRA and QLoRA.

>>> from qlora_exp import run, load_run
>>> record = run("quantization=nf4", "lora.r=8", "training.max_steps=20")
>>> record.scores.after.accuracy

torch, transformers and MLflow are imported only when a run starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_exp.version import __version__

if TYPE_CHECKING:
    from qlora_exp.records.types import RunRecord

__all__ = ["__version__", "load_run", "run"]


def run(*overrides: str) -> RunRecord:
    """Run one configuration, as ``qlora-exp run OVERRIDES`` does, and return its record.

    Raises:
        qlora_exp.errors.QloraExpError: wrong input; the run was not started.
    """
    from qlora_exp.config.compose import compose
    from qlora_exp.runs.execute import execute

    return execute(compose(list(overrides)))


def load_run(run: str, output_root: str = "outputs") -> RunRecord:
    """Return the record of a run.

    Args:
        run: its id, a unique beginning or end of the id, ``last``, or its folder.

    Raises:
        qlora_exp.errors.RecordError: the record doesn't exist or can't be read.
    """
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    return read_record(find_run(run, OutputPaths.of(output_root)).record)
