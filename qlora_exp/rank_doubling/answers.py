"""The answer of each rank ladder: the recommended rank, what it saves, and warnings.

All of it is computed from the runs' records and per-item files; nothing else is stored.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.analysis.power import Noise, half_width, plan
from qlora_exp.analysis.rank import Comparison, RankAnswer, answer, as_object
from qlora_exp.analysis.rank_rule import MAX_SEEDS, Rule, StepVerdict
from qlora_exp.config.compose import compose_raw
from qlora_exp.config.schema import LadderConfig, LrPolicy
from qlora_exp.paths import StudyPaths
from qlora_exp.rank_doubling.ladder import (
    LOSS_UNIT,
    LadderProposer,
    LadderState,
    LadderTrial,
    LearningRateChoice,
    evaluate_ladder,
)
from qlora_exp.rank_doubling.settings import SPLIT, is_single_rank, rule_of
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Status
from qlora_exp.study.objectives import MODEL_STATE, objective_value
from qlora_exp.study.types import LadderSettings, LadderSpec, StudySpec, TrialRow

COSTS = {
    "model_state_bytes": MODEL_STATE,
    "peak_train_bytes": "memory.peak_train_bytes",
    "adapter_bytes": "memory.adapter_bytes",
    "train_seconds": "speed.train_seconds",
    "cost_usd": "speed.cost_usd",
}
MAX_CURVE_DIFFERENCE = 0.005
"""Two training curves count as the same if they differ by less than this share of the loss decrease at every step."""


def announce(spec: StudySpec, config: LadderConfig) -> None:
    """Print before training whether the planned seeds and items can settle the margin, if there is one."""
    assert spec.ladder is not None
    if is_single_rank(spec.ladder):
        return
    raw = compose_raw(spec.overrides)
    limits = [limit for limit in (raw.evaluation.max_items, raw.task.max_test_items) if limit is not None]
    rule, items = rule_of(spec.ladder), min(limits, default=None)
    settles, sentence = plan_sentence(rule, config.seed_sd, config.item_sd, items, spec.ladder.max_seeds)
    print(f"  {'' if settles else 'warning: '}{sentence}", file=sys.stderr, flush=True)


def print_answers(spec: StudySpec, paths: StudyPaths, trials: Sequence[TrialRow]) -> dict[str, Any]:
    """Print each ladder's sentence and warnings so far, and return the content of ``ladder.json``."""
    assert spec.ladder is not None
    ladder_answers = answers(spec.ladder, LadderProposer(spec.ladder, paths).ladder_trials(trials))
    for ladder in ladder_answers:
        name = ", ".join(f"{key}={value}" for key, value in ladder["axes"].items())
        parts = ["SYNTHETIC" if spec.synthetic else "", name, ladder["sentence"]]
        print(": ".join(part for part in parts if part))
        for warning in ladder["warnings"]:
            print(f"  warning: {warning}")
    return {"study": spec.name, "synthetic": spec.synthetic, "ladders": ladder_answers}


def answers(spec: LadderSpec, trials: Sequence[LadderTrial]) -> list[dict[str, Any]]:
    """Return one object per ladder, in plain JSON types.

    It has the keys of :func:`~qlora_exp.analysis.rank.as_object` (none of them if a single rank is run), and

    * ``status``: ``open``, ``decided`` or ``failed``; ``axes``; ``alpha``; ``learning_rates`` with their pilots;
    * ``seeds`` by rank; ``items``; ``spent``; ``warnings``; ``sentence``;
    * ``saves``: what one run at the recommended rank saves compared with the other rank of the last doubling, in
      bytes, seconds and dollars. Negative: it costs more. ``train_seconds`` is ``None`` if the two ranks' runs
      overlap in time taken.
    """
    return [_answer_object(spec, ladder, trials) for ladder in spec.ladders]


def plan_sentence(
    rule: Rule, seed_sd: float | None, item_sd: float | None, items: int | None, seeds: int = MAX_SEEDS
) -> tuple[bool, str]:
    """Return whether the planned seeds and items can settle the margin given the expected noise, and a sentence about
    it.

    Args:
        seed_sd, item_sd: expected standard deviations, in nats per item and nats; ``None``: unknown.
        items: test items; ``None``: not limited, so not known before the data are read.
        seeds: per rank, after the extra seeds were added.
    """
    if seed_sd is not None and item_sd is not None and items is not None:
        power_plan = plan(Noise(seed_sd, item_sd), seeds, items, rule)
        return power_plan.settles, power_plan.sentence
    max_seed_sd = rule.half_zone / half_width(Noise(1.0, 0.0), seeds, 1, rule)
    settles = seed_sd is None or seed_sd <= max_seed_sd
    sentence = (
        f"With {seeds} seeds per rank, extra seeds included, the margin can be decided if the standard deviation of a"
        " doubling's gain "
    )
    sentence += f"is at most {max_seed_sd:.2g} {LOSS_UNIT} between seeds"
    if items is not None:
        max_item_sd = rule.half_zone / half_width(Noise(0.0, 1.0), seeds, items, rule)
        settles = settles and (item_sd is None or item_sd <= max_item_sd)
        sentence += f", and below {max_item_sd:.2g} nats between items ({items} items)"
    known = [f"{sd:g} between {what}" for sd, what in ((seed_sd, "seeds"), (item_sd, "items")) if sd is not None]
    sentence += f"; expected: {', '.join(known)}." if known else "; the expected deviations are unknown."
    return settles, sentence


def _answer_object(spec: LadderSpec, ladder: LadderSettings, trials: Sequence[LadderTrial]) -> dict[str, Any]:
    state = evaluate_ladder(spec, ladder, trials)
    answer_object: dict[str, Any] = {}
    rank_answer = last = saves = None
    if state.comparisons:
        rank_answer = answer(state.comparisons, rule_of(spec), LOSS_UNIT)
        answer_object = as_object(rank_answer)
        decided = (step for step in rank_answer.comparisons if step.decision.verdict is not StepVerdict.CONTINUE)
        last = next(decided, rank_answer.comparisons[-1])
        saves = _saves(last, state)
    elif not is_single_rank(spec):
        rule = rule_of(spec)
        answer_object = {"decision": None, "recommended_rank": None, "comparisons": []}
        answer_object |= {"margin": rule.margin, "half_zone": rule.half_zone}
    return answer_object | {
        "status": "open" if state.needs else "decided" if state.trouble is None else "failed",
        "axes": ladder.axes,
        "alpha": ladder.alpha,
        "lr_policy": spec.lr_policy,
        "learning_rates": [to_dict(choice) for choice in state.choices],
        "seeds": {str(rank): sum(trial.completed for trial in runs) for rank, runs in state.runs.items()},
        "items": last.decision.items if last is not None else None,
        "saves": saves,
        "spent": _spent([trial for trial in trials if trial.ended and ladder.axes.items() <= trial.params.items()]),
        "warnings": _warnings(spec, state, last),
        "sentence": " ".join(_sentences(spec, ladder, state, rank_answer, saves)),
    }


def _saves(last: Comparison, state: LadderState) -> dict[str, Any] | None:
    """Return the mean savings per run of the recommended rank; ``None`` if no rank is recommended."""
    ranks = {
        StepVerdict.STOP: (last.from_rank, last.to_rank),
        StepVerdict.CONTINUE: (last.to_rank, last.from_rank),
    }.get(last.decision.verdict)
    if ranks is None:
        return None
    chosen, other = (_costs(state.runs.get(rank, ())) for rank in ranks)
    saves: dict[str, Any] = {"against_rank": ranks[1]}
    for name in COSTS:
        known = bool(chosen[name] and other[name])
        saves[name] = statistics.fmean(other[name]) - statistics.fmean(chosen[name]) if known else None
        # Unclear if runs of the same rank differ by more than the two ranks do.
        if known and name == "train_seconds":
            overlap = min(chosen[name]) <= max(other[name]) and min(other[name]) <= max(chosen[name])
            saves[name] = None if overlap else saves[name]
    return saves


def _costs(runs: Sequence[LadderTrial]) -> dict[str, list[float]]:
    """Return the known costs of the completed runs, by name."""
    records = [trial.record for trial in runs if trial.record is not None and trial.completed]
    known = {name: [objective_value(record, field) for record in records] for name, field in COSTS.items()}
    return {name: [value for value in values if value is not None] for name, values in known.items()}


def _spent(ended: Sequence[LadderTrial]) -> dict[str, Any]:
    """Return what all runs of the ladder took, pilots and failures included.

    ``pilots_stopped``: those of the pilots that were stopped early.
    """
    speeds = [trial.record.speed for trial in ended if trial.record is not None]
    usd = [speed.cost_usd for speed in speeds if speed.cost_usd is not None]
    pilots = [trial for trial in ended if trial.params[SPLIT] == "validation"]
    return {
        "runs": len(ended),
        "pilots": len(pilots),
        "pilots_stopped": sum(trial.record is not None and trial.record.status is Status.PRUNED for trial in pilots),
        "seconds": math.fsum(speed.total_seconds for speed in speeds if speed.total_seconds is not None),
        "cost_usd": math.fsum(usd) if usd else None,
    }


# Sentences and warnings.


def _sentences(
    spec: LadderSpec,
    ladder: LadderSettings,
    state: LadderState,
    rank_answer: RankAnswer | None,
    saves: Mapping[str, Any] | None,
) -> list[str]:
    if rank_answer is None and is_single_rank(spec) and not state.needs:
        return [_learning_rate_words(spec, ladder, state.choices)]
    if rank_answer is None:
        return [f"No answer: {state.trouble}." if state.trouble else "Nothing is decided yet."]
    sentences = [rank_answer.sentence]
    if state.needs:
        sentences.append("The ladder isn't finished.")
    if state.trouble:
        sentences.append(f"It ended early: {state.trouble}.")
    sentences.append(_learning_rate_words(spec, ladder, state.choices))
    if saves is not None:
        chosen = f"Compared with r = {saves['against_rank']}, a run at r = {rank_answer.recommended_rank}"
        sentences.append(f"{chosen} {_cost_words(saves)}.")
    return sentences


def _learning_rate_words(spec: LadderSpec, ladder: LadderSettings, choices: Sequence[LearningRateChoice]) -> str:
    rates = ", ".join(
        f"{choice.learning_rate:g} at r = {choice.rank}{' (unresolved)' if choice.unresolved else ''}"
        for choice in choices
    )
    words = f"alpha: {ladder.alpha}. "
    if spec.lr_policy == LrPolicy.search.value:
        return words + f"Learning rate chosen at every rank: {rates}."
    if spec.lr_policy == LrPolicy.transfer.value:
        return words + f"Learning rate chosen at r = {spec.r_start} and carried over: {rates}."
    return words + f"Learning rate: {ladder.learning_rate:g} at every rank."


def _cost_words(saves: Mapping[str, Any]) -> str:
    memory, seconds, usd = saves["peak_train_bytes"], saves["train_seconds"], saves["cost_usd"]
    if memory is None:
        memory = saves["model_state_bytes"]
    unpriced = "; the cost is unknown: budget.usd_per_hour isn't set, and conf/prices.yaml doesn't have the device"
    money = unpriced if usd is None else f", {_difference(usd, 'USD')}"
    unclear = "no clearly different training time (runs of the same rank differ by more)"
    parts = [
        "unknown memory" if memory is None else f"{_difference(memory / 1e6, 'MB')} memory",
        unclear if seconds is None else f"{_difference(seconds, 's')} training time",
    ]
    if usd is not None and seconds is None:
        money = ", and so no clearly different cost"
    return f"takes {', '.join(parts)}{money}"


def _difference(saved: float, unit: str) -> str:
    return f"{abs(saved):.3g} {unit} {'less' if saved > 0 else 'more'}"


def _warnings(spec: LadderSpec, state: LadderState, last: Comparison | None) -> list[str]:
    warnings = [
        f"r = {choice.rank}: the best learning rate of the pilots, {choice.learning_rate:g}, is at the edge of the "
        "grid after one extension: unresolved. Change sweep.ladder.lr_factors or training.learning_rate"
        for choice in state.choices
        if choice.unresolved
    ]
    lost = sum(not trial.completed for runs in state.runs.values() for trial in runs)
    if lost:
        warnings.append(f"{lost} decision runs left no result")
    warnings += [
        f"the training losses of r = {step.from_rank} and {step.to_rank} coincide: training is too short for the ranks "
        "to differ. Increase training.max_steps"
        for step in state.comparisons
        if _curves_coincide(state.runs.get(step.from_rank, ()), state.runs.get(step.to_rank, ()))
    ]
    if last is not None and last.from_rank == spec.r_start and last.decision.verdict is StepVerdict.STOP:
        warnings.append(
            f"r = {spec.r_start} is the smallest rank that was run, and half of it may be enough: "
            f"sweep.ladder.r_start={max(spec.r_start // 2, 1)}"
        )
        rule = rule_of(spec)
        if last.decision.high is not None and last.decision.high < rule.margin - rule.half_zone:
            warnings.append(f"r = {spec.r_start} saturates: the gain of r = {last.to_rank} is below margin - half_zone")
    return warnings


def _curves_coincide(smaller: Sequence[LadderTrial], larger: Sequence[LadderTrial]) -> bool:
    """Return whether the training curves of the same seeds coincide, for every seed that both ranks have."""
    by_seed = {trial.params["seed"]: trial.curve for trial in larger if trial.completed}
    distances = [
        _curve_distance(trial.curve, by_seed.get(trial.params["seed"], {})) for trial in smaller if trial.completed
    ]
    known = [distance for distance in distances if distance is not None]
    return bool(known) and max(known) < MAX_CURVE_DIFFERENCE


def _curve_distance(curve: Mapping[int, float], other_curve: Mapping[int, float]) -> float | None:
    """Return the largest difference of two training curves (step → loss) at a shared step, as a share of the loss
    decrease."""
    steps = sorted(curve.keys() & other_curve.keys())
    if not steps:
        return None
    decrease = curve[steps[0]] - min(*curve.values(), *other_curve.values())
    return max(abs(curve[step] - other_curve[step]) for step in steps) / decrease if decrease > 0 else None
