"""Sweeps: what a command asks for, who works on the study, and the straight line from there to its conclusion.

The names below are loaded when first used: to see who orchestrates a study needs none of the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_exp.sweep.asking import Asked as Asked
    from qlora_exp.sweep.asking import ask as ask
    from qlora_exp.sweep.asking import run_overrides as run_overrides
    from qlora_exp.sweep.line import jobs_of as jobs_of
    from qlora_exp.sweep.line import sweep as sweep
    from qlora_exp.sweep.line import sweep_for_hydra as sweep_for_hydra
    from qlora_exp.sweep.line import work as work
    from qlora_exp.sweep.orchestration import orchestrator as orchestrator
    from qlora_exp.sweep.orchestration import request_stop as request_stop

_HOMES = {
    "Asked": "asking",
    "ask": "asking",
    "run_overrides": "asking",
    "jobs_of": "line",
    "sweep": "line",
    "sweep_for_hydra": "line",
    "work": "line",
    "orchestrator": "orchestration",
    "request_stop": "orchestration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
