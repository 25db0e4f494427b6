"""What a study says at its end: the best so far, how sure that is, how to confirm it and how to run it again."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.analysis.confirmation import confirm_finalists, margin_unit_of, pending_runs
from qlora_exp.analysis.confirmation_words import (
    ConfirmedSearch,
    confirmation_card,
    confirmation_lines,
    retry_command,
    settle_command,
    unanswered_sentence,
)
from qlora_exp.analysis.item_scores import item_scores
from qlora_exp.analysis.margin import parse_margin
from qlora_exp.architecture.run_plan import EARLIER_TRAINING_DEFAULTS
from qlora_exp.config.from_record import recorded_overrides
from qlora_exp.config.overrides import escape_interpolations, override_key, override_value
from qlora_exp.errors import QloraExpError, RecordError
from qlora_exp.formatting import figure
from qlora_exp.orchestration.finalists import (
    DEFAULT_SEEDS,
    DEFAULT_TOP,
    ConfirmPlan,
    Contender,
    confirm_name,
    mean_seconds,
    ranked,
    read_plan,
    score_of,
    write_plan,
)
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import read_record, write_text
from qlora_exp.records.redaction import REDACTED
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.types import StudySpec, TrialRow

NOT_IN_BEST = ("output_root",)
"""Keys that belong to the recorded run: another one chooses its own."""
SPLIT_WORDS = {"after": "validation", "test": "test"}


# best.yaml


def best_row(rows: Sequence[TrialRow], spec: StudySpec) -> TrialRow | None:
    """Return the best of ``rows``, as :meth:`~qlora_exp.study.study.Study.best` gives them: of a Pareto front, the one
    that is best in the first objective."""
    if spec.ladder is not None or len(spec.objectives) < 2:
        return next(iter(rows), None)
    sign = -1.0 if spec.objectives[0].startswith("maximize") else 1.0
    scored = [(sign * row.values[0], row.number, row) for row in rows if row.values and row.values[0] is not None]
    return min(scored)[2] if scored else None


def write_best(spec: StudySpec, paths: StudyPaths, row: TrialRow | None) -> str | None:
    """Write ``best.yaml``, the configuration of the trial's run; return the command that runs it again.

    The file has everything that the run was trained with, so it needs neither the sweep's file nor the study. ``None``
    without a trial, or if its record or the folder can't be used.
    """
    if row is None or row.run_id is None:
        return None
    command = f"qlora-exp run --from {shlex.quote(_shown(paths.best))}"
    try:
        record = read_record(paths.outputs.run(row.run_id).record)
        text = best_text(record, spec, row)
        if not (paths.best.is_file() and paths.best.read_text(encoding="utf-8") == text):
            write_text(paths.best, text)
    except (QloraExpError, OSError):
        return None
    return command


def best_text(record: RunRecord, spec: StudySpec, row: TrialRow) -> str:
    """Return the content of ``best.yaml``.

    Raises:
        QloraExpError: the record's configuration doesn't compose with this version.
    """
    training = {**EARLIER_TRAINING_DEFAULTS, **(record.config.get("training") or {})}
    overrides = recorded_overrides(record.replace(config={**record.config, "training": training}))
    settings = {}
    for text in overrides:
        key = text.partition("=")[0]
        if override_key(text) not in NOT_IN_BEST and REDACTED not in text:
            settings[key] = override_value(text)
    # Defaults may change: what was searched is written even where it is the default.
    searched = {key: escape_interpolations(value) for key, value in row.params.items() if REDACTED not in str(value)}
    settings |= {key: value for key, value in searched.items() if key not in settings}
    settings.setdefault("seed", record.seed)
    values = ", ".join(
        f"{parse_objective(objective).field} {figure(value)}"
        for objective, value in zip(spec.objectives, row.values, strict=False)
    )
    heading = f"# Trial {row.number} of {spec.name}: {values}\n# To train it again: qlora-exp run --from best.yaml\n"
    return heading + yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)


def _shown(file: Path) -> str:
    """Return the path relative to the current folder, if the file is below it."""
    with contextlib.suppress(ValueError, OSError):
        return file.absolute().relative_to(Path.cwd()).as_posix()
    return str(file)


# How sure, and what would make it sure.


def output_option(outputs: OutputPaths) -> str:
    """Return `` --output-root DIR`` for a command, or nothing if it is the default one here."""
    return "" if outputs == OutputPaths.of("outputs") else f" --output-root {shlex.quote(str(outputs.root))}"


def confirm_command(study: str, outputs: OutputPaths) -> str:
    return f"qlora-exp confirm {shlex.quote(study)}{output_option(outputs)}"


def how_sure(spec: StudySpec, paths: StudyPaths, rows: Sequence[TrialRow], at_once: int = 1) -> list[str]:
    """Return lines on how far the best so far can be trusted, and the one command that would confirm it.

    Empty before a trial has a score.

    Args:
        at_once: trials that run at the same time, for the time that confirming takes.
    """
    if (plan := read_plan(paths)) is not None:
        said = [f"answer: {sentence}" for sentence in (plan.answer.get("sentences") or [])[:1]]
        if plan.is_answered:
            return said
        if said and not plan.answer.get("pending"):  # a complete answer, before seeds were added
            earlier = f"answer with {plan.answer.get('seeds')} seeds, before more were added:"
            said = [said[0].replace("answer:", earlier, 1)]
        return [*said, f"  {_continue_words(plan)}"]
    command = confirm_command(spec.name, paths.outputs)
    if spec.ladder is not None:
        if not any(row.state == "COMPLETE" for row in rows):
            return []
        lines = ["how sure: a ladder decides by several seeds on test, with known error rates. It needs no confirm."]
        if spec.ladder.screening_steps is not None:
            lines.append("  Short runs scored on validation chose the configuration that the ladder starts from.")
        return lines
    contenders = ranked(rows, spec)
    if not contenders:
        return []
    split = SPLIT_WORDS.get(parse_objective(spec.objectives[0]).field.split(".")[1:2][0]) if score_of(spec) else None
    if split is None:
        return [
            f"how sure: the objective {spec.objectives[0].split(maxsplit=1)[1]} is no score that confirm can decide by."
        ]
    seeds = _seed_words(contenders)
    several = f"the best of {len(contenders)} configurations, {seeds} each, chosen on the same {split} rows"
    doubt = f"Its score of {figure(contenders[0].value)} is optimistic, and the order may be chance."
    if len(contenders) == 1:
        several, doubt = f"one configuration, {seeds}, scored on {split}", "It wasn't chosen among others."
    elif len(spec.objectives) > 1:
        several = f"a front of {len(contenders)} configurations, {seeds} each, chosen on the same {split} rows"
        doubt = "Its scores are optimistic, and the order may be chance."
    lines = [f"how sure: {several}. {doubt}"]
    if split != "test" and spec.settings.get("evaluation.split") == "test":
        report = f"qlora-exp report {shlex.quote(spec.name)}{output_option(paths.outputs)}"
        lines.append(f"  These trials were scored on test, too: {report}")
    answered = _confirmed(spec, paths)
    return [*lines, *(answered or [_to_confirm(spec, contenders, command, at_once)])]


def _to_confirm(spec: StudySpec, contenders: Sequence[Contender], command: str, at_once: int) -> str:
    top = min(DEFAULT_TOP, len(contenders))
    finalists = contenders[:top]
    if len(spec.objectives) > 1:
        numbers = ",".join(str(one.row.number) for one in finalists)
        return f"  to confirm those that you would take: {command} --trials {numbers}"
    runs, seconds = top * DEFAULT_SEEDS, mean_seconds(finalists)
    time = "" if seconds is None else f", about {duration_words(seconds * runs / max(at_once, 1))}"
    which = f"the best {top}" if top > 1 else "it"
    option = "" if top > 1 else " --top 1"
    trained = f"{which} with {DEFAULT_SEEDS} new seeds, scored on test: {runs} runs{time}"
    return f"  to confirm it: {command}{option}\n    ({trained})"


def _confirmed(spec: StudySpec, paths: StudyPaths) -> list[str]:
    """Return the answer of the study that confirms this one; empty if there is none."""
    own = paths.outputs.study(confirm_name(spec.name))
    plan = read_plan(own)
    if plan is None or not own.created.exists() or plan.study_id != spec.id:
        return []
    sentences = plan.answer.get("sentences") or []
    if not plan.is_answered:
        return [f"  {_continue_words(plan)}"]
    if plan.answer.get("verdict") is None:
        return [f"  not confirmed: {sentence}" for sentence in sentences[:1]]
    return [f"  confirmed: {sentences[0]}", f"    more about it: qlora-exp report {shlex.quote(str(own.name))}"]


def _continue_words(plan: ConfirmPlan) -> str:
    return f"confirming isn't finished; to continue: {plan.command}"


def duration_words(seconds: float) -> str:
    """Return e.g. ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seed_words(contenders: Sequence[Contender]) -> str:
    counts = sorted({one.seeds for one in contenders})
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


# The answer of a study that confirms.


def print_confirmation(
    spec: StudySpec, paths: StudyPaths, plan: ConfirmPlan, rows: Sequence[TrialRow]
) -> TrialRow | None:
    """Print the answer so far, store it in ``confirm.json``, and return the trial to use; ``None`` without a score."""
    records = []
    for row in rows:
        if row.run_id is not None:
            with contextlib.suppress(RecordError):
                records.append(read_record(paths.outputs.run(row.run_id).record))
    margin = parse_margin(plan.margin, margin_unit_of(plan.measure))
    skipped = sum(row.skipped is not None for row in rows)
    planned = len(plan.seeds) * len(plan.trials) - skipped
    found = confirm_finalists(records, plan.measure, item_scores(paths.outputs), margin, planned)
    search = ConfirmedSearch.of(to_dict(plan))
    progress = {"pending": pending_runs(records, planned), "skipped": skipped, "planned_seeds": len(plan.seeds)}
    if found is None:
        sentence = unanswered_sentence(records, len(plan.trials), search)
        print(sentence)
        if progress["pending"]:
            print(f"  {_continue_words(plan)}")
        command = plan.command if progress["pending"] else retry_command(records, search)
        _store(plan, paths, {"verdict": None, **progress, "settle_command": command, "sentences": [sentence]})
        return None
    sentences = confirmation_lines(found, search)
    prefix = "SYNTHETIC: " if spec.synthetic else ""
    print(prefix + sentences[0], *(f"  {sentence}" for sentence in sentences[1:]), sep="\n")
    used = found.use.first
    answer: dict[str, Any] = {
        "verdict": str(found.verdict),
        **progress,
        "use_trial": plan.trials[used.trial.number % len(plan.trials)] if used.trial is not None else None,
        "use_run": used.run_id,
        "use": confirmation_card(found, search).verdict,
        "regret_bound": found.regret_bound,
        "unit": found.measure.label,
        "seeds": found.seeds,
        "items": found.items,
        "settle_command": settle_command(found, search),
        "sentences": list(sentences),
        "pairs": [
            {
                "first": pair.first.label,
                "second": pair.second.label,
                "better_by": pair.difference.value,
                "low": pair.difference.low,
                "high": pair.difference.high,
                "verdict": str(pair.verdict),
            }
            for pair in found.pairs
        ],
    }
    _store(plan, paths, answer)
    return next((row for row in rows if row.run_id == used.run_id), None)


def _store(plan: ConfirmPlan, paths: StudyPaths, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the answer can be computed again at any time
        write_plan(replace(plan, answer=answer), paths)
