"""Runs in MLflow: a view of the records that can be rebuilt from the run folders at any time.

The names below are loaded when first used: MLflow takes seconds to import, and ``ls`` only needs :func:`repair`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_exp.tracking.pending import not_delivered as not_delivered
    from qlora_exp.tracking.pending import root_option as root_option
    from qlora_exp.tracking.state import TrackingState as TrackingState
    from qlora_exp.tracking.state import read_state as read_state
    from qlora_exp.tracking.study import StudyTracker as StudyTracker
    from qlora_exp.tracking.study import deliver_report as deliver_report
    from qlora_exp.tracking.study import told_status as told_status
    from qlora_exp.tracking.study_view import StudyDefinition as StudyDefinition
    from qlora_exp.tracking.study_view import TrialRow as TrialRow
    from qlora_exp.tracking.synchronise import SyncReport as SyncReport
    from qlora_exp.tracking.synchronise import deliver_runs as deliver_runs
    from qlora_exp.tracking.synchronise import repair as repair
    from qlora_exp.tracking.synchronise import sync as sync
    from qlora_exp.tracking.tracker import Tracker as Tracker
    from qlora_exp.tracking.ui import charts_url as charts_url
    from qlora_exp.tracking.ui import compare_url as compare_url
    from qlora_exp.tracking.ui import runs_url as runs_url
    from qlora_exp.tracking.ui import ui_command as ui_command
    from qlora_exp.tracking.ui import ui_environment as ui_environment

_HOMES = {
    "not_delivered": "pending",
    "root_option": "pending",
    "Tracker": "tracker",
    "StudyTracker": "study",
    "deliver_report": "study",
    "told_status": "study",
    "StudyDefinition": "study_view",
    "TrialRow": "study_view",
    "sync": "synchronise",
    "repair": "synchronise",
    "deliver_runs": "synchronise",
    "SyncReport": "synchronise",
    "ui_command": "ui",
    "ui_environment": "ui",
    "charts_url": "ui",
    "compare_url": "ui",
    "runs_url": "ui",
    "TrackingState": "state",
    "read_state": "state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
