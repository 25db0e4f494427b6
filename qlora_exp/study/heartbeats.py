"""When a trial is stale: no worker runs it any more."""

from __future__ import annotations

import time

from optuna.trial import FrozenTrial, TrialState

from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Process
from qlora_exp.study.trials import CLAIM, HEARTBEAT
from qlora_exp.system.environment import is_alive_if_visible

MIN_UNCHANGED_SHARE = 0.25
"""Share of the lease for which another machine's heartbeat is watched before its written time counts."""


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
            previous, since = self._seen.get(trial._trial_id, (None, 0.0))
            if previous != heartbeat:
                since = time.monotonic()
            self._seen[trial._trial_id] = (heartbeat, since)
            unchanged_seconds = time.monotonic() - since
            if silent_seconds <= lease_seconds or unchanged_seconds <= MIN_UNCHANGED_SHARE * lease_seconds:
                silent_seconds = unchanged_seconds
        if silent_seconds <= lease_seconds:
            return None
        return f"its worker {owner['worker']} was silent for {silent_seconds:.0f} s"
