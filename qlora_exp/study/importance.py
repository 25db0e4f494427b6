"""Which axis explains how much of an objective: Optuna's own estimate over a study's finished trials."""

from __future__ import annotations

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.types import StudySpec

MIN_TRIALS = 4
"""Fewer say nothing at all: the estimate needs trials that differ."""


def importances(study: optuna.Study, spec: StudySpec) -> dict[str, dict[str, float]]:
    """Objective → axis → share of its variance (fANOVA, from a fixed seed), the largest first. Objectives and axes that
    no share can be told of are left out."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state is TrialState.COMPLETE]
    if len(trials) < MIN_TRIALS:
        return {}
    found = {parse_objective(text).field: _of(study, trials, number) for number, text in enumerate(spec.objectives)}
    return {field: shares for field, shares in found.items() if shares}


def _of(study: optuna.Study, trials: list[FrozenTrial], number: int) -> dict[str, float]:
    if len({trial.values[number] for trial in trials}) < 2:  # nothing varies, nothing explains it
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return dict(get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[number]))
    except (ValueError, RuntimeError):  # conditional axes of which no trial has all
        return {}
