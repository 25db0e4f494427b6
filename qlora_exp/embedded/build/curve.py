"""Measure the embedded task's accuracy by rank with qlora-exp: ranks × learning rates × seeds, on the test split.

python -m qlora_exp.embedded.build.curve --output-root DIR [--part 1/2]  # idempotent; parts may run in parallel
python -m qlora_exp.embedded.build.curve --output-root DIR --collect     # curve.json, and the table in the model card
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from qlora_exp.config.compose import compose
from qlora_exp.errors import RecordError
from qlora_exp.paths import EMBEDDED, OutputPaths
from qlora_exp.records.files import read_record, write_json, write_text
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.execute import execute

RANKS = (1, 4, 8, 16, 64)
LEARNING_RATES = (1e-3, 4e-3)
SEEDS = (1, 2, 3)
CURVE_MARK, BASE_SCORES_MARK = "<!-- curve -->", "<!-- base scores -->"
INSTRUCT = "curve instruct r8 lr0.004 s1"
"""One run of the instruct model: the card shows its scores before training next to the base model's."""
FIXED = (
    "targets=all_linear",
    "quantization=fp32",
    "training.max_steps=200",
    "training.threads=1",
    "evaluation.split=test",
    "evaluation.generate=false",
    "evaluation.forgetting=false",
    "tracking=off",
)

Point = tuple[int, float, int]


def points() -> list[Point]:
    """Return all (rank, learning rate, seed), seed by seed."""
    return [(r, rate, seed) for seed, rate, r in itertools.product(SEEDS, LEARNING_RATES, RANKS)]


def name_of(point: Point) -> str:
    """Return the name of the point's run."""
    rank, rate, seed = point
    return f"curve r{rank} lr{rate:g} s{seed}"


def finished(output_root: Path) -> dict[str, RunRecord]:
    """Return the completed runs of the curve by name."""
    records = {}
    for path in sorted(OutputPaths.of(output_root).runs.glob("*/record.json")):
        try:
            record = read_record(path)
        except RecordError:
            continue
        if record.status is Status.COMPLETED and record.name.startswith("curve "):
            records[record.name] = record
    return records


def measure(output_root: Path, part: int, parts: int) -> None:
    """Run this part's points that have no completed run yet."""
    runs = [(name_of(point), _axes(point)) for point in points()]
    runs.insert(0, (INSTRUCT, ["model.variant=instruct", *_axes((8, 4e-3, 1))]))
    for name, axes in runs[part - 1 :: parts]:
        if name in finished(output_root):
            continue
        record = execute(compose([*FIXED, *axes, f"name='{name}'", f"output_root='{output_root}'"]))
        test = record.scores.test
        print(record.name, record.status, test.accuracy if test else None, flush=True)


def _axes(point: Point) -> list[str]:
    rank, rate, seed = point
    return [f"lora.r={rank}", f"training.learning_rate={rate}", f"seed={seed}"]


def collect(output_root: Path) -> None:
    """Write curve.json, and the tables into the model card."""
    records = finished(output_root)
    rows = [_row(point, records[name_of(point)]) for point in points() if name_of(point) in records]
    write_json(EMBEDDED / "curve.json", {"settings": FIXED, "rows": rows})
    card = EMBEDDED / "MODEL_CARD.md"
    text = _fill(card.read_text(), CURVE_MARK, table(rows))
    write_text(card, _fill(text, BASE_SCORES_MARK, base_scores_table(records)))


def _fill(text: str, mark: str, content: str) -> str:
    """Put ``content`` between the mark and the next heading or end, in place of the old text."""
    return re.sub(f"{mark}.*?(?=\n## |\n<!-- |\\Z)", lambda _: f"{mark}\n\n{content}\n", text, flags=re.S)


def base_scores_table(records: dict[str, RunRecord]) -> str:
    """Return the table of both models' scores before training and of the baselines, on the test split."""
    lines = ["| on the test split | accuracy | calibrated | loss per item (nats) |", "|---|---|---|---|"]
    base = next((record for name, record in records.items() if name != INSTRUCT), None)
    for name, record in (("base, plain prompt", base), ("instruct, chat format", records.get(INSTRUCT))):
        scores = record.scores.test_before if record else None
        if scores is not None:
            figures = (scores.accuracy, scores.accuracy_calibrated, scores.loss_per_item)
            lines.append(f"| {name} | " + " | ".join(_number(value) for value in figures) + " |")
    if base is not None and base.baselines is not None:
        lines.append(f"| majority class | {_number(base.baselines.majority_accuracy)} | | |")
        lines.append(f"| TF-IDF + logistic regression | {_number(base.baselines.tfidf_accuracy)} | | |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _row(point: Point, record: RunRecord) -> dict[str, float | int | None]:
    test, before = record.scores.test, record.scores.test_before
    assert test is not None
    return {
        "rank": point[0],
        "learning_rate": point[1],
        "seed": point[2],
        "accuracy": test.accuracy,
        "loss_per_item": test.loss_per_item,
        "macro_f1": test.macro_f1,
        "base_accuracy": before.accuracy if before else None,
        "base_accuracy_calibrated": before.accuracy_calibrated if before else None,
        "majority_accuracy": record.baselines.majority_accuracy if record.baselines else None,
        "tfidf_accuracy": record.baselines.tfidf_accuracy if record.baselines else None,
    }


def table(rows: Iterable[dict[str, float | int | None]]) -> str:
    """Return the table of mean ± standard deviation over seeds, by rank and learning rate."""
    cells: dict[tuple[object, object], list[dict[str, float | int | None]]] = defaultdict(list)
    for row in rows:
        cells[row["rank"], row["learning_rate"]].append(row)
    lines = ["| r | learning rate | seeds | test loss per item (nats) | test accuracy |", "|---|---|---|---|---|"]
    for (rank, rate), group in sorted(cells.items(), key=lambda cell: (str(cell[0][1]), float(str(cell[0][0])))):
        losses = [float(row["loss_per_item"]) for row in group if row["loss_per_item"] is not None]
        accuracies = [float(row["accuracy"]) for row in group if row["accuracy"] is not None]
        lines.append(f"| {rank} | {rate} | {len(group)} | {_spread(losses)} | {_spread(accuracies)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "unknown"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-root", type=Path, required=True)
    parser.add_argument("--part", default="1/1", help="K/N: every N-th point, beginning with the K-th")
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args()
    if options.collect:
        collect(options.output_root)
    else:
        part, parts = (int(number) for number in options.part.split("/"))
        measure(options.output_root, part, parts)


if __name__ == "__main__":
    main()
