"""The report's plots as plain plotly figures (``data`` and ``layout``); the page sets colours for light and dark."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scipy import stats

from qlora_exp.analysis.configurations import (
    INTERVAL_CONFIDENCE,
    PEAK_PARTS,
    Configuration,
    Estimate,
    Measure,
    display_setting,
    mode_of,
    variant_of,
)
from qlora_exp.analysis.ladder_views import LadderStep
from qlora_exp.analysis.tradeoffs import PRECISION_ORDER, Front, ParetoStatus
from qlora_exp.records.method_name import method_name

Figure = dict[str, Any]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8c564b")
"""Okabe and Ito's palette for colour-blind readers, with a darker yellow for a white page."""
SYMBOLS = {"base": "circle", "instruct": "square"}
"""Variant → shape of its marks, the same in every plot."""
VARIANT_COLOURS = {"base": PALETTE[0], "instruct": PALETTE[1]}
LADDER_SYMBOLS = ("circle", "square", "diamond", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MAX_MARGIN_RATIO = 1.1
MAX_LABELLED_POINTS = 40
"""Among more points than these, only those on the front have intervals and none has its rank next to it."""
MAX_DOMINATED_POINTS = 1000
"""More dominated points than these are thinned out: a plot of 10,000 is slow and shows no more. The table has all."""
PART_COLOURS = (*PALETTE[:5], PALETTE[6])
MAX_LINES = len(PALETTE)
MAX_BARS = 16
RATE = "training.learning_rate"


def write_figure(figure: Figure | None, path: Path) -> None:
    """Write one HTML file that works offline. ``None`` writes nothing."""
    from plotly.io import write_html

    if figure is not None:
        write_html(figure, path, include_plotlyjs=True, full_html=True)


def plotly_figure(figure: Figure) -> Any:
    """Return a plain figure as a :class:`plotly.graph_objects.Figure`, which a notebook shows."""
    from plotly.graph_objects import Figure as PlotlyFigure

    return PlotlyFigure(figure)


def lines(named: Mapping[str, tuple[Sequence[float], Sequence[float]]], axes: tuple[str, str], goal: float) -> Figure:
    """Plot (x, y) by name, with a dashed line at ``goal``. ``axes``: titles, horizontal and vertical."""
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": escape(name), "x": list(x), "y": list(y)}
        | {"line": {"color": PALETTE[number % len(PALETTE)]}}
        for number, (name, (x, y)) in enumerate(named.items())
    ]
    return {"data": traces, "layout": _layout(*axes) | {"shapes": [_dashed_line(goal, PALETTE[-2])]}}


def pareto(front: Front, measure: Measure, horizontal: str) -> Figure:
    """Plot quality against ``memory`` or ``speed``: colour is the quantization, the mark's shape the variant.

    Points on the front are larger. Every point has its 95 % intervals; among many, only those on the front have.
    """
    pairs: list[tuple[Configuration, ParetoStatus | None]] = [(c, None) for c in front.configurations]
    if front.statuses:
        pairs = list(zip(front.configurations, front.statuses, strict=True))
    rest = [pair for pair in pairs if pair[1] is not ParetoStatus.FRONT]
    step = max(1, -(-len(rest) // MAX_DOMINATED_POINTS))
    by_kind: dict[tuple[str, str], list[tuple[Configuration, ParetoStatus | None]]] = defaultdict(list)
    for configuration, status in (*rest[::step], *(pair for pair in pairs if pair[1] is ParetoStatus.FRONT)):
        by_kind[mode_of(configuration.first), variant_of(configuration)].append((configuration, status))
    known = [mode for mode in PRECISION_ORDER if any(mode == kind[0] for kind in by_kind)]
    modes = [*known, *sorted({kind[0] for kind in by_kind} - set(known))]
    crowded = len(pairs) > MAX_LABELLED_POINTS
    traces = [
        _points(mode, variant, by_kind[mode, variant], horizontal, PALETTE[modes.index(mode) % len(PALETTE)], crowded)
        for mode, variant in sorted(by_kind, key=lambda kind: (modes.index(kind[0]), kind[1]))
    ]
    titles = {"memory": "memory, MB", "speed": "training speed, tokens/s"}
    best = "higher is better" if measure.higher_is_better else "lower is better"
    layout = _layout(titles[horizontal], f"{measure.label} ({best})")
    return {"data": traces, "layout": layout | {"hovermode": "closest", "showlegend": True}}


def _points(
    mode: str,
    variant: str,
    points: Sequence[tuple[Configuration, ParetoStatus | None]],
    horizontal: str,
    colour: str,
    crowded: bool,
) -> Figure:
    scored = [(c, c.quality, status) for c, status in points if c.quality is not None]
    on_front = [status is ParetoStatus.FRONT for *_, status in scored]
    with_bars = [not crowded or front for front in on_front]
    values = [c.memory_bytes if horizontal == "memory" else c.tokens_per_second for c, *_ in scored]
    halves = [quality.half_width() if bars else None for (_, quality, _), bars in zip(scored, with_bars, strict=True)]
    trace = {
        "type": "scatter",
        "mode": "markers" if crowded else "markers+text",
        "name": escape(f"{mode}, {variant}"),
        "x": [None if v is None else v / 1e6 if horizontal == "memory" else v for v in values],
        "y": [quality.mean for _, quality, _ in scored],
        "error_y": _error(halves),
        "text": [f"r {c.rank}" if c.rank else method_name(c.first.config) for c, *_ in scored],
        "textposition": "top right",
        "hovertext": [escape(c.label) + (f"<br>{status}" if status is not None else "") for c, _, status in scored],
        "customdata": [c.first.run_id for c, *_ in scored],
        "hovertemplate": "%{hovertext}<br>%{y:.4g} at %{x:.4g}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": SYMBOLS.get(variant, "diamond"),
            "size": [13 if front else 8 for front in on_front],
            "opacity": [1.0 if status in (ParetoStatus.FRONT, None) else 0.45 for *_, status in scored],
        },
    }
    if horizontal == "speed":
        spread = [
            _half_width_of_mean([run.speed.train_tokens_per_second for run in c.runs]) if bars else None
            for (c, *_), bars in zip(scored, with_bars, strict=True)
        ]
        trace["error_x"] = _error(spread)
    return trace


def rank_curve(
    configurations: Sequence[Configuration],
    measure: Measure,
    estimate_of: Callable[[Configuration], Estimate | None] = lambda configuration: configuration.quality,
) -> Figure | None:
    """Plot quality by rank with 95 % intervals, one line per combination of the other settings.

    Learning rates share a line unless one rank was run with several. ``None`` if no line has two points.

    Args:
        estimate_of: the value that is drawn; the default is the configuration's quality, whose interval is over seeds.
    """
    estimates = {id(c): estimate for c in configurations if c.rank and (estimate := estimate_of(c)) is not None}
    scored = [c for c in configurations if id(c) in estimates]
    lines = _lines(scored, ("lora.r", "lora.alpha", RATE))
    if any(len({c.settings.get("lora.r") for c in line}) < len(line) for line in lines.values()):
        lines = _lines(scored, ("lora.r", "lora.alpha"))
    several = (line for line in lines.items() if len(line[1]) > 1)
    if not (drawn := sorted(several, key=lambda line: -len(line[1]))[:MAX_LINES]):
        return None
    variants = [variant_of(points[0]) for _, points in drawn]  # one colour in all plots, unless it has several lines
    by_variant = len(set(variants)) == len(variants)
    colours = [VARIANT_COLOURS.get(v, PALETTE[2]) if by_variant else PALETTE[n] for n, v in enumerate(variants)]
    traces: list[Figure] = []
    for number, (name, points) in enumerate(drawn):
        ordered = sorted(points, key=lambda c: c.rank)
        values = [estimates[id(c)] for c in ordered]
        variant = variant_of(ordered[0])
        title = " · ".join(name)
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(title if variant in title else f"{variant} · {title}" if title else variant),
            "x": [c.rank for c in ordered],
            "y": [e.mean for e in values],
            "error_y": _error([e.half_width() for e in values]),
            "customdata": [c.first.run_id for c in ordered],
            "text": [escape(c.label) for c in ordered],
            "hovertemplate": "%{text}<br>%{y:.4g}<extra></extra>",
            "line": {"color": colours[number], "width": 2},
            "marker": {"size": 9, "symbol": SYMBOLS.get(variant, "diamond")},
            "showlegend": True,
        }
        traces.append(trace)
    better = "higher" if measure.higher_is_better else "lower"
    layout = _layout("rank r", f"{measure.label} ({better} is better)")
    ranks = sorted({rank for trace in traces for rank in trace["x"]})
    layout["xaxis"] |= {"type": "log", "tickvals": ranks, "ticktext": [str(rank) for rank in ranks]}
    return {"data": traces, "layout": layout}


def _lines(
    configurations: Sequence[Configuration], of_a_line: Sequence[str]
) -> dict[tuple[str, ...], list[Configuration]]:
    """Group the configurations by all settings except ``of_a_line``, which change along a line, and those that the
    quantization mode implies. A key has a short text for each setting."""
    implied = ("quantization.double_quantization", "quantization.compute_dtype", "quantization.int8_threshold")
    lines: dict[tuple[str, ...], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        name = tuple(
            value if isinstance(value, str) else f"{key.rsplit('.', 1)[-1].replace('_', ' ')} {display_setting(value)}"
            for key, value in configuration.settings.items()
            if key not in of_a_line and key not in implied
        )
        lines[name].append(configuration)
    return lines


def ladder(answer: Mapping[str, Any]) -> Figure | None:
    """Plot the gains of one ladder's answer, in the score's units; ``None`` if no step has a gain."""
    steps = [step for step in answer.get("comparisons") or [] if step.get("gain") is not None]
    drawn = [
        GainPoint(
            f"{s['from_rank']} → {s['to_rank']}", s["gain"], s.get("low"), s.get("high"), str(s.get("decision")),
            int(s.get("doublings") or 1),
        )
        for s in steps
    ]  # fmt: skip
    if answer.get("margin") is None:
        return None
    zone = answer.get("half_zone") or answer["margin"] / 2
    return gains({"gain": drawn}, {"gain": (answer["margin"], zone)}, "nats per item", 1.0)


@dataclass(frozen=True)
class GainPoint:
    """A step's gain with its bounds. A step of several doublings is drawn as gain per doubling."""

    name: str
    gain: float
    low: float | None
    high: float | None
    decision: str
    doublings: int = 1

    @classmethod
    def of(cls, step: LadderStep) -> GainPoint:
        return cls(step.name, step.gain, step.low, step.high, step.decision, step.doublings)


def gains(
    by_ladder: Mapping[str, Sequence[GainPoint]],
    margins: Mapping[str, tuple[float, float | None]],
    unit: str,
    scale: float,
) -> Figure | None:
    """Plot the gain of each doubling with its 95 % interval, the margin and its zone; ``None`` if there is no gain.

    Args:
        by_ladder: ladder → its steps.
        margins: ladder → (margin, half_zone). Nearly equal ones are drawn as one line with its zone.
        scale: factor of the drawn values, e.g. 100 for percent.
    """
    drawn = {name: steps for name, steps in by_ladder.items() if steps}
    if not drawn:
        return None
    traces: list[Figure] = []
    edges = [0.0]
    # The order in which ranks double, for all ladders.
    order = sorted({_step_label(step) for steps in drawn.values() for step in steps}, key=_ranks_of)
    for number, (name, steps) in enumerate(drawn.items()):
        x = [_step_label(step) for step in steps]
        factors = [scale / step.doublings for step in steps]
        y = [step.gain * factor for step, factor in zip(steps, factors, strict=True)]
        high = [None if s.high is None else s.high * f for s, f in zip(steps, factors, strict=True)]
        low = [None if s.low is None else s.low * f for s, f in zip(steps, factors, strict=True)]
        edges += [edge for edge in (*y, *high, *low) if edge is not None]
        error = _error([None if top is None else top - at for top, at in zip(high, y, strict=True)])
        below = [0 if bottom is None else at - bottom for bottom, at in zip(low, y, strict=True)]
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": escape(name),
            "x": x,
            "y": y,
            "error_y": error | {"symmetric": False, "arrayminus": below},
            "text": [escape(step.decision) for step in steps],
            "offsetgroup": str(number),
            "hovertemplate": "%{x}: %{y:.3g}<br>%{text}<extra>" + escape(name) + "</extra>",
            "marker": {
                "size": 11,
                "color": _colour(name, number),
                "symbol": SYMBOLS.get(name, LADDER_SYMBOLS[number % 4]),
            },
            "showlegend": len(drawn) > 1,
        }
        # The decision stands above its interval.
        tops = [at if top is None else top for top, at in zip(high, y, strict=True)]
        labels = {"type": "scatter", "mode": "text", "x": x, "y": tops, "text": trace["text"], "hoverinfo": "skip"}
        labels |= {"textposition": "top center", "offsetgroup": str(number), "showlegend": False}
        traces += [trace, labels]
    layout = _layout("doubling of the rank", f"gain, {unit}") | {"scattermode": "group", "scattergap": 0.25}
    shown = [(name, margin * scale) for name, (margin, _) in margins.items() if name in drawn]
    layout["shapes"], layout["annotations"] = [], []
    if shown and max(at for _, at in shown) <= MAX_MARGIN_RATIO * min(at for _, at in shown):
        margin, zone = margins[shown[0][0]]
        half = (zone if zone is not None else margin / 2) * scale
        band = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": shown[0][1] - half, "y1": shown[0][1] + half}
        layout["shapes"].append(band | {"fillcolor": PALETTE[4], "opacity": 0.15, "line": {"width": 0}})
        shown = [("", shown[0][1])]
        edges.append(shown[0][1] + half)
    for name, at in shown:
        # Between the first two steps, where no interval is drawn; of two margins the lower one's words are below it.
        place = {"xref": "paper", "x": 1 / len(order) if len(order) > 1 else 0.02, "y": at, "showarrow": False}
        place["xanchor"] = "center" if len(order) > 1 else "left"
        place["yanchor"] = "top" if len(shown) > 1 and at == min(other for _, other in shown) else "bottom"
        colour = _colour(name, list(drawn).index(name)) if name else PALETTE[4]
        layout["shapes"].append(_dashed_line(at, colour))
        words = {"text": f"margin, {escape(name)}" if name else "margin", "font": {"size": 12, "color": colour}}
        layout["annotations"].append(place | words)
        edges.append(at)
    layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    padding = 0.06 * (max(edges) - min(edges))
    layout["yaxis"]["range"] = [min(edges) - padding, max(edges) + 2 * padding]
    return {"data": traces, "layout": layout}


def _step_label(step: GainPoint) -> str:
    return step.name + (" (per doubling)" if step.doublings > 1 else "")


def _colour(name: str, number: int) -> str:
    return VARIANT_COLOURS.get(name, PALETTE[number % len(PALETTE)])


def _ranks_of(name: str) -> tuple[int, ...]:
    return tuple(int(word) for word in name.split() if word.isdigit())


@dataclass(frozen=True)
class CurveLine:
    """A training curve: one run's, or the mean of several with its interval.

    ``low`` and ``high``: 95 % interval at each step; empty for one run. ``faint``: drawn behind the others.
    """

    name: str
    group: str
    """What has one colour, e.g. ``base``."""
    rank: int
    steps: Sequence[float]
    losses: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False
    legend: bool = True
    run_id: str | None = None


def learning_curves(curves: Sequence[CurveLine], vertical: str) -> Figure | None:
    """Plot training curves: colour is the group, the dash the rank, and a band the 95 % interval."""
    if not curves:
        return None
    groups = list(dict.fromkeys(curve.group for curve in curves))
    ranks = sorted({curve.rank for curve in curves if not curve.faint})
    traces: list[Figure] = []
    for curve in sorted(curves, key=lambda curve: not curve.faint):
        colour = _colour(curve.group, groups.index(curve.group))
        line: Figure = {"color": colour, "width": 1 if curve.faint else 2.2}
        if curve.rank in ranks and not curve.faint:
            line["dash"] = DASHES[ranks.index(curve.rank) % len(DASHES)]
        trace = {
            "type": "scatter",
            "mode": "lines",
            "name": escape(curve.name),
            "legendgroup": escape(curve.name),
            "x": list(curve.steps),
            "y": list(curve.losses),
            "line": line,
            "opacity": 0.35 if curve.faint else 1.0,
            "showlegend": curve.legend,
            "legendrank": 1001 if curve.faint else 1000,
            "hovertemplate": escape(curve.name) + "<br>step %{x}: %{y:.4g}<extra></extra>",
        }
        if curve.run_id is not None:
            trace["customdata"] = [curve.run_id] * len(curve.steps)
        traces.append(trace)
        if curve.low:
            band = {"type": "scatter", "mode": "lines", "legendgroup": escape(curve.name), "showlegend": False}
            band |= {"x": [*curve.steps, *reversed(curve.steps)], "y": [*curve.high, *reversed(curve.low)]}
            band |= {"fill": "toself", "fillcolor": colour, "opacity": 0.14, "line": {"width": 0}, "hoverinfo": "skip"}
            traces.append(band)
    layout = _layout("training step", vertical) | {"hovermode": "closest"}
    values = [value for curve in curves for value in (*curve.losses, *curve.low, *curve.high)]
    ticks = _log_ticks(min(values), max(values))
    layout["yaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"data": traces, "layout": layout}


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10 … within the range, at most 12."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: max(1, -(-len(inside) // 12))]


def accuracy_by_cell(
    cells: Sequence[tuple[str, Sequence[Estimate | None]]], baselines: Sequence[tuple[str, float]]
) -> Figure | None:
    """Plot each cell's accuracy with 95 % intervals: base model, with worked examples, tuned; and lines at the
    baselines to beat.

    Args:
        cells: (name, estimates), one for each of the three.
    """
    names = [escape(name) for name, _ in cells]
    traces: list[Figure] = []
    for number, label in enumerate(("before tuning", "with examples", "after tuning")):
        estimates = [of_cell[number] for _, of_cell in cells]
        if any(estimate is not None for estimate in estimates):
            trace: Figure = {"type": "bar", "name": label, "x": names, "marker": {"color": PALETTE[number]}}
            trace |= {"y": [estimate.mean if estimate else None for estimate in estimates]}
            trace |= {"error_y": _error([estimate.half_width() if estimate else None for estimate in estimates])}
            traces.append(trace | {"hovertemplate": "%{x}, " + label + ": %{y:.3f}<extra></extra>"})
    if not traces:
        return None
    layout = _layout("", "accuracy, by likelihood") | {"barmode": "group"}
    layout["shapes"] = [
        _dashed_line(value, PALETTE[6 + number]) | {"name": f"{escape(label)}, {value:.3f}", "showlegend": True}
        for number, (label, value) in enumerate(baselines)
    ]
    return {"data": traces, "layout": layout}


@dataclass(frozen=True)
class ContrastPoint:
    name: str
    gain: float
    low: float | None
    high: float | None


def contrasts(points: Sequence[ContrastPoint], horizontal: str) -> Figure | None:
    """Plot differences with 95 % intervals, one a row, and a line at 0; ``None`` if there is none."""
    if not points:
        return None
    rows = list(reversed(points))
    error = _error([None if point.high is None else point.high - point.gain for point in rows])
    below = [0 if point.low is None else point.gain - point.low for point in rows]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [point.gain for point in rows],
        "y": [escape(point.name) for point in rows],
        "error_x": error | {"symmetric": False, "arrayminus": below},
        "marker": {"size": 10, "color": PALETTE[0]},
        "hovertemplate": "%{y}: %{x:.3g}<extra></extra>",
        "showlegend": False,
    }
    layout = _layout(horizontal, "") | {"height": 130 + 36 * len(rows)}
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0}
    layout["shapes"] = [zero | {"line": {"color": PALETTE[6], "width": 1.5, "dash": "dot"}}]
    return {"data": [trace], "layout": layout}


def memory_bars(parts_of: Mapping[str, Mapping[str, float | None]], spread: Mapping[str, float]) -> Figure | None:
    """Plot memory by part, stacked, for the largest configurations; ``None`` if nothing is known.

    Args:
        parts_of: label → part → bytes.
        spread: label → half of the 95 % interval of all parts together, in bytes, over runs.
    """
    known = [(label, parts) for label, parts in parts_of.items() if any(parts.values())]
    largest = sorted(known, key=lambda item: -sum(size or 0 for size in item[1].values()))[:MAX_BARS][::-1]
    if not largest:
        return None
    names = [escape(label) for label, _ in largest]
    traces: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": names,
            "x": [None if (size := parts[part]) is None else size / 1e6 for _, parts in largest],
            "marker": {"color": PART_COLOURS[number]},
            "hovertemplate": "%{y}<br>" + part + " %{x:.3g} MB<extra></extra>",
        }
        for number, part in enumerate(PEAK_PARTS)
        if any(parts[part] is not None for _, parts in largest)
    ]
    totals = [sum(size or 0 for size in parts.values()) / 1e6 for _, parts in largest]
    halves = [spread.get(label, 0.0) / 1e6 for label, _ in largest]
    ends = {"type": "scatter", "mode": "markers", "marker": {"size": 1, "color": PALETTE[6]}, "showlegend": False}
    ends |= {"x": totals, "y": names, "error_x": _error(halves) | {"visible": True}}
    traces.append(ends | {"hovertemplate": "%{y}<br>all parts %{x:.3g} MB<extra></extra>"})
    layout = _layout("memory, MB", "") | {"barmode": "stack", "height": 150 + 34 * len(names)}
    layout["legend"] |= {"traceorder": "normal"}
    return {"data": traces, "layout": layout}


def _half_width_of_mean(values: Sequence[float | None]) -> float | None:
    """Return half of the 95 % interval of the mean; ``None`` for a single value."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    se = statistics.stdev(known) / math.sqrt(len(known))
    return float(stats.t.ppf((1 + INTERVAL_CONFIDENCE) / 2, len(known) - 1)) * se


def _dashed_line(height: float, colour: str) -> Figure:
    """Return a horizontal line across the plot."""
    line = {"color": colour, "dash": "dash", "width": 2}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}


def _error(halves: Sequence[float | None]) -> Figure:
    array = [half or 0 for half in halves]
    return {"type": "data", "array": array, "visible": any(halves), "thickness": 1.2, "width": 3}


def _layout(horizontal: str, vertical: str) -> Figure:
    return {
        "xaxis": {"title": {"text": horizontal}, "automargin": True},
        "yaxis": {"title": {"text": vertical}, "automargin": True},
        "margin": {"l": 10, "r": 10, "t": 40, "b": 10},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "height": 420,
    }
