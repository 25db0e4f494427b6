"""What a ladder's runs left, and what follows from it: the answer, what it saves, and what to be careful about.

Everything is made from the runs' records and per-item files; nothing else is kept.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.analysis.power import Noise, half_width, plan
from qlora_exp.analysis.rank import Comparison, RankAnswer, answer, as_object
from qlora_exp.analysis.rule import MOST_SEEDS, Rule, StepVerdict
from qlora_exp.config.schema import LrPolicy
from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.rank_doubling.ladder import LadderState, LadderTrial, LearningRateChoice, evaluate_ladder
from qlora_exp.rank_doubling.settings import SPLIT, is_single, rule_of
from qlora_exp.records.files import read_curve, read_record
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.objectives import MODEL_STATE, objective_value
from qlora_exp.study.types import LadderSettings, LadderSpec

LOSS_UNIT = "nats per item"
COSTS = {
    "model_state_bytes": MODEL_STATE,
    "peak_train_bytes": "memory.peak_train_bytes",
    "adapter_bytes": "memory.adapter_bytes",
    "train_seconds": "speed.train_seconds",
    "cost_usd": "speed.cost_usd",
}
SAME_CURVE = 0.005
"""Of what training gained: training losses of two ranks that are nearer than this at every step are the same curve."""


def ended_trial(params: dict[str, Any], run_id: str | None, outputs: OutputPaths) -> LadderTrial:
    """A trial that has ended, with what its run left."""
    record, losses, curve = None, None, {}
    if run_id is not None:
        paths = outputs.run(run_id)
        with contextlib.suppress(RecordError):
            record = read_record(paths.record)
        if record is not None and params.get(SPLIT) == "test":
            losses = _test_losses(paths)
            curve = {point["step"]: point["loss"] for point in read_curve(paths.curve) if "loss" in point}
    return LadderTrial(params, ended=True, record=record, losses=losses, curve=curve)


def ladder_trials(records: Sequence[RunRecord], outputs: OutputPaths) -> list[LadderTrial]:
    """The ended trials of a study from its runs' records: enough to make its answer again without the database."""
    ended = [record for record in records if record.status not in (Status.RUNNING, Status.INTERRUPTED)]
    return [ended_trial(record.trial.params, record.run_id, outputs) for record in ended if record.trial is not None]


def answers(spec: LadderSpec, trials: Sequence[LadderTrial]) -> list[dict[str, Any]]:
    """One object a ladder, in plain JSON types: that of :func:`~qlora_exp.analysis.rank.as_object`, and

    ``status`` (``open``, ``decided``, ``failed``), ``axes``, ``alpha``, ``learning_rates`` with their pilots, ``seeds``
    by rank, ``items``, ``saves`` (what the recommended rank saves against the other of the last doubling, a run; bytes,
    seconds, dollars; negative: it costs more; no seconds where the two ranks' runs overlap), ``spent``, ``warnings``.
    Without ``decision`` and what belongs to it where a single rank is run.
    """
    return [_object(spec, one, evaluate_ladder(spec, one, trials), _own(one, trials)) for one in spec.ladders]


def recommended(spec: LadderSpec, trials: Sequence[LadderTrial]) -> list[dict[str, Any]]:
    """Parameters of the completed decision runs at the ranks that the ladders recommend, by ladder and seed."""
    found = []
    for one in spec.ladders:
        standing = evaluate_ladder(spec, one, trials)
        if standing.comparisons and not standing.needs:
            rank = answer(standing.comparisons, rule_of(spec), LOSS_UNIT).recommended_rank
            runs = standing.runs.get(rank, ()) if rank is not None else ()
            found += [trial.params for trial in runs if trial.completed]
    return found


def plan_sentence(
    rule: Rule, seed_sd: float | None, item_sd: float | None, items: int | None, seeds: int = MOST_SEEDS
) -> tuple[bool, str]:
    """Whether the plan can settle the margin, as far as the expected noise is known; and the word on it.

    Args:
        seed_sd, item_sd: expected, in nats per item and nats; ``None``: unknown.
        items: test items; ``None``: not limited, so not known before the data are read.
        seeds: a rank, after the purchase.
    """
    if seed_sd is not None and item_sd is not None and items is not None:
        found = plan(Noise(seed_sd, item_sd), seeds, items, rule)
        return found.settles, found.sentence
    by_seeds = rule.half_zone / half_width(Noise(1.0, 0.0), seeds, 1, rule)
    settles = seed_sd is None or seed_sd <= by_seeds
    told = f"With {seeds} seeds after a purchase the margin can be settled if a doubling's gain varies by at most "
    told += f"{by_seeds:.2g} {LOSS_UNIT} (sd) from seed to seed"
    if items is not None:
        by_items = rule.half_zone / half_width(Noise(0.0, 1.0), seeds, items, rule)
        settles = settles and (item_sd is None or item_sd <= by_items)
        told += f", and by less than {by_items:.2g} nats from item to item ({items} items)"
    known = [f"{sd:g} over {what}" for sd, what in ((seed_sd, "seeds"), (item_sd, "items")) if sd is not None]
    told += f"; expected: {', '.join(known)}." if known else "; what it will vary by isn't known yet."
    return settles, told


def _test_losses(paths: RunPaths) -> dict[str, float] | None:
    """Item → nats, sorted by item; ``None`` where there is no such file, or it can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(paths.items("after", "test"), columns=["item_id", "loss_sum_nats"])
    except (OSError, pa.ArrowException):
        return None
    return dict(sorted(zip(table["item_id"].to_pylist(), table["loss_sum_nats"].to_pylist(), strict=True)))


def _own(one: LadderSettings, trials: Sequence[LadderTrial]) -> list[LadderTrial]:
    return [trial for trial in trials if one.axes.items() <= trial.params.items()]


def _object(spec: LadderSpec, one: LadderSettings, standing: LadderState, own: Sequence[LadderTrial]) -> dict[str, Any]:
    found = answer(standing.comparisons, rule_of(spec), LOSS_UNIT) if standing.comparisons else None
    last = _last(found) if found is not None else None
    saves = _saves(last, standing) if last is not None else None
    told = as_object(found) if found is not None else {} if is_single(spec) else _nothing(rule_of(spec))
    return told | {
        "status": "open" if standing.needs else "decided" if standing.trouble is None else "failed",
        "axes": one.axes,
        "alpha": one.alpha,
        "lr_policy": spec.lr_policy,
        "learning_rates": [to_dict(choice) for choice in standing.choices],
        "seeds": {str(rank): sum(trial.completed for trial in runs) for rank, runs in standing.runs.items()},
        "items": last.decision.items if last is not None else None,
        "saves": saves,
        "spent": _spent(own),
        "warnings": _warnings(spec, standing, last),
        "sentence": " ".join(_sentences(spec, one, standing, found, saves)),
    }


def _nothing(rule: Rule) -> dict[str, Any]:
    undecided: dict[str, Any] = {"decision": None, "recommended_rank": None, "comparisons": []}
    return undecided | {"margin": rule.margin, "half_zone": rule.half_zone}


def _last(found: RankAnswer) -> Comparison:
    return next((c for c in found.comparisons if c.decision.verdict is not StepVerdict.CONTINUE), found.comparisons[-1])


def _saves(last: Comparison, standing: LadderState) -> dict[str, Any] | None:
    """``None`` where no rank is recommended."""
    ranks = {
        StepVerdict.STOP: (last.from_rank, last.to_rank),
        StepVerdict.CONTINUE: (last.to_rank, last.from_rank),
    }.get(last.decision.verdict)
    if ranks is None:
        return None
    chosen, other = (_costs(standing.runs.get(rank, ())) for rank in ranks)
    differences = {
        name: statistics.fmean(other[name]) - statistics.fmean(chosen[name])
        for name in COSTS
        if chosen[name] and other[name]
    }
    ours, theirs = chosen["train_seconds"], other["train_seconds"]
    if ours and theirs and min(ours) <= max(theirs) and min(theirs) <= max(ours):
        del differences["train_seconds"]  # what else the machine did differed by more
    return {"against_rank": ranks[1]} | {name: differences.get(name) for name in COSTS}


def _costs(runs: Sequence[LadderTrial]) -> dict[str, list[float]]:
    """What is known of the runs that completed."""
    records = [trial.record for trial in runs if trial.record is not None and trial.completed]
    known = {name: [objective_value(record, field) for record in records] for name, field in COSTS.items()}
    return {name: [value for value in values if value is not None] for name, values in known.items()}


def _spent(own: Sequence[LadderTrial]) -> dict[str, Any]:
    """All runs of the ladder, pilots and failures included."""
    records = [trial.record for trial in own if trial.record is not None]
    seconds = [record.speed.total_seconds for record in records if record.speed.total_seconds is not None]
    usd = [record.speed.cost_usd for record in records if record.speed.cost_usd is not None]
    pilots = sum(trial.ended and trial.params[SPLIT] == "validation" for trial in own)
    return {
        "runs": len([trial for trial in own if trial.ended]),
        "pilots": pilots,
        "seconds": math.fsum(seconds),
        "cost_usd": math.fsum(usd) if usd else None,
    }


# Words.


def _sentences(
    spec: LadderSpec,
    one: LadderSettings,
    standing: LadderState,
    found: RankAnswer | None,
    saves: Mapping[str, Any] | None,
) -> list[str]:
    if found is None and is_single(spec) and not standing.needs:
        return [_learning_rate_words(spec, one, standing.choices)]
    if found is None:
        return [f"No answer: {standing.trouble}." if standing.trouble else "Nothing is decided yet."]
    told = [found.sentence]
    if standing.needs:
        told.append("The ladder isn't finished.")
    if standing.trouble:
        told.append(f"It ended there: {standing.trouble}.")
    told.append(_learning_rate_words(spec, one, standing.choices))
    if saves is not None:
        chosen = f"Beside one at r = {saves['against_rank']}, a run at r = {found.recommended_rank}"
        told.append(f"{chosen} {_cost_words(saves)}.")
    return told


def _learning_rate_words(spec: LadderSpec, one: LadderSettings, choices: Sequence[LearningRateChoice]) -> str:
    rates = ", ".join(
        f"{choice.learning_rate:g} at r = {choice.rank}{' (unresolved)' if choice.unresolved else ''}"
        for choice in choices
    )
    told = f"alpha: {one.alpha}. "
    if spec.lr_policy == LrPolicy.search.value:
        return told + f"Learning rate chosen at every rank: {rates}."
    if spec.lr_policy == LrPolicy.transfer.value:
        return told + f"At this learning rate, chosen at r = {spec.r_start} and carried over: {rates}."
    return told + f"At this learning rate: {one.learning_rate:g} at every rank."


def _cost_words(saves: Mapping[str, Any]) -> str:
    memory, seconds, usd = saves["peak_train_bytes"], saves["train_seconds"], saves["cost_usd"]
    if memory is None:
        memory = saves["model_state_bytes"]
    unpriced = "; the money is unknown: budget.usd_per_hour isn't set, and conf/prices.yaml doesn't have the device"
    money = unpriced if usd is None else f", {_difference(usd, 'USD')}"
    noise = "a training time that can't be told apart (the runs of one rank differ by more)"
    parts = [
        "unknown memory" if memory is None else f"{_difference(memory / 1e6, 'MB')} of memory",
        noise if seconds is None else f"{_difference(seconds, 's')} of training",
    ]
    if usd is not None and seconds is None:
        money = ", and so with the money"
    return f"takes {', '.join(parts)}{money}"


def _difference(saved: float, unit: str) -> str:
    return f"{abs(saved):.3g} {unit} {'less' if saved > 0 else 'more'}"


def _warnings(spec: LadderSpec, standing: LadderState, last: Comparison | None) -> list[str]:
    told = [
        f"r = {choice.rank}: the best learning rate of the pilots, {choice.learning_rate:g}, is at the edge of the "
        "grid after one extension: unresolved. Other sweep.ladder.lr_factors, or another training.learning_rate"
        for choice in standing.choices
        if choice.unresolved
    ]
    lost = sum(not trial.completed for runs in standing.runs.values() for trial in runs)
    if lost:
        told.append(f"{lost} decision runs left no result")
    told += [
        f"the training losses of r = {step.from_rank} and {step.to_rank} coincide: the budget is too short for ranks "
        "to differ. More training.max_steps"
        for step in standing.comparisons
        if _coincide(standing.runs.get(step.from_rank, ()), standing.runs.get(step.to_rank, ()))
    ]
    if last is not None and last.from_rank == spec.r_start and last.decision.verdict is StepVerdict.STOP:
        told.append(
            f"r = {spec.r_start} is the smallest rank that was run, and halving it may do as well: "
            f"sweep.ladder.r_start={max(spec.r_start // 2, 1)}"
        )
        rule = rule_of(spec)
        if last.decision.high is not None and last.decision.high < rule.margin - rule.half_zone:
            told.append(f"r = {spec.r_start} saturates: what r = {last.to_rank} gains is below the whole zone in doubt")
    return told


def _coincide(smaller: Sequence[LadderTrial], larger: Sequence[LadderTrial]) -> bool:
    """Whether the training curves of the same seeds are one, for every seed that both ranks have."""
    by_seed = {trial.params["seed"]: trial.curve for trial in larger if trial.completed}
    distances = [_distance(trial.curve, by_seed.get(trial.params["seed"], {})) for trial in smaller if trial.completed]
    known = [distance for distance in distances if distance is not None]
    return bool(known) and max(known) < SAME_CURVE


def _distance(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """The largest difference of two training curves (step → loss) at a step of both, as a share of what training
    gained."""
    steps = sorted(one.keys() & other.keys())
    if not steps:
        return None
    gained = one[steps[0]] - min(*one.values(), *other.values())
    return max(abs(one[step] - other[step]) for step in steps) / gained if gained > 0 else None
