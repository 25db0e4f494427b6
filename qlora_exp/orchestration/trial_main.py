"""The trial process: runs one trial after another for the worker that started it, and keeps the base model loaded.

``python -m qlora_exp.orchestration.trial_main --parent PID [--preload training] [--preload tracking]``. It reads
commands from standard input and writes messages to standard output; see :mod:`qlora_exp.orchestration.messages`. Output
of libraries goes to standard error, which is the log. The worker sets threads and GPU in the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, cast

from qlora_exp.config.schema import Config
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.memory_fit import PredictedOutOfMemory, with_micro_batch
from qlora_exp.orchestration.messages import (
    PRELOADED,
    Command,
    DiskFull,
    Message,
    Note,
    PhaseChanged,
    Progress,
    PruneReply,
    PruneRequest,
    Ready,
    RunTrial,
    Step,
    TrialEnded,
    TrialRefused,
    UserError,
    decode,
    encode_message,
)
from qlora_exp.records.redaction import redact_text
from qlora_exp.runs.process import die_with, import_and_freeze_gc, silence_libraries
from qlora_exp.system import streams
from qlora_exp.system.streams import show_any_text
from qlora_exp.training.outcome import PruneCheck, is_disk_full

if TYPE_CHECKING:
    from qlora_exp.models.base_models import BaseModels


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--preload", action="append", default=[], choices=sorted(PRELOADED))
    arguments = parser.parse_args()
    die_with(arguments.parent)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    streams.ignore_write_errors()
    line = Channel()
    show_any_text()
    silence_libraries()
    import_and_freeze_gc(module for name in arguments.preload for module in PRELOADED[name])
    line.tell(Ready())
    with ThreadPoolExecutor(1, "delivery") as deliveries, contextlib.suppress(KeyboardInterrupt):
        host = _TrialRunner(line, deliveries, _base_cache() if "training" in arguments.preload else None)
        while isinstance(command := line.next(), RunTrial):
            host.run(command)
    return 0


def _base_cache() -> BaseModels:
    from qlora_exp.models.base_cache import BaseCache

    return BaseCache()


PROGRESS_SECONDS = 1.0
"""A worker writes its state once a second."""


class Channel:
    """The two pipes to the worker, moved so that no library can print to or read from them."""

    def __init__(self) -> None:
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._writing = threading.Lock()
        threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def tell(self, message: Message) -> None:
        with self._writing:
            self._out.write(encode_message(message))

    def next(self) -> Command:
        return self._commands.get()

    def _listen(self) -> None:
        """Read commands. The end of standard input means that the worker is gone, and this process must not outlive
        it."""
        with contextlib.suppress(Exception):
            for text in self._in:
                self._commands.put(cast(Command, decode(text)))
        os._exit(1)


class _TrialRunner:
    """Runs trials and, as their observer, sends their progress to the worker."""

    def __init__(self, line: Channel, deliveries: ThreadPoolExecutor, bases: BaseModels | None) -> None:
        from qlora_exp.config.compose import Composer

        self.line, self.deliveries, self.bases = line, deliveries, bases
        self.composer = Composer()
        self.last_report = -PROGRESS_SECONDS
        """When the worker last heard how far a phase is."""

    def run(self, command: RunTrial) -> None:
        from qlora_exp.progress import Amount, shown_by

        def forward(amount: Amount) -> None:
            if time.monotonic() - self.last_report >= PROGRESS_SECONDS:
                self.last_report = time.monotonic()
                self.line.tell(Progress(amount.done, amount.total, amount.unit))

        with shown_by(forward):
            self._execute(command)

    def _execute(self, command: RunTrial) -> None:
        from qlora_exp.runs.execute import execute

        try:
            execute(
                _with_worker_settings(self.composer.compose(command.overrides), command),
                self,
                resume=command.run_id if command.resume else None,
                run_id=command.run_id,
                trial=command.trial,
                report=PruneCheck(self.ask, command.per_item, command.pilot),
                bases=self.bases,
                deliver=self.deliveries.submit,
                memory=command.memory,
            )
            self.line.tell(TrialEnded())
        except PredictedOutOfMemory as error:
            self.line.tell(TrialRefused(error.what, error.skipped))
        except QloraExpError as error:
            what = redact_text(error.what if type(error).__str__ is QloraExpError.__str__ else str(error))
            self.line.tell(UserError(type(error).__name__, what, error.where, error.hint))
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.line.tell(DiskFull(str(error)))

    def ask(self, step: int, value: float, items: Sequence[float] | None) -> bool:
        finite = items is not None and math.isfinite(value)
        self.line.tell(PruneRequest(step, value, tuple(items) if items is not None and finite else None))
        answer = self.line.next()
        assert isinstance(answer, PruneReply)
        return answer.stop

    def phase(self, name: str) -> None:
        self.line.tell(PhaseChanged(name))

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        self.line.tell(Step(step, total, dict(metrics)))

    def note(self, text: str) -> None:
        self.line.tell(Note(text))


def _with_worker_settings(config: Config, command: RunTrial) -> Config:
    """Return the configuration with the values that the worker sets directly, not as Hydra overrides."""
    changed = replace(config, output_root=command.output_root)
    return with_micro_batch(changed, command.micro_batch)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit would take torch so long that the worker had to wait
