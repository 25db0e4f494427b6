"""Successive halving of a study's configurations on validation, before the best one gets a rank ladder.

Jamieson and Talwalkar 2016 (arXiv 1502.07943), with short trainings as the resource: every configuration trains
``screening_steps`` at r_start, the better half goes on with twice as many, until one is left. A training of another
length has another learning-rate schedule, so each round starts anew.

All functions are pure over the ended trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora_exp.analysis.contrasts import Difference, interval
from qlora_exp.rank_doubling.ladder_trials import LadderTrial, trial_key
from qlora_exp.rank_doubling.settings import (
    RANK,
    RATE,
    SEED,
    SPLIT,
    TRAINING_STEPS,
    pilot_seeds_of,
    round_rate,
    screening_rounds,
)
from qlora_exp.study.proposer import TrialPoint
from qlora_exp.study.types import LadderSettings, LadderSpec

SCORE = "nats per item of the answer"
"""On validation, without end tokens: these depend on the format."""
WITHOUT_ITEMS = "its per-item losses are missing, or not finite"


@dataclass(frozen=True)
class ScreenedConfiguration:
    """One configuration in one round. ``None`` is unknown."""

    axes: Mapping[str, Any]
    loss: float | None
    """Mean over seeds and items, in :data:`SCORE`; ``None`` if a run left no result."""
    behind: Difference | None
    """How much higher its loss is than the round's lowest; ``None`` for that one, and without a result."""
    weight_bytes: float | None
    kept: bool
    cause: str | None = None
    """Why it left no result."""

    @property
    def within_noise(self) -> bool:
        """Whether the 95 % interval of the difference from the best one contains 0, or there is no interval."""
        return self.behind is not None and (self.behind.seeds < 2 or self.behind.low is None or self.behind.low <= 0)


@dataclass(frozen=True)
class ScreeningRound:
    steps: int
    configurations: tuple[ScreenedConfiguration, ...]
    """The best one first."""


@dataclass(frozen=True)
class Screening:
    """``needs``: points that it still waits for, running ones included. ``winner``: the ladder that is left."""

    rounds: tuple[ScreeningRound, ...]
    needs: tuple[TrialPoint, ...]
    winner: LadderSettings | None
    left: tuple[LadderSettings, ...]
    """Those not yet dropped, the best of the last complete round first."""
    cheaper_taken: bool = False
    """Whether the last two were within noise, so that the one with the smaller weights was taken."""
    trouble: str | None = None


def screen(spec: LadderSpec, trials: Sequence[LadderTrial]) -> Screening:
    """Return the state of the halving, from the ended trials."""
    assert spec.screening_steps is not None
    known = {trial_key(trial.params): trial for trial in trials}
    left, rounds = list(spec.ladders), list[ScreeningRound]()
    for _, steps in screening_rounds(spec):
        points = {index: _points(spec, ladder, steps) for index, ladder in enumerate(left)}
        ended = {
            index: [known[key] for point in of_one if (key := trial_key(point)) in known and known[key].ended]
            for index, of_one in points.items()
        }
        needs = [
            point
            for of_one in points.values()
            for point in of_one
            if (found := known.get(trial_key(point))) is None or not found.ended
        ]
        if needs:
            return Screening(tuple(rounds), tuple(needs), None, tuple(left))
        ranked = _ranked(left, ended)
        if not ranked:
            causes = {trial.cause or WITHOUT_ITEMS for of_one in ended.values() for trial in of_one}
            trouble = f"no configuration left a validation loss after {steps} steps: {'; '.join(sorted(causes))}"
            return Screening(tuple(rounds), (), None, tuple(left), trouble=trouble)
        keep, cheaper = math.ceil(len(left) / 2), False
        kept = ranked[:keep]
        if keep == 1 and (smaller := _smaller_within_noise(ranked, ended)) is not None:
            kept, cheaper = [smaller], True
        rounds.append(_round(steps, left, ended, ranked, kept))
        left = [left[index] for index in kept]
        if len(left) == 1:
            return Screening(tuple(rounds), (), left[0], tuple(left), cheaper)
    raise AssertionError("the last round leaves one configuration")


def ladder_after_screening(spec: LadderSpec, trials: Sequence[LadderTrial]) -> tuple[LadderSpec, Screening | None]:
    """Return the spec whose ladders may run now: all of them without a screening, else the winner's, or none yet."""
    if spec.screening_steps is None:
        return spec, None
    state = screen(spec, trials)
    return replace(spec, ladders=() if state.winner is None else (state.winner,)), state


def screening_object(spec: LadderSpec, state: Screening) -> dict[str, Any]:
    """Return the screening in plain JSON types."""
    return {
        "score": SCORE,
        "rounds": [
            {
                "steps": one.steps,
                "configurations": [
                    {
                        "axes": own_axes(c.axes),
                        "loss": c.loss,
                        "behind": None if c.behind is None else c.behind.value,
                        "low": None if c.behind is None else c.behind.low,
                        "high": None if c.behind is None else c.behind.high,
                        "within_noise": c.within_noise,
                        "kept": c.kept,
                        "cause": c.cause,
                    }
                    for c in one.configurations
                ],
            }
            for one in state.rounds
        ],
        "use": own_axes(state.left[0].axes) if state.rounds else None,
        "chosen": state.winner is not None,
        "sentence": sentence(spec, state),
    }


def sentence(spec: LadderSpec, state: Screening) -> str:
    """Return what to use now, how sure that is, and what the screening could not settle."""
    if state.trouble is not None:
        return f"No configuration is chosen: {state.trouble}."
    count = len(spec.ladders)
    if not state.rounds:
        return f"None of the {count} configurations has been compared yet: the first round isn't complete."
    last = state.rounds[-1]
    best = configuration_name(state.left[0].axes)
    if state.winner is None:
        others = ", ".join(configuration_name(ladder.axes) for ladder in state.left[1:])
        return (
            f"Use {best} for now: it is the best of {len(last.configurations)} after {last.steps} steps. Not settled:"
            f" whether it is better than {others}, which the next round compares."
        )
    parts = [f"Use {best}: of {count} configurations it is the one that {len(state.rounds)} rounds of halving left"]
    if state.cheaper_taken:
        taken = next((c for c in state.rounds[-1].configurations if c.kept), None)
        bound = None if taken is None or taken.behind is None else taken.behind.high
        cost = f", and may cost at most {bound:.3g} nats per item (95 %)" if bound is not None else ""
        parts.append(f"the last two were within noise, and it has the smaller weights{cost}")
    dropped = [c for one in state.rounds for c in one.configurations if not c.kept]
    unsettled = [configuration_name(c.axes) for c in dropped if c.within_noise]
    text = "; ".join(parts) + "."
    if unsettled:
        text += f" Not settled: {', '.join(unsettled)} {'was' if len(unsettled) == 1 else 'were'} within noise of the"
        text += " best when dropped (each by its 95 % CI, over seeds and validation items)."
    elif len(dropped) > 0:
        text += " Every dropped one was behind beyond noise (each by its 95 % CI, over seeds and validation items)."
    lost = [f"{configuration_name(c.axes)} ({c.cause})" for c in dropped if c.cause is not None]
    return text + (f" Without a result: {', '.join(lost)}." if lost else "")


def own_axes(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes that distinguish configurations."""
    return {key: value for key, value in axes.items() if key != TRAINING_STEPS}


def configuration_name(axes: Mapping[str, Any]) -> str:
    """Return e.g. ``base · nf4``."""
    return " · ".join(map(str, own_axes(axes).values()))


def _points(spec: LadderSpec, ladder: LadderSettings, steps: int) -> list[TrialPoint]:
    rate = round_rate(ladder.learning_rate)
    fixed = {**ladder.axes, TRAINING_STEPS: steps, RANK: spec.r_start}
    return [{**fixed, SEED: seed, RATE: rate, SPLIT: "validation"} for seed in pilot_seeds_of(spec)]


def _losses(trials: Sequence[LadderTrial]) -> dict[int, Mapping[str, float]] | None:
    """Return seed → item → nats; ``None`` if a run left no result."""
    found = {
        int(trial.params[SEED]): trial.validation
        for trial in trials
        if trial.completed and trial.validation is not None
    }
    finite = all(math.isfinite(value) for losses in found.values() for value in losses.values())
    return found if len(found) == len(trials) and finite else None


def _mean(losses: Mapping[int, Mapping[str, float]]) -> float:
    return float(np.mean([value for of_seed in losses.values() for value in of_seed.values()]))


_Ended = Mapping[int, Sequence[LadderTrial]]


def _ranked(left: Sequence[LadderSettings], ended: _Ended) -> list[int]:
    """Return the indices of the configurations with a result, the lowest loss first."""
    means = {index: _mean(losses) for index in range(len(left)) if (losses := _losses(ended[index])) is not None}
    return sorted(means, key=lambda index: (means[index], index))


def _behind(one: Sequence[LadderTrial], best: Sequence[LadderTrial]) -> Difference | None:
    """Return how much higher the loss of ``one`` is, over shared seeds and items; ``None`` if they don't pair."""
    a, b = _losses(one), _losses(best)
    if a is None or b is None or any(a[seed].keys() != b[min(b)].keys() for seed in a):
        return None
    differences = np.array([[a[seed][item] - b[seed][item] for item in a[seed]] for seed in a], dtype=float)
    return interval(differences, f"{len(a)} seeds and {differences.shape[1]} items", trained=True)


def _smaller_within_noise(ranked: Sequence[int], ended: _Ended) -> int | None:
    """Return the configuration with the smallest weights among those within noise of the best; ``None``: the best."""
    best = ranked[0]
    sizes = {best: _weights(ended[best])}
    for index in ranked[1:]:
        behind = _behind(ended[index], ended[best])
        if behind is not None and (behind.seeds < 2 or behind.low is None or behind.low <= 0):
            sizes[index] = _weights(ended[index])
    known = {index: size for index, size in sizes.items() if size is not None}
    smallest = min(known, key=lambda index: known[index], default=best)
    return smallest if best in known and known[smallest] < known[best] else None


def _weights(trials: Iterable[LadderTrial]) -> float | None:
    sizes = [
        trial.record.memory.base_weight_bytes + (trial.record.memory.quantization_state_bytes or 0)
        for trial in trials
        if trial.record is not None and trial.record.memory.base_weight_bytes is not None
    ]
    return float(np.mean(sizes)) if sizes else None


def _round(
    steps: int, left: Sequence[LadderSettings], ended: _Ended, ranked: Sequence[int], kept: Sequence[int]
) -> ScreeningRound:
    lost = [index for index in range(len(left)) if index not in ranked]
    found = []
    for index in [*ranked, *lost]:
        losses = _losses(ended[index])
        causes = [trial.cause or WITHOUT_ITEMS for trial in ended[index] if not trial.validation]
        one = ScreenedConfiguration(
            axes=left[index].axes,
            loss=None if losses is None else _mean(losses),
            behind=None if losses is None or index == ranked[0] else _behind(ended[index], ended[ranked[0]]),
            weight_bytes=_weights(ended[index]),
            kept=index in kept,
            cause=causes[0] if losses is None and causes else None,
        )
        found.append(one)
    return ScreeningRound(steps, tuple(found))
