"""A study's progress: its trials, what its workers are doing, the time left. Any process can read it."""

from __future__ import annotations

import contextlib
import csv
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from qlora_exp.errors import RecordError
from qlora_exp.formatting import UNKNOWN_CELL, bytes_text, number, print_table, simple_table
from qlora_exp.orchestration.memory_feedback import MemoryFeedback, MemoryPredictionSummary
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Process, Status
from qlora_exp.study.types import Counts, StudySpec, TrialRow
from qlora_exp.system.environment import is_alive_if_visible, process_identity
from qlora_exp.system.orchestrator_lease import Lease, age_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PREDICTED_NOT_TO_FIT = "DOES_NOT_FIT"
"""Status of a trial that was not started because it was predicted not to fit; Optuna's state is PRUNED."""

REFRESH_SECONDS = 1.0
SHOWN_BEST = 5
SILENT_WORKER_SECONDS = 60.0
"""A worker on another machine that has not written its file for so long is gone, if the file has no lease."""


@dataclass(frozen=True)
class SlotState:
    """What one slot of a worker is doing; ``None``: not reported yet."""

    trial: int | None
    params: dict[str, Any]
    phase: str | None
    step: int | None
    total: int | None
    started_at: str | None
    loss: float | None
    process: Process


def running_slots(paths: StudyPaths) -> list[SlotState]:
    """Return what the living workers' slots are doing now."""
    states: list[SlotState] = []
    for file in sorted(paths.workers.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, RecordError, KeyError, AttributeError, TypeError):
            raw = json.loads(file.read_text(encoding="utf-8"))
            process = from_dict(Process, raw["process"])
            if _is_alive(process, file, float(raw.get("lease_seconds") or SILENT_WORKER_SECONDS)):
                states.extend(_slot_state(slot, process) for slot in raw["slots"] if slot.get("trial") is not None)
    return states


def _is_alive(process: Process, file: Path, lease_seconds: float) -> bool:
    """Return whether the worker that writes ``file`` every second is alive; on another machine only its file shows
    that."""
    is_alive = is_alive_if_visible(process)
    if is_alive is None:
        age = age_seconds(file)
        return age is not None and abs(age) <= lease_seconds
    return is_alive


def _slot_state(slot: dict[str, Any], process: Process) -> SlotState:
    keys = ("trial", "phase", "step", "total", "started_at", "loss")
    return SlotState(params=slot.get("params") or {}, process=process, **{key: slot.get(key) for key in keys})


def progress_text(counts: Counts) -> str:
    """Return, for example, ``12 of 20 trials done: 9 finished, 2 pruned, 1 failed; 2 running, 6 to come``."""
    progress = f"{counts.finished} of {counts.total} trials done: {counts.completed} finished, {counts.pruned} pruned"
    left = counts.waiting + counts.to_ask
    skipped = f", {counts.skipped} predicted not to fit" if counts.skipped else ""
    remaining = f"; {counts.running} running, {left} to come" if left or counts.running else ""
    return f"{progress}, {counts.failed} failed{skipped}{remaining}"


def seconds_left(rows: Sequence[TrialRow], counts: Counts, at_once: int) -> float | None:
    """Return an estimate from the mean time of the ended trials, failures included; ``None`` before the first."""
    known = [row.seconds for row in rows if row.seconds is not None]
    if not known:
        return None
    left = counts.waiting + counts.to_ask + counts.running / 2
    return sum(known) / len(known) * left / max(at_once, 1)


def objective_fields(spec: StudySpec) -> list[str]:
    """Return the record's field of each objective."""
    return [objective.split(maxsplit=1)[-1] for objective in spec.objectives]


def best_table(rows: Sequence[TrialRow], spec: StudySpec) -> Table:
    """Return a table of the best trial, the Pareto front, or a ladder's runs at its recommended rank."""
    table = simple_table("best", *objective_fields(spec), *(axis.key for axis in spec.axes), "run")
    for row in rows:
        values = [_value(value) for value in row.values]
        params = [_param(row, axis.key) for axis in spec.axes]
        table.add_row(f"trial {row.number}", *values, *params, row.run_id or UNKNOWN_CELL)
    return table


def write_csv(rows: Sequence[TrialRow], spec: StudySpec, stream: TextIO) -> None:
    """Write ``number,status,value,run_id,seconds`` and one column per axis; with several objectives ``value_FIELD``
    each.

    Values of axes have all digits. ``null`` is a value; an axis that the trial doesn't have is empty.
    """
    fields = objective_fields(spec)
    columns = ["value"] if len(fields) == 1 else [f"value_{field}" for field in fields]
    axes = [axis.key for axis in spec.axes]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", "status", *columns, "run_id", "seconds", *axes])
    for row in rows:
        values = [*row.values, *[None] * len(columns)][: len(columns)]
        params = [exact_text(row.params[key]) if key in row.params else None for key in axes]
        writer.writerow([row.number, status_text(row), *values, row.run_id, row.seconds, *params])


def trials_table(rows: Sequence[TrialRow], spec: StudySpec) -> Table:
    """Return a table of all trials, one row each."""
    fields, axes = objective_fields(spec), [axis.key for axis in spec.axes]
    table = simple_table("trial", "status", *fields, "seconds", *axes, "run")
    for row in rows:
        values = [_value(value) for value in [*row.values, *[None] * len(fields)][: len(fields)]]
        params = [_param(row, key) for key in axes]
        table.add_row(
            str(row.number), status_text(row), *values, number(row.seconds, 1), *params, row.run_id or UNKNOWN_CELL
        )
    return table


def status_text(row: TrialRow) -> str:
    """Return the run's status if the trial has ended, else Optuna's state: WAITING, RUNNING."""
    if row.skipped is not None:
        return PREDICTED_NOT_TO_FIT
    return row.status.value if row.status is not None else row.state


def study_status(spec: StudySpec, opened: Any, paths: StudyPaths, holder: Lease | None) -> RenderableType:
    """Return everything as one renderable: progress, time left, running trials, the best so far, and the machine's
    load."""
    from rich.console import Group
    from rich.text import Text

    counts, rows = opened.counts(), opened.trials()
    running_numbers = {row.number for row in rows if row.state == "RUNNING"}
    # The file of a worker that just died may still look fresh, so the study's own state decides.
    slots = [slot for slot in running_slots(paths) if slot.trial in running_numbers]
    seconds = seconds_left(rows, counts, len(slots))
    text = f"{'SYNTHETIC ' if spec.synthetic else ''}study {spec.name}: {progress_text(counts)}"
    if counts.running + counts.waiting + counts.to_ask:
        text += f", {_duration(seconds)} left" if seconds is not None and slots else ""
        resume_hint = f"no process works on it: qlora-exp resume {shlex.quote(spec.name)}"
        text += f"\nworked on by {holder.owner}" if holder else f"\n{resume_hint}"
    predicted = memory_predictions(rows, paths)
    text += f"\n{predicted.sentence}" if predicted is not None else ""
    parts: list[RenderableType] = [Text(text)]
    if slots:
        parts.append(_running_table(slots))
    best = opened.best()
    if best:
        parts.append(best_table(best[:SHOWN_BEST], spec))
    if len(best) > SHOWN_BEST:
        parts.append(Text(f"and {len(best) - SHOWN_BEST} more: qlora-exp best {shlex.quote(spec.name)}"))
    parts.append(Text(machine_use(), style="dim"))
    return Group(*parts)


def memory_predictions(rows: Sequence[TrialRow], paths: StudyPaths) -> MemoryPredictionSummary | None:
    """Return how the predictions of the trials' memory turned out; ``None`` if nothing limits the memory."""
    return MemoryFeedback(OutputPaths(paths.folder.parent.parent)).predicted(rows)


def _running_table(slots: Sequence[SlotState]) -> Table:
    table = simple_table("running", "phase", "step", "loss", "for", "configuration")
    for slot in slots:
        step = f"{slot.step}/{slot.total}" if slot.step is not None else UNKNOWN_CELL
        configuration = " ".join(f"{key}={_text(value)}" for key, value in slot.params.items())
        duration = _duration(_age(slot.started_at)) if slot.started_at else UNKNOWN_CELL
        table.add_row(
            f"trial {slot.trial}", slot.phase or UNKNOWN_CELL, step, number(slot.loss), duration, configuration
        )
    return table


def machine_use() -> str:
    """Return the whole machine's CPU, memory and GPU use, for example ``cpu 87 %, memory 3.1 GB of 8.3 GB``."""
    import psutil

    memory = psutil.virtual_memory()
    cpu = psutil.cpu_percent(interval=0.1)
    parts = [f"cpu {cpu:.0f} %", f"memory {bytes_text(memory.used)} of {bytes_text(memory.total)}"]
    return ", ".join([*parts, *_gpu_use()])


def _gpu_use() -> Iterator[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            share = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            yield f"gpu {index} {share} %, {bytes_text(memory.used)} of {bytes_text(memory.total)}"
    except Exception:  # no driver, no library, or a GPU that doesn't report its use: there is nothing to show
        return


class LiveStatus:
    """Context manager that shows a study while it runs and updates its MLflow parent run.

    On a terminal it is a live view, elsewhere a line for each trial that ends. It polls in its own thread and never
    raises into the sweep.
    """

    def __init__(self, spec: StudySpec, opened: Any, paths: StudyPaths, tracker: Any, stream: TextIO | None = None):
        self._spec, self._opened, self._paths, self._tracker = spec, opened, paths, tracker
        self._stream = stream if stream is not None else sys.stderr
        self._me = Lease(process_identity(), lease_seconds=0.0, heartbeat_seconds=0.0)
        self._told: set[int] = set()
        self._counts: Counts | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="qlora-exp-watch", daemon=True)

    def __enter__(self) -> LiveStatus:
        self._told = {row.number for row in self._opened.trials() if row.status is not None and row.status.ended}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._refresh(None)

    def _poll(self) -> None:
        with self._live() as live:
            while not self._ended.wait(REFRESH_SECONDS):
                # After an error, such as a busy database or a half-written file, the next poll tries again.
                with contextlib.suppress(Exception):
                    self._refresh(live)

    def _refresh(self, live: Any) -> None:
        counts = self._opened.counts()
        if live is not None:
            live.update(study_status(self._spec, self._opened, self._paths, self._me), refresh=True)
        if counts == self._counts:
            return
        self._counts = counts
        rows = self._opened.trials()
        if not self._stream.isatty():
            for row in rows:
                if row.status is not None and row.status.ended and row.number not in self._told:
                    self._told.add(row.number)
                    print(trial_line(row, len(self._told), counts.total), file=self._stream, flush=True)
        if self._tracker is not None:
            self._tracker.update(tracking_rows(rows), [row.number for row in self._opened.best()])

    def _live(self) -> Any:
        if not self._stream.isatty():
            return contextlib.nullcontext()
        from rich.console import Console
        from rich.live import Live

        return Live(console=Console(file=self._stream), auto_refresh=False, transient=True)


def trial_line(row: TrialRow, done: int, total: int) -> str:
    """Return, for example, ``[4/20] trial 3 COMPLETED 0.8123  lora.r=8 quantization=nf4  (12.1 s)``."""
    values = " ".join(_value(value) for value in row.values if value is not None)
    params = " ".join(f"{key}={_text(value)}" for key, value in row.params.items())
    failure = f"  {row.failure.splitlines()[0]}" if row.failure else ""
    seconds = f"  ({row.seconds:.1f} s)" if row.seconds is not None else ""
    result = f"{status_text(row)} {values}".strip()
    return f"[{done}/{total}] trial {row.number} {result}  {params}{seconds}{failure}"


def tracking_rows(rows: Sequence[TrialRow]) -> list[Any]:
    """Return the trials as :mod:`qlora_exp.tracking` takes them."""
    from qlora_exp.tracking.study_fields import SummaryTrial

    return [
        SummaryTrial(row.number, row.status or Status.RUNNING, row.values, row.params, row.run_id, row.seconds)
        for row in rows
        if row.status is not None or row.state == "RUNNING"
    ]


def watch_status(spec: StudySpec, opened: Any, paths: StudyPaths, holder: Any) -> None:
    """Show the study's status every second until it is complete. Ctrl-C ends the view, not the study."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            live.update(study_status(spec, opened, paths, holder(paths)), refresh=True)
            counts = opened.counts()
            if counts.running + counts.waiting + counts.to_ask == 0:
                return
            time.sleep(REFRESH_SECONDS)


def show_status(spec: StudySpec, opened: Any, paths: StudyPaths, holder: Lease | None) -> None:
    """Print the study's status."""
    print_table(study_status(spec, opened, paths, holder))


def _age(moment: str) -> float | None:
    with contextlib.suppress(ValueError, TypeError):
        return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    return None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN_CELL
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _value(value: float | None) -> str:
    return UNKNOWN_CELL if value is None else f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _param(row: TrialRow, key: str) -> str:
    return _text(row.params[key]) if key in row.params else UNKNOWN_CELL


def _text(value: Any) -> str:
    """Return an axis's value for people: at most six digits."""
    return f"{value:.6g}" if isinstance(value, float) else exact_text(value)


def exact_text(value: Any) -> str:
    """Return an axis's value exactly as the trial had it: every digit of a number, ``null`` for none."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(exact_text, value))}]"
    return repr(value) if isinstance(value, float) else str(value)
