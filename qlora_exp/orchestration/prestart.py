"""Start trial processes while the study is still being opened, because their imports take longer than that."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.config.enums import Engine
from qlora_exp.config.schema import WorkersConfig
from qlora_exp.errors import QloraExpError
from qlora_exp.orchestration import forking
from qlora_exp.orchestration.devices import assign_slots, environment_of, threads_per_process
from qlora_exp.orchestration.live_state import worker_name
from qlora_exp.orchestration.trial_process import TrialProcess
from qlora_exp.paths import StudyPaths


@dataclass(frozen=True)
class ProcessStart:
    """How one slot's trial process is started."""

    log: Path
    environment: tuple[tuple[str, str], ...]
    preload: tuple[str, ...]

    def start(self) -> TrialProcess:
        return TrialProcess(self.log, dict(self.environment), self.preload)


_started: dict[ProcessStart, TrialProcess] = {}


def process_starts(config: Any, workers: WorkersConfig, paths: StudyPaths) -> list[ProcessStart]:
    """Return one per slot. ``config``: composed without the axes.

    Raises:
        ConfigError, Problems: a GPU is in use by another process.
    """
    training = config.training
    gpus = assign_slots(training.engine, training.device, workers.count)
    threads = threads_per_process(training.threads, len(gpus), paths.threads)
    preload: tuple[str, ...] = () if training.engine is Engine.sleep else ("training",)
    preload = (*preload, "tracking") if config.tracking.enabled else preload
    return [
        ProcessStart(paths.logs / f"{worker_name()}-{slot}.log", tuple(environment_of(gpu, threads).items()), preload)
        for slot, gpu in enumerate(gpus)
    ]


def processes_per_device(starts: Sequence[ProcessStart]) -> int | None:
    """Return the largest number of trial processes on one GPU, or on the machine if they use none; ``None``: nothing is
    trained."""
    gpus = [gpu for one in starts if (gpu := dict(one.environment).get("CUDA_VISIBLE_DEVICES")) is not None]
    on_cpu = len(starts) if any("training" in one.preload for one in starts) else None
    return max(Counter(gpus).values(), default=on_cpu)


@contextlib.contextmanager
def prestarted(config: Any, workers: WorkersConfig, paths: StudyPaths, at_most: int) -> Iterator[None]:
    """Start the processes that a worker of this process will need; those that it didn't take are killed afterwards.

    Only the main thread may use this: the kernel kills a process when the thread that started it ends.
    """
    with forking.servers_kept():
        try:
            with contextlib.suppress(QloraExpError, OSError):  # the worker meets it too, and reports it
                for one in process_starts(config, workers, paths)[:at_most]:
                    _started[one] = one.start()
            yield
        finally:
            while _started:
                _started.popitem()[1].kill()


def take_started(one: ProcessStart) -> TrialProcess:
    """Return the process started before, or a new one."""
    return _started.pop(one, None) or one.start()
