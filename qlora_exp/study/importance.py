"""How much each axis explains of an objective's variance: Optuna's estimate over a study's completed trials."""

from __future__ import annotations

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.types import StudySpec

MIN_TRIALS = 4
"""The estimate needs trials that differ; with fewer it means nothing."""


def importances(study: optuna.Study, spec: StudySpec) -> dict[str, dict[str, float]]:
    """Return objective → axis → share of its variance (fANOVA with a fixed seed), largest first.

    Objectives and axes without a computable share are left out.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state is TrialState.COMPLETE]
    if len(trials) < MIN_TRIALS:
        return {}
    by_objective = {
        parse_objective(text).field: _shares_of_objective(study, trials, number)
        for number, text in enumerate(spec.objectives)
    }
    return {field: shares for field, shares in by_objective.items() if shares}


def _shares_of_objective(study: optuna.Study, trials: list[FrozenTrial], number: int) -> dict[str, float]:
    if len({trial.values[number] for trial in trials}) < 2:  # no variance to explain
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return dict(get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[number]))
    except (ValueError, RuntimeError):  # conditional axes, and no trial has all of them
        return {}
