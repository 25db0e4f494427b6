"""Optuna's pruner for a ladder's pilots, by the rule of :mod:`qlora_exp.analysis.pilots`."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.analysis.pilots import is_behind
from qlora_exp.records.types import Status
from qlora_exp.study.trials import STATUS
from qlora_exp.study.types import LadderSpec

RATE, SPLIT = "training.learning_rate", "evaluation.split"


def may_stop(ladder: LadderSpec | None, params: dict[str, Any]) -> bool:
    """Return whether a trial with these parameters is a pilot that may be stopped: pilots are scored on validation."""
    return ladder is not None and ladder.stop_pilots and params.get(SPLIT) == "validation"


class PilotPruner(BasePruner):
    """Prunes a pilot that is behind another one of its ladder and rank: equal in all parameters but the learning rate.

    Each pilot reports one value, its training loss at the step of comparison.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None:
            return False
        others = (other for other in study.get_trials(deepcopy=False) if other.number != trial.number)
        losses = [
            other.intermediate_values[step]
            for other in others
            if step in other.intermediate_values and _shared(other) == _shared(trial) and not _failed(other)
        ]
        return is_behind(trial.intermediate_values[step], losses)


def _shared(trial: FrozenTrial) -> dict[str, Any]:
    return {name: value for name, value in trial.params.items() if name != RATE}


def _failed(trial: FrozenTrial) -> bool:
    """Return whether the trial ended without a score, e.g. diverged: no other pilot may be stopped because of it."""
    stopped = trial.state is TrialState.PRUNED and trial.user_attrs.get(STATUS) == Status.PRUNED.value
    return trial.state.is_finished() and trial.state is not TrialState.COMPLETE and not stopped
