"""Shared by the commands that run one configuration: run it with progress on a terminal, or in a child process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from qlora_exp.architecture.run_plan import (
    EARLIER_DISTILLATION,
    EARLIER_EVALUATION_DEFAULTS,
    EARLIER_GROUP,
    EARLIER_LORA_DEFAULTS,
    EARLIER_METHOD,
    EARLIER_MODEL_DEFAULTS,
    EARLIER_SHIP,
    EARLIER_TASK_DEFAULTS,
    EARLIER_TRAINING_DEFAULTS,
)
from qlora_exp.config.compose import as_checked_config
from qlora_exp.config.overrides import escape_interpolations
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError, RecordError
from qlora_exp.estimate.budget import STUDY_LIMITS
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_curve, read_record, write_json
from qlora_exp.records.types import Failure, RunRecord, Status
from qlora_exp.runs.execute import execute
from qlora_exp.runs.first_record import current_time
from qlora_exp.runs.notify import notify, run_notification
from qlora_exp.runs.process import exit_code_of
from qlora_exp.system import environment
from qlora_exp.system.out_of_memory import killed_for_memory


def run_with_progress(config: Config, resume: str | None = None, single: bool = True, curve: bool | None = None) -> int:
    """Run with progress on stderr, print the summary on stdout, and return the exit code.

    ``single``: the command makes this run only. On a terminal it then also shows answers, cost and the next command.
    ``curve``: whether to print the learning curve; ``None``: on a terminal, if the command makes this run only.
    """
    from qlora_exp.runs.console import ProgressReporter

    with ProgressReporter() as observer:
        record = execute(config, observer, resume, alone=True)
    on_terminal = single and sys.stdout is not None and sys.stdout.isatty()
    if on_terminal if curve is None else curve:
        print_learning_curve(record, config)
    _print_end(record, config, on_terminal)
    if config.tracking.enabled:
        from qlora_exp.tracking.state import not_delivered

        missing = not_delivered(OutputPaths.of(config.output_root), [record.run_id])
        if missing is not None:
            print(missing)
    code = exit_code_of(record.status)
    notify(config.notify, run_notification(record, OutputPaths.of(config.output_root).run(record.run_id).folder, code))
    return code


def _print_end(record: RunRecord, config: Config, detailed: bool) -> None:
    if not detailed:
        print(run_summary(record, config))
        return
    from qlora_exp.formatting import table_width
    from qlora_exp.runs.end_of_run import answers_at_the_end, cost_and_next

    outputs = OutputPaths.of(config.output_root)
    width = table_width()
    answers, rest = answers_at_the_end(record, outputs, width), cost_and_next(record, outputs, width)
    print("\n".join([*answers, run_summary(record, config), *rest]))


def print_learning_curve(record: RunRecord, config: Config) -> None:
    """Print the run's losses over its steps as a few lines of text, if there are enough of them."""
    from qlora_exp.runs.text_curve import text_curve

    lines = text_curve(read_curve(OutputPaths.of(config.output_root).run(record.run_id).curve), sys.stdout)
    if lines:
        print(*lines, "", sep="\n")


def run_summary(record: RunRecord, config: Config) -> str:
    """Return a few lines about a finished run: status, scores, failure, and the path of its record."""
    lines = [f"{record.status}: {record.name}  ({record.run_id})"]
    before, after = record.scores.before, record.scores.after
    if after is not None:
        for name in ("accuracy", "exact_match", "loss"):
            if getattr(after, name) is not None:
                old = getattr(before, name) if before else None
                prefix = f"{old:.3f} → " if old is not None else ""
                lines.append(f"  {name} {prefix}{getattr(after, name):.3f} on {after.items} {after.split} items")
    if record.training is not None and record.training.ended_by_budget is not None:
        lines.append(f"  {next(text for text in record.warnings if text.startswith('budget.'))}")
    if record.failure is not None:
        lines.append(
            f"  {record.failure.kind} in phase {record.failure.phase}: {record.failure.message.splitlines()[0]}"
        )
        if record.failure.hint:
            lines.append(f"  do: {record.failure.hint}")
    lines.append(f"  record: {OutputPaths.of(config.output_root).run(record.run_id).record}")
    return "\n".join(lines)


def config_from_plain(plain: dict[str, Any]) -> Config:
    """Return the checked configuration of a record, or of a child process's standard input."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # Records don't hold the sweep's settings.
        plain = {"sweep": None, "workers": None, "notify": None, **plain}
        plain["budget"] = {**dict.fromkeys(STUDY_LIMITS), "force": False, **plain.get("budget", {})}
        plain["distillation"] = {**EARLIER_DISTILLATION, **plain.get("distillation", {})}
        plain["ship"] = {**EARLIER_SHIP, **plain.get("ship", {})}
        plain["quantization"] = {"group": EARLIER_GROUP, **plain.get("quantization", {})}
        plain["lora"] = {**EARLIER_LORA_DEFAULTS, **plain.get("lora", {})}
        plain["method"] = {**EARLIER_METHOD, **plain.get("method", {})}
        plain["model"] = {**EARLIER_MODEL_DEFAULTS, **plain.get("model", {})}  # older records lack some keys of these
        plain["task"] = {**EARLIER_TASK_DEFAULTS, **plain.get("task", {})}
        plain["task"]["columns"] = {"tools": None, **(plain["task"].get("columns") or {})}
        plain["evaluation"] = {**EARLIER_EVALUATION_DEFAULTS, **plain.get("evaluation", {})}
        training = plain.get("training")
        if isinstance(training, dict):
            plain["training"] = training = {**EARLIER_TRAINING_DEFAULTS, **training}
            if training.get("max_tokens") is not None:
                training["max_steps"] = None  # earlier versions allowed both and used max_tokens
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(escape_interpolations(plain)))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], "the recorded configuration", "run it again by hand") from None
    return as_checked_config(merged)


def complete_killed_record(config: Config, pid: int, number: int, kills_before: int | None = None) -> None:
    """Complete the record of a run whose process ``pid`` was killed by signal ``number``.

    ``kills_before``: see :func:`~qlora_exp.system.out_of_memory.killed_for_memory`.
    """
    from qlora_exp.tracking.sync import sync_runs

    outputs = OutputPaths.of(config.output_root)
    running = _running_record_of(pid, outputs)
    failure = killed_for_memory(running[1] if running else None, number, kills_before)
    status = Status.OUT_OF_MEMORY if failure is not None else Status.FAILED
    failure = failure or Failure("Killed", f"the run's process was ended by signal {number}", hint="start it again")
    print(f"error: {failure.message}\n  do:    {failure.hint}", file=sys.stderr)
    if running is not None:
        path, record = running
        write_json(path, record.replace(status=status, ended_at=current_time(), process=None, failure=failure))
    if config.tracking.enabled:
        sync_runs(outputs.root)


def _running_record_of(pid: int, outputs: OutputPaths) -> tuple[Path, RunRecord] | None:
    """Return the RUNNING record of process ``pid`` of this machine, and its file."""
    own = environment.process_identity()
    for path in outputs.runs.glob("*/record.json"):
        with contextlib.suppress(RecordError):
            record = read_record(path)
            owner = record.process
            if (
                record.status is Status.RUNNING
                and owner is not None
                and (owner.pid, owner.boot_id) == (pid, own.boot_id)
            ):
                return path, record
    return None
