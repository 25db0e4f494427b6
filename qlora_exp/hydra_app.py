"""The Hydra door: ``python -m qlora_exp [-m] key=value …``."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser

from qlora_exp import compose
from qlora_exp.app import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    end_killed_run,
    run_and_tell,
    tell,
)
from qlora_exp.config import Config, register, to_plain
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.paths import CONF


def main(arguments: Sequence[str] | None = None) -> int:
    """The Hydra door. Exit codes: 0, 1 a run failed, 2 wrong input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = get_args_parser().parse_args(given)  # as Hydra itself does; it ends with 2 for a flag that doesn't exist
    multirun = flags.multirun
    asks = any((flags.help, flags.hydra_help, flags.info, flags.cfg, flags.shell_completion))
    codes: list[int] = []
    try:
        _check_flags(flags)
        if not asks:
            (compose.check_multirun if multirun else compose.compose)(flags.overrides)
        given = compose.without_globs(given, flags.overrides)
        _hydra(given, lambda config: codes.append(_one_job(config, multirun)))
    except QloraExpError as error:
        tell(error)
        return EXIT_WRONG_INPUT
    except _Stop as stop:
        return stop.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return max(codes, default=EXIT_COMPLETED)


NOT_OURS = {
    "config_name": "key=value changes a setting; qlora-exp run --from FILE.yaml takes many",
    "config_path": "key=value changes a setting; qlora-exp run --from FILE.yaml takes many",
    "config_dir": "key=value changes a setting; qlora-exp run --from FILE.yaml takes many",
    "experimental_rerun": "qlora-exp rerun RUN",
}
"""Hydra's flags that would read another configuration in the place of ours (the last one a pickle), and what to do."""


def _check_flags(flags: argparse.Namespace) -> None:
    for name, hint in NOT_OURS.items():
        value = getattr(flags, name)
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            what = f"{flag} can't be used: a run's settings come from the conf/ of qlora-exp"
            raise ConfigError(what, f"{flag} {value}", hint)


class _Stop(KeyboardInterrupt):
    """Leaves Hydra (which turns an ordinary exception into a trace and exit code 1) with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def _hydra(arguments: Sequence[str], job: Any) -> None:
    import hydra

    register()
    sys.argv = ["qlora_exp", *arguments]

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def application(config: Any) -> None:
        job(config)

    application()


def _one_job(raw: Any, multirun: bool) -> int:
    """One Hydra job's exit code. In a multirun each job has a process of its own: its memory figures are then its own,
    and an out-of-memory kill ends one run, not all of them. An interruption or wrong input ends the multirun."""
    try:
        config = compose.checked(_without_hydra(raw))
        if not multirun:
            return run_and_tell(config)
    except QloraExpError as error:
        tell(error)
        raise _Stop(EXIT_WRONG_INPUT) from None
    code = _in_own_process(config)
    if code in (EXIT_INTERRUPTED, EXIT_WRONG_INPUT):
        raise _Stop(code)
    return code


def _without_hydra(raw: Any) -> Any:
    from omegaconf import OmegaConf, open_dict

    with open_dict(raw):
        if "hydra" in raw:
            del raw["hydra"]
    OmegaConf.resolve(raw)
    return raw


def _in_own_process(config: Config) -> int:
    text = yaml.safe_dump(to_plain(config), allow_unicode=True)
    # Ctrl-C reaches the child too, which saves and says how to resume; this process only waits for it.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        child = subprocess.Popen([sys.executable, "-m", "qlora_exp.job"], stdin=subprocess.PIPE, text=True)
        child.communicate(text)
    finally:
        signal.signal(signal.SIGINT, previous)
    if child.returncode >= 0:
        return child.returncode
    end_killed_run(config, child.pid, -child.returncode)
    return EXIT_RUN_FAILED
