"""What a process sets before it imports libraries, and its exit codes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator

from qlora_exp.config.enums import DeviceChoice
from qlora_exp.errors import QloraExpError
from qlora_exp.records import redaction
from qlora_exp.records.types import Status
from qlora_exp.system import gpus
from qlora_exp.system.environment import NO_TELEMETRY

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EXIT_COMPLETED, EXIT_RUN_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class ExitCode(KeyboardInterrupt):
    """Exits Hydra's application with an exit code; Hydra turns ordinary exceptions into a traceback and exit code 1."""

    def __init__(self, code: int) -> None:
        super().__init__(code)  # in args, so that pickle restores it in a launcher's parent process
        self.code = code


def die_with(parent: int) -> None:
    """Make the kernel kill this process when the parent's thread that started it ends (Linux).

    Elsewhere the end of standard input has this effect. The parent may already have died before the kernel call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads, best before torch is imported.

    OpenMP threads wait passively: two pools that spin on the same cores slow each other down many times over.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        count = threads or int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
        torch.set_num_threads(count)


def hide_other_gpus(device: DeviceChoice) -> str | None:
    """Limit this process to one GPU unless ``training.device=cpu``, and let torch's memory there grow in place. Call it
    before torch is imported."""
    if device is DeviceChoice.cpu:
        return None
    if gpus.cards():
        os.environ.update(gpus.allocator_setting())
    return gpus.use_one_gpu()


def silence_libraries() -> None:
    """Turn off telemetry, progress bars and warnings of libraries, and the tokenizers' parallelism, which breaks when a
    process with threads forks."""
    for key, value in {
        "TOKENIZERS_PARALLELISM": "false",
        **NO_TELEMETRY,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }.items():
        os.environ.setdefault(key, value)
    # bitsandbytes logs a missing optional kernel at import, and a cast to 16 bits at each int8 layer's first forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL warns that a micro-batch of one row gains nothing without padding; it loses nothing, either.
    logging.getLogger("trl.trainer.sft_trainer").addFilter(lambda record: "padding-free" not in record.getMessage())
    # transformers 5.23 warns of argument names that TRL passes; the user can't change them.
    warnings.filterwarnings("ignore", category=FutureWarning)


def import_and_freeze_gc(modules: Iterable[str]) -> None:
    """Import modules that this process needs until it ends, without garbage collection, and exclude them from it.

    Python's collector would scan these objects about a dozen times during the imports, for a fifth of a short run's
    time, and free almost nothing.

    Call it only in a process that belongs to the run: ``gc.freeze`` also keeps all other objects of the process
    forever. For the same reason it does nothing in a second run of a process.
    """
    missing = [module for module in modules if module not in sys.modules]
    if not missing:
        return
    gc.disable()
    try:
        for module in missing:
            importlib.import_module(module)
    finally:
        gc.enable()
    gc.freeze()


def exit_code_of(status: Status) -> int:
    """Return the command's exit code for a run with this status."""
    if status in (Status.COMPLETED, Status.PRUNED):
        return EXIT_COMPLETED
    return EXIT_INTERRUPTED if status is Status.INTERRUPTED else EXIT_RUN_FAILED


_collected: list[QloraExpError] | None = None
"""Errors that :func:`errors_collected` takes; ``None``: they are printed."""


@contextlib.contextmanager
def errors_collected() -> Iterator[list[QloraExpError]]:
    """Collect what :func:`print_error` would print: a caller in Python gets exceptions."""
    global _collected
    _collected = []
    try:
        yield _collected
    finally:
        _collected = None


def print_error(error: QloraExpError) -> None:
    """Print an error to stderr, without secrets."""
    if _collected is not None:
        _collected.append(error)
        return
    print(f"error: {redaction.redact_text(str(error))}", file=sys.stderr)
