"""The analyses' answers to fixed tables and to made-up records: ``analyze --json`` and the report's table."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.contracts import reading, runs, store
from tests.contracts.calling import call, called_in
from tests.contracts.masking import masked

SEEDS = (1, 2, 3)
RANKS = (8, 16, 32)
ITEMS = 40
QUESTIONS = (
    "seeds.csv --margin 0.02",
    "seeds.csv --margin 0.5",
    "seeds.csv",
    "long.jsonl --margin 0.05",
    "published.csv --score-column wikisql --higher-is-better --se 0.5 --margin 0.5",
    "published.csv --score-column wikisql --higher-is-better --se 0.5 --margin 2",
    "published.csv --score-column mnli --higher-is-better --se 0.1 --margin 0.5",
    "published.csv --score-column mnli --higher-is-better",
    "configurations.tsv --margin 0.03 --configuration-column model",
)


def analyses(folder: Path) -> dict[str, Any]:
    """Question → answer."""
    write_tables(folder)
    with called_in(folder):
        found: dict[str, Any] = {f"analyze {question}": answer(question) for question in QUESTIONS}
        write_records(folder)
        for name, options in {"report": "", "report within 0.05": "--equivalence 0.05"}.items():
            called = call("report", "--output-root", "made_up", "--output", "written", *options.split())
            text = (folder / "written" / "report.md").read_text(encoding="utf-8")
            found[name] = {
                "exit_code": called.code,
                "error": called.err,
                "headline": reading.numbers_of(called.out, folder),
                "numbers": reading.numbers_of(text, folder),
            }
        found["runs.csv"] = reading.table_of((folder / "written" / "runs.csv").read_text(encoding="utf-8"))
    return masked(found, {str(folder): "<folder>"})


def answer(question: str) -> Any:
    called = call("analyze", *question.split(), "--json")
    if called.code != 0:
        return {"exit_code": called.code, "error": called.err}
    return without_notes(json.loads(called.out))


def without_notes(value: Any) -> Any:
    """Notes are sentences: their number stays."""
    if isinstance(value, dict):
        return {
            key: len(item) if key == "notes" and isinstance(item, list) else without_notes(item)
            for key, item in value.items()
        }
    return [without_notes(item) for item in value] if isinstance(value, list) else value


def write_tables(folder: Path) -> None:
    """A table of seeds, a long one of items, a published one, and one of two models."""
    rng = random.Random(0)
    losses = {8: 1.5, 16: 1.4, 32: 1.39, 64: 1.388}
    lines = ["rank,seed,loss"]
    lines += [f"{r},{seed},{loss + rng.gauss(0, 0.01):.6f}" for r, loss in losses.items() for seed in SEEDS]
    (folder / "seeds.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        {"rank": r, "seed": seed, "item": f"i{item}", "loss": round(loss + 0.02 * item + rng.gauss(0, 0.05), 6)}
        for r, loss in losses.items()
        for seed in SEEDS
        for item in range(20)
    ]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    published = "rank,wikisql,mnli\n1,73.4,91.3\n2,73.3,91.4\n4,73.7,91.3\n8,73.8,91.6\n64,73.5,91.4\n"
    (folder / "published.csv").write_text(published, encoding="utf-8")
    lines = ["model\trank\tseed\tloss"]
    for model, gain in {"small": 0.1, "large": 0.005}.items():
        lines += [
            f"{model}\t{r}\t{seed}\t{2 - gain * step + rng.gauss(0, 0.005):.6f}"
            for step, r in enumerate(RANKS)
            for seed in SEEDS
        ]
    (folder / "configurations.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_records(folder: Path) -> None:
    """Records of a grid (variant × format × rank × seed) that nothing trained, in the form of version 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    outputs = store.unpacked("v1", folder / "store") / "outputs"
    template = runs.records_of(outputs)["contract"]
    [file] = (outputs / "runs" / template["run_id"]).glob("items_after_test.parquet")
    items = pq.read_table(file)
    for record, losses in made_up(template):
        target = folder / "made_up" / "runs" / record["run_id"]
        target.mkdir(parents=True)
        (target / "record.json").write_text(json.dumps(record), encoding="utf-8")
        first = items.slice(0, 1).to_pylist()[0]
        rows = [
            {**first, "item_id": f"i{number}", "completion_nats": nats, "completion_bytes": 5, "correct": nats < 1.4}
            for number, nats in enumerate(losses)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=items.schema), target / "items_after_test.parquet")


def made_up(template: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[float]]]:
    rng = random.Random(1)
    hard = [rng.gauss(0, 0.3) for _ in range(ITEMS)]
    number = 0
    for variant, written, level in (("base", "plain", 1.5), ("instruct", "plain", 1.6), ("instruct", "chat", 1.45)):
        for step, r in enumerate(RANKS):
            for seed in SEEDS:
                losses = [level - 0.15 / (step + 1) + one + rng.gauss(0, 0.05) for one in hard]
                record = copy.deepcopy(template)
                number += 1
                name = f"{variant} {written} r{r} s{seed}"
                record.update(run_id=f"20260101-0000{number:02}-made-up", name=name, seed=seed)
                record["config"].update(seed=seed, name=record["name"])
                record["config"]["model"]["variant"] = variant
                record["config"]["lora"]["r"] = r
                record["config"]["task"]["format"] = written
                record["plan"].update(format=written, alpha=2.0 * r, trainable_parameters=15000 * r)
                record["plan"]["config_fingerprint"] = f"{number:064x}"
                record["model_fingerprint"] = f"sha256:{variant}"
                loss = sum(losses) / ITEMS
                scores = {"loss": loss / 2.4, "loss_per_item": loss, "bits_per_byte": loss / 5 / 0.6931471805599453}
                scores["accuracy"] = sum(one < 1.4 for one in losses) / ITEMS
                record["scores"]["test"].update(scores, items=ITEMS)
                record["scores"]["after"].update(scores, items=ITEMS)
                record["memory"].update(peak_train_bytes=10_000_000 + 100_000 * r)
                record["speed"].update(train_seconds=10.0 + r / 8, train_tokens_per_second=2000.0 - r)
                yield record, losses
