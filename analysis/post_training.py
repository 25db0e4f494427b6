"""Post-training quantization: what ``qlora-exp quantize`` found for the runs of a report, one row for each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_exp.analysis.configurations import Configuration
from qlora_exp.analysis.report_content import DisplayedValue, Section, value_table

QuantizationFiles = Callable[[str], Mapping[str, Any] | None]
"""Run id → content of its ``quantization.json``; ``None``: it wasn't quantized, or the file can't be read."""
MAX_FORMATS = 40


def post_training_section(configurations: Sequence[Configuration], files: QuantizationFiles) -> Section | None:
    """Return the section on the runs that were quantized after training; ``None`` if there are none."""
    rows: list[tuple[DisplayedValue, ...]] = []
    splits: set[str] = set()
    changes: list[tuple[float, str, str]] = []
    for configuration in configurations:
        for run in configuration.runs:
            content = files(run.run_id)
            if content is None:
                continue
            splits.add(f"{content['items']} {content['split']}")
            for result in content["results"]:
                name = f"{configuration.label} s{run.seed}"
                rows.append(_row(name, result, content["merged_bytes"]))
                loss = result.get("loss_per_item")
                if loss is not None and loss.get("low") is not None and loss["low"] <= 0:
                    changes.append((result["model_bytes"], f"{name} in {result['format']}", _change(loss)))
    if not rows:
        return None
    columns = (
        *("run", "format", ("bits per weight", "figure"), "calibration", ("size", "bytes")),
        ("share of 16 bits", "percent"),
        *(("loss before, nats per item", "figure"), ("after", "figure"), ("change", "figure"), ("low", "figure")),
        *(("high", "figure"), ("accuracy before", "figure"), ("accuracy after", "figure")),
        *(("accuracy change", "share"), ("accuracy low", "share"), ("accuracy high", "share")),
        *("worst layer", ("its error", "percent")),
    )
    caption = (
        f"{min(len(rows), MAX_FORMATS)} of {len(rows)} formats; changes against the merged model on the same items "
        f"({', '.join(sorted(splits))}); low and high: 95 % CI over items alone. Worst layer: the largest relative "
        "error of its output, or of its weights without calibration rows"
    )
    if changes:
        _, name, change = min(changes)
        sentence = f"The smallest model whose loss isn't shown to rise is {name}: {change}."
    else:
        sentence = "No format is without a shown rise of the loss, or none was scored."
    table = value_table(columns, rows[:MAX_FORMATS], caption)
    return Section("post-training", "Post-training quantization", (sentence,), (table,))


def _row(name: str, result: Mapping[str, Any], merged_bytes: int) -> tuple[DisplayedValue, ...]:
    loss, accuracy = result.get("loss_per_item") or {}, result.get("accuracy") or {}
    worst = max(result["layers"], key=_error, default=None)
    return (
        *(name, result["format"], result["bits_per_weight"], result["calibration"], result["model_bytes"]),
        result["model_bytes"] / merged_bytes,
        *(loss.get("before"), loss.get("after"), loss.get("difference"), loss.get("low"), loss.get("high")),
        *(accuracy.get("before"), accuracy.get("after"), accuracy.get("difference")),
        *(accuracy.get("low"), accuracy.get("high")),
        *((worst["name"], _error(worst)) if worst is not None else (None, None)),
    )


def _error(layer: Mapping[str, Any]) -> float:
    output = layer.get("output_error")
    return float(layer["weight_error"] if output is None else output)


def _change(loss: Mapping[str, Any]) -> str:
    return f"{loss['difference']:+.3g} nats per item (95 % CI {loss['low']:+.3g} to {loss['high']:+.3g})"
