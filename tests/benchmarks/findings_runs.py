"""Which runs the findings need, and what their figures say (docs/findings.md): no training, no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CENTRE_RANK, FIXED_ALPHA = 8, 16
"""At this rank alpha = 2r is the fixed alpha, so that both policies share its runs."""
POLICIES = ("fixed", "2r")


@dataclass(frozen=True)
class Model:
    """A model and its runs. ``variant``: of the embedded pair; ``None``: SmolLM2."""

    name: str
    title: str
    variant: str | None
    steps: int
    batch_size: int
    logging_steps: int
    items: int
    """Test items of each run."""
    centre: float
    """The learning rate at r = 8, chosen before these runs."""
    ranks: tuple[int, ...]
    curve_policies: tuple[str, ...] = POLICIES
    quantization_seeds: int = 0
    curve_seeds: int = 0
    rate_seeds: int = 0
    factors: tuple[float, ...] = (1.0, 0.5, 2.0, 0.25, 4.0)
    """Of the law's rate, for the best rate of each rank."""
    rate_ranks: tuple[int, ...] | None = None
    """``None``: ``ranks``."""
    quantization_rank: int = 16


@dataclass(frozen=True, order=True)
class Point:
    """What distinguishes one run of the plan from the others."""

    model: str
    quantization: str
    rank: int
    alpha: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Run:
    """An ended run's figures. ``losses``: nats of each test item; ``None`` if it diverged."""

    point: Point
    status: str
    steps: int
    batch_size: int
    trainable_parameters: int
    loss_tokens: int
    """Tokens with a loss that the training processed."""
    train_seconds: float | None
    measured: str
    versions: str
    curve: Mapping[int, float]
    """Step → training loss, nats per token, mean since the logged step before."""
    losses: Sequence[float] | None


EMBEDDED = Model(
    *("embedded-base", "the embedded base model", "base"),
    steps=40,
    batch_size=16,
    logging_steps=5,
    items=200,
    centre=4e-3,
    ranks=(4, 8, 16, 32, 64),
    quantization_seeds=6,
    curve_seeds=5,
    rate_seeds=3,
)
MODELS = (
    EMBEDDED,
    replace(
        EMBEDDED,
        name="embedded-instruct",
        title="the embedded instruct model",
        variant="instruct",
        ranks=(4, 16, 64),
        curve_policies=("fixed",),
        quantization_seeds=3,
        curve_seeds=3,
        rate_seeds=0,
    ),
    Model(
        *("smollm2-135m", "SmolLM2-135M-Instruct", None),
        steps=8,
        batch_size=4,
        logging_steps=1,
        items=48,
        centre=2e-3,
        ranks=(4, 16, 64),
        curve_policies=("fixed",),
        quantization_seeds=3,
        curve_seeds=3,
        rate_seeds=2,
        rate_ranks=(8, 64),
        factors=(1.0, 0.5, 2.0),
    ),
)


# The plan.


def alpha_of(policy: str, rank: int) -> int:
    return FIXED_ALPHA if policy == "fixed" else 2 * rank


def law_rate(model: Model, policy: str, rank: int) -> float:
    """Return the product's rate: constant under a fixed alpha, ∝ r^−½ under alpha = 2r."""
    return model.centre if policy == "fixed" else model.centre * (rank / CENTRE_RANK) ** -0.5


def point(model: Model, policy: str, rank: int, factor: float, seed: int, quantization: str = "fp32") -> Point:
    rate = float(f"{law_rate(model, policy, rank) * factor:.4g}")
    return Point(model.name, quantization, rank, alpha_of(policy, rank), rate, seed)


def planned(model: Model, runs: Iterable[Run] = ()) -> list[Point]:
    """Return all runs of the model's findings, without repetition.

    First come every second rank and two seeds at each rate, then the other ranks and seeds. ``runs``: those that have
    ended; where the best learning rate is at the edge of a rank's grid, one rate beyond it is added.
    """
    first = replace(
        model,
        ranks=model.ranks[::2] if len(model.ranks) > 3 else model.ranks,
        rate_seeds=min(2, model.rate_seeds),
    )
    return list(dict.fromkeys([*_stages(first), *_beyond(model, list(runs)), *_stages(model)]))


def _stages(model: Model) -> Iterator[Point]:
    for seed in range(1, model.quantization_seeds + 1):
        for mode in ("bf16", "nf4"):
            yield point(model, "2r", model.quantization_rank, 1.0, seed, mode)
    for seed, policy in product(range(1, model.curve_seeds + 1), model.curve_policies):
        yield from (point(model, policy, rank, 1.0, seed) for rank in model.ranks)
    for policy, seed, factor in product(POLICIES, range(1, model.rate_seeds + 1), model.factors):
        yield from (point(model, policy, rank, factor, seed) for rank in rate_ranks(model))


def rate_ranks(model: Model) -> tuple[int, ...]:
    return model.rate_ranks or model.ranks


def _beyond(model: Model, runs: Sequence[Run]) -> Iterator[Point]:
    for policy, rank in product(POLICIES, rate_ranks(model)):
        grid = rate_grid(model, runs, policy, rank)
        if grid is not None:
            factors, losses = grid
            best = int(np.argmin(losses.mean(axis=(1, 2))))
            beyond = {0: factors[0] / 2, len(factors) - 1: factors[-1] * 2}.get(best)
            if beyond is not None:
                yield from (point(model, policy, rank, beyond, seed + 1) for seed in range(losses.shape[1]))


def rate_grid(model: Model, runs: Iterable[Run], policy: str, rank: int) -> tuple[list[float], Array] | None:
    """Return factors of the law's rate, and their losses (factors, seeds, items).

    The seeds are the first ones that have every rate of the plan; ``None`` if there are fewer than two. A run that
    diverged has infinite losses: its rate isn't the best one.
    """
    known = {run.point: run for run in runs}

    def runs_at(factor: float, seeds: int) -> list[Run]:
        points = [point(model, policy, rank, factor, seed) for seed in range(1, seeds + 1)]
        return [known[each] for each in points] if all(each in known for each in points) else []

    complete = [n for n in range(2, model.rate_seeds + 1) if all(runs_at(factor, n) for factor in model.factors)]
    if not complete:
        return None
    cells = {factor: runs_at(factor, complete[-1]) for factor in (2.0**power for power in range(-8, 9))}
    factors = [factor for factor, cell in cells.items() if cell]
    losses = [[run.losses or [np.inf] * model.items for run in cells[factor]] for factor in factors]
    return factors, np.array(losses)


# The data file.

COLUMNS = (
    *("model", "quantization", "rank", "alpha", "learning_rate", "seed", "status", "steps", "batch_size"),
    *(
        "trainable_parameters",
        "loss_tokens",
        "train_seconds",
        "measured",
        "versions",
        "test_loss",
        "curve",
        "test_items_millinats",
    ),
)


def save(runs: Sequence[Run], path: Path) -> None:
    """Write one row a run. ``curve``: step:loss pairs; items in the order of their ids, rounded to 0.001 nats."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for run in runs:
            at, losses = run.point, run.losses
            writer.writerow(
                (
                    *(at.model, at.quantization, at.rank, at.alpha, at.learning_rate, at.seed, run.status, run.steps),
                    *(run.batch_size, run.trainable_parameters, run.loss_tokens),
                    "" if run.train_seconds is None else f"{run.train_seconds:.2f}",
                    *(run.measured, run.versions),
                    "" if losses is None else f"{np.mean(losses):.5f}",
                    " ".join(f"{step}:{loss:.4f}" for step, loss in sorted(run.curve.items())),
                    "" if losses is None else " ".join(f"{1000 * loss:.0f}" for loss in losses),
                )
            )


def load(path: Path) -> list[Run]:
    """Return the runs of a file that :func:`save` wrote."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [_run(row) for row in csv.DictReader(stream)]


def _run(row: Mapping[str, str]) -> Run:
    at = Point(
        *(row["model"], row["quantization"], int(row["rank"]), int(row["alpha"])),
        *(float(row["learning_rate"]), int(row["seed"])),
    )
    pairs = (text.split(":") for text in row["curve"].split())
    return Run(
        at,
        row["status"],
        int(row["steps"]),
        int(row["batch_size"]),
        int(row["trainable_parameters"]),
        int(row["loss_tokens"]),
        float(row["train_seconds"]) if row["train_seconds"] else None,
        row["measured"],
        row["versions"],
        {int(step): float(loss) for step, loss in pairs},
        [int(text) / 1000 for text in row["test_items_millinats"].split()] or None,
    )
