"""The report's section of each ladder, and the plot of all gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.analysis import figures
from qlora_exp.analysis.ladder_views import LadderView
from qlora_exp.analysis.report_content import Section, formatted_value, value_table

MAX_ERROR_RATE = 0.05
"""Share of simulated ladders with a wrong answer: the largest in docs/calibration.md with a goal, rounded up, without
the cell whose seeds correlate 0.8 in pairs. The sentence names that assumption."""


def ladder_sections(views: Sequence[LadderView]) -> list[Section]:
    columns = ("step", "decision", ("gain", "share"), ("low", "share"), ("high", "share"))
    more = (("seeds", "integer"), ("items", "integer"), ("lost runs", "integer"))
    sections = []
    for number, view in enumerate(views, start=1):
        rows = [
            (step.name, step.decision, step.gain, step.low, step.high, *map(raw.get, ("seeds", "items", "lost_runs")))
            for step, raw in zip(view.shares, view.raw_steps, strict=True)
        ]
        kinds = columns if view.loss else [c if isinstance(c, str) else (c[0], "figure") for c in columns]
        level = (
            f"share of the loss at the first rank, {formatted_value(view.loss, 'figure')} nats per item"
            if view.loss
            else view.unit
        )
        caption = f"Gain of each step: {level}; low and high: 95 % CI as the decision uses it"
        sentence = str(view.answer.get("sentence") or f"The ladder's answer: {view.decision}.")
        paragraphs = (sentence, _ladder_margin(view), _ladder_cost(view.answer))
        figure = gains_figure([view])
        section = Section(
            name=f"ladder-{number}",
            title="Rank doubling" + (f": {view.name}" if len(views) > 1 else ""),
            paragraphs=tuple(text for text in paragraphs if text is not None),
            tables=(value_table([*kinds, *more], rows, caption),) if rows else (),
            figures=(figure,) if figure and len(views) == 1 else (),
            points=tuple(str(warning) for warning in view.answer.get("warnings") or []),
        )
        sections.append(section)
    return sections


def gains_figure(views: Sequence[LadderView]) -> figures.Figure | None:
    """Plot every ladder's gains, as shares of the loss if all of them are known."""
    if any(view.loss is None for view in views):
        views = [replace(view, loss=None) for view in views]
    by_ladder = {view.name: [figures.GainPoint.of(step) for step in view.shares] for view in views}
    percent = all(view.loss for view in views)
    unit = "% of the loss at the first rank" if percent else "nats per item"
    margins = {view.name: (view.margin, view.half_zone) for view in views if view.margin is not None}
    return figures.gains(by_ladder, margins, unit, 100.0 if percent else 1.0)


def _ladder_margin(view: LadderView) -> str | None:
    words = view.margin_in_units
    return f"Margin per doubling, fixed beforehand: {words}." if words else None


def _ladder_cost(answer: Mapping[str, Any]) -> str | None:
    """Return what the ladder cost and was decided from; ``None`` if the answer doesn't have it."""
    spent, seeds, items = answer.get("spent") or {}, answer.get("seeds") or {}, answer.get("items")
    if not spent:
        return None
    usd = f", {formatted_value(spent['cost_usd'], 'usd')}" if spent.get("cost_usd") is not None else ""
    stopped = f" ({spent['pilots_stopped']} stopped early)" if spent.get("pilots_stopped") else ""
    runs = f"{spent['runs']} runs, {spent['pilots']} of them pilots{stopped}"
    summary = f"{runs}, took {spent['seconds'] / 60:,.1f} minutes{usd}."
    if seeds and items:
        summary += (
            f" Decided from {items} test items and {', '.join(f'{n} seeds at r = {r}' for r, n in seeds.items())}."
        )
    return summary


def error_rate_sentence(views: Sequence[LadderView]) -> str | None:
    """Return how often a ladder's answers are wrong; ``None`` if nothing was decided."""
    if not any(view.steps and view.answer.get("half_zone") is not None for view in views):
        return None
    return (
        f"Of simulated ladders, at most {100 * MAX_ERROR_RATE:g} % got a wrong answer (docs/calibration.md). It assumes"
        " independent seeds, and independent items or a group column. A gain within half_zone of the margin counts as"
        " right either way."
    )
