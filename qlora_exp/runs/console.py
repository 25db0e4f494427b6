"""How a run goes, told while it goes: a bar with the time left on a terminal, a few plain lines in a log."""

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
"""A log gets the first step, a line for each tenth of the steps but no more than one in ten seconds, one a minute where
a tenth takes longer, and the last step."""

SHOWN_METRICS = ("loss", "eval_loss", "tokens_per_second")


class ProgressReporter:
    """An observer of a run (phase, step, note), used as a context manager.

    On a terminal it draws with Rich; elsewhere it prints lines. Both go to ``stream``, standard error by default, so
    that standard output holds results only.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._view: _Lines | _Live = _Live(self._stream) if self._stream.isatty() else _Lines(self._stream)

    def __enter__(self) -> ProgressReporter:
        self._view.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()

    def phase(self, name: str) -> None:
        """A part of the run begins, e.g. ``train``."""
        self._view.phase(name)

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """``step`` of ``total`` is done; ``metrics`` are its figures, e.g. ``loss``."""
        self._view.step(step, total, metrics)

    def note(self, text: str) -> None:
        """Something that a person should read."""
        self._view.note(text)


class _Lines:
    """Plain lines; a run of an hour and a run of a minute both leave a log that can be read."""

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
        passed = now - self._line_time
        tenth = step - self._line_step >= LINE_SHARE * total and passed >= LINE_SECONDS
        due = tenth or passed >= SILENT_SECONDS
        if not due and step < total:
            return
        self._line_step, self._line_time = step, now
        self._print(f"  step {step}/{total}{_left(now - self._steps_began, step - self._first_step, total - step)}"
                    f"{_figures(metrics)}")  # fmt: skip

    def note(self, text: str) -> None:
        self._print(text)

    def _begin_steps(self) -> None:
        self._steps_began = None
        self._first_step = self._line_step = 0
        self._line_time = -SILENT_SECONDS

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Live:
    """A bar per phase, with the time left where the phase counts steps."""

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
        self._bar.update(self._task, completed=step, total=total, shown=f"{step}/{total}{_figures(metrics)}")

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def _finish_phase(self) -> None:
        """A finished phase stays on the screen with its time; its spinner stops."""
        if self._task is not None:
            # The last logged step need not be the last one.
            total = self._bar.tasks[-1].total or 1
            self._bar.update(self._task, total=total, completed=total)
            self._bar.stop_task(self._task)
            self._task = None


def _left(seconds: float, done: int, remaining: int) -> str:
    if done <= 0 or remaining <= 0:
        return ""
    left = round(seconds / done * remaining)
    return f", {left // 60}:{left % 60:02d} left"


def _figures(metrics: dict[str, float]) -> str:
    return "".join(f", {name} {metrics[name]:.4g}" for name in SHOWN_METRICS if metrics.get(name) is not None)
