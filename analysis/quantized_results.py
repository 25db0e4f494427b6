"""The report's section on runs that ``qlora-exp quantize`` rounded after their training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_exp.analysis.configurations import Configuration
from qlora_exp.analysis.report_content import Section, value_table
from qlora_exp.formatting import bytes_text
from qlora_exp.records.types import RunRecord

QuantizationFiles = Callable[[RunRecord], Mapping[str, Any] | None]
"""Run → the content of its quantization.json; ``None`` if it has none."""
SHOWN_RUNS = 8


def quantized_section(configurations: Sequence[Configuration], files: QuantizationFiles) -> Section | None:
    """Return one row per run and format: bits, size, what it costs with its interval, and the worst layer.

    ``None`` if no run has been through ``qlora-exp quantize``.
    """
    found = [
        (c, run, content)
        for c in configurations
        for run in c.runs
        if (content := files(run)) is not None and content.get("results")
    ]
    if not found:
        return None
    columns = (
        *("run", "format", "ranges", ("bits per weight", "figure"), ("size", "bytes")),
        *(("loss merged", "figure"), ("rounded", "figure"), ("costs", "figure"), ("low", "figure"), ("high", "figure")),
        *(
            ("accuracy changes", "figure"),
            ("from", "figure"),
            ("to", "figure"),
            "worst layer",
            ("its error", "percent"),
        ),
    )
    rows: list[tuple[str | float | None, ...]] = []
    for c, run, content in found[:SHOWN_RUNS]:
        for result in content["results"]:
            loss, accuracy = result.get("loss_per_item") or {}, result.get("accuracy") or {}
            worst = max(result["layers"], key=_error)
            rows.append(
                (
                    *(f"{c.label} ({run.run_id[-4:]})", result["format"], result["calibration"]),
                    *(result["bits_per_weight"], result["model_bytes"]),
                    *(loss.get(name) for name in ("before", "after", "difference", "low", "high")),
                    *(accuracy.get(name) for name in ("difference", "low", "high")),
                    *(worst["name"], _error(worst)),
                )
            )
    paragraphs = tuple(_sentence(run, content) for _, run, content in found[:SHOWN_RUNS])
    more = len(found) - SHOWN_RUNS
    points = (
        "The model is merged in 16 bits and rounded without further training. Intervals are over items alone, of one"
        " run: another seed would give another cost. A layer's error is that of its output on training rows, relative;"
        " without such rows, that of its weights.",
        *([f"{more} more runs have a quantization.json."] if more > 0 else []),
    )
    return Section(
        "quantized",
        "Rounded after training",
        paragraphs,
        (value_table(columns, rows, "Loss per item in nats; costs: rounded minus merged, on the same items"),),
        points=points,
    )


def _error(layer: Mapping[str, Any]) -> float:
    return float(layer["output_error"] if layer.get("output_error") is not None else layer["weight_error"])


def _sentence(run: RunRecord, content: Mapping[str, Any]) -> str:
    """Return which is the smallest format that isn't shown to cost anything."""
    scored = [result for result in content["results"] if result.get("loss_per_item")]
    who, merged = f"Run {run.run_id[-4:]}", bytes_text(content["merged_bytes"])
    if not scored:
        return f"{who} was rounded, but not scored: {content.get('why_not_scored')}."
    harmless = [r for r in scored if r["loss_per_item"]["low"] is not None and r["loss_per_item"]["low"] <= 0]
    if not harmless:
        least = min(scored, key=lambda result: float(result["loss_per_item"]["difference"]))
        cost = least["loss_per_item"]["difference"]
        return f"{who}: every format costs something, {least['format']} the least ({cost:.3f} nats per item)."
    smallest = min(harmless, key=lambda result: int(result["model_bytes"]))
    change = smallest["loss_per_item"]
    interval = f"{change['difference']:.3f} nats per item, 95 % CI {change['low']:.3f} to {change['high']:.3f}"
    size = f"{bytes_text(smallest['model_bytes'])} instead of {merged}"
    return f"{who}: the smallest format that isn't shown to cost anything is {smallest['format']} ({size}; {interval})."
