"""Turns a state into docs/gpu.md and docs/predicted_memory_cuda.csv, and prints the constants that it proposes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_kit.runner import EXIT_OK, EXIT_USAGE, ROOT

PAGE, TABLE = "gpu.md", "predicted_memory_cuda.csv"
GB, MIB = 1e9, 2**20
CELL_COLUMNS = (
    *("predicted_peak_bytes", "measured_peak_bytes", "measured_over_predicted", "predicted_activation_bytes"),
    *("predicted_logits_bytes", "predicted_context_bytes", "context_bytes", "measured_reserved_bytes"),
    *("measured_base_bytes", "allocated_before_bytes"),
)
FRAGMENTS_PERCENTILE = 90


def collect(state_file: Path, docs: Path) -> int:
    """Write both files into ``docs``, and print the proposed constants. A rehearsal's go to another folder than the
    repository's: nothing in them was measured on a GPU.

    Returns exit code 2 if the state can't be read, has no measured cell, or is a rehearsal's without another folder.
    """
    try:
        state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
        rows = [row for stage in state["stages"].values() for row in stage["numbers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {state_file} is no state of this kit ({type(error).__name__}): pass the state.json of --out")
        return EXIT_USAGE
    if state.get("rehearsal", True) and docs.resolve() == (ROOT / "docs").resolve():
        print("error: this state is a rehearsal's, without a GPU: choose another folder with --docs")
        return EXIT_USAGE
    cells = table_of(rows, "cells")
    if not cells:
        print("error: the state has no measured cell: run the stage cells first")
        return EXIT_USAGE
    docs.mkdir(parents=True, exist_ok=True)
    write_cells(docs / TABLE, cells)
    (docs / PAGE).write_text("\n".join(page(state, rows)) + "\n", encoding="utf-8")
    print(f"written: {docs / PAGE}, {docs / TABLE}")
    print(*constants(rows), sep="\n")
    return EXIT_OK


def table_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["table"] == name]


def write_cells(file: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        names = [*cells[0]["config"], *CELL_COLUMNS]
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for cell in cells:
            writer.writerow({**cell["config"], **{name: cell.get(name) for name in CELL_COLUMNS}})


def constants(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the constants of the product that these measurements would replace."""
    cells = table_of(rows, "cells")
    contexts = [cell["context_bytes"] for cell in cells if cell.get("context_bytes")]
    contexts += [row["bytes"] for row in table_of(rows, "context")]
    fragments = sorted(
        cell["measured_reserved_bytes"] / cell["measured_peak_bytes"] - 1
        for cell in cells
        if cell.get("measured_reserved_bytes") and cell.get("measured_peak_bytes")
    )
    errors = [abs(cell["measured_over_predicted"] - 1) for cell in cells if cell.get("measured_over_predicted")]
    if contexts:
        yield f"CUDA_CONTEXT_BYTES = {math.ceil(max(contexts) / MIB)} * 2**20  # the largest of {len(contexts)}"
    if fragments:
        place = min(len(fragments) - 1, math.ceil(FRAGMENTS_PERCENTILE / 100 * len(fragments)) - 1)
        share, count = max(0.0, fragments[place]), len(fragments)
        yield f"CUDA_FRAGMENTS = {share:.3f}  # {FRAGMENTS_PERCENTILE}th percentile of {count} cells"
    if errors:
        yield f'RELATIVE_ERROR["cuda"] = {max(errors):.2f}  # the largest of {len(errors)}'
    for row in table_of(rows, "calibrated share"):
        low, middle, high = (row[name] for name in ("low", "middle", "high"))
        yield f"CALIBRATED_SHARE on GPUs = ({low:.2f}, {middle:.2f}, {high:.2f})  # of {row['cells']} cells"


def page(state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of docs/gpu.md."""
    yield "# Measured on a GPU"
    yield ""
    if state.get("rehearsal", True):
        yield "**REHEARSAL: no GPU was used. Device and meters were mocked; no number here is a measurement of one.**"
        yield ""
    card = next(iter(table_of(rows, "card")), {})
    versions = next(iter(table_of(rows, "versions")), {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("table",))
    commit = f"{state.get('commit') or 'unknown'}{' with changes' if state.get('commit_changed') else ''}"
    yield f"`make gpu-acceptance` wrote this page. Card: {card.get('name', 'unknown')}. Commit: {commit}."
    yield f"Packages: {named}."
    for row in table_of(rows, "ceilings"):
        yield (
            f"A bf16 matrix product of 8192³ reached {row['matmul_tflops']:.0f} TFLOP/s, "
            f"a copy {row['copy_tb_s']:.2f} TB/s."
        )
    yield from _section("Checks", ("stage", "status", "seconds", "checks passed", "not checked"), _stages(state))
    failed = [
        (name, check["name"], check["got"], check["wanted"])
        for name, stage in state["stages"].items()
        for check in stage["checks"]
        if check["ok"] is False
    ]
    yield from _section("Failed checks", ("stage", "check", "got", "wanted"), failed)
    yield from _section(
        "Memory: measured and predicted, GB (10^9 bytes)",
        ("cell", "predicted peak", "measured peak", "ratio", "reserved", "context"),
        [
            (
                row["cell"],
                *(_gb(row.get(name)) for name in ("predicted_peak_bytes", "measured_peak_bytes")),
                row.get("measured_over_predicted"),
                *(_gb(row.get(name)) for name in ("measured_reserved_bytes", "context_bytes")),
            )
            for row in table_of(rows, "cells")
        ],
    )
    speed = ("tokens_per_second", "tokens_per_second_wall", "step_seconds_p50", "host_seconds_per_step", "utilisation")
    yield from _section(
        "Speed: real tokens per second",
        ("cell", "counted steps", "all of training", "step p50, s", "host CPU a step, s", "utilisation", "J a token"),
        [
            (row["cell"], *(row.get(name) for name in (*speed, "joules_per_token")))
            for row in (*table_of(rows, "cells"), *table_of(rows, "product and TRL"))
        ],
    )
    for title, table, columns in SIMPLE_TABLES:
        found = [tuple(row.get(column) for column in columns) for row in table_of(rows, table)]
        yield from _section(title, columns, found)
    yield from _section("Proposed constants", ("constant",), [(f"`{line}`",) for line in constants(rows)])


SIMPLE_TABLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Plain TRL on the same rows", "TRL", ("cell", "kind", "tokens_per_second", "peak_bytes", "liger")),
    ("Product / plain TRL", "product / TRL", ("cell", "documented", "tuned", "bf16", "noise")),
    (
        "Anatomy of a step",
        "anatomy",
        (
            *("cell", "idle_share", "waits_per_micro_batch", "reads_per_micro_batch", "dequantization", "attention"),
            *("matrix products", "element-wise"),
        ),
    ),
    ("Seconds of a step of one row", "micro-steps", ("tokens", "checkpointing", "seconds")),
    (
        "Gain if K rows of different adapters shared a step",
        "gain of K rows in one step",
        ("tokens", "K=2", "K=4", "K=8"),
    ),
    ("Trial processes on one card", "processes on one card", ("processes", "tokens_per_second", "joules")),
    ("Scoring, seconds", "scoring", ("part", "seconds", "items")),
    ("Energy of a phase, and power × time, J", "energy", ("joules", "joules_by_power")),
)


def _stages(state: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    found = []
    for name, stage in state["stages"].items():
        done = [check for check in stage["checks"] if check["ok"] is not None]
        passed = f"{sum(check['ok'] for check in done)} of {len(done)}"
        found.append((name, stage["status"], stage["seconds"], passed, len(stage["checks"]) - len(done)))
    return found


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    for row in rows:
        yield f"| {' | '.join(_shown(value) for value in row)} |"


def _gb(value: float | None) -> float | None:
    return value / GB if value is not None else None


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
