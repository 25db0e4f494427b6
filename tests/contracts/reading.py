"""What the reading commands say of the outputs that an earlier version left."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from tests.contracts import runs, store
from tests.contracts.calling import call, called_in
from tests.contracts.errors import WHERE
from tests.contracts.golden_files import numbers
from tests.contracts.masking import masked

NOW = re.compile(r"^(?:cpu|gpu|memory) .*$|\bMLflow UI:.*", re.MULTILINE)
"""What a command says of the machine at this moment."""
STEPS = (
    *("ls runs", "ls runs --limit 2"),
    *(
        "show {contract} --all",
        "show {real 0} --all",
        "show {ladder 0} --all",
        "show {SYNTHETIC fails} --all",
        "show {SYNTHETIC spent} --all",
        "show {contract}",
        "show last",
    ),
    *("diff {real 0} {real 1} --all", "diff {contract} {ladder 3} --all"),
    *("status real", "status ladder", "status search", "status half"),
    *("best real", "best ladder", "best search", "best half"),
    *("trials real --csv", "trials ladder --csv", "trials search --csv", "trials half --csv", "trials search"),
    *("clean real", "clean search --keep best:2"),
    *("report real --output real_report", "report ladder", "stop half", "show nothing", "status nothing"),
    *("run --resume {contract}", "rerun {SYNTHETIC spent} seed=2", "resume real", "resume half", "trials half --csv"),
    "sync",
)
"""In this order: the last ones write."""

FIRST_WRITING = next(number for number, step in enumerate(STEPS) if step.startswith("rerun"))


def readings(folder: Path, version: str) -> dict[str, Any]:
    """Step → exit code, rows of a table or numbers of a text; and what is in MLflow afterwards."""
    store.unpacked(version, folder)
    records = runs.records_of(folder / "outputs")
    ids = {name: record["run_id"] for name, record in records.items()}
    results: dict[str, Any] = {}
    with called_in(folder):
        for number, step in enumerate(STEPS):
            results[f"{number:02} {step}"] = reading(step, ids, folder, number >= FIRST_WRITING)
        results["real_report/runs.csv"] = table_of((folder / "real_report" / "runs.csv").read_text(encoding="utf-8"))
        results["real_report/report.md"] = numbers_of((folder / "real_report" / "report.md").read_text("utf-8"), folder)
    stored = runs.mlflow_of(folder)
    results["mlflow"] = {name: masked(stored[name], {str(folder): "<folder>"}) for name in sorted(stored)}
    return results


def reading(step: str, ids: dict[str, str], folder: Path, writing: bool) -> dict[str, Any]:
    """What a step says. After the first step that writes, run ids and seconds are new ones, and masked."""
    arguments = re.sub(r"\{([^}]*)\}", lambda found: ids[found[1]], step).split()
    called = call(*arguments)
    if called.code != 0:
        message = masked(called.err.strip(), {str(folder): "<folder>"})
        return {"exit_code": called.code, "where": WHERE.findall(message), "message": message}
    if "--csv" in arguments:
        rows = table_of(called.out)
        return {"exit_code": 0, "rows": masked(rows) if writing else rows}
    return {"exit_code": 0, "numbers": numbers_of(called.out, folder)}


def table_of(text: str) -> list[dict[str, Any]]:
    rows = list(csv.reader(io.StringIO(text)))
    values = [[runs.number_of(cell) for cell in row] for row in rows[1:]]
    return [{"columns": rows[0]}, *(dict(zip(rows[0], row, strict=True)) for row in values)]


def numbers_of(text: str, folder: Path) -> str:
    """The numbers of a text that is about fixed records: they stay when its words change. Short ids of runs are none,
    even if all their hexadecimal digits are decimal ones."""
    for run in folder.rglob("record.json"):
        text = re.sub(rf"(?<![\w.]){run.parent.name[-4:]}(?![\w.])", "", text)
    return numbers(masked(NOW.sub("", text), {str(folder): "<folder>"}))


def loaded(folder: Path, version: str) -> dict[str, Any]:
    """Each record through the public function of Python."""
    import qlora_exp

    store.unpacked(version, folder)
    found = {}
    for name, record in runs.records_of(folder / "outputs").items():
        read = qlora_exp.load_run(str(folder / "outputs" / "runs" / record["run_id"]))
        after = read.scores.after
        found[name] = {
            "run_id": read.run_id,
            "status": str(read.status),
            "seed": read.seed,
            "r": read.config["lora"]["r"],
            "loss_per_item": after.loss_per_item if after else None,
            "steps": read.training.steps if read.training else None,
            "seconds": read.speed.total_seconds,
        }
    return json.loads(json.dumps(found))
