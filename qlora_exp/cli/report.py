"""``report``: the answers of studies as HTML, Markdown and CSV. ``analyze``: the rank decision from any table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import AsJson, OutputRoot, complete_studies, examples, outputs_of

if TYPE_CHECKING:
    from qlora_exp.analysis.margin import Margin
    from qlora_exp.analysis.report_content import ReportContent, StudyInfo
    from qlora_exp.paths import OutputPaths, StudyPaths
    from qlora_exp.records.items import ItemLoss
    from qlora_exp.records.types import RunRecord
    from qlora_exp.study.study import Study
    from qlora_exp.study.types import StudySpec


def add_to(app: typer.Typer) -> None:
    app.command(
        "analyze",
        epilog=examples(
            "qlora-exp analyze results.csv --margin 0.02",
            "qlora-exp analyze paper.csv --score-column wikisql --higher-is-better --se 0.5 --margin 0.5",
            "qlora-exp analyze export.parquet --margin 0.02 --json | jq .decision",
            "qlora-exp analyze r8/results.json r16/results.json --score-column acc,none --margin 0.01",
            "qlora-exp analyze wandb_export.csv --best-over learning_rate --configuration-column model",
            "qlora-exp analyze items.jsonl --group-column document --margin 0.02",
        ),
    )(analyze)
    app.command(
        "report",
        epilog=examples(
            "qlora-exp report last",
            "qlora-exp report base_ladder instruct_ladder --output report/",
            "qlora-exp report --output-root outputs            # every run there, of any study or none",
            "qlora-exp report last --only tradeoffs            # one section, on the terminal",
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
        str | None,
        typer.Option(
            "--equivalence",
            metavar="MARGIN",
            help="Margin within which two models or quantizations count as equal, e.g. 0.5% (of the loss) or 0.02 (bits"
            " per byte); fix it beforehand. Default: the ladder's margin, else 0.25%",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="SECTION",
            help="Print one section as Markdown (rank, tradeoffs, equal, instruct-base, memory, speed, failures …);"
            " with --output, also write it to the files",
        ),
    ] = None,
    as_json: AsJson = False,
    output_root: OutputRoot = None,
) -> int:
    """Write report.html, report.md and runs.csv: the answer in words, and its evidence."""
    from os.path import relpath
    from urllib.parse import quote

    from qlora_exp.analysis.margin import MarginUnit, parse_margin
    from qlora_exp.analysis.report import only_section
    from qlora_exp.analysis.report_content import report_object, to_csv, to_html, to_markdown
    from qlora_exp.cli.tables import print_json
    from qlora_exp.errors import RecordError
    from qlora_exp.records.files import write_text
    from qlora_exp.records.find import find_study

    outputs = outputs_of(output_root)
    study_paths = list(dict.fromkeys(find_study(name, outputs) for name in studies or []))
    margin = parse_margin(equivalence, MarginUnit.SCORE, "--equivalence") if equivalence is not None else None
    content, runs = content_of(study_paths, outputs, margin)
    if only is not None:
        content = only_section(content, only)
        if not as_json:
            print(to_markdown(content))
        if output is None:
            if as_json:
                print_json({**report_object(content), "files": {}})
            return 0
    folder = output or (study_paths[0].folder if study_paths else outputs.root)
    # The links stay valid if the run folders and the report are moved together.
    runs_at = quote(Path(relpath(outputs.runs, folder.expanduser().absolute())).as_posix())
    files = {"report.html": to_html(content, runs_at), "report.md": to_markdown(content), "runs.csv": to_csv(content)}
    for name, text in files.items():
        try:
            write_text(folder / name, text)
        except OSError as error:
            what = f"the report can't be written: {error.strerror}"
            raise RecordError(what, str(folder / name), "--output DIR") from None
    for paths in study_paths if output is None else ():
        _log_report(paths, runs, outputs)
    if as_json:
        print_json({**report_object(content), "files": {name: str(folder / name) for name in files}})
        return 0
    if only is None:
        print("\n".join(content.headline or [str(content.why_none)]))
        for card in content.cards:
            print(f"  {card.question} {card.verdict} ({card.status})")
    print(f"report: {folder / 'report.html'}")
    return 0


def content_of(
    study_paths: list[StudyPaths], outputs: OutputPaths, margin: Margin | None = None
) -> tuple[ReportContent, list[RunRecord]]:
    """Return the report on these studies (none: on every run under ``outputs``), and the runs that it is about."""
    from functools import partial

    from qlora_exp.analysis.item_scores import item_scores
    from qlora_exp.analysis.report import build
    from qlora_exp.records.files import read_curve, training_losses
    from qlora_exp.records.find import read_runs

    records, unreadable = read_runs(outputs)
    infos, runs = _studies_and_runs(study_paths, records, outputs)
    content = build(
        *(runs, infos, item_scores(outputs), margin, len(unreadable)),
        curves=lambda record: training_losses(read_curve(outputs.run(record.run_id).curve)),
        command_of=partial(_command, study_paths, outputs),
        answers=partial(_answers, outputs),
        losses=partial(_losses, outputs),
        quantized=partial(_quantization, outputs),
    )
    return content, runs


def _studies_and_runs(
    study_paths: list[StudyPaths], records: list[RunRecord], outputs: OutputPaths
) -> tuple[list[StudyInfo], list[RunRecord]]:
    """Return what the report needs to know of each study, and their runs."""
    from qlora_exp.analysis.report_content import StudyInfo
    from qlora_exp.orchestration.finalists import score_of
    from qlora_exp.orchestration.study_end import confirm_command
    from qlora_exp.records.upgrade import upgrade_answers
    from qlora_exp.study.spec import is_trial_of, read_spec

    if not study_paths:
        return [StudyInfo(str(outputs.root.name))], records
    infos, specs = [], [read_spec(paths) for paths in study_paths]
    for spec, paths in zip(specs, study_paths, strict=True):
        importance = _from_study(spec, paths, "importance.json", lambda study, paths: study.importances())
        predicted = _from_study(spec, paths, "predicted_memory.json", _predicted_memory)
        answers = upgrade_answers(_read_json(paths.ladder)) or {}
        ladders = answers.get("ladders") or ()
        overrides = _trial_overrides(spec, outputs)
        info = StudyInfo(spec.name, spec.question, spec.objectives, ladders, importance, predicted, overrides)
        confirmation = _read_json(paths.confirmation)
        confirm = None
        if confirmation is None and spec.ladder is None and len(spec.objectives) == 1 and score_of(spec) is not None:
            confirm = confirm_command(spec.name, outputs)
        infos.append(
            replace(info, screening=answers.get("screening"), confirmation=confirmation, confirm_command=confirm)
        )
    return infos, [record for record in records if any(is_trial_of(record, spec) for spec in specs)]


def _command(study_paths: list[StudyPaths], outputs: OutputPaths, record: RunRecord) -> str | None:
    """Return the command that runs the record's configuration; ``None`` if it isn't a run of these studies."""
    import shlex

    from qlora_exp.orchestration.command import run_overrides
    from qlora_exp.study.spec import is_trial_of, read_spec

    for spec in map(read_spec, study_paths):
        if record.trial is not None and is_trial_of(record, spec):
            return shlex.join(["qlora-exp", "run", *run_overrides(spec, record.trial.params)])
    file = outputs.run(record.run_id).config
    return shlex.join(["qlora-exp", "run", "--from", str(file)]) if file.exists() else None


def _trial_overrides(spec: StudySpec, outputs: OutputPaths) -> tuple[str, ...]:
    """Return the overrides of every trial, with the output root if it isn't the default one here."""
    from qlora_exp.config.overrides import hydra_value
    from qlora_exp.orchestration.command import run_overrides

    here = outputs_of(None).root.absolute() == outputs.root.absolute()
    root = [] if here else [f"output_root={hydra_value(str(outputs.root.absolute()))}"]
    return (*run_overrides(spec, {}), *root)


def _from_study(
    spec: StudySpec, paths: StudyPaths, file_name: str, read: Callable[[Study, StudyPaths], dict[str, Any] | None]
) -> dict[str, Any]:
    """Return what ``read`` finds in the study's database, and store it for reports after the database is gone.

    If the database is gone, return what an earlier report stored. Empty for a SYNTHETIC study.
    """
    import contextlib

    from qlora_exp.errors import QloraExpError
    from qlora_exp.records.files import write_json
    from qlora_exp.records.upgrade import PREDICTED_MEMORY_KEYS, renamed
    from qlora_exp.study.study import Study

    if spec.synthetic:
        return {}
    file = paths.folder / file_name
    try:
        content = read(Study.read(spec, paths), paths)
    except QloraExpError:
        stored = _read_json(file)
        # Keys of version 1; importances have none of them.
        return renamed(stored, PREDICTED_MEMORY_KEYS) if isinstance(stored, dict) else {}
    if content is not None:
        # A study folder that can't be written is no error.
        with contextlib.suppress(OSError):
            write_json(file, content)
    return content or {}


def _predicted_memory(study: Study, paths: StudyPaths) -> dict[str, Any] | None:
    """Return a summary of the memory predictions: trials that were not started have no record. ``None`` if nothing
    limits the trials' memory."""
    from qlora_exp.orchestration.status import memory_predictions
    from qlora_exp.records.schema import to_dict

    summary = memory_predictions(study.trials(), paths)
    return None if summary is None else {**to_dict(summary), "sentence": summary.sentence}


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


def _answers(outputs: OutputPaths, record: RunRecord, ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the run's items, all or those of ``ids``; empty if it has none that can be read."""
    from qlora_exp.errors import RecordError
    from qlora_exp.records.items import read_items

    try:
        return read_items(outputs.run(record.run_id).folder, ids=ids)
    except RecordError:
        return []


def _losses(outputs: OutputPaths, record: RunRecord) -> list[ItemLoss]:
    """Return the losses of the run's items; empty if it has none that can be read."""
    from qlora_exp.errors import RecordError
    from qlora_exp.records.items import read_item_losses

    try:
        return read_item_losses(outputs.run(record.run_id).folder)
    except RecordError:
        return []


def _quantization(outputs: OutputPaths, run_id: str) -> dict[str, Any] | None:
    """Return what ``qlora-exp quantize`` wrote for the run; ``None`` if there is nothing that can be read."""
    from qlora_exp.errors import RecordError

    try:
        content = _read_json(outputs.run(run_id).quantization)
    except RecordError:
        return None
    return content if isinstance(content, dict) and content.get("results") else None


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


def analyze(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="CSV, TSV, JSON, JSON lines, Parquet or Markdown; several files are one table"
        ),
    ],
    margin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MARGIN",
            help="Smallest gain of a doubling that is worth its cost: a number in the score's units, or e.g. 0.25%"
            " of the loss",
        ),
    ] = None,
    higher_is_better: Annotated[
        bool | None,
        typer.Option(
            "--higher-is-better/--lower-is-better", help="Direction of the score; default: from the score's name"
        ),
    ] = None,
    rank_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column with the rank")] = None,
    score_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column with the score")] = None,
    configuration_column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Column that distinguishes configurations; can be repeated"),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column with the group of an item; items of a group count as one"),
    ] = None,
    best_over: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Use each rank's best value of this column (optimistic); can be repeated"),
    ] = None,
    se: Annotated[float | None, typer.Option(help="Published standard error of every score")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object")] = False,
) -> int:
    """Decide which rank is enough from the tables of any tool.

    A table has a rank and a score, and optionally seed and item: in columns, or with a column for each rank. Without
    seeds or a standard error, the command says what can't be concluded. The exit code is 0 for every answer.
    """
    from qlora_exp.analysis.table import analyze_table, table_as_json
    from qlora_exp.analysis.table_columns import Options

    options = Options(
        rank_column=rank_column,
        score_column=score_column,
        configuration_columns=tuple(configuration_column or ()),
        higher_is_better=higher_is_better,
        margin=tuple(margin or ()),
        se=se,
        group_column=group_column,
        best_over=tuple(best_over or ()),
    )
    answers = analyze_table(files, options)
    if json:
        from json import dumps

        print(dumps(table_as_json(answers), indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    from qlora_exp.formatting import UNKNOWN_CELL, plain_table, print_table

    for table_answer in answers:
        if table_answer.configuration is not None:
            print(f"{table_answer.configuration}:")
        print(table_answer.answer.sentence)
        rows = []
        for step in table_answer.answer.comparisons:
            decision = step.decision
            figures = (decision.gain, decision.low, decision.high)
            texts = [UNKNOWN_CELL if figure is None else f"{figure:+.4g}" for figure in figures]
            held_to = f"{table_answer.margin.value * step.doublings:.4g}"
            rows.append((f"{step.from_rank} → {step.to_rank}", *texts, held_to, str(decision.verdict)))
        print_table(plain_table(("step", "gain", "low (95 % CI)", "high", "margin", "decision"), rows))
        print(table_answer.margin.sentence)
        for note in table_answer.notes:
            print(note)
    return 0
