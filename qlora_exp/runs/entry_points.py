"""What the doors share: a run that is told at the terminal, and one in a child process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from qlora_exp.architecture.run_plan import EARLIER_TASK
from qlora_exp.config.compose import as_checked_config
from qlora_exp.config.override_values import escape_interpolations
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError, RecordError
from qlora_exp.estimate.budget import STUDY_LIMITS
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import Failure, RunRecord, Status
from qlora_exp.runs.execute import execute
from qlora_exp.runs.first_record import current_time
from qlora_exp.runs.process import exit_code_of
from qlora_exp.system import environment
from qlora_exp.system.out_of_memory import killed_for_memory


def run_and_tell(config: Config, resume: str | None = None) -> int:
    """Run with progress on stderr, print the summary on stdout, and return the exit code."""
    from qlora_exp.runs.console import ProgressReporter

    with ProgressReporter() as observer:
        record = execute(config, observer, resume, alone=True)
    print(run_summary(record, config))
    if config.tracking.enabled:
        from qlora_exp.tracking.pending import not_delivered

        missing = not_delivered(OutputPaths.of(config.output_root), [record.run_id])
        if missing is not None:
            print(missing)
    return exit_code_of(record.status)


def run_summary(record: RunRecord, config: Config) -> str:
    """Three lines after a run: what came of it, and where to look."""
    lines = [f"{record.status}: {record.name}  ({record.run_id})"]
    before, after = record.scores.before, record.scores.after
    if after is not None:
        for name in ("accuracy", "exact_match", "loss"):
            if getattr(after, name) is not None:
                old = getattr(before, name) if before else None
                shown = f"{old:.3f} → " if old is not None else ""
                lines.append(f"  {name} {shown}{getattr(after, name):.3f} on {after.items} {after.split} items")
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
    """A configuration from a record or a child's standard input, checked like any other."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # A run's record doesn't keep the settings of the sweep that it belongs to.
        plain = {"sweep": None, "workers": None, **plain}
        plain["budget"] = {**dict.fromkeys(STUDY_LIMITS), "force": False, **plain.get("budget", {})}  # of older records
        plain["task"] = {**EARLIER_TASK, **plain.get("task", {})}  # older records have none
        plain["task"]["columns"] = {"tools": None, **(plain["task"].get("columns") or {})}
        training = plain.get("training")
        if isinstance(training, dict) and training.get("max_tokens") is not None:
            plain["training"] = {**training, "max_steps": None}  # older versions took both, and heeded the tokens
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(escape_interpolations(plain)))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], "the recorded configuration", "run it again by hand") from None
    return as_checked_config(merged)


def end_killed_run(config: Config, pid: int, number: int, kills_before: int | None = None) -> None:
    """A child that was killed could not end its own record. ``kills_before``: as
    :func:`~qlora_exp.system.out_of_memory.killed_for_memory` has it."""
    from qlora_exp.tracking.sync import sync_runs

    outputs = OutputPaths.of(config.output_root)
    found = _running_of(pid, outputs)
    told = killed_for_memory(found[1] if found else None, number, kills_before)
    status = Status.OUT_OF_MEMORY if told is not None else Status.FAILED
    told = told or Failure("Killed", f"the run's process was ended by signal {number}", hint="start it again")
    print(f"error: {told.message}\n  do:    {told.hint}", file=sys.stderr)
    if found is not None:
        path, record = found
        write_json(path, record.replace(status=status, ended_at=current_time(), process=None, failure=told))
    if config.tracking.enabled:
        sync_runs(outputs.root)


def _running_of(pid: int, outputs: OutputPaths) -> tuple[Path, RunRecord] | None:
    """The RUNNING record of process ``pid`` of this machine, and its file."""
    here = environment.process_identity()
    for path in outputs.runs.glob("*/record.json"):
        with contextlib.suppress(RecordError):
            record = read_record(path)
            owner = record.process
            if (
                record.status is Status.RUNNING
                and owner is not None
                and (owner.pid, owner.boot_id) == (pid, here.boot_id)
            ):
                return path, record
    return None
