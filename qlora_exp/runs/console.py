"""Progress of a run: a bar with counts and the time left on a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from qlora_exp.progress import Amount, shown_by

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_SHARE = 0.1
LINE_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""A log gets the first and the last step, and a line per tenth of the work: at most one in ten seconds, and at least
one a minute while something is counted."""
REFRESHES_PER_SECOND = 4
"""Of the bar. Drawing one takes about a millisecond of the interpreter's time, which training needs, too."""


class ProgressReporter:
    """Shows a run's progress (:class:`~qlora_exp.training.outcome.Observer`); use it as a context manager.

    It draws a Rich bar on a terminal and prints lines elsewhere. ``stream`` is standard error by default, so that
    standard output holds only results. Inside the ``with`` block it also shows what :mod:`qlora_exp.progress` reports.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._view: _Lines | _Bar = _Bar(self._stream) if self._stream.isatty() else _Lines(self._stream)
        self._reports = shown_by(self._view.amount)

    def __enter__(self) -> ProgressReporter:
        self._view.open()
        self._reports.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reports.__exit__(kind, error, trace)
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
        self._phase: tuple[str, float] | None = None
        self._metrics: dict[str, float] = {}
        self._steps_began: float | None = None
        self._first_step = self._line_step = 0
        self._line_time = -SILENT_SECONDS
        self._work: _Work | None = None

    def open(self) -> None:
        return

    def close(self) -> None:
        return

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self._steps_began, self._metrics, self._work = None, {}, None
        self._first_step = self._line_step = 0
        self._line_time = -SILENT_SECONDS
        took = f", {self._phase[0]} took {_clock(now - self._phase[1])}" if self._phase is not None else ""
        self._phase = (name, now)
        self._print(f"{name}  ({_clock(now - self._started)} elapsed{took})")

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        self._metrics |= metrics
        if self._steps_began is None:
            self._steps_began, self._first_step = now, step
        seconds_since_line = now - self._line_time
        is_tenth = step - self._line_step >= LINE_SHARE * total and seconds_since_line >= LINE_SECONDS
        is_due = is_tenth or seconds_since_line >= SILENT_SECONDS
        if not is_due and step < total:
            return
        self._line_step, self._line_time = step, now
        done, left = step - self._first_step, total - step
        remaining = _left((now - self._steps_began) / done * left if done > 0 and left > 0 else None)
        self._print(f"  step {step}/{total}{_metrics_text(self._metrics)}{remaining}")

    def amount(self, amount: Amount) -> None:
        now = time.monotonic()
        if self._work is None or not self._work.continues(amount):
            self._work = _Work(amount, now)
        work = self._work
        is_tenth = amount.share - work.line_share >= LINE_SHARE and now - work.line_time >= LINE_SECONDS
        if is_tenth or now - work.line_time >= SILENT_SECONDS:
            work.line_share, work.line_time = amount.share, now
            self._print(f"  {amount.done:,} of {amount.total:,} {amount.unit}{_left(work.seconds_left(amount, now))}")
        work.last = amount

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Work:
    """A piece of counted work: when it began, and its last line. Work of a few seconds gets no line."""

    def __init__(self, first: Amount, now: float) -> None:
        self.first = self.last = first
        self.began = self.line_time = now
        self.line_share = 0.0

    def continues(self, amount: Amount) -> bool:
        """Return whether ``amount`` belongs to this work: the same items are counted, and on from the last number."""
        same = (amount.unit, amount.total) == (self.first.unit, self.first.total)
        return same and amount.done >= self.last.done

    def seconds_left(self, amount: Amount, now: float) -> float | None:
        share = amount.share - self.first.share
        return (now - self.began) / share * (1 - amount.share) if share > 0 and amount.share < 1 else None


class _Bar:
    """Draws a bar per phase, with what is counted and the remaining time."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        class Elapsed(ProgressColumn):
            """The phase's time. Rich's own column stops when a first piece of counted work is done."""

            def render(self, task: Any) -> Text:
                return Text(_clock(task.elapsed or 0.0).rjust(10), style="progress.elapsed")

        self._bar: Bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            Elapsed(),
            TextColumn("elapsed{task.fields[left]}"),
            TextColumn("{task.fields[shown]}"),
            console=Console(file=stream),
            refresh_per_second=REFRESHES_PER_SECOND,
            get_time=lambda: time.monotonic(),
        )
        self._task: TaskID | None = None
        self._metrics: dict[str, float] = {}
        self._work: _Work | None = None

    def open(self) -> None:
        self._bar.start()

    def close(self) -> None:
        if self._task is not None and self._bar.tasks[-1].total is None:
            self._finish_phase()
        self._bar.stop()

    def phase(self, name: str) -> None:
        self._finish_phase()
        self._metrics, self._work = {}, None
        self._task = self._bar.add_task(name, total=None, shown="", left="")

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        self._metrics |= metrics
        shown = f"step {step}/{total}{_metrics_text(self._metrics)}"
        self._show(Amount(step, total, "steps", step / total if total else 0.0), shown)

    def amount(self, amount: Amount) -> None:
        self._show(amount, f"{amount.done:,} of {amount.total:,} {amount.unit}")

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def _show(self, amount: Amount, shown: str) -> None:
        if self._task is None:
            self.phase("train")
        assert self._task is not None
        now = time.monotonic()
        if self._work is None or not self._work.continues(amount):
            self._work = _Work(amount, now)
        left = _left(self._work.seconds_left(amount, now))
        self._work.last = amount
        self._bar.update(self._task, completed=amount.share, total=1.0, shown=shown, left=left)

    def _finish_phase(self) -> None:
        """Stop the phase's spinner; the phase stays on the screen with its duration."""
        if self._task is not None:
            # The last step may not have been logged.
            self._bar.update(self._task, total=1.0, completed=1.0, left="")
            self._bar.stop_task(self._task)
            self._task = None


def _clock(seconds: float) -> str:
    """Return e.g. ``0.3 s``, ``4:05 min`` or ``2:04:05 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", about {_clock(max(seconds, 0.0))} left"


def _metrics_text(metrics: dict[str, float]) -> str:
    """Return e.g. ``, loss 1.92, validation loss 1.95, 1,204 tokens/s``: the newest value of each."""
    names = {"loss": "loss", "validation_loss": "validation loss"}
    text = "".join(f", {words} {metrics[name]:.4g}" for name, words in names.items() if metrics.get(name) is not None)
    tokens, seconds = metrics.get("tokens"), metrics.get("seconds")
    return f"{text}, {tokens / seconds:,.0f} tokens/s" if tokens and seconds else text
