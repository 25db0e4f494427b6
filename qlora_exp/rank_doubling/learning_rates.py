"""The learning rate of each rank of a ladder, from the validation losses of its pilot runs.

At r_start the rate with the lowest mean loss over the pilot seeds is chosen. One law carries it to the other ranks.
Pilots of a single seed would choose by chance: two rates whose means are equal win on about every second seed, and the
chosen rate moves the gain of a doubling by more than the noise of the runs that decide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_exp.analysis.pilots import is_behind, is_better_beyond_noise
from qlora_exp.errors import AnalysisError
from qlora_exp.rank_doubling.ladder_trials import LadderTrial
from qlora_exp.rank_doubling.settings import round_rate
from qlora_exp.records.types import Status

PilotRun = Callable[[float, int], LadderTrial | None]
"""(learning rate, seed) → the ended pilot of a rank; ``None``: it has not ended, and is requested now."""


@dataclass(frozen=True)
class Pilot:
    """One pilot run of a learning rate."""

    learning_rate: float
    validation_loss: float | None
    """Nats per item; ``None`` if the run left no loss (stopped early, diverged, failed, or out of memory)."""
    training_loss: float | None = None
    """Nats per token at the step at which pilots are compared; ``None`` unless ``sweep.ladder.stop_pilots``."""
    behind: bool = False
    """The training loss is clearly behind another pilot's of this seed. The run was stopped early. If the other one ran
    later, it was completed, but isn't chosen either: the choice depends on the losses, not on the order of the runs."""
    seed: int | None = None
    """``None`` in files of versions with one pilot seed."""
    cause: str | None = None
    """Why it left no validation loss."""
    diverged: bool = False


@dataclass(frozen=True)
class LearningRateChoice:
    """The learning rate of one rank."""

    rank: int
    learning_rate: float
    unresolved: bool = False
    """The best pilot is still at the edge of the grid after one extension."""
    pilots: tuple[Pilot, ...] = ()
    carried: float | None = None
    """The rate that the law carries over from r_start. Where it differs from ``learning_rate``, pilots have shown a
    better one. ``None`` at r_start, and if no law is used."""


def best_rate(
    rank: int, rates: Sequence[float], seeds: Sequence[int], pilot_run: PilotRun
) -> LearningRateChoice | None:
    """Return the rate with the lowest mean validation loss; ``None``: pilots are still missing.

    A rate that is behind at one seed isn't chosen, so it isn't run with the next seeds. Nor are any if only one rate is
    left. If the best rate is at the edge of the grid, one rate beyond it is tried.

    Args:
        rates: in the order in which their pilots start.
    """
    return _choice(rank, rates, seeds, pilot_run, None)


def carried_or_better_rate(
    rank: int, carried: float, rates: Sequence[float], seeds: Sequence[int], pilot_run: PilotRun
) -> LearningRateChoice | None:
    """Return ``carried``, or the best other rate if the pilots show that it is better beyond their noise; ``None``:
    pilots are still missing.

    The two are compared by their validation losses, paired by seed. If the pilot at ``carried`` was stopped early,
    their training losses at the step of comparison are. A carried rate that diverged is left.
    """
    return _choice(rank, [carried, *(rate for rate in rates if rate != carried)], seeds, pilot_run, carried)


def _choice(
    rank: int, rates: Sequence[float], seeds: Sequence[int], pilot_run: PilotRun, carried: float | None
) -> LearningRateChoice | None:
    extended = False
    while True:
        pilots = _run_pilots(rates, seeds, pilot_run, carried)
        if pilots is None:
            return None
        best = _best(pilots, rank) if carried is None else _best_or_carried(pilots, carried, rank)
        grid = sorted(rates)
        at_edge = best != carried and best in (grid[0], grid[-1])
        if extended or not at_edge:
            in_order = sorted(pilots, key=lambda pilot: (pilot.learning_rate, pilot.seed or 0))
            return LearningRateChoice(rank, best, at_edge, tuple(in_order), carried)
        beyond = grid[0] ** 2 / grid[1] if best == grid[0] else grid[-1] ** 2 / grid[-2]
        rates, extended = [*rates, round_rate(beyond)], True


def _run_pilots(
    rates: Sequence[float], seeds: Sequence[int], pilot_run: PilotRun, carried: float | None
) -> list[Pilot] | None:
    """Return the pilots of all rates and seeds that can change the choice; ``None``: some are missing."""
    pilots: list[Pilot] = []
    left = list(rates)
    for seed in seeds:
        if pilots and len(left) == 1:
            break
        trials = {rate: pilot_run(rate, seed) for rate in left}
        ended = {rate: trial for rate, trial in trials.items() if trial is not None}
        if len(ended) < len(trials):
            return None
        of_seed = _pilots(ended, seed)
        pilots += of_seed
        standing = {pilot.learning_rate for pilot in of_seed if _stands(pilot)}
        if standing:  # else all of them failed, and another seed may show more
            left = [rate for rate in left if rate in standing or rate == carried]
    return pilots


def _pilots(trials: Mapping[float, LadderTrial], seed: int) -> list[Pilot]:
    """Return the ended pilots of one rank and seed. Pilots that failed are compared with none."""
    losses = {rate: _training_loss(trial) for rate, trial in trials.items()}
    known = [loss for loss in losses.values() if loss is not None]
    return [
        Pilot(
            learning_rate=rate,
            validation_loss=_validation_loss(trial),
            training_loss=(loss := losses[rate]),
            behind=loss is not None and is_behind(loss, known),
            seed=seed,
            cause=trial.cause,
            diverged=trial.record is not None and trial.record.status is Status.DIVERGED,
        )
        for rate, trial in trials.items()
    ]


def _stands(pilot: Pilot) -> bool:
    return pilot.validation_loss is not None and not pilot.behind


def _best(pilots: Sequence[Pilot], rank: int) -> float:
    best = _best_standing(pilots)
    if best is None:  # all others failed, among them the one because of which these were stopped
        best = _lowest_mean(_by_rate(pilots), lambda pilot: pilot.training_loss)
    if best is None:
        causes = sorted({pilot.cause for pilot in pilots if pilot.cause is not None})
        reason = f": {'; '.join(causes)}" if causes else ""
        raise AnalysisError(f"no pilot at r = {rank} left a validation loss{reason}", f"r = {rank}")
    return best


def _best_standing(pilots: Iterable[Pilot]) -> float | None:
    """Return the rate with the lowest mean validation loss that is behind at no seed."""
    kept = {rate: own for rate, own in _by_rate(pilots).items() if not any(pilot.behind for pilot in own)}
    return _lowest_mean(kept, lambda pilot: pilot.validation_loss)


def _best_or_carried(pilots: Sequence[Pilot], carried: float, rank: int) -> float:
    own = _by_rate(pilots)[carried]
    other = _best_standing(pilot for pilot in pilots if pilot.learning_rate != carried)
    if other is None:
        return _best(own, rank)
    if any(pilot.diverged for pilot in own) or all(
        pilot.training_loss is pilot.validation_loss is None for pilot in own
    ):
        return other
    others = {pilot.seed: pilot for pilot in pilots if pilot.learning_rate == other}
    pairs = [(others[pilot.seed], pilot) for pilot in own if pilot.seed in others]
    if any(pilot.behind for pilot in own):
        losses = [(pilot.training_loss, carried_pilot.training_loss) for pilot, carried_pilot in pairs]
    else:
        losses = [(pilot.validation_loss, carried_pilot.validation_loss) for pilot, carried_pilot in pairs]
    known = [(a, b) for a, b in losses if a is not None and b is not None]
    return other if is_better_beyond_noise([a for a, _ in known], [b for _, b in known]) else carried


def _by_rate(pilots: Iterable[Pilot]) -> dict[float, list[Pilot]]:
    by_rate: dict[float, list[Pilot]] = {}
    for pilot in pilots:
        by_rate.setdefault(pilot.learning_rate, []).append(pilot)
    return by_rate


def _lowest_mean(by_rate: Mapping[float, Sequence[Pilot]], loss: Callable[[Pilot], float | None]) -> float | None:
    """Return the rate with the fewest missing losses, then the lowest mean, then the lowest rate."""
    ranked = []
    for rate, pilots in by_rate.items():
        known = [value for pilot in pilots if (value := loss(pilot)) is not None]
        if known:
            ranked.append((len(pilots) - len(known), statistics.fmean(known), rate))
    return min(ranked)[2] if ranked else None


def _training_loss(trial: LadderTrial) -> float | None:
    """Return a pilot's loss at the step of comparison; ``None`` if it isn't known or the run failed."""
    training = trial.record.training if trial.record is not None else None
    if trial.record is None or training is None or training.pilot_loss is None:
        return None
    return training.pilot_loss.loss if trial.record.status in (Status.COMPLETED, Status.PRUNED) else None


def _validation_loss(trial: LadderTrial) -> float | None:
    after = trial.record.scores.after if trial.completed and trial.record else None
    loss = after.loss_per_item if after else None
    return loss if loss is not None and math.isfinite(loss) else None
