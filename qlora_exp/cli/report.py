"""``report``: what studies have to say, as one HTML file, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import OutputRoot, complete_studies, examples, outputs_of

if TYPE_CHECKING:
    from qlora_exp.analysis.content import StudyInfo
    from qlora_exp.paths import OutputPaths, StudyPaths
    from qlora_exp.records.types import RunRecord

KEPT_ITEMS = 64
"""Runs whose per-item values are kept in memory: a comparison comes back to the same few."""


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
    from qlora_exp.analysis.rendering import to_csv, to_html, to_markdown
    from qlora_exp.analysis.report import build
    from qlora_exp.records.files import write_text
    from qlora_exp.records.find import find_study, read_runs

    outputs = outputs_of(output_root)
    found = list(dict.fromkeys(find_study(name, outputs) for name in studies or []))
    _check_equivalence(equivalence)
    records, unreadable = read_runs(outputs)
    asked, own = _asked(found, records, outputs)
    made = build(own, asked, _item_scores(outputs), equivalence, len(unreadable))
    folder = output or (found[0].folder if found else outputs.root)
    files = {"report.html": to_html(made, _runs_at(outputs, folder)), "report.md": to_markdown(made)}
    for name, text in (files | {"runs.csv": to_csv(made)}).items():
        _write(folder / name, text, write_text)
    for paths in found if output is None else ():
        _track(paths, own, outputs)
    for sentence in made.headline or [str(made.why_none)]:
        print(sentence)
    print(f"report: {folder / 'report.html'}")
    return 0


def _track(paths: StudyPaths, records: list[RunRecord], outputs: OutputPaths) -> None:
    """Into the study's parent run, where the tracking store has one."""
    import sys

    from qlora_exp.config.schema import TrackingConfig
    from qlora_exp.study.spec import read_spec
    from qlora_exp.tracking.state import read_state
    from qlora_exp.tracking.study import deliver_report

    raw = records[-1].config.get("tracking") or {}
    if read_state(paths) is None or not raw.get("enabled"):
        return
    config = TrackingConfig(True, raw.get("uri"), raw["experiment"], float(raw["timeout_seconds"]))
    why = deliver_report(config, outputs, read_spec(paths).name)
    if why is not None:
        print(f"the report is not in MLflow yet: {why}\n  do:    qlora-exp sync", file=sys.stderr)


def _check_equivalence(margin: float | None) -> None:
    import math

    from qlora_exp.errors import AnalysisError

    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise AnalysisError(f"{margin:g} is no margin", "--equivalence", "a number above 0, in bits per byte")


def _asked(
    found: list[StudyPaths], records: list[RunRecord], outputs: OutputPaths
) -> tuple[list[StudyInfo], list[RunRecord]]:
    """What each study asked, and the runs that are theirs."""
    from qlora_exp.analysis.content import StudyInfo
    from qlora_exp.study.spec import is_trial_of, read_spec

    if not found:
        return [StudyInfo(str(outputs.root.name))], records
    asked, specs = [], [read_spec(paths) for paths in found]
    for spec, paths in zip(specs, found, strict=True):
        importance = {} if spec.synthetic else _importance(spec, paths)
        predicted = {} if spec.synthetic else _predicted_memory(spec, paths)
        ladder = _read_json(paths.folder / "ladder.json")
        asked.append(StudyInfo(spec.name, spec.question, spec.objectives, ladder, importance, predicted))
    return asked, [record for record in records if any(is_trial_of(record, spec) for spec in specs)]


def _predicted_memory(spec: Any, paths: StudyPaths) -> dict[str, Any]:
    """What predicting memory came to, kept beside the study as importances are: trials that were not started have no
    record. Empty where nothing limited the trials' memory."""
    from qlora_exp.errors import QloraExpError
    from qlora_exp.orchestration.status import memory_predictions
    from qlora_exp.records.schema import to_dict
    from qlora_exp.study.study import Study

    file = paths.folder / "predicted_memory.json"
    try:
        found = memory_predictions(Study.read(spec, paths, spec.storage).trials(), paths)
    except QloraExpError:
        kept = _read_json(file)
        return kept if isinstance(kept, dict) else {}
    if found is None:
        return {}
    told = {**to_dict(found), "sentence": found.sentence}
    _keep(file, told)
    return told


def _importance(spec: Any, paths: StudyPaths) -> dict[str, dict[str, float]]:
    """Optuna's importances, kept beside the study; what was kept where the study's database is gone."""
    from qlora_exp.errors import QloraExpError
    from qlora_exp.study.study import Study

    file = paths.folder / "importance.json"
    try:
        found = Study.read(spec, paths, spec.storage).importances()
    except QloraExpError:
        kept = _read_json(file)
        return kept if isinstance(kept, dict) else {}
    _keep(file, found)
    return found


def _keep(file: Path, found: dict[str, Any]) -> None:
    """For a report when the database is gone; beside a study that can only be read nothing is kept."""
    import contextlib

    from qlora_exp.records.files import write_json

    with contextlib.suppress(OSError):
        write_json(file, found)


def _read_json(file: Path) -> Any:
    """``None`` where there is no such file.

    Raises:
        RecordError: it can't be read.
    """
    from json import loads

    from qlora_exp.errors import RecordError

    try:
        return loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise RecordError(f"the file can't be read: {error}", str(file), "delete it, or resume the study") from None


SCORED = {"accuracy": "correct", "exact_match": "exact"}
"""Score → the column that has it item by item."""


def _item_scores(outputs: OutputPaths) -> Any:
    """What :data:`qlora_exp.analysis.contrasts.ItemScores` asks for, from the runs' per-item files."""
    from functools import lru_cache

    @lru_cache(maxsize=KEPT_ITEMS)
    def read(run_id: str, moment: str, split: str) -> dict[str, list[Any]] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = ["item_id", "completion_nats", "completion_bytes", *SCORED.values()]
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
        if score in SCORED:
            values = items[SCORED[score]]
        else:
            size = sum(items["completion_bytes"]) / max(len(items["completion_bytes"]), 1)
            values = [nats / math.log(2) / size for nats in items["completion_nats"]] if size else [None]
        if None in values:
            return None
        return {item: float(value) for item, value in zip(items["item_id"], values, strict=True)}

    return scores


def _runs_at(outputs: OutputPaths, folder: Path) -> str:
    """The run folders as seen from the report, so that its links hold where both are moved together."""
    from os.path import relpath
    from urllib.parse import quote

    return quote(Path(relpath(outputs.runs, folder.expanduser().absolute())).as_posix())


def _write(file: Path, text: str, write_text: Any) -> None:
    from qlora_exp.errors import RecordError

    try:
        write_text(file, text)
    except OSError as error:
        raise RecordError(f"the report can't be written: {error.strerror}", str(file), "--output DIR") from None
