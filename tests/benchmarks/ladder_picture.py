"""The answers of a rank-doubling sweep as one picture: docs/pictures/ladder_demo.png of the README.

    make demo
    python tests/benchmarks/ladder_picture.py outputs/studies/demo/ladder.json docs/pictures/ladder_demo.png

One panel for each ladder: the gain of each doubling with its interval, the margin and the zone around it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"continue": "#009e73", "stop": "#0072b2", "inconclusive": "#d55e00"}


def draw(ladders: list[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(ladders), figsize=(4.6 * len(ladders), 3.4), sharey=True, squeeze=False)
    for axes, ladder in zip(panels[0], ladders, strict=True):
        margin, zone = ladder["margin"], ladder["half_zone"]
        axes.axhspan(margin - zone, margin + zone, color="#b8860b", alpha=0.15, linewidth=0)
        axes.axhline(margin, color="#b8860b", linestyle="--", label=f"margin: {margin:g}")
        steps = ladder["comparisons"]
        for number, step in enumerate(steps):
            gain, colour = step["gain"], COLOURS[step["decision"]]
            ends = [[gain - step["low"]], [step["high"] - gain]]
            axes.errorbar([number], [gain], yerr=ends, marker="o", markersize=8, capsize=4, color=colour)
            axes.annotate(step["decision"], (number, gain), (10, -4), textcoords="offset points", color=colour)
        names = [f"r = {step['from_rank']} → {step['to_rank']}" for step in steps]
        axes.set_xticks(range(len(steps)), names)
        axes.set_xlim(-0.6, len(steps) - 0.1)
        chosen = ladder["recommended_rank"]
        open_step = f"{steps[-1]['from_rank']} → {steps[-1]['to_rank']} needs more seeds"
        answer = open_step if chosen is None else f"use r = {chosen}"
        axes.set_title(f"{', '.join(map(str, ladder['axes'].values()))} model: {answer}")
        axes.legend(loc="upper right" if len(steps) == 1 else "lower right", frameon=False)
    panels[0][0].set_ylabel("gain, nats per test item")
    panels[0][0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ladder", type=Path, help="studies/STUDY/ladder.json")
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.ladder.read_text(encoding="utf-8"))["ladders"], given.picture)


if __name__ == "__main__":
    main()
