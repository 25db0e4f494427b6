"""``report``: the answers of studies as one HTML file, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import OutputRoot, complete_studies, examples, outputs_of

if TYPE_CHECKING:
    from qlora_exp.analysis.report_content import StudyInfo
    from qlora_exp.paths import OutputPaths, StudyPaths
    from qlora_exp.records.types import RunRecord

MAX_CACHED_ITEM_TABLES = 64
"""Runs whose per-item values stay in memory: comparisons use the same few runs again and again."""


def add_to(app: typer.Typer) -> None:
    app.command(
        "report",
        epilog=examples(
            "qlora-exp report last",
            "qlora-exp report base_ladder instruct_ladder --output report/",
            "qlora-exp report --output-root outputs            # every run there, of any study or none",
        ),
    )(report)


def report(
    studies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY]...",
            help="Names, unique beginnings of names, or 'last'; default: all runs",
            autocompletion=complete_studies,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the files; default: the folder of the (first) study"
        ),
    ] = None,
    equivalence: Annotated[
        float | None,
        typer.Option(
            "--equivalence",
            help="Margin in bits per byte within which instruct and base count as equal; fix it beforehand",
        ),
    ] = None,
    output_root: OutputRoot = None,
) -> int:
    """Write report.html, report.md and runs.csv: the answer in words, and its evidence."""
    from qlora_exp.analysis.report import build
    from qlora_exp.analysis.report_rendering import to_csv, to_html, to_markdown
    from qlora_exp.records.files import write_text
    from qlora_exp.records.find import find_study, read_runs

    outputs = outputs_of(output_root)
    study_paths = list(dict.fromkeys(find_study(name, outputs) for name in studies or []))
    _check_equivalence(equivalence)
    records, unreadable = read_runs(outputs)
    infos, runs = _studies_and_runs(study_paths, records, outputs)
    content = build(runs, infos, _item_scores(outputs), equivalence, len(unreadable))
    folder = output or (study_paths[0].folder if study_paths else outputs.root)
    files = {"report.html": to_html(content, _runs_at(outputs, folder)), "report.md": to_markdown(content)}
    for name, text in (files | {"runs.csv": to_csv(content)}).items():
        _write(folder / name, text, write_text)
    for paths in study_paths if output is None else ():
        _log_report(paths, runs, outputs)
    for sentence in content.headline or [str(content.why_none)]:
        print(sentence)
    print(f"report: {folder / 'report.html'}")
    return 0


def _log_report(paths: StudyPaths, records: list[RunRecord], outputs: OutputPaths) -> None:
    """Log the report to the study's parent run, if the study is in MLflow."""
    import sys

    from qlora_exp.config.schema import TrackingConfig
    from qlora_exp.study.spec import read_spec
    from qlora_exp.tracking.state import read_state
    from qlora_exp.tracking.study import deliver_report

    raw = records[-1].config.get("tracking") or {}
    if read_state(paths) is None or not raw.get("enabled"):
        return
    config = TrackingConfig(True, raw.get("uri"), raw["experiment"], float(raw["timeout_seconds"]))
    reason = deliver_report(config, outputs, read_spec(paths).name)
    if reason is not None:
        print(f"the report is not in MLflow yet: {reason}\n  do:    qlora-exp sync", file=sys.stderr)


def _check_equivalence(margin: float | None) -> None:
    import math

    from qlora_exp.errors import AnalysisError

    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise AnalysisError(f"invalid margin {margin:g}", "--equivalence", "a number above 0, in bits per byte")


def _studies_and_runs(
    study_paths: list[StudyPaths], records: list[RunRecord], outputs: OutputPaths
) -> tuple[list[StudyInfo], list[RunRecord]]:
    """Return what the report needs to know of each study, and their runs."""
    from qlora_exp.analysis.report_content import StudyInfo
    from qlora_exp.records.upgrade import upgrade_answers
    from qlora_exp.study.spec import is_trial_of, read_spec

    if not study_paths:
        return [StudyInfo(str(outputs.root.name))], records
    infos, specs = [], [read_spec(paths) for paths in study_paths]
    for spec, paths in zip(specs, study_paths, strict=True):
        importance = {} if spec.synthetic else _importance(spec, paths)
        predicted = {} if spec.synthetic else _predicted_memory(spec, paths)
        ladder = upgrade_answers(_read_json(paths.folder / "ladder.json"))
        infos.append(StudyInfo(spec.name, spec.question, spec.objectives, ladder, importance, predicted))
    return infos, [record for record in records if any(is_trial_of(record, spec) for spec in specs)]


def _predicted_memory(spec: Any, paths: StudyPaths) -> dict[str, Any]:
    """Return a summary of the memory predictions, and store it with the study: trials that were not started have no
    record. Empty if nothing limits the trials' memory."""
    from qlora_exp.errors import QloraExpError
    from qlora_exp.orchestration.status import memory_predictions
    from qlora_exp.records.schema import to_dict
    from qlora_exp.records.upgrade import PREDICTED_MEMORY_KEYS, renamed
    from qlora_exp.study.study import Study

    file = paths.folder / "predicted_memory.json"
    try:
        summary = memory_predictions(Study.read(spec, paths, spec.storage).trials(), paths)
    except QloraExpError:
        stored = _read_json(file)
        return renamed(stored, PREDICTED_MEMORY_KEYS) if isinstance(stored, dict) else {}
    if summary is None:
        return {}
    plain = {**to_dict(summary), "sentence": summary.sentence}
    _store(file, plain)
    return plain


def _importance(spec: Any, paths: StudyPaths) -> dict[str, dict[str, float]]:
    """Return Optuna's importances, and store them with the study. If its database is gone, return the stored ones."""
    from qlora_exp.errors import QloraExpError
    from qlora_exp.study.study import Study

    file = paths.folder / "importance.json"
    try:
        importances = Study.read(spec, paths, spec.storage).importances()
    except QloraExpError:
        stored = _read_json(file)
        return stored if isinstance(stored, dict) else {}
    _store(file, importances)
    return importances


def _store(file: Path, content: dict[str, Any]) -> None:
    """Store it for reports after the database is gone. A study folder that can't be written is no error."""
    import contextlib

    from qlora_exp.records.files import write_json

    with contextlib.suppress(OSError):
        write_json(file, content)


def _read_json(file: Path) -> Any:
    """Return the file's content; ``None`` if there is no such file.

    Raises:
        RecordError: it can't be read.
    """
    from json import loads

    from qlora_exp.errors import RecordError

    try:
        return loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise RecordError(f"the file can't be read: {error}", str(file), "delete it, or resume the study") from None


CORRECTNESS_COLUMNS = {"accuracy": "correct", "exact_match": "exact"}
"""Score → its column in the per-item table."""


def _item_scores(outputs: OutputPaths) -> Any:
    """Return a function as :data:`qlora_exp.analysis.contrasts.ItemScores`, which reads the runs' per-item files."""
    from functools import lru_cache

    @lru_cache(maxsize=MAX_CACHED_ITEM_TABLES)
    def read(run_id: str, moment: str, split: str) -> dict[str, list[Any]] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = ["item_id", "completion_nats", "completion_bytes", *CORRECTNESS_COLUMNS.values()]
        try:
            table = pq.read_table(outputs.run(run_id).items(moment, split), columns=columns)
        except (OSError, pa.ArrowException, KeyError):
            return None
        return dict(table.to_pydict())

    def scores(record: RunRecord, moment: str, score: str) -> Mapping[str, float] | None:
        import math

        items = read(record.run_id, moment, "test" if record.scores.test is not None else "validation")
        if items is None:
            return None
        if score in CORRECTNESS_COLUMNS:
            values = items[CORRECTNESS_COLUMNS[score]]
        else:
            size = sum(items["completion_bytes"]) / max(len(items["completion_bytes"]), 1)
            values = [nats / math.log(2) / size for nats in items["completion_nats"]] if size else [None]
        if None in values:
            return None
        return {item: float(value) for item, value in zip(items["item_id"], values, strict=True)}

    return scores


def _runs_at(outputs: OutputPaths, folder: Path) -> str:
    """Return the run folders' path relative to the report: its links stay valid if both are moved together."""
    from os.path import relpath
    from urllib.parse import quote

    return quote(Path(relpath(outputs.runs, folder.expanduser().absolute())).as_posix())


def _write(file: Path, text: str, write_text: Any) -> None:
    from qlora_exp.errors import RecordError

    try:
        write_text(file, text)
    except OSError as error:
        raise RecordError(f"the report can't be written: {error.strerror}", str(file), "--output DIR") from None
