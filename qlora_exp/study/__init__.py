"""Studies: search space, ask and tell, pruning, leases and retries over Optuna's storage.

The names below are loaded when first used: Optuna takes a while to import, and the types alone are needed by many.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_exp.study.history import check_earlier as check_earlier
    from qlora_exp.study.ladder_plan import most_trials as most_trials
    from qlora_exp.study.ladder_plan import own_axes as own_axes
    from qlora_exp.study.objectives import outcome_of as outcome_of
    from qlora_exp.study.objectives import parse_constraint as parse_constraint
    from qlora_exp.study.objectives import parse_objective as parse_objective
    from qlora_exp.study.objectives import value_of as value_of
    from qlora_exp.study.retrying import RETRIED as RETRIED
    from qlora_exp.study.retrying import numbers_text as numbers_text
    from qlora_exp.study.retrying import retry_trials as retry_trials
    from qlora_exp.study.samplers import check_search as check_search
    from qlora_exp.study.samplers import make_pruner as make_pruner
    from qlora_exp.study.samplers import make_sampler as make_sampler
    from qlora_exp.study.space import grid as grid
    from qlora_exp.study.space import is_grid as is_grid
    from qlora_exp.study.space import overrides_of as overrides_of
    from qlora_exp.study.space import parse_axes as parse_axes
    from qlora_exp.study.storage import lost as lost
    from qlora_exp.study.storage import unreachable as unreachable
    from qlora_exp.study.store import Study as Study

_HOMES = {
    "RETRIED": "retrying",
    "numbers_text": "retrying",
    "retry_trials": "retrying",
    "Study": "store",
    "parse_axes": "space",
    "is_grid": "space",
    "grid": "space",
    "overrides_of": "space",
    "most_trials": "ladder_plan",
    "own_axes": "ladder_plan",
    "parse_objective": "objectives",
    "parse_constraint": "objectives",
    "value_of": "objectives",
    "outcome_of": "objectives",
    "make_sampler": "samplers",
    "make_pruner": "samplers",
    "check_search": "samplers",
    "check_earlier": "history",
    "lost": "storage",
    "unreachable": "storage",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
