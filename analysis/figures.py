"""The report's plots as plain plotly figures (``data`` and ``layout``); the page sets colours for light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qlora_exp.analysis.configurations import Configuration, Measure, display_settings
from qlora_exp.analysis.memory import PEAK_PARTS, Breakdown
from qlora_exp.analysis.tradeoffs import PRECISION_ORDER, Front, ParetoStatus, mode_of

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
    dashed = {"color": PALETTE[-2], "dash": "dash", "width": 2}
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": goal, "y1": goal, "line": dashed}
    return {"data": traces, "layout": _layout(*axes) | {"shapes": [shape]}}


def pareto(front: Front, measure: Measure, horizontal: str) -> Figure:
    """Plot quality against ``memory`` or ``speed``, one trace per quantization; points on the front are larger."""
    drawn = _thinned(front)
    by_mode: dict[str, list[tuple[Configuration, ParetoStatus | None]]] = defaultdict(list)
    for configuration, status in drawn:
        by_mode[mode_of(configuration)].append((configuration, status))
    traces = [
        _cloud(mode, by_mode[mode], horizontal, PALETTE[number % len(PALETTE)])
        for number, mode in enumerate(sorted(by_mode, key=_by_precision))
    ]
    titles = {"memory": "memory, MB", "speed": "training speed, tokens/s"}
    best = "higher is better" if measure.higher_is_better else "lower is better"
    return {
        "data": traces,
        "layout": _layout(titles[horizontal], f"{measure.name.replace('_', ' ')} ({best})")
        | {"hovermode": "closest", "showlegend": True},
    }


def rank_curve(configurations: Sequence[Configuration], measure: Measure) -> Figure | None:
    """Plot quality by rank with 95 % intervals over seeds, one line per combination of the other settings.

    Learning rates share a line unless one rank was run with several. ``None`` if no line has two points.
    """
    scored = [configuration for configuration in configurations if configuration.quality is not None]
    lines = _lines(scored, ("lora.r", "lora.alpha", RATE))
    if any(len({c.settings.get("lora.r") for c in line}) < len(line) for line in lines.values()):
        lines = _lines(scored, ("lora.r", "lora.alpha"))
    drawn_lines = sorted((line for line in lines.items() if len(line[1]) > 1), key=lambda line: -len(line[1]))
    if not drawn_lines:
        return None
    traces: list[Figure] = []
    ranks: set[int] = set()
    for number, (name, points) in enumerate(drawn_lines[:MAX_LINES]):
        ordered = sorted(points, key=lambda c: int(c.first.config["lora"]["r"]))
        estimates = [c.quality for c in ordered if c.quality is not None]
        ranks.update(int(c.first.config["lora"]["r"]) for c in ordered)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(" · ".join(part for part in name if part) or measure.name.replace("_", " ")),
                "x": [int(c.first.config["lora"]["r"]) for c in ordered],
                "y": [e.mean for e in estimates],
                "error_y": _error([e.half_width() for e in estimates]),
                "customdata": [c.first.run_id for c in ordered],
                "text": [escape(c.label) for c in ordered],
                "hovertemplate": "%{text}<br>%{y:.4g}<extra></extra>",
                "line": {"color": PALETTE[number], "width": 2},
                "marker": {"size": 8},
            }
        )
    layout = _layout("rank r", measure.label)
    layout["xaxis"] |= {"type": "log", "tickvals": sorted(ranks), "ticktext": [str(rank) for rank in sorted(ranks)]}
    return {"data": traces, "layout": layout}


def _lines(
    configurations: Sequence[Configuration], of_a_line: Sequence[str]
) -> dict[tuple[str, ...], list[Configuration]]:
    """Group the configurations by all settings except ``of_a_line``, which change along a line."""
    lines: dict[tuple[str, ...], list[Configuration]] = defaultdict(list)
    for configuration in configurations:
        others = [(key, value) for key, value in configuration.settings.items() if key not in of_a_line]
        lines[tuple(_named(key, value) for key, value in others)].append(configuration)
    return lines


def ladder(answer: Mapping[str, Any]) -> Figure | None:
    """Plot each doubling's gain with its bounds, the margin and its zone; ``None`` if no step has a gain."""
    steps = [step for step in answer.get("comparisons") or [] if step.get("gain") is not None]
    margin = answer.get("margin")
    if not steps or margin is None:
        return None
    zone = answer.get("half_zone") or margin / 2
    layout = _layout("doubling", "gain, nats per item")
    layout["shapes"] = [
        {
            "type": "rect",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": margin - zone,
            "y1": margin + zone,
            "fillcolor": PALETTE[4],
            "opacity": 0.15,
            "line": {"width": 0},
        },
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": margin,
            "y1": margin,
            "line": {"color": PALETTE[4], "dash": "dash", "width": 2},
        },
    ]
    gains = [step["gain"] for step in steps]
    error = _error([None if step.get("high") is None else step["high"] - step["gain"] for step in steps])
    error |= {
        "symmetric": False,
        "arrayminus": [0 if step.get("low") is None else step["gain"] - step["low"] for step in steps],
    }
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [f"{step['from_rank']} → {step['to_rank']}" for step in steps],
        "y": gains,
        "error_y": error,
        "text": [escape(str(step.get("decision"))) for step in steps],
        "hovertemplate": "%{x}: %{y:.4g}<br>%{text}<extra></extra>",
        "marker": {"size": 11, "color": PALETTE[0]},
        "showlegend": False,
    }
    layout["xaxis"]["type"] = "category"
    y_values = [0.0, margin + zone, *gains, *(step[end] for step in steps for end in ("low", "high") if step.get(end))]
    padding = 0.06 * (max(y_values) - min(y_values))
    layout["yaxis"]["range"] = [min(y_values) - padding, max(y_values) + padding]
    return {"data": [trace], "layout": layout}


def accuracy_by_cell(
    cells: Sequence[tuple[str, float | None, float | None, float | None]], lines: Sequence[tuple[str, float]]
) -> Figure | None:
    """Plot each cell's accuracy: base model, with worked examples, tuned. ``lines``: the baselines to beat."""
    names = [escape(name) for name, *_ in cells]
    traces: list[Figure] = []
    for number, label in enumerate(("before tuning", "with examples", "after tuning")):
        values = [cell[number + 1] for cell in cells]
        if any(value is not None for value in values):
            traces.append(
                {
                    "type": "bar",
                    "name": label,
                    "x": names,
                    "y": values,
                    "marker": {"color": PALETTE[number]},
                    "hovertemplate": "%{x}, " + label + ": %{y:.3f}<extra></extra>",
                }
            )
    if not traces:
        return None
    layout = _layout("", "accuracy, by likelihood") | {"barmode": "group"}
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": value,
            "y1": value,
            "name": f"{escape(label)}, {value:.3f}",
            "showlegend": True,
            "line": {"color": PALETTE[6 + number], "dash": "dash", "width": 2},
        }
        for number, (label, value) in enumerate(lines)
    ]
    return {"data": traces, "layout": layout}


def memory_bars(breakdowns: Sequence[Breakdown]) -> Figure | None:
    """Plot memory by part, stacked, for the largest configurations; ``None`` if nothing is known."""
    known = [b for b in breakdowns if any(b.parts.values())]
    largest = sorted(known, key=lambda b: -sum(part or 0 for part in b.parts.values()))[:MAX_BARS]
    if not largest:
        return None
    names = [escape(b.label) for b in reversed(largest)]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": names,
            "x": [None if (size := b.parts[part]) is None else size / 1e6 for b in reversed(largest)],
            "marker": {"color": PART_COLOURS[number]},
            "hovertemplate": "%{y}<br>" + part + " %{x:.3g} MB<extra></extra>",
        }
        for number, part in enumerate(PEAK_PARTS)
        if any(b.parts[part] is not None for b in largest)
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


def _cloud(
    mode: str, points: Sequence[tuple[Configuration, ParetoStatus | None]], horizontal: str, colour: str
) -> Figure:
    scored = [(c, s) for c, s in points if c.quality is not None]
    estimates = [c.quality for c, _ in scored if c.quality is not None]
    on_front = [status is ParetoStatus.FRONT for _, status in scored]
    values = [c.memory_bytes if horizontal == "memory" else c.tokens_per_second for c, _ in scored]
    halves = [e.half_width() if front else None for e, front in zip(estimates, on_front, strict=True)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(mode),
        "x": [None if v is None else v / 1e6 if horizontal == "memory" else v for v in values],
        "y": [e.mean for e in estimates],
        "error_y": _error(halves),
        "text": [escape(c.label) + (f"<br>{s}" if s is not None else "") for c, s in scored],
        "customdata": [c.first.run_id for c, _ in scored],
        "hovertemplate": "%{text}<br>%{y:.4g} at %{x:.4g}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": SYMBOLS.get(mode, "circle"),
            "size": [13 if front else 8 for front in on_front],
            "opacity": [1.0 if front or s is None else 0.45 for front, (_, s) in zip(on_front, scored, strict=True)],
        },
    }


def _thinned(front: Front) -> list[tuple[Configuration, ParetoStatus | None]]:
    """Return the whole front, and every k-th of the other points."""
    if not front.statuses:
        return [(c, None) for c in _every(front.configurations, MAX_DOMINATED_POINTS)]
    pairs = list(zip(front.configurations, front.statuses, strict=True))
    rest = [pair for pair in pairs if pair[1] is not ParetoStatus.FRONT]
    return [*_every(rest, MAX_DOMINATED_POINTS), *(pair for pair in pairs if pair[1] is ParetoStatus.FRONT)]


def _every(values: Sequence[Any], limit: int) -> list[Any]:
    step = max(1, -(-len(values) // limit))
    return list(values[::step])


def _named(key: str, value: Any) -> str:
    """Return a short text for the legend; empty if the quantization mode implies the setting."""
    if key in ("quantization.double_quantization", "quantization.compute_dtype", "quantization.int8_threshold"):
        return ""
    return value if isinstance(value, str) else f"{key.rsplit('.', 1)[-1].replace('_', ' ')} {display_settings(value)}"


def _error(halves: Sequence[float | None]) -> Figure:
    return {
        "type": "data",
        "array": [half or 0 for half in halves],
        "visible": any(halves),
        "thickness": 1.2,
        "width": 3,
    }


def _by_precision(mode: str) -> tuple[int, str]:
    return (PRECISION_ORDER.index(mode) if mode in PRECISION_ORDER else len(PRECISION_ORDER), mode)


def _layout(horizontal: str, vertical: str) -> Figure:
    return {
        "xaxis": {"title": {"text": horizontal}, "automargin": True},
        "yaxis": {"title": {"text": vertical}, "automargin": True},
        "margin": {"l": 10, "r": 10, "t": 40, "b": 10},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "height": 420,
    }
