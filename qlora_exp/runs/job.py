"""The process of one run of a multirun: reads the resolved configuration from standard input (YAML)."""

from __future__ import annotations

import ctypes
import signal
import sys

import yaml

from qlora_exp.errors import QloraExpError
from qlora_exp.runs.entry_points import config_from_plain, run_with_progress
from qlora_exp.runs.process import EXIT_INTERRUPTED, EXIT_WRONG_INPUT, print_error
from qlora_exp.system import signals, streams
from qlora_exp.system.distributed import check_single_rank
from qlora_exp.system.streams import show_any_text

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Let the kernel send TERM when the parent ends: the run saves its state and frees the GPU. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    die_with_parent()
    streams.ignore_write_errors()
    show_any_text()
    try:
        with signals.signals_as_interrupts():
            check_single_rank()
            return run_with_progress(
                config_from_plain(yaml.safe_load(sys.stdin.buffer.read().decode("utf-8"))), single=False
            )
    except QloraExpError as error:
        print_error(error)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
