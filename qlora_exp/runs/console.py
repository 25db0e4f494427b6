"""Progress of a run: a bar with the remaining time on a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_SHARE = 0.1
LINE_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""A log gets the first and the last step, and a line per tenth of the steps: at most one in ten seconds, and at least
one a minute."""

SHOWN_METRICS = ("loss", "eval_loss", "tokens_per_second")


class ProgressReporter:
    """Shows a run's progress (:class:`~qlora_exp.training.outcome.Observer`); use it as a context manager.

    It draws a Rich bar on a terminal and prints lines elsewhere. ``stream`` is standard error by default, so that
    standard output holds only results.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._view: _Lines | _Bar = _Bar(self._stream) if self._stream.isatty() else _Lines(self._stream)

    def __enter__(self) -> ProgressReporter:
        self._view.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()

    def phase(self, name: str) -> None:
        """Show that a phase of the run begins, e.g. ``train``."""
        self._view.phase(name)

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Show that ``step`` of ``total`` is done, with its ``metrics``, e.g. ``loss``."""
        self._view.step(step, total, metrics)

    def note(self, text: str) -> None:
        """Show a message for the user."""
        self._view.note(text)


class _Lines:
    """Prints plain lines, few enough that the log of a long run is readable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._steps_began: float | None = None
        self._first_step = self._line_step = 0
        self._line_time = -SILENT_SECONDS

    def open(self) -> None:
        return

    def close(self) -> None:
        return

    def phase(self, name: str) -> None:
        self._begin_steps()
        self._print(f"[{time.monotonic() - self._started:6.1f} s] {name}")

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if self._steps_began is None:
            self._steps_began, self._first_step = now, step
        seconds_since_line = now - self._line_time
        is_tenth = step - self._line_step >= LINE_SHARE * total and seconds_since_line >= LINE_SECONDS
        is_due = is_tenth or seconds_since_line >= SILENT_SECONDS
        if not is_due and step < total:
            return
        self._line_step, self._line_time = step, now
        left = _remaining_time(now - self._steps_began, step - self._first_step, total - step)
        self._print(f"  step {step}/{total}{left}{_metrics_text(metrics)}")

    def note(self, text: str) -> None:
        self._print(text)

    def _begin_steps(self) -> None:
        self._steps_began = None
        self._first_step = self._line_step = 0
        self._line_time = -SILENT_SECONDS

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Bar:
    """Draws a bar per phase, with the remaining time if the phase counts steps."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar: Bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task: TaskID | None = None

    def open(self) -> None:
        self._bar.start()

    def close(self) -> None:
        if self._task is not None and self._bar.tasks[-1].total is None:
            self._finish_phase()
        self._bar.stop()

    def phase(self, name: str) -> None:
        self._finish_phase()
        self._task = self._bar.add_task(name, total=None, shown="")

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        if self._task is None:
            self.phase("train")
        assert self._task is not None
        self._bar.update(self._task, completed=step, total=total, shown=f"{step}/{total}{_metrics_text(metrics)}")

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def _finish_phase(self) -> None:
        """Stop the phase's spinner; the phase stays on the screen with its duration."""
        if self._task is not None:
            # The last step may not have been logged.
            total = self._bar.tasks[-1].total or 1
            self._bar.update(self._task, total=total, completed=total)
            self._bar.stop_task(self._task)
            self._task = None


def _remaining_time(seconds: float, done: int, remaining: int) -> str:
    if done <= 0 or remaining <= 0:
        return ""
    left = round(seconds / done * remaining)
    return f", {left // 60}:{left % 60:02d} left"


def _metrics_text(metrics: dict[str, float]) -> str:
    return "".join(f", {name} {metrics[name]:.4g}" for name in SHOWN_METRICS if metrics.get(name) is not None)
