"""LoRA against full tuning: the best learning rates, and what each forgets (docs/findings.md).

    OMP_NUM_THREADS=1 python tests/benchmarks/findings_methods.py --output outputs/findings [--minutes 10]
    python tests/benchmarks/findings_methods.py --output outputs/findings --collect docs/findings_methods.csv

The first command trains the embedded base model with both methods at five learning rates; killed and called again, it
goes on. Then come more seeds at the best rate of each. The second command writes the figures of all runs to one file;
``findings.py --page`` has its answers.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from findings_answers import (
    DRAWS,
    Estimate,
    below_zero,
    grid_minimum,
    mean_over_seeds,
    relative_difference,
    t_half_width,
    within,
)
from findings_page import Part, number_interval, paragraph, percent_interval, table

from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import read_runs
from qlora_exp.records.types import RunRecord, Status

RANK, ALPHA, STEPS, BATCH, ITEMS, DOCUMENTS = 8, 16, 40, 16, 200, 64
CENTRES = {"lora": 4e-3, "full": 4e-4}
"""The published factor is where the grids begin: ten."""
FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
RATE_SEEDS, SEEDS = 3, 5
"""Of every rate, and of the best rate of each method."""
PUBLISHED, WITHIN_DOUBLINGS = 10.0, 1.0
"""About ten times: the whole interval of the ratio is within a factor of 2 of ten."""
SETTINGS = (
    *("model=embedded", "model.variant=base", "task=embedded", "tracking=off", "training.device=cpu"),
    *("training.threads=1", "targets=all_linear", "quantization=fp32", "lora.alpha_policy=fixed", f"lora.r={RANK}"),
    *(f"lora.alpha={ALPHA}", f"training.max_steps={STEPS}", f"training.batch_size={BATCH}"),
    *("evaluation.generate=false", "evaluation.baselines=false", "evaluation.split=test"),
    *("evaluation.forgetting=true", f"evaluation.forgetting_documents={DOCUMENTS}"),
    # kind: generation leaves out the options' likelihoods, most of the scoring: only the loss is needed here.
    *("task.kind=generation", "task.goal=null", f"task.max_test_items={ITEMS}", "task.max_validation_items=4"),
)
NAMES = {"lora": f"LoRA r = {RANK}", "full": "full tuning"}
TEXT = """## LoRA against full tuning

**Published**: the best learning rate of LoRA is about ten times that of full tuning (Schulman et al. 2025); LoRA
forgets less than full tuning (Biderman et al. 2024, [arXiv:2405.09673](https://arxiv.org/abs/2405.09673)).

**Claims here**: the ratio of the best rates is between 5 and 20. At the best rate of each method, full tuning forgets
more: its loss on general text grows more, in nats per byte. {settings}

{grids}

The best rate and its interval are found as in the section above. Forgetting depends on the rate, too: a lower one with
nearly the same test loss may forget less.

{forgetting}

*Grows by* is the loss on {documents} documents of general text after training, minus before. Differences are paired by
seed, in the test loss also by item; a positive one means that full tuning is worse.

{sentences}

"""


@dataclass(frozen=True, order=True)
class MethodPoint:
    """What distinguishes one run from the others."""

    method: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class MethodRun:
    """An ended run's figures. ``losses``: nats of each test item; ``forgetting``: growth of the loss on general text,
    nats per byte. Both are ``None`` if it diverged."""

    point: MethodPoint
    status: str
    trainable_parameters: int
    train_seconds: float | None
    measured: str
    losses: Sequence[float] | None
    forgetting: float | None


# The plan.


def rate(method: str, factor: float) -> float:
    return float(f"{CENTRES[method] * factor:.4g}")


def points(runs: Sequence[MethodRun]) -> Iterator[MethodPoint]:
    """Return all runs that are needed. Where the best rate is at a grid's edge, one rate beyond it is added; then come
    more seeds at the best rate."""
    for seed in range(1, RATE_SEEDS + 1):
        for factor in FACTORS:
            yield from (MethodPoint(method, rate(method, factor), seed) for method in CENTRES)
    for method in CENTRES:
        if (grid := method_grid(method, runs)) is None:
            continue
        rates, losses = grid
        best = int(np.argmin(losses.mean(axis=(1, 2))))
        beyond = {0: rates[0] / 2, len(rates) - 1: rates[-1] * 2}.get(best)
        if beyond is not None:
            yield from (MethodPoint(method, float(f"{beyond:.4g}"), seed + 1) for seed in range(RATE_SEEDS))
        else:
            yield from (MethodPoint(method, rates[best], seed + 1) for seed in range(RATE_SEEDS, SEEDS))


def method_grid(method: str, runs: Sequence[MethodRun]) -> tuple[list[float], np.ndarray] | None:
    """Return the rates, and their losses (rates, seeds, items); ``None`` while one is missing. A run that diverged has
    infinite losses."""
    known = {run.point: run for run in runs if run.point.method == method}
    rates = sorted({point.learning_rate for point in known})
    cells = [[known.get(MethodPoint(method, each, seed + 1)) for seed in range(RATE_SEEDS)] for each in rates]
    complete = [(each, [run for run in cell if run]) for each, cell in zip(rates, cells, strict=True) if all(cell)]
    if len(complete) < len(FACTORS):
        return None
    losses = [[run.losses or [math.inf] * ITEMS for run in cell] for _, cell in complete]
    return [each for each, _ in complete], np.array(losses, dtype=float)


# The answers.


@dataclass(frozen=True)
class MethodAnswers:
    rates: dict[str, tuple[list[float], list[float], Estimate, bool]]
    """Method → rates, their mean losses, the best rate, whether the grid contains its interval."""
    grown: dict[str, list[float]]
    """Method → mean growth of the loss on general text at each rate, nats per byte."""
    ratio: Estimate
    """Best rate of LoRA over that of full tuning."""
    best: dict[str, list[MethodRun]]
    """Method → runs at its best rate, over the seeds that both have."""
    forgetting: Estimate
    """Of full tuning minus LoRA, nats per byte."""
    quality: Estimate
    """Of full tuning, as a share of LoRA's test loss; positive: full tuning is worse."""

    @property
    def ratio_verdict(self) -> str:
        if not all(resolved for *_, resolved in self.rates.values()):
            return "not decided"
        doublings = (math.log2(bound / PUBLISHED) for bound in (self.ratio.value, self.ratio.low, self.ratio.high))
        return within(Estimate(*doublings), WITHIN_DOUBLINGS)

    @property
    def forgetting_verdict(self) -> str:
        return below_zero(Estimate(-self.forgetting.value, -self.forgetting.high, -self.forgetting.low))


def method_answers(runs: Sequence[MethodRun], draws: int = DRAWS) -> MethodAnswers | None:
    """Return the answers; ``None`` while a rate of the grids is missing."""
    grids = {method: method_grid(method, runs) for method in CENTRES}
    generator = np.random.default_rng(1)
    items = generator.multinomial(ITEMS, np.full(ITEMS, 1 / ITEMS), size=draws) / ITEMS
    rates, growth, best, logs, drawn = {}, {}, {}, {}, {}
    for method, grid in grids.items():
        if grid is None:
            return None
        found = grid_minimum(np.log2(grid[0]), grid[1], items, generator)
        low, high = found.log - found.half_width, found.log + found.half_width
        estimate = Estimate(*(float(2.0**log) for log in (found.log, low, high)))
        rates[method] = (grid[0], list(found.means), estimate, found.resolved)
        logs[method], drawn[method] = found.log, found.draws
        growth[method] = [
            float(np.mean([run.forgetting if run.forgetting is not None else math.nan for run in at_rate]))
            for each in grid[0]
            if (at_rate := [run for run in runs if _at(run, method, each) and run.point.seed <= RATE_SEEDS])
        ]
        chosen = grid[0][int(np.argmin(found.means))]
        best[method] = {run.point.seed: run for run in runs if _at(run, method, chosen) and run.losses is not None}
    ratio = logs["lora"] - logs["full"]
    half = t_half_width(drawn["lora"] - drawn["full"], 2 * (RATE_SEEDS - 1))
    seeds = sorted(best["lora"].keys() & best["full"].keys())
    paired = {method: [own[seed] for seed in seeds] for method, own in best.items()}
    grown = {method: np.array([run.forgetting for run in own], dtype=float) for method, own in paired.items()}
    losses = {method: np.array([run.losses for run in own], dtype=float) for method, own in paired.items()}
    return MethodAnswers(
        rates,
        growth,
        Estimate(*(float(2.0**log) for log in (ratio, ratio - half, ratio + half))),
        paired,
        mean_over_seeds(grown["full"] - grown["lora"]),
        relative_difference(losses["full"], losses["lora"]),
    )


def _at(run: MethodRun, method: str, learning_rate: float) -> bool:
    return (run.point.method, run.point.learning_rate) == (method, learning_rate)


# The page.


def methods_part(runs: Sequence[MethodRun]) -> Part | None:
    """Return the summary's rows and the section; ``None`` without complete grids."""
    found = method_answers(runs)
    if found is None:
        return None
    ratio, title = found.ratio, "the embedded base model"
    ratio_text = f"{ratio.value:.2g} ({ratio.low:.2g} to {ratio.high:.2g})"
    narrow = [NAMES[method] for method, (*_, resolved) in found.rates.items() if not resolved]
    forgets = f"{number_interval(found.forgetting)} nats per byte"
    rows = (
        (
            *("The best LoRA rate is about ten times that of full tuning", title, f"**{found.ratio_verdict}**"),
            f"ratio {ratio_text}{'; a grid of rates is too narrow' if narrow else ''}",
        ),
        (
            *("LoRA forgets less than full tuning", title, f"**{found.forgetting_verdict}**"),
            f"full − LoRA: {forgets}",
        ),
    )
    return Part(
        rows,
        TEXT.format(
            settings=f"LoRA has r = {RANK} and alpha = {ALPHA}.",
            grids=_grids_table(found),
            forgetting=_forgetting_table(found),
            documents=DOCUMENTS,
            sentences=paragraph(_sentences(found, ratio_text, forgets, narrow, runs)),
        ),
    )


def _grids_table(found: MethodAnswers) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for method, (rates, losses, best, resolved) in found.rates.items():
            cells = zip(rates, losses, found.grown[method], strict=True)
            grid = ", ".join(f"{rate:.2g}: {loss:.3f} ({grown:.2f})" for rate, loss, grown in cells)
            interval = f"{best.value:.2g} ({best.low:.2g} to {best.high:.2g})"
            yield (
                NAMES[method],
                RATE_SEEDS,
                grid,
                f"{min(losses):.3f}",
                interval,
                "wide enough" if resolved else "too narrow",
            )

    titles = (
        "method",
        "seeds",
        "rate: mean test loss in nats per item, grows by",
        "lowest",
        "best rate (95 % CI)",
        "grid",
    )
    return table(titles, rows())


def _forgetting_table(found: MethodAnswers) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for method, runs in found.best.items():
            grown = np.mean([run.forgetting for run in runs if run.forgetting is not None])
            first, reference = runs[0], method == "lora"
            yield (
                *(NAMES[method], f"{first.point.learning_rate:g}", len(runs), f"{first.trainable_parameters:,}"),
                *(f"{np.mean([run.losses for run in runs]):.3f}", f"{grown:.3f}"),
                *(("–", "–") if reference else (percent_interval(found.quality), number_interval(found.forgetting))),
            )

    titles = ("method", "learning rate", "seeds", "trained parameters", "test loss, nats per item", "grows by")
    return table((*titles, "test loss − LoRA's (95 % CI)", "grows by − LoRA's (95 % CI)"), rows())


def _sentences(found: MethodAnswers, ratio: str, forgets: str, narrow: Sequence[str], runs: Sequence[MethodRun]) -> str:
    verbs = {"not decided": "is not decided"}
    verdict, other = found.ratio_verdict, found.forgetting_verdict
    said = f"The best rate of LoRA is {ratio} times that of full tuning: the first claim {verbs.get(verdict, verdict)}."
    if narrow:
        said += f" The grid is too narrow for the best rate's interval of {' and of '.join(narrow)}."
    said += f" Forgetting of full tuning minus that of LoRA is {forgets}: the second claim {verbs.get(other, other)}."
    diverged = sum(run.losses is None for run in runs)
    minutes = sum(run.train_seconds or 0.0 for run in runs) / 60
    days = sorted({run.measured for run in runs})
    said += (
        f" {len(runs)} runs of {STEPS} steps of {BATCH} rows, {ITEMS} test items, {diverged} diverged; {minutes:.0f}"
    )
    return f"{said} minutes of training on shared cores, {' to '.join(dict.fromkeys((days[0], days[-1])))}."


# The data file.

COLUMNS = (
    *("method", "learning_rate", "seed", "status", "trainable_parameters", "train_seconds", "measured"),
    *("test_loss", "forgetting_nats_per_byte", "test_items_millinats"),
)


def load_methods(path: Path) -> list[MethodRun]:
    """Return the runs of a file that ``--collect`` wrote; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [_of_row(row) for row in csv.DictReader(stream)]


def _of_row(row: dict[str, str]) -> MethodRun:
    return MethodRun(
        MethodPoint(row["method"], float(row["learning_rate"]), int(row["seed"])),
        row["status"],
        int(row["trainable_parameters"]),
        float(row["train_seconds"]) if row["train_seconds"] else None,
        row["measured"],
        [int(text) / 1000 for text in row["test_items_millinats"].split()] or None,
        float(row["forgetting_nats_per_byte"]) if row["forgetting_nats_per_byte"] else None,
    )


def save_methods(runs: Sequence[MethodRun], path: Path) -> None:
    """Write one row a run; items in the order of their ids, rounded to 0.001 nats."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for run in sorted(runs, key=lambda run: run.point):
            at, losses = run.point, run.losses
            writer.writerow(
                (
                    *(at.method, at.learning_rate, at.seed, run.status, run.trainable_parameters),
                    *("" if run.train_seconds is None else f"{run.train_seconds:.2f}", run.measured),
                    "" if losses is None else f"{np.mean(losses):.5f}",
                    "" if run.forgetting is None else f"{run.forgetting:.5f}",
                    "" if losses is None else " ".join(f"{1000 * loss:.0f}" for loss in losses),
                )
            )


# The runs.


def method_run(record: RunRecord, outputs: OutputPaths) -> MethodRun:
    assert record.plan is not None
    losses = forgetting = None
    if record.status is Status.COMPLETED:
        table = pq.read_table(outputs.run(record.run_id).items("after", "test"), columns=["item_id", "loss_sum_nats"])
        losses = table.sort_by("item_id")["loss_sum_nats"].to_pylist()
        forgetting = record.scores.forgetting.difference if record.scores.forgetting else None
    config = record.config
    point = MethodPoint(config["method"]["kind"], config["training"]["learning_rate"], record.seed or 0)
    trained, measured = record.plan.trainable_parameters, str(record.started_at)[:10]
    return MethodRun(point, record.status.value, trained, record.speed.train_seconds, measured, losses, forgetting)


def ended_method_runs(outputs: OutputPaths) -> list[MethodRun]:
    ended = (Status.COMPLETED, Status.DIVERGED)
    found = [method_run(record, outputs) for record in read_runs(outputs)[0] if record.status in ended]
    return list({run.point: run for run in found}.values())


def train(outputs: OutputPaths, until: float) -> None:
    from qlora_exp.config.compose import compose
    from qlora_exp.models.base_cache import BaseCache
    from qlora_exp.runs.execute import execute

    bases, runs = BaseCache(), ended_method_runs(outputs)
    while time.monotonic() < until:
        known = {run.point for run in runs}
        point = next((point for point in points(runs) if point not in known), None)
        if point is None:
            return
        choice = [f"method={point.method}", f"training.learning_rate={point.learning_rate}", f"seed={point.seed}"]
        record = execute(compose([*SETTINGS, *choice, f"output_root={outputs.root}"]), bases=bases)
        if record.status not in (Status.COMPLETED, Status.DIVERGED):
            sys.exit(f"run {record.run_id} was not completed: {record.status.value}; the same command tries it again")
        runs.append(method_run(record, outputs))
        print(f"{point}: {record.status.value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after that time")
    parser.add_argument("--collect", type=Path, help="write the runs' figures to this CSV file and train nothing")
    given = parser.parse_args()
    outputs = OutputPaths.of(str(given.output.resolve() / "methods"))
    if given.collect is not None:
        save_methods(ended_method_runs(outputs), given.collect)
        return
    train(outputs, time.monotonic() + 60 * given.minutes)


if __name__ == "__main__":
    main()
