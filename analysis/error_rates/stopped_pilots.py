"""What stopping pilots early saves, and how often it changes the chosen learning rate.

Real pilots, each trained to its end (docs/pilot_curves.csv, by tests/benchmarks/pilot_curves.py), are searched again
and again: around each learning rate that has both neighbours, with the ladder's own code. docs/statistics.md has the
result.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.analysis.pilots import (
    MAX_BEHIND,
    SHARE_OF_STEPS,
    comparison_loss,
    comparison_step,
    is_behind,
)

PILOTS_FILE = Path(__file__).resolve().parents[2] / "docs" / "pilot_curves.csv"
SHARES = (0.25, SHARE_OF_STEPS, 0.75)
LIMITS = (0.02, MAX_BEHIND, 0.1, 0.15, 0.2)


@dataclass(frozen=True)
class FullPilot:
    """A pilot that was trained to its end."""

    learning_rate: float
    validation_loss: float
    """Nats per item; infinite if it diverged."""
    steps: int
    curve: Mapping[int, float]


PilotCell = tuple[str, int, int]
"""Variant, rank and seed: its pilots differ in their learning rate only."""


def load_pilots(path: Path) -> dict[PilotCell, list[FullPilot]]:
    """Return the pilots of each cell, by learning rate."""
    cells: dict[PilotCell, list[FullPilot]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            pairs = (text.split(":") for text in row["curve"].split())
            pilot = FullPilot(
                float(row["learning_rate"]),
                float(row["validation_loss"] or "inf"),
                int(row["steps"]),
                {int(step): float(loss) for step, loss in pairs},
            )
            cells[row["variant"], int(row["rank"]), int(row["seed"])].append(pilot)
    return {cell: sorted(pilots, key=lambda pilot: pilot.learning_rate) for cell, pilots in sorted(cells.items())}


@dataclass(frozen=True)
class Search:
    """One search of a learning rate: three pilots, and a fourth if the best one is at the edge."""

    chosen: FullPilot
    steps: int
    """Of all its pilots together."""
    behind: float
    """How far the chosen pilot's training loss was above the best one at the comparison, as a share of that one."""


def search(pilots: Sequence[FullPilot], centre: int, share: float, max_behind: float, at_once: bool) -> Search | None:
    """Search around ``pilots[centre]``; ``None`` if a pilot beyond the edge is needed that was not run.

    Args:
        max_behind: infinite: every pilot runs to its end.
        at_once: the first three pilots run at the same time; else one after the other, the centre first.
    """
    tried = [centre, centre - 1, centre + 1]
    stopped = _stopped(pilots, tried, share, max_behind, at_once)
    best = _best(pilots, tried, share, max_behind)
    if best != centre:
        beyond = 2 * best - centre
        if not 0 <= beyond < len(pilots):
            return None
        tried.append(beyond)
        stopped |= _stopped(pilots, tried, share, max_behind, at_once=False)
        best = _best(pilots, tried, share, max_behind)
    steps = sum(_stop_step(pilots[one], share, at_once) if one in stopped else pilots[one].steps for one in tried)
    losses = [_loss(pilots[one], share) for one in tried]
    return Search(pilots[best], steps, _loss(pilots[best], share) / min(losses) - 1)


def _loss(pilot: FullPilot, share: float) -> float:
    loss = comparison_loss(pilot.curve, comparison_step(pilot.steps, None, share))
    return math.inf if loss is None else loss


def _stopped(
    pilots: Sequence[FullPilot], tried: Sequence[int], share: float, max_behind: float, at_once: bool
) -> set[int]:
    losses = [_loss(pilots[one], share) for one in tried]
    known = [losses if at_once else losses[: place + 1] for place in range(len(tried))]
    return {one for one, loss, others in zip(tried, losses, known, strict=True) if is_behind(loss, others, max_behind)}


def _best(pilots: Sequence[FullPilot], tried: Sequence[int], share: float, max_behind: float) -> int:
    losses = [_loss(pilots[one], share) for one in tried]
    kept = [one for one, loss in zip(tried, losses, strict=True) if not is_behind(loss, losses, max_behind)]
    return min(kept, key=lambda one: pilots[one].validation_loss)


def _stop_step(pilot: FullPilot, share: float, at_once: bool) -> int:
    """The first logged step at the comparison or, if the better pilot runs at the same time, the one after it."""
    step = comparison_step(pilot.steps, None, share)
    logged = sorted(at for at in pilot.curve if at >= step)
    return [*logged, pilot.steps, pilot.steps][int(at_once)]


@dataclass(frozen=True)
class MeasuredRule:
    """All searches with one rule."""

    share: float
    max_behind: float
    searches: int
    changed: int
    """Searches that choose another learning rate than with every pilot trained to its end."""
    worst: float
    """The largest rise of the chosen pilot's validation loss, in nats per item."""
    behind: float
    """Of the searches in full: how far the best pilot was behind at the comparison at most (``Search.behind``)."""
    saved: tuple[float, float]
    """Share of the pilots' steps that is saved: one after the other, and three at a time."""


def measure_rule(cells: Mapping[PilotCell, Sequence[FullPilot]], share: float, max_behind: float) -> MeasuredRule:
    """Search in every cell around every learning rate that has both neighbours."""
    rises, behind, saved = [], [0.0], {False: [0, 0], True: [0, 0]}
    for pilots in cells.values():
        for centre in range(1, len(pilots) - 1):
            full = search(pilots, centre, share, math.inf, at_once=False)
            both = {at_once: search(pilots, centre, share, max_behind, at_once) for at_once in (False, True)}
            if full is None or None in both.values():
                continue
            behind.append(full.behind)
            for at_once, found in both.items():
                assert found is not None
                saved[at_once][0] += full.steps - found.steps
                saved[at_once][1] += full.steps
                rises.append(found.chosen.validation_loss - full.chosen.validation_loss)
    shares = [part / whole if whole else 0.0 for part, whole in saved.values()]
    changed = sum(rise != 0.0 for rise in rises) // 2
    return MeasuredRule(
        share, max_behind, len(rises) // 2, changed, max(rises, default=0.0), max(behind), (shares[0], shares[1])
    )


def rules_table(rows: Sequence[MeasuredRule]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| compared after | stopped if above the best by | searches | another choice | largest rise of the validation "
        "loss | steps saved, one at a time | three at a time | best pilot behind by at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        lines.append(
            f"| {one.share:.0%} of the steps | {one.max_behind:.0%} | {one.searches} | {one.changed} | "
            f"{one.worst:.3f} nats per item | {one.saved[0]:.0%} | {one.saved[1]:.0%} | "
            f"{one.behind:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the rule that stops pilots early on stored pilots.")
    parser.add_argument("--data", type=Path, default=PILOTS_FILE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    cells = load_pilots(options.data)
    print(f"{sum(map(len, cells.values()))} pilots in {len(cells)} cells (variant × rank × seed)\n")
    print(rules_table([measure_rule(cells, share, limit) for share in SHARES for limit in LIMITS]))


if __name__ == "__main__":
    main()
