"""What a process of ours sets before it imports libraries, and how it ends."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable

from qlora_exp.config.schema import DeviceChoice
from qlora_exp.errors import QloraExpError
from qlora_exp.records import redaction
from qlora_exp.records.types import Status
from qlora_exp.system import gpus

EXIT_COMPLETED, EXIT_RUN_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class ExitCode(KeyboardInterrupt):
    """Leaves Hydra (which turns an ordinary exception into a trace and exit code 1) with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)  # a launcher brings it from another process
        self.code = code


def set_threads(threads: int | None) -> None:
    """Fix the CPU threads before torch is imported. Two OpenMP pools that spin on the same cores slow each other down
    many times over, so waiting is passive."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        wanted = threads or int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
        torch.set_num_threads(wanted)


def hide_other_gpus(device: DeviceChoice) -> str | None:
    """Limit this process to one GPU where ``training.device`` allows one. Must be called before torch is imported."""
    return gpus.use_one_gpu() if device is not DeviceChoice.cpu else None


def silence_libraries() -> None:
    """No telemetry, no progress bars of the libraries' own, no fork of tokenizers after threads exist."""
    for key, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
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
    # bitsandbytes names an optional kernel at import, and at each layer's first forward that LLM.int8() takes 16 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 warns of names that TRL itself passes; nobody at the terminal can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning)


def import_and_freeze_gc(modules: Iterable[str]) -> None:
    """Import what a process of ours needs until it ends. Python's collector would walk all of it a dozen times and free
    next to nothing, for a fifth of a short run's time: it is off meanwhile, and leaves alone what there is then.

    Not where another program calls us: what that one has would never be freed. Nor a second time in one process, for
    the same reason: what a first run left would stay.
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
    if status in (Status.COMPLETED, Status.PRUNED):
        return EXIT_COMPLETED
    return EXIT_INTERRUPTED if status is Status.INTERRUPTED else EXIT_RUN_FAILED


def print_error(error: QloraExpError) -> None:
    """Print an error to stderr as the person at the terminal should read it."""
    print(f"error: {redaction.redact_text(str(error))}", file=sys.stderr)
