"""A trial's user attributes, in addition to Optuna's state: who runs it, since when, and how it ended."""

from __future__ import annotations

import time

from optuna.trial import FrozenTrial, TrialState

from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Process
from qlora_exp.system.environment import is_alive_if_visible

CLAIM, HEARTBEAT, RUN, STATUS, SECONDS, FAILURE, MEMORY_RETRIES, INTERRUPTED_ATTEMPTS = (
    *("claim", "heartbeat", "run_id", "status", "seconds", "failure", "out_of_memory_retries", "interrupted_attempts"),
)
EARLIER_INTERRUPTED_ATTEMPTS = "uncounted_attempts"
"""The name in studies of version 1."""
SKIPPED = "predicted_not_to_fit"
"""Why a trial was not started (``records.types.SkippedTrial``); also the name of the constraint that it violates."""
MIN_UNCHANGED_SHARE = 0.25
"""Share of the lease for which another machine's heartbeat is watched before its written time counts."""
FIXED_PARAMS = "fixed_params"
"""Optuna's own key for the parameters that a trial was enqueued with."""


def attempt_of(trial: FrozenTrial) -> int:
    """Return how often the trial has been claimed; 0 if never."""
    return int((trial.user_attrs.get(CLAIM) or {}).get("attempt", 0))


def interrupted_attempts(trial: FrozenTrial) -> int:
    """Return how many attempts ended with an interruption; they don't count against ``sweep.max_attempts``."""
    attributes = trial.user_attrs
    return int(attributes.get(INTERRUPTED_ATTEMPTS, attributes.get(EARLIER_INTERRUPTED_ATTEMPTS, 0)))


class Heartbeats:
    """The trials' heartbeats as one observer has seen them.

    A worker on another machine writes the time of its own clock, which may be wrong by hours. So its trial is stale
    only if its heartbeat has not changed for the lease by this process's clock. If the written time, too, says that the
    lease has run out, a quarter of the lease is enough.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}
        """Trial id → last heartbeat, and since when (``time.monotonic``) it is unchanged."""

    def stale_reason(self, trial: FrozenTrial, lease_seconds: float) -> str | None:
        """Return why no worker runs a RUNNING trial any more; ``None``: one does, or the trial isn't RUNNING."""
        if trial.state is not TrialState.RUNNING:
            return None
        owner = (trial.user_attrs.get(CLAIM) or {}).get("owner")
        if owner is None:
            return "its worker died while claiming it"
        process = from_dict(Process, owner["process"])
        living = is_alive_if_visible(process)
        if living is False:
            return f"its worker {owner['worker']} (process {process.pid}) died"
        heartbeat = float(trial.user_attrs.get(HEARTBEAT, 0.0))
        silent_seconds = time.time() - heartbeat
        if living is None:
            unchanged_seconds = self._unchanged_seconds(trial._trial_id, heartbeat)
            if silent_seconds <= lease_seconds or unchanged_seconds <= MIN_UNCHANGED_SHARE * lease_seconds:
                silent_seconds = unchanged_seconds
        if silent_seconds <= lease_seconds:
            return None
        return f"its worker {owner['worker']} was silent for {silent_seconds:.0f} s"

    def _unchanged_seconds(self, trial_id: int, heartbeat: float) -> float:
        now = time.monotonic()
        previous, since = self._seen.get(trial_id, (None, now))
        if previous != heartbeat:
            since = now
        self._seen[trial_id] = (heartbeat, since)
        return now - since
