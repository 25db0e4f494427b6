"""A run's learning curve as a few lines of text, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

ROWS, COLUMNS = 8, 60
MIN_POINTS = 3
"""Fewer losses are no curve: the summary has them."""
LOG_FROM = 2.0
"""If the highest loss is more than this many times the lowest, the axis is logarithmic."""
UNICODE_SIGNS = {"training": "•", "validation": "◆", "axis": "│", "corner": "└", "line": "─"}
ASCII_SIGNS = {"training": "*", "validation": "o", "axis": "|", "corner": "+", "line": "-"}


def text_curve(points: Sequence[Mapping[str, Any]], stream: TextIO) -> list[str]:
    """Return a plot of training and validation loss over the steps, 70 columns wide; empty for fewer than three points.

    ``points``: of curve.jsonl. ``stream``: where the lines will be printed; if it can't encode the plot's characters,
    the plot is in ASCII. A validation loss is drawn over a training loss in the same place.
    """
    series = {name: _series(points, key) for name, key in (("training", "loss"), ("validation", "validation_loss"))}
    if len(series["training"]) < MIN_POINTS:
        return []
    signs = UNICODE_SIGNS if _can_encode(stream, "".join(UNICODE_SIGNS.values())) else ASCII_SIGNS
    everything = [point for of_one in series.values() for point in of_one]
    steps, losses = [step for step, _ in everything], [loss for _, loss in everything]
    first, last, low, high = min(steps), max(steps), min(losses), max(losses)
    is_log = low > 0 and high > LOG_FROM * low  # the first steps would flatten all others
    scale = math.log if is_log else float
    grid = [[" "] * COLUMNS for _ in range(ROWS)]
    for name, of_one in series.items():
        for step, loss in of_one:
            column = round((step - first) / max(last - first, 1) * (COLUMNS - 1))
            row = (
                round((scale(high) - scale(loss)) / (scale(high) - scale(low)) * (ROWS - 1)) if high > low else ROWS - 1
            )
            grid[row][column] = signs[name]
    labels = {0: f"{high:.4g}", ROWS - 1: f"{low:.4g}"}
    width = max(map(len, labels.values()))
    lines = [f"  {labels.get(row, ''):>{width}} {signs['axis']}{''.join(grid[row])}".rstrip() for row in range(ROWS)]
    lines.append(f"  {'':{width}} {signs['corner']}{signs['line'] * COLUMNS}")
    ends = f"step {first}{f'step {last}':>{COLUMNS - len(f'step {first}')}}"
    note = " (logarithmic axis)" if is_log else ""
    names = [f"{signs[name]} {name} loss {of_one[-1][1]:.4g}" for name, of_one in series.items() if of_one]
    return [*lines, f"  {'':{width}}  {ends}", f"  {'':{width}}  {'   '.join(names)} at the end, nats per token{note}"]


def _series(points: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    values = ((int(point["step"]), point.get(key)) for point in points)
    return [(step, float(loss)) for step, loss in values if loss is not None and math.isfinite(loss)]


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
