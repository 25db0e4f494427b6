"""The answer of each rank ladder: the recommended rank, what it saves, and warnings.

All of it is computed from the runs' records and per-item files; nothing else is stored.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.analysis.power import Noise, half_width, plan
from qlora_exp.analysis.rank import Comparison, RankAnswer, as_object, deciding_step
from qlora_exp.analysis.rank_rule import Rule, SeedPlan, StepVerdict
from qlora_exp.config.compose import compose_raw
from qlora_exp.config.enums import LrPolicy
from qlora_exp.config.schema import LadderConfig
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.rank_doubling.ladder import (
    LOSS_UNIT,
    LadderProposer,
    LadderState,
    evaluate_ladder,
    rank_answer,
    use_rank,
)
from qlora_exp.rank_doubling.ladder_trials import LadderTrial
from qlora_exp.rank_doubling.learning_rates import LearningRateChoice
from qlora_exp.rank_doubling.margins import margin_fields
from qlora_exp.rank_doubling.screening import ladder_after_screening, screening_object
from qlora_exp.rank_doubling.settings import (
    EDITION,
    RANK,
    SEED,
    SPLIT,
    is_single_rank,
    margin_of,
    rule_in_margin_units,
    rule_of,
    seed_limit,
    seed_plan,
)
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
    rule, items = rule_in_margin_units(spec.ladder), min(limits, default=None)
    unit = margin_of(spec.ladder).unit.replace("_", " ")
    settles, sentence = plan_sentence(rule, config.seed_sd, config.item_sd, items, seed_plan(spec.ladder), unit)
    print(f"  {'' if settles else 'warning: '}{sentence}", file=sys.stderr, flush=True)
    if spec.ladder.edition < EDITION:
        kept = f"lr_policy={spec.ladder.lr_policy}, max_seeds={spec.ladder.max_seeds}"
        words = "an earlier version started this study: it keeps its settings"
        print(f"  {words} ({kept}) and continues with the present rule", file=sys.stderr, flush=True)


def print_answers(
    spec: StudySpec, paths: StudyPaths, trials: Sequence[TrialRow], larger_limit: str | None = None
) -> dict[str, Any]:
    """Print each ladder's sentence and warnings so far, and return the content of ``ladder.json``.

    ``larger_limit``: an override of the budget, if it is spent; without it a study that is continued starts nothing.
    """
    assert spec.ladder is not None
    known, resume = LadderProposer(spec.ladder, paths).ladder_trials(trials), resume_command(spec, paths)
    resume += f" {larger_limit}" if larger_limit is not None else ""
    after, screening = ladder_after_screening(spec.ladder, known)
    ladder_answers = answers(after, known, resume)
    content: dict[str, Any] = {"study": spec.name, "synthetic": spec.synthetic, "ladders": ladder_answers}
    if screening is not None:
        content["screening"] = screened = screening_object(spec.ladder, screening)
        for ladder in ladder_answers:
            ladder["sentence"] += f" Screening runs: {screened['sentence']}"
        if screening.winner is None:
            print(f"{'SYNTHETIC: ' if spec.synthetic else ''}{screened['sentence']}")
        if screening.needs:
            print(f"  to settle it: {resume}")
    for ladder in ladder_answers:
        name = ", ".join(f"{key}={value}" for key, value in ladder["axes"].items())
        parts = ["SYNTHETIC" if spec.synthetic else "", name, ladder["sentence"]]
        print(": ".join(part for part in parts if part))
        for warning in ladder["warnings"]:
            print(f"  warning: {warning}")
        if ladder["settle_command"] is not None:
            print(f"  to settle it: {ladder['settle_command']}")
    return content


def says_what_to_use(content: Mapping[str, Any]) -> bool:
    """Return whether the content of ``ladder.json`` has a rank or a configuration to use."""
    ladders = any(ladder.get("use_rank") is not None or ladder.get("seeds") for ladder in content["ladders"])
    return ladders or (content.get("screening") or {}).get("use") is not None


def resume_command(spec: StudySpec, paths: StudyPaths) -> str:
    """Return the command that continues the study from the current folder."""
    command = f"qlora-exp resume {shlex.quote(spec.name)}"
    if paths.outputs == OutputPaths.of("outputs"):
        return command
    return f"{command} --output-root {shlex.quote(str(paths.outputs.root))}"


def answers(spec: LadderSpec, trials: Sequence[LadderTrial], resume: str | None = None) -> list[dict[str, Any]]:
    """Return one object per ladder, in plain JSON types.

    It has the keys of :func:`~qlora_exp.analysis.rank.as_object` (none of them if a single rank is run), and

    * ``margin_text``: the margin as the user wrote it; ``margin_units``: its size in each unit
      (:class:`~qlora_exp.analysis.margin.MarginUnits`); ``None``: unknown;
    * ``settle_command``: a command that adds the seeds with which an undecided ladder would probably be decided, or
      that runs what is missing; ``None``: decided, or no number of seeds up to the limit is enough;
    * ``status``: ``open``, ``decided`` or ``failed``; ``axes``; ``alpha``; ``lr_policy``; ``learning_rates`` with their
      pilots;
    * ``seeds`` by rank; ``lost_runs`` with rank, seed and cause; ``items``; ``spent``; ``warnings``; ``sentence``;
    * ``saves``: what one run at the rank to use saves compared with the other rank of the deciding step, in bytes,
      seconds and dollars. Negative: it costs more. ``train_seconds`` is ``None`` if the two ranks' runs overlap in time
      taken.

    Args:
        resume: the command that continues the study, for ``settle_command``.
    """
    return [_answer_object(spec, ladder, trials, resume) for ladder in spec.ladders]


def plan_sentence(
    rule: Rule,
    seed_sd: float | None,
    item_sd: float | None,
    items: int | None,
    seeds: SeedPlan,
    unit: str = LOSS_UNIT,
) -> tuple[bool, str]:
    """Return whether the planned seeds and items can settle the margin given the expected noise, and a sentence about
    it.

    Args:
        rule: in ``unit``, which needn't be nats: what a share of the loss is in nats is unknown before training.
        seed_sd, item_sd: expected standard deviations in the same unit; ``None``: unknown.
        items: test items; ``None``: not limited, so not known before the data are read.
    """
    if seed_sd is not None and item_sd is not None and items is not None:
        power_plan = plan(Noise(seed_sd, item_sd), seeds, items, rule)
        return power_plan.settles, power_plan.sentence
    max_seed_sd = rule.half_zone / half_width(Noise(1.0, 0.0), seeds, 1)
    settles = seed_sd is None or seed_sd <= max_seed_sd
    sentence = (
        f"With at most {seeds.most} seeds per rank, the margin can be decided if the standard deviation of a doubling's"
        f" gain is at most {max_seed_sd:.2g} {unit} between seeds"
    )
    if items is not None:
        max_item_sd = rule.half_zone / half_width(Noise(0.0, 1.0), seeds, items)
        settles = settles and (item_sd is None or item_sd <= max_item_sd)
        sentence += f", and below {max_item_sd:.2g} {unit} between items ({items} items)"
    known = [f"{sd:g} between {what}" for sd, what in ((seed_sd, "seeds"), (item_sd, "items")) if sd is not None]
    sentence += f"; expected: {', '.join(known)}." if known else "; the expected deviations are unknown."
    return settles, sentence


def _answer_object(
    spec: LadderSpec, ladder: LadderSettings, trials: Sequence[LadderTrial], resume: str | None
) -> dict[str, Any]:
    state = evaluate_ladder(spec, ladder, trials)
    answer_object: dict[str, Any] = {}
    found, last, saves, rule = rank_answer(spec, state), None, None, None
    if found is not None:
        rule = found.rule
        answer_object = as_object(found)
        if state.needs and found.verdict is not StepVerdict.CONTINUE:  # a step r → 2r may follow and decide
            answer_object |= {"decision": str(StepVerdict.BUY), "recommended_rank": None, "would_settle": None}
        last = deciding_step(found.comparisons)
        saves = _saves(last, state)
    elif not is_single_rank(spec):
        rule = None if margin_of(spec).needs_levels else rule_of(spec)
        answer_object = {"decision": None, "recommended_rank": None, "use_rank": use_rank(spec, state)}
        answer_object |= {"regret_bound": None, "regret_rank": None, "comparisons": [], "would_settle": None}
        answer_object |= {"margin": rule and rule.margin, "half_zone": rule and rule.half_zone}
    margin_sentence = None
    if not is_single_rank(spec):
        fields = margin_fields(spec, rule, state.runs)
        margin_sentence = fields.pop("sentence")
        answer_object |= fields
    return answer_object | {
        "settle_command": _settle_command(spec, state, last, resume),
        "status": "open" if state.needs else "decided" if state.trouble is None else "failed",
        "axes": ladder.axes,
        "alpha": ladder.alpha,
        "lr_policy": spec.lr_policy,
        "learning_rates": [to_dict(choice) for choice in state.choices],
        "seeds": {str(rank): sum(trial.completed for trial in runs) for rank, runs in state.runs.items()},
        "lost_runs": [
            {"rank": trial.params[RANK], "seed": trial.params[SEED], "cause": trial.cause} for trial in state.lost
        ],
        "items": last.decision.items if last is not None else None,
        "saves": saves,
        "spent": _spent([trial for trial in trials if trial.ended and ladder.axes.items() <= trial.params.items()]),
        "warnings": _warnings(spec, state, last),
        "sentence": " ".join(_sentences(spec, ladder, state, found, saves, margin_sentence)),
    }


def _settle_command(spec: LadderSpec, state: LadderState, last: Comparison | None, resume: str | None) -> str | None:
    """Return the command that settles what is undecided; ``None``: nothing is, or no command would."""
    if resume is None or (state.needs and not is_single_rank(spec)):
        return resume
    if last is None or last.decision.verdict is not StepVerdict.INCONCLUSIVE:
        return None
    seeds = last.decision.settling_seeds
    if seeds is None or not spec.max_seeds < seeds <= seed_limit(spec):
        return None
    return f"{resume} sweep.ladder.max_seeds={seeds}"


def _saves(last: Comparison, state: LadderState) -> dict[str, Any] | None:
    """Return the mean savings per run of the rank to use, compared with the step's other rank."""
    ranks = last.from_rank, last.to_rank
    use, against = reversed(ranks) if last.decision.verdict is StepVerdict.CONTINUE else ranks
    chosen, other = (_costs(state.runs.get(rank, ())) for rank in (use, against))
    saves: dict[str, Any] = {"against_rank": against}
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
    found: RankAnswer | None,
    saves: Mapping[str, Any] | None,
    margin_sentence: str | None,
) -> list[str]:
    if found is None and is_single_rank(spec) and not state.needs and not state.trouble:
        return [_learning_rate_words(spec, ladder, state.choices)]
    if found is None:
        rank = use_rank(spec, state)
        words = f"No answer: {state.trouble}." if state.trouble else "Nothing is decided yet."
        return [words] if rank is None else [f"Use r = {rank} for now. {words}"]
    sentences = [found.sentence, *([margin_sentence] if margin_sentence else [])]
    if state.needs:
        sentences.append("The ladder isn't finished.")
    if state.trouble:
        sentences.append(f"It ended early: {state.trouble}.")
    sentences.append(_learning_rate_words(spec, ladder, state.choices))
    if saves is not None:
        chosen = f"Compared with r = {saves['against_rank']}, a run at r = {found.use_rank}"
        sentences.append(f"{chosen} {_cost_words(saves)}.")
    return sentences


def _learning_rate_words(spec: LadderSpec, ladder: LadderSettings, choices: Sequence[LearningRateChoice]) -> str:
    rates = ", ".join(
        f"{choice.learning_rate:g} at r = {choice.rank}{' (unresolved)' if choice.unresolved else ''}"
        for choice in choices
    )
    words = f"alpha: {ladder.alpha}. "
    if spec.lr_policy == LrPolicy.fixed.value:
        return words + f"Learning rate (fixed): {ladder.learning_rate:g} at every rank; the answer holds for it."
    if spec.lr_policy == LrPolicy.search.value and spec.edition < EDITION:
        return words + f"Learning rate chosen at every rank: {rates}."
    seeds = "1 pilot seed" if spec.pilot_seeds == 1 else f"{spec.pilot_seeds} pilot seeds"
    words += f"Learning rate ({spec.lr_policy}) chosen at r = {spec.r_start} by {seeds}"
    if is_single_rank(spec):
        return f"{words}: {rates}."
    words += f" and carried over by {_law_words(ladder)}: {rates}"
    if spec.lr_policy == LrPolicy.carry.value:
        return f"{words}; the answer holds for these rates."
    left = [
        f"at r = {choice.rank} ({choice.learning_rate:g} instead of {choice.carried:g})"
        for choice in choices
        if choice.carried is not None and choice.learning_rate != choice.carried
    ]
    kept = "pilots show no better rate beyond their noise at any other rank"
    return f"{words}; {'pilots left the law ' + ', '.join(left) if left else kept}."


def _law_words(ladder: LadderSettings) -> str:
    return "a constant law" if ladder.rate_exponent == 0 else f"r^{ladder.rate_exponent:g}"


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
    warnings += [
        f"r = {trial.params[RANK]}, seed {trial.params[SEED]} left no result, which counts against this rank: "
        f"{trial.cause}"
        for trial in state.lost
    ]
    if spec.raised_from:
        values = " and ".join(map(str, spec.raised_from))
        warnings.append(
            f"max_seeds was raised from {values} to {spec.max_seeds} after an answer. Each of the two or more answers "
            "has the rule's error rates; that one of them is wrong has at most their sum"
        )
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
        assert state.walk is not None
        assert state.walk.rule is not None
        rule = state.walk.rule.over(last.doublings)
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
