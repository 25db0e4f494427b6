"""Commands that train one configuration: ``run`` and ``rerun``."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import (
    Force,
    OutputRoot,
    Overrides,
    Run,
    Source,
    complete_runs,
    examples,
    forced,
    outputs_of,
)
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.errors import ConfigError, RecordError
from qlora_exp.system import signals, streams
from qlora_exp.system.distributed import check_single_rank

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config

Curve = Annotated[
    bool | None,
    typer.Option(
        "--curve/--no-curve",
        help="Print the learning curve at the end as text; by default on a terminal",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(
        "run",
        epilog=examples(
            "qlora-exp run",
            "qlora-exp run model.variant=instruct quantization=nf4 lora.r=16 targets=all_linear",
            "qlora-exp run task=local task.path=FILE.jsonl training.max_steps=40",
            "qlora-exp run -m quantization=fp16,nf4 lora.r=4,8      # four runs, one after the other",
            "qlora-exp run --from my_task.yaml seed=2",
            "qlora-exp run --resume last                            # continue after Ctrl-C",
        ),
    )(run)
    app.command(
        "rerun",
        epilog=examples(
            "qlora-exp rerun last                                   # same seed: the same losses",
            "qlora-exp rerun last seed=2",
            "qlora-exp rerun 20261121-04 quantization=fp32",
        ),
    )(rerun)


def run(
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Run every combination of comma-separated values")
    ] = False,
    source: Source = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Continue an interrupted run", autocompletion=complete_runs),
    ] = None,
    output_root: OutputRoot = None,
    force: Force = False,
    curve: Curve = None,
) -> int:
    """Train one configuration, score it before and after, and write its record."""
    from qlora_exp.config.overrides import hydra_value

    check_single_rank()
    all_overrides = [*combined_overrides(source, overrides), *forced(force)]
    if output_root is not None:
        all_overrides.append(f"output_root={hydra_value(str(Path(output_root)))}")
    if resume is not None:
        return _resume(resume, output_root, overrides or [], curve)
    if multirun:
        from qlora_exp.orchestration.hydra_app import main

        return main(["--multirun", *all_overrides])
    from qlora_exp.config.compose import compose_run

    return _run(all_overrides, curve, compose_run)


def rerun(
    run: Run,
    overrides: Overrides = None,
    output_root: OutputRoot = None,
    force: Force = False,
    curve: Curve = None,
) -> int:
    """Run the configuration of a recorded run again."""
    from qlora_exp.architecture.run_plan import EARLIER_TRAINING_DEFAULTS
    from qlora_exp.config.from_record import recorded_overrides
    from qlora_exp.config.overrides import hydra_value
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    check_single_rank()
    paths = find_run(run, outputs_of(output_root))
    changes = [*(overrides or []), *forced(force)]
    if not any(change.startswith("output_root=") for change in changes):
        changes.append(f"output_root={hydra_value(str(paths.folder.parent.parent))}")
    record = read_record(paths.record)
    changes += _other_lengths_off(changes, record.config.get("training") or {})
    training = {**EARLIER_TRAINING_DEFAULTS, **(record.config.get("training") or {})}
    recorded = recorded_overrides(record.replace(config={**record.config, "training": training}), changes)
    print(f"qlora-exp run {shlex.join(recorded)}", flush=True)
    from qlora_exp.config.compose import compose

    return _run(recorded, curve, compose)


def _other_lengths_off(changes: Sequence[str], training: Mapping[str, Any]) -> list[str]:
    """Return the overrides that switch off the recorded length of a training if ``changes`` name another one, e.g.
    ``training.max_steps=null`` for ``training.epochs=2``."""
    from qlora_exp.config.overrides import override_key

    keys = ("training.max_steps", "training.max_tokens", "training.epochs")
    changed = {override_key(text) for text in changes if not text.endswith("=null")}
    if not changed & set(keys):
        return []
    given = {override_key(text) for text in changes}
    return [f"{key}=null" for key in keys if key not in given and training.get(key.partition(".")[2]) is not None]


def _run(overrides: Sequence[str], curve: bool | None, composed: Callable[[Sequence[str]], Config]) -> int:
    from qlora_exp.runs.entry_points import run_with_progress

    with _interruptible():
        return run_with_progress(composed(list(overrides)), curve=curve)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Keep the run alive when nobody reads its output, and let TERM and HUP interrupt it as Ctrl-C does."""
    streams.ignore_write_errors()
    with signals.signals_as_interrupts():
        yield


def _resume(run: str, output_root: str | None, overrides: Sequence[str], curve: bool | None) -> int:
    """Continue a run, unless it has ended, is still running, or its record lacks a secret setting."""
    from qlora_exp.config.compose import compose
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run
    from qlora_exp.records.redaction import REDACTED
    from qlora_exp.records.types import Status
    from qlora_exp.runs.entry_points import config_from_plain, run_with_progress
    from qlora_exp.system.environment import is_alive

    others = [text for text in overrides if not text.startswith("notify.")]
    if others:
        raise ConfigError("a resumed run keeps its configuration", " ".join(others), f"qlora-exp rerun {run} …")
    paths = find_run(run, outputs_of(output_root))
    record = read_record(paths.record)
    if record.status in (Status.COMPLETED, Status.PRUNED):
        raise RecordError(f"the run is {record.status}: nothing is left to do", record.run_id, "qlora-exp rerun …")
    # A process of another host can't be checked from here: the lock on the run's folder decides.
    if record.status is Status.RUNNING and record.process is not None and is_alive(record.process):
        raise RecordError("the run is still running", f"{record.run_id}, process {record.process.pid}", "wait for it")
    if REDACTED in str(record.config):
        what = "the record doesn't contain a secret setting, so the run can't be resumed from it"
        raise RecordError(what, record.run_id, f"qlora-exp rerun {record.run_id} with the secret setting")
    config = config_from_plain(record.config)
    training = replace(config.training, resume=True)  # this is what --resume means
    # A record leaves out whom to notify: a command or an address may hold a secret.
    asked = compose(list(overrides)).notify if overrides else None
    resumed = replace(config, training=training, notify=asked, output_root=str(paths.folder.parent.parent))
    with _interruptible():
        return run_with_progress(resumed, record.run_id, curve=curve)
