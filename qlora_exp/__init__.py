"""qlora-exp: experiment tracking and sweeps for LoRA and QLoRA.

>>> from qlora_exp import run, runs, sweep
>>> tuned = run("quantization=nf4", "lora.r=8", "training.max_steps=20")
>>> tuned.record.scores.after.accuracy, tuned.items(), tuned.curve()
>>> model, tokenizer = tuned.model()
>>> study = sweep("rank_doubling", "sweep.ladder.margin=0.1")
>>> study.best, study.answer, study.trials()
>>> runs(where="r>=16")

docs/python.md has more. torch, transformers, MLflow and pandas are imported only when a function needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import qlora_exp.runs as _runs
from qlora_exp.version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from qlora_exp.api.loaded_run import LoadedRun
    from qlora_exp.api.loaded_study import LoadedStudy

__all__ = ["__version__", "load_run", "load_study", "run", "runs", "sweep"]


def run(*overrides: str | Mapping[str, Any], quiet: bool = False) -> LoadedRun:
    """Train and score one configuration, as ``qlora-exp run OVERRIDES`` does, and return the run.

    A run that failed is returned, too: ``status`` and ``record.failure`` say why.

    Args:
        overrides: texts such as ``"lora.r=16"``, or mappings with the same keys, nested or dotted:
            ``{"quantization": "nf4", "lora.r": 16}``, ``{"training": {"max_steps": 20}}``.
        quiet: show no progress on standard error.

    Raises:
        qlora_exp.errors.QloraExpError: wrong input; the run was not started.
    """
    from qlora_exp.api.commands import run_here

    return run_here(overrides, quiet)


def sweep(*arguments: str | Mapping[str, Any]) -> LoadedStudy:
    """Run the trials of a study, as ``qlora-exp sweep NAME OVERRIDES`` does, and return the study.

    The same call continues a study that was interrupted.

    Args:
        arguments: the name of a file in sweeps/, then overrides as :func:`run` takes them. Without a name, the study
            has every combination of the overrides' values: ``sweep("lora.r=4,8", "seed=1,2")``. In a mapping a key has
            one value.

    Raises:
        qlora_exp.errors.QloraExpError: wrong input, or the study can't be opened.
        KeyboardInterrupt: the sweep was interrupted.
    """
    from qlora_exp.api.commands import sweep_here

    return sweep_here(arguments)


def load_run(run: str | Path, output_root: str | Path = "outputs") -> LoadedRun:
    """Return a run: its record, and its items, curve and model on request.

    Args:
        run: its id, a unique beginning or end of the id, ``last``, or its folder.

    Raises:
        qlora_exp.errors.RecordError: the record doesn't exist or can't be read.
    """
    from qlora_exp.api.loaded_run import LoadedRun
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import find_run

    return LoadedRun.of(find_run(str(run), OutputPaths.of(output_root)))


def load_study(name: str, output_root: str | Path = "outputs") -> LoadedStudy:
    """Return a study: its trials, its best run and its answer.

    Args:
        name: its name, a unique beginning of it, or ``last``.

    Raises:
        qlora_exp.errors.RecordError: the study doesn't exist or can't be read.
    """
    from qlora_exp.api.loaded_study import LoadedStudy
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import find_study

    return LoadedStudy.of(find_study(name, OutputPaths.of(output_root)))


def _runs_table(
    output_root: str | Path = "outputs", study: str | None = None, where: str | Sequence[str] = ()
) -> pd.DataFrame:
    """Return the runs under ``output_root`` as a DataFrame, one row a run in order of their start.

    A row begins with the fields of ``qlora-exp ls runs --json``: scores, memory in bytes, seconds, cost in US dollars.
    Then come all settings and figures of the record under their keys: ``lora.r``, ``scores.before.loss``. Unknown
    values are missing (NaN).

    Args:
        study: only the trials of this study.
        where: conditions as ``--where`` takes them; all must hold: ``"r>=16"``, ``["status=COMPLETED", "loss<2"]``.

    Raises:
        qlora_exp.errors.QloraExpError: there is no such study, or a condition names no column.
    """
    from qlora_exp.api.frames import runs_frame

    return runs_frame(output_root, study, where)


if TYPE_CHECKING:
    runs = _runs_table
else:
    # The package qlora_exp.runs has this name, too: Python makes every package an attribute of its parent. So the
    # package itself can be called.
    class _CallableRuns(ModuleType):
        __call__ = staticmethod(_runs_table)
        __call__.__doc__ = _runs_table.__doc__

    runs = _runs
    runs.__class__ = _CallableRuns
