"""A run's answers as a table artifact, which MLflow's UI shows next to those of other runs."""

from __future__ import annotations

import json

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from qlora_exp.analysis.shown_items import marked, same_items, shown_prompts, shows_generated, without_end
from qlora_exp.errors import RecordError
from qlora_exp.paths import RunPaths
from qlora_exp.records.items import read_items
from qlora_exp.records.redaction import redact_text

ARTIFACT = "answers.json"
LOGGED_ITEMS = 200
"""Items of the table; the run folder has all."""
CELL_CHARACTERS = 1_000
"""Of each text."""

PROMPT_AND_ANSWER, TUNED, EXPECTED, BASE = "prompt → right answer", "tuned", "right answer", "base"
WRITES, ITEM = "tuned writes", "item"
"""Columns. The UI's comparison has a row for each different value of the first one, and shows the second of each run:
the right answer must be in the first."""


def answers_table(paths: RunPaths) -> str | None:
    """Return the table as JSON, as ``mlflow.log_table`` writes it; ``None`` if the run has no answers.

    Prompts are without what all share, so that runs with another template have the same rows.
    """
    try:
        rows = read_items(paths.folder)
    except RecordError:
        return None
    if all(row["answer"] is None for row in rows):
        return None
    chosen, prompts = same_items(rows, LOGGED_ITEMS), shown_prompts(rows)
    columns = [PROMPT_AND_ANSWER, TUNED, EXPECTED, BASE, *([WRITES] if shows_generated(rows) else []), ITEM]
    data = []
    for row in chosen:
        cells = {
            PROMPT_AND_ANSWER: without_end(prompts[row["id"]] or row["id"], CELL_CHARACTERS // 2),
            TUNED: marked(row["answer"], row["correct"]),
            EXPECTED: row["expected"],
            BASE: marked(row["base_answer"], row["base_correct"]),
            WRITES: row["generated"],
            ITEM: row["id"],
        }
        if row["expected"] is not None:
            cells[PROMPT_AND_ANSWER] += f"\n→ {without_end(row['expected'], CELL_CHARACTERS // 2 - 5)}"
        data.append([without_end(redact_text(cells[name] or ""), CELL_CHARACTERS) for name in columns])
    return json.dumps({"columns": columns, "data": data}, ensure_ascii=False)


def log_answers(client: MlflowClient, run_id: str, paths: RunPaths) -> None:
    """Log the table, in place of an earlier one, and the tag by which the UI finds it.

    ``MlflowClient.log_table`` would append the rows to those of an earlier delivery.
    """
    table = answers_table(paths)
    if table is None:
        return
    client.log_text(run_id, table, ARTIFACT)
    tables = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    entry = {"path": ARTIFACT, "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))
