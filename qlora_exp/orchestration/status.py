"""A study's progress: its trials, what its workers are doing, the time left. Any process can read it."""

from __future__ import annotations

import contextlib
import csv
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from qlora_exp.formatting import TableColumn, bytes_text, clock_text, fitted_table, number, table_width
from qlora_exp.orchestration.live_state import SlotState, running_slots
from qlora_exp.orchestration.memory_predictions import MemoryFeedback, MemoryPredictionSummary
from qlora_exp.paths import StudyPaths
from qlora_exp.records.labels import label, labels, short_id
from qlora_exp.study.types import Counts, StudySpec, TrialRow
from qlora_exp.system.environment import process_identity
from qlora_exp.system.orchestrator_lease import Lease, held_lease

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PREDICTED_NOT_TO_FIT = "DOES_NOT_FIT"
"""Status of a trial that was not started because it was predicted not to fit; Optuna's state is PRUNED."""

REFRESH_SECONDS = 1.0
SHOWN_BEST = 5


def study_status(
    spec: StudySpec, opened: Any, paths: StudyPaths, holder: Lease | None, width: int | None = None
) -> RenderableType:
    """Return everything as one renderable: progress, time left, running trials, the best so far, and the machine's
    load. ``width``: of the terminal in characters; ``None``: that of standard output."""
    from rich.console import Group
    from rich.text import Text

    counts, rows = opened.counts(), opened.trials()
    running_numbers = {row.number for row in rows if row.state == "RUNNING"}
    # The file of a worker that just died may still look fresh, so the study's own state decides.
    slots = [slot for slot in running_slots(paths) if slot.trial in running_numbers]
    text = f"{'SYNTHETIC ' if spec.synthetic else ''}study {spec.name}: {progress_text(counts)}"
    if not counts.is_complete:
        seconds = seconds_left(rows, counts, len(slots))
        text += f", {clock_text(seconds)} left" if seconds is not None and slots else ""
        resume_hint = f"no process works on it: qlora-exp resume {shlex.quote(spec.name)}"
        text += f"\nworked on by {holder.owner}" if holder else f"\n{resume_hint}"
    predicted = memory_predictions(rows, paths)
    text += f"\n{predicted.sentence}" if predicted is not None else ""
    parts: list[RenderableType] = [Text(text)]
    if slots:
        parts.append(_running_table(slots, width))
    best = opened.best()
    if best:
        parts.append(best_table(best[:SHOWN_BEST], spec, width))
    if len(best) > SHOWN_BEST:
        parts.append(Text(f"and {len(best) - SHOWN_BEST} more: qlora-exp best {shlex.quote(spec.name)}"))
    parts.append(Text(_machine_use(), style="dim"))
    return Group(*parts)


def status_fields(spec: StudySpec, opened: Any, paths: StudyPaths, holder: Lease | None) -> dict[str, Any]:
    """Return the study's state for ``status --json``: numbers of trials, the running ones, the best so far."""
    counts, rows = opened.counts(), opened.trials()
    running_numbers = {row.number for row in rows if row.state == "RUNNING"}
    slots = [slot for slot in running_slots(paths) if slot.trial in running_numbers]
    names = ("total", "completed", "pruned", "failed", "skipped", "running", "waiting", "to_ask", "finished")
    keys = ("trial", "run_id", "phase", "step", "total", "loss", "started_at")
    return {
        "study": spec.name,
        "synthetic": spec.synthetic,
        "is_complete": counts.is_complete,
        **{name: getattr(counts, name) for name in names},
        "seconds_left": seconds_left(rows, counts, len(slots)) if slots and not counts.is_complete else None,
        "worked_on_by": holder.owner if holder is not None else None,
        "running_trials": [{key: getattr(slot, key) for key in keys} | {"name": label(slot.params)} for slot in slots],
        "best": trial_rows(opened.best(), spec),
    }


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


def memory_predictions(rows: Sequence[TrialRow], paths: StudyPaths) -> MemoryPredictionSummary | None:
    """Return how the predictions of the trials' memory turned out; ``None`` if nothing limits the memory."""
    return MemoryFeedback(paths.outputs).predicted(rows)


def _running_table(slots: Sequence[SlotState], width: int | None) -> Table:
    rows = []
    for slot in slots:
        seconds = None
        with contextlib.suppress(ValueError, TypeError):
            seconds = (datetime.now(UTC) - datetime.fromisoformat(str(slot.started_at))).total_seconds()
        step = f"{slot.step}/{slot.total}" if slot.step is not None else None
        row: dict[str, Any] = {
            "trial": f"trial {slot.trial}",
            "label": label(slot.params),
            "phase": slot.progress or slot.phase,
        }
        rows.append(row | {"step": step, "loss": slot.loss, "seconds": seconds})
    columns = [
        TableColumn("trial", "running"),
        TableColumn("label", "settings", cut=True),
        TableColumn("phase"),
        TableColumn("step"),
        TableColumn("loss", text=number, priority=1),
        TableColumn("seconds", "for", clock_text, priority=2),
    ]
    return fitted_table(rows, columns, width or table_width())[0]


def _machine_use() -> str:
    """Return the whole machine's CPU, memory and GPU use, for example ``cpu 87 %, memory 3.1 GB of 8.3 GB``."""
    import psutil

    memory = psutil.virtual_memory()
    parts = [f"cpu {psutil.cpu_percent(interval=0.1):.0f} %"]
    parts.append(f"memory {bytes_text(memory.used)} of {bytes_text(memory.total)}")
    # Without a driver, a library, or a GPU that reports its use, there is nothing to show.
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            card = pynvml.nvmlDeviceGetMemoryInfo(handle)
            share = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            parts.append(f"gpu {index} {share} %, {bytes_text(card.used)} of {bytes_text(card.total)}")
    return ", ".join(parts)


# Tables of trials.


def best_table(rows: Sequence[TrialRow], spec: StudySpec, width: int | None = None) -> Table:
    """Return a table of the best trial, the Pareto front, or a ladder's runs at its recommended rank."""
    shown = [row | {"best": f"trial {row['number']}"} for row in trial_rows(rows, spec)]
    columns = [
        TableColumn("best"),
        TableColumn("name", "settings", cut=True),
        *value_columns(spec),
        TableColumn("short_id", "run"),
    ]
    return fitted_table(shown, columns, width or table_width())[0]


def trial_rows(rows: Sequence[TrialRow], spec: StudySpec, everybody: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the trials as flat rows with the columns of :func:`write_csv` and: ``label`` (what varies among these
    trials), ``name`` (all axes' values), ``short_id`` (unique among these runs and ``everybody``), ``attempt``,
    ``failure``."""
    ids = [*everybody, *(row.run_id for row in rows if row.run_id is not None)]
    return [
        {
            "number": row.number,
            "label": text,
            "status": status_text(row),
            **dict(zip(value_keys(spec), row.values, strict=False)),
            "run_id": row.run_id,
            "short_id": short_id(row.run_id, ids) if row.run_id is not None else None,
            "seconds": row.seconds,
            **{axis.key: row.params.get(axis.key) for axis in spec.axes},
            "name": label(row.params),
            "attempt": row.attempt,
            "failure": row.failure,
        }
        for row, text in zip(rows, labels([row.params for row in rows]), strict=True)
    ]


def trial_columns(spec: StudySpec) -> list[TableColumn]:
    """Return the columns of ``trials``: what varies, the objectives, time, status and run."""
    return [
        TableColumn("number", "trial"),
        TableColumn("label", "settings", cut=True),
        *value_columns(spec),
        TableColumn("seconds", "time", clock_text, priority=1),
        TableColumn("status"),
        TableColumn("short_id", "run"),
    ]


def value_keys(spec: StudySpec) -> list[str]:
    """Return the keys of the objectives in tables: ``value``, or ``value_FIELD`` for each of several."""
    fields = _objective_fields(spec)
    return ["value"] if len(fields) == 1 else [f"value_{field}" for field in fields]


def value_columns(spec: StudySpec) -> list[TableColumn]:
    """Return a column per objective, headed by the end of its name and its direction: ``loss_per_item ↓``."""
    arrows = ["↑" if objective.startswith("maximize") else "↓" for objective in spec.objectives]
    names = [field.rsplit(".", 1)[-1] for field in _objective_fields(spec)]
    headings = [f"{name} {arrow}" for name, arrow in zip(names, arrows, strict=True)]
    texts = [bytes_text if name.endswith("_bytes") else _value for name in names]
    return [TableColumn(*fields) for fields in zip(value_keys(spec), headings, texts, strict=True)]


def write_csv(rows: Sequence[TrialRow], spec: StudySpec, stream: TextIO) -> None:
    """Write ``number,status,value,run_id,seconds`` and one column per axis; with several objectives ``value_FIELD``
    each.

    Values of axes have all digits. ``null`` is a value; an axis that the trial doesn't have is empty.
    """
    axes = [axis.key for axis in spec.axes]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", "status", *value_keys(spec), "run_id", "seconds", *axes])
    for row in rows:
        params = [exact_text(row.params[key]) if key in row.params else None for key in axes]
        writer.writerow([row.number, status_text(row), *row.values, row.run_id, row.seconds, *params])


def status_text(row: TrialRow) -> str:
    """Return the run's status if the trial has ended, else Optuna's state: WAITING, RUNNING."""
    if row.skipped is not None:
        return PREDICTED_NOT_TO_FIT
    return row.status.value if row.status is not None else row.state


def _objective_fields(spec: StudySpec) -> list[str]:
    return [objective.split(maxsplit=1)[-1] for objective in spec.objectives]


def _value(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"


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


# While the study runs.


class LiveStatus:
    """Context manager that shows a study while it runs and updates its MLflow parent run.

    On a terminal it is a live view, elsewhere a line for each trial that ends. It polls in its own thread and never
    raises into the sweep.
    """

    def __init__(self, spec: StudySpec, opened: Any, paths: StudyPaths, log: Callable[[], None] | None):
        """``log`` is called after every change."""
        self._spec, self._opened, self._paths, self._log = spec, opened, paths, log
        self._stream = sys.stderr
        self._me = Lease(process_identity(), lease_seconds=0.0, heartbeat_seconds=0.0)
        self._printed: set[int] = set()
        """Numbers of the ended trials that have their line, or had ended before."""
        self._counts: Counts | None = None
        self._width: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="qlora-exp-watch", daemon=True)

    def __enter__(self) -> LiveStatus:
        self._printed = {row.number for row in self._opened.trials() if row.status is not None and row.status.ended}
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

    def _live(self) -> Any:
        if not self._stream.isatty():
            return contextlib.nullcontext()
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        self._width = console.width
        return Live(console=console, auto_refresh=False, transient=True)

    def _refresh(self, live: Any) -> None:
        counts = self._opened.counts()
        if live is not None:
            live.update(study_status(self._spec, self._opened, self._paths, self._me, self._width), refresh=True)
        if counts == self._counts:
            return
        self._counts = counts
        if not self._stream.isatty():
            for row in self._opened.trials():
                if row.status is not None and row.status.ended and row.number not in self._printed:
                    self._printed.add(row.number)
                    print(trial_line(row, len(self._printed), counts.total), file=self._stream, flush=True)
        if self._log is not None:
            self._log()


def trial_line(row: TrialRow, done: int, total: int) -> str:
    """Return, for example, ``[4/20] trial 3 COMPLETED 0.8123  nf4 r8  (12.1 s)``."""
    values = " ".join(_value(value) for value in row.values if value is not None)
    failure = f"  {row.failure.splitlines()[0]}" if row.failure else ""
    seconds = f"  ({row.seconds:.1f} s)" if row.seconds is not None else ""
    result = f"{status_text(row)} {values}".strip()
    return f"[{done}/{total}] trial {row.number} {result}  {label(row.params)}{seconds}{failure}"


def watch_status(spec: StudySpec, opened: Any, paths: StudyPaths) -> None:
    """Show the study's status every second until it is complete. Ctrl-C ends the view, not the study."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            live.update(study_status(spec, opened, paths, held_lease(paths.orchestrator)), refresh=True)
            if opened.counts().is_complete:
                return
            time.sleep(REFRESH_SECONDS)
