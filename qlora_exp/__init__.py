"""qlora-exp: which LoRA/QLoRA configuration is worth paying for?

>>> from qlora_exp import run, load_run
>>> record = run("quantization=nf4", "lora.r=8", "training.max_steps=20")
>>> record.scores.after.accuracy

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_exp.records.types import RunRecord

__version__ = "0.1.0"
__all__ = ["__version__", "load_run", "run"]


def run(*overrides: str) -> RunRecord:
    """Run one configuration, as ``qlora-exp run OVERRIDES`` does, and return its record.

    Raises:
        qlora_exp.errors.QloraExpError: wrong input; nothing was started.
    """
    from qlora_exp.config.compose import compose
    from qlora_exp.runs.execute import execute

    return execute(compose(list(overrides)))


def load_run(run: str, output_root: str = "outputs") -> RunRecord:
    """The record of a run by its id, a unique beginning or end of one, ``last``, or its folder.

    Raises:
        qlora_exp.errors.RecordError: there is no such record, or it can't be read.
    """
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    return read_record(find_run(run, OutputPaths.of(output_root)).record)
