"""Records as tables of pandas: one flat row a run, with the fields and conditions of ``qlora-exp ls runs``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import find_study, read_runs
from qlora_exp.records.flat_rows import all_fields, flat_run, meeting
from qlora_exp.study.spec import is_trial_of, read_spec

NO_RUN_COLUMNS = ("run_id", "name", "status", "study", "trial", "score", "loss", "peak_train_bytes", "cost_usd")
"""Columns of a table without runs."""


def runs_frame(output_root: str | Path, study: str | None, where: str | Sequence[str]) -> pd.DataFrame:
    """See :func:`qlora_exp.runs`."""
    outputs = OutputPaths.of(output_root)
    spec = read_spec(find_study(study, outputs)) if study is not None else None
    records = [record for record in read_runs(outputs)[0] if spec is None or is_trial_of(record, spec)]
    rows = [{**flat_run(record), **all_fields(record)} for record in records]
    chosen = meeting(rows, [where] if isinstance(where, str) else where)
    columns = list(dict.fromkeys(key for row in rows for key in row)) if rows else list(NO_RUN_COLUMNS)
    return pd.DataFrame([rows[position] for position in chosen], columns=columns)
