"""The report's plots as plain plotly figures (``data`` and ``layout``); the page sets colours for light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qlora_exp.analysis.configurations import PEAK_PARTS, Configuration, Measure, display_setting, mode_of
from qlora_exp.analysis.tradeoffs import PRECISION_ORDER, Front, ParetoStatus

Figure = dict[str, Any]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8c564b")
"""Okabe and Ito's palette for colour-blind readers, with a darker yellow for a white page."""
SYMBOLS = dict(zip(PRECISION_ORDER, ("circle", "square", "diamond", "cross", "x", "star"), strict=True))
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


def lines(named: Mapping[str, tuple[Sequence[float], Sequence[float]]], axes: tuple[str, str], goal: float) -> Figure:
    """Plot (x, y) by name, with a dashed line at ``goal``. ``axes``: titles, horizontal and vertical."""
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": escape(name), "x": list(x), "y": list(y)}
        | {"line": {"color": PALETTE[number % len(PALETTE)]}}
        for number, (name, (x, y)) in enumerate(named.items())
    ]
    return {"data": traces, "layout": _layout(*axes) | {"shapes": [_dashed_line(goal, PALETTE[-2])]}}


def pareto(front: Front, measure: Measure, horizontal: str) -> Figure:
    """Plot quality against ``memory`` or ``speed``, one trace per quantization; points on the front are larger."""
    pairs: list[tuple[Configuration, ParetoStatus | None]] = [(c, None) for c in front.configurations]
    if front.statuses:
        pairs = list(zip(front.configurations, front.statuses, strict=True))
    rest = [pair for pair in pairs if pair[1] is not ParetoStatus.FRONT]
    step = max(1, -(-len(rest) // MAX_DOMINATED_POINTS))
    by_mode: dict[str, list[tuple[Configuration, ParetoStatus | None]]] = defaultdict(list)
    for configuration, status in (*rest[::step], *(pair for pair in pairs if pair[1] is ParetoStatus.FRONT)):
        by_mode[mode_of(configuration.first)].append((configuration, status))
    known = [mode for mode in PRECISION_ORDER if mode in by_mode]
    traces = [
        _points(mode, by_mode[mode], horizontal, PALETTE[number % len(PALETTE)])
        for number, mode in enumerate([*known, *sorted(by_mode.keys() - set(known))])
    ]
    titles = {"memory": "memory, MB", "speed": "training speed, tokens/s"}
    best = "higher is better" if measure.higher_is_better else "lower is better"
    layout = _layout(titles[horizontal], f"{measure.words} ({best})")
    return {"data": traces, "layout": layout | {"hovermode": "closest", "showlegend": True}}


def _points(
    mode: str, points: Sequence[tuple[Configuration, ParetoStatus | None]], horizontal: str, colour: str
) -> Figure:
    scored = [(c, c.quality, status) for c, status in points if c.quality is not None]
    on_front = [status is ParetoStatus.FRONT for *_, status in scored]
    values = [c.memory_bytes if horizontal == "memory" else c.tokens_per_second for c, *_ in scored]
    halves = [quality.half_width() if status is ParetoStatus.FRONT else None for _, quality, status in scored]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(mode),
        "x": [None if v is None else v / 1e6 if horizontal == "memory" else v for v in values],
        "y": [quality.mean for _, quality, _ in scored],
        "error_y": _error(halves),
        "text": [escape(c.label) + (f"<br>{status}" if status is not None else "") for c, _, status in scored],
        "customdata": [c.first.run_id for c, *_ in scored],
        "hovertemplate": "%{text}<br>%{y:.4g} at %{x:.4g}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": SYMBOLS.get(mode, "circle"),
            "size": [13 if front else 8 for front in on_front],
            "opacity": [1.0 if status in (ParetoStatus.FRONT, None) else 0.45 for *_, status in scored],
        },
    }


def rank_curve(configurations: Sequence[Configuration], measure: Measure) -> Figure | None:
    """Plot quality by rank with 95 % intervals over seeds, one line per combination of the other settings.

    Learning rates share a line unless one rank was run with several. ``None`` if no line has two points.
    """
    scored = [configuration for configuration in configurations if configuration.quality is not None]
    lines = _lines(scored, ("lora.r", "lora.alpha", RATE))
    if any(len({c.settings.get("lora.r") for c in line}) < len(line) for line in lines.values()):
        lines = _lines(scored, ("lora.r", "lora.alpha"))
    drawn = sorted((line for line in lines.items() if len(line[1]) > 1), key=lambda line: -len(line[1]))[:MAX_LINES]
    if not drawn:
        return None
    traces: list[Figure] = []
    for number, (name, points) in enumerate(drawn):
        ordered = sorted(points, key=lambda c: c.rank)
        estimates = [c.quality for c in ordered if c.quality is not None]
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(" · ".join(name) or measure.words),
            "x": [c.rank for c in ordered],
            "y": [e.mean for e in estimates],
            "error_y": _error([e.half_width() for e in estimates]),
            "customdata": [c.first.run_id for c in ordered],
            "text": [escape(c.label) for c in ordered],
            "hovertemplate": "%{text}<br>%{y:.4g}<extra></extra>",
            "line": {"color": PALETTE[number], "width": 2},
            "marker": {"size": 8},
        }
        traces.append(trace)
    layout = _layout("rank r", measure.label)
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
    """Plot each doubling's gain with its bounds, the margin and its zone; ``None`` if no step has a gain."""
    steps = [step for step in answer.get("comparisons") or [] if step.get("gain") is not None]
    margin = answer.get("margin")
    if not steps or margin is None:
        return None
    zone = answer.get("half_zone") or margin / 2
    gains = [step["gain"] for step in steps]
    error = _error([None if step.get("high") is None else step["high"] - step["gain"] for step in steps])
    below = [0 if step.get("low") is None else step["gain"] - step["low"] for step in steps]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [f"{step['from_rank']} → {step['to_rank']}" for step in steps],
        "y": gains,
        "error_y": error | {"symmetric": False, "arrayminus": below},
        "text": [escape(str(step.get("decision"))) for step in steps],
        "hovertemplate": "%{x}: %{y:.4g}<br>%{text}<extra></extra>",
        "marker": {"size": 11, "color": PALETTE[0]},
        "showlegend": False,
    }
    layout = _layout("doubling", "gain, nats per item")
    band = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": margin - zone, "y1": margin + zone}
    band |= {"fillcolor": PALETTE[4], "opacity": 0.15, "line": {"width": 0}}
    layout["shapes"] = [band, _dashed_line(margin, PALETTE[4])]
    layout["xaxis"]["type"] = "category"
    y_values = [0.0, margin + zone, *gains, *(step[end] for step in steps for end in ("low", "high") if step.get(end))]
    padding = 0.06 * (max(y_values) - min(y_values))
    layout["yaxis"]["range"] = [min(y_values) - padding, max(y_values) + padding]
    return {"data": [trace], "layout": layout}


def accuracy_by_cell(
    cells: Sequence[tuple[str, float | None, float | None, float | None]], baselines: Sequence[tuple[str, float]]
) -> Figure | None:
    """Plot each cell's accuracy: base model, with worked examples, tuned; and lines at the baselines to beat."""
    names = [escape(name) for name, *_ in cells]
    traces: list[Figure] = []
    for number, label in enumerate(("before tuning", "with examples", "after tuning")):
        values = [cell[number + 1] for cell in cells]
        if any(value is not None for value in values):
            trace = {"type": "bar", "name": label, "x": names, "y": values, "marker": {"color": PALETTE[number]}}
            traces.append(trace | {"hovertemplate": "%{x}, " + label + ": %{y:.3f}<extra></extra>"})
    if not traces:
        return None
    layout = _layout("", "accuracy, by likelihood") | {"barmode": "group"}
    layout["shapes"] = [
        _dashed_line(value, PALETTE[6 + number]) | {"name": f"{escape(label)}, {value:.3f}", "showlegend": True}
        for number, (label, value) in enumerate(baselines)
    ]
    return {"data": traces, "layout": layout}


def memory_bars(parts_of: Mapping[str, Mapping[str, float | None]]) -> Figure | None:
    """Plot memory by part, stacked, for the largest configurations; ``None`` if nothing is known.

    Args:
        parts_of: label → part → bytes.
    """
    known = [(label, parts) for label, parts in parts_of.items() if any(parts.values())]
    largest = sorted(known, key=lambda item: -sum(size or 0 for size in item[1].values()))[:MAX_BARS][::-1]
    if not largest:
        return None
    names = [escape(label) for label, _ in largest]
    traces = [
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
    layout = _layout("memory, MB", "") | {"barmode": "stack", "height": 130 + 34 * len(names)}
    layout["legend"] |= {"traceorder": "normal"}
    return {"data": traces, "layout": layout}


def importance_bars(shares: Mapping[str, float]) -> Figure:
    ordered = sorted(shares.items(), key=lambda pair: pair[1])
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [escape(name) for name, _ in ordered],
        "x": [share for _, share in ordered],
        "marker": {"color": PALETTE[0]},
        "hovertemplate": "%{y}: %{x:.2f}<extra></extra>",
    }
    return {"data": [trace], "layout": _layout("share of the variance", "") | {"height": 130 + 32 * len(ordered)}}


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
