"""The straight line of one run."""

from qlora_exp.one_run.bases import Bases
from qlora_exp.one_run.fitting import fit_of
from qlora_exp.one_run.preparing import Prepared, prepare
from qlora_exp.one_run.straight_line import run

__all__ = [
    "Bases",
    "Prepared",
    "fit_of",
    "prepare",
    "run",
]
