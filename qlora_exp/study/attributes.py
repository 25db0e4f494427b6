"""What a trial's user attributes say beside Optuna's own state: who runs it, since when, and how it ended."""

from __future__ import annotations

import time

from optuna.trial import FrozenTrial, TrialState

from qlora_exp.environment import alive
from qlora_exp.records import Process, from_dict

CLAIM, HEARTBEAT, RUN, STATUS, SECONDS, FAILURE, MEMORY_RETRIES, UNCOUNTED = (
    *("claim", "heartbeat", "run_id", "status", "seconds", "failure", "out_of_memory_retries", "uncounted_attempts"),
)
REFUSED = "predicted_not_to_fit"
"""Why a trial was not started (:class:`~qlora_exp.records.Refusal`); also the name of the constraint that it breaks."""
FIXED = "fixed_params"
"""Optuna's own name for what a trial was enqueued with."""


def attempt_of(trial: FrozenTrial) -> int:
    """How often the trial has been claimed; 0 for one that never was."""
    return int((trial.user_attrs.get(CLAIM) or {}).get("attempt", 0))


def why_lost(trial: FrozenTrial, lease_seconds: float) -> str | None:
    """Why a RUNNING trial has nobody who runs it; ``None``: somebody does, or it isn't RUNNING."""
    if trial.state is not TrialState.RUNNING:
        return None
    owner = (trial.user_attrs.get(CLAIM) or {}).get("owner")
    if owner is None:
        return "left while it was asked or requeued"
    process = from_dict(Process, owner["process"])
    if alive(process) is False:
        return f"its worker {owner['worker']} (process {process.pid}) died"
    silent_seconds = time.time() - trial.user_attrs.get(HEARTBEAT, 0.0)
    return (
        f"its worker {owner['worker']} was silent for {silent_seconds:.0f} s"
        if silent_seconds > lease_seconds
        else None
    )
