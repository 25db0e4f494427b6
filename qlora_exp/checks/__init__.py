"""What must hold between the keys of a configuration: every problem found at once, before anything is loaded."""

from qlora_exp.checks.adapting import int8_dora
from qlora_exp.checks.configuration import check
from qlora_exp.checks.names import (
    FOUR_BIT,
    NATIVE_DTYPES,
    OPTIMIZERS,
    OPTIMIZERS_NEEDING_MORE,
    QUANTIZED,
    SCHEDULERS,
    TARGET_SETS,
)
from qlora_exp.checks.task import COMPARE, goal_metrics, goal_of

__all__ = [
    "COMPARE",
    "FOUR_BIT",
    "NATIVE_DTYPES",
    "OPTIMIZERS",
    "OPTIMIZERS_NEEDING_MORE",
    "QUANTIZED",
    "SCHEDULERS",
    "TARGET_SETS",
    "check",
    "goal_metrics",
    "goal_of",
    "int8_dora",
]
