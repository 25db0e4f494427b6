"""The Hydra application: ``python -m qlora_exp [-m] key=value …``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.compose import (
    as_checked_config,
    check_hydra,
    check_multirun,
    compose_raw,
    compose_run,
    with_alpha_policy,
    with_one_length,
)
from qlora_exp.config.interpolations import unresolved_error, unresolved_texts
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.overrides import (
    SEARCH_PATH,
    first_choice,
    is_swept,
    search_folders,
    search_path,
    with_target_modules,
    without_globs,
)
from qlora_exp.config.schema import Config, register, to_plain
from qlora_exp.errors import ConfigError, QloraExpError, raise_all
from qlora_exp.paths import CONF
from qlora_exp.runs.entry_points import complete_killed_record, run_with_progress
from qlora_exp.runs.process import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    ExitCode,
    print_error,
)
from qlora_exp.system import heap, memory_limits, signals, streams
from qlora_exp.system.distributed import check_single_rank
from qlora_exp.system.streams import check_arguments, show_any_text

BASIC_SWEEPER = "hydra/sweeper=basic"
"""Hydra's own sweeper: one process per run, no study."""

REJECTED_FLAGS = {
    "config_name": "key=value changes a setting; qlora-exp run --from FILE.yaml takes many",
    "config_path": "key=value changes a setting; qlora-exp run --from FILE.yaml takes many",
    "config_dir": "key=value changes a setting; qlora-exp run --from FILE.yaml takes many",
    "experimental_rerun": "qlora-exp rerun RUN",
}
"""Hydra's flags that would read another configuration than conf/ (the last one a pickle), and what to use instead."""

_codes: list[int] = []
"""Exit codes of the jobs that ran in this process: Hydra discards what its jobs return."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the Hydra application. Exit codes: 0, 1 a run failed, 2 wrong input, 130 interrupted."""
    show_any_text()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_arguments(given)
    except QloraExpError as error:
        print_error(error)
        return EXIT_WRONG_INPUT
    flags = get_args_parser().parse_args(given)  # as Hydra itself does; it ends with 2 for a flag that doesn't exist
    only_shows = any((flags.help, flags.hydra_help, flags.info, flags.cfg, flags.shell_completion))
    _codes.clear()
    if only_shows:
        return _main(given, flags, only_shows)
    streams.ignore_write_errors()
    try:
        with signals.signals_as_interrupts():
            return _main(given, flags, only_shows)
    except KeyboardInterrupt:  # a second one, while the first one was handled
        return EXIT_INTERRUPTED


def _main(arguments: list[str], flags: argparse.Namespace, only_shows: bool) -> int:
    try:
        if not only_shows:
            check_single_rank()
        if not flags.multirun:
            arguments, flags.overrides = with_target_modules(arguments), with_target_modules(flags.overrides)
        _check_flags(flags)
        if only_shows:
            _check_displayed_config(flags)
        else:
            _check(flags.overrides, flags.multirun)
        if BASIC_SWEEPER in flags.overrides:
            arguments = without_globs(arguments, flags.overrides)
        register()
        sys.argv = ["qlora_exp", *_with_search_path(arguments)]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run_job)()
    except QloraExpError as error:
        print_error(error)
        return EXIT_WRONG_INPUT
    except ExitCode as ended:
        return ended.code
    except KeyboardInterrupt:
        print("interrupted; run the same command again" if only_shows else "interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # ``… --help | head``, as in the qlora-exp commands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return max(_codes, default=EXIT_COMPLETED)


def _check_flags(flags: argparse.Namespace) -> None:
    for name, hint in REJECTED_FLAGS.items():
        value = getattr(flags, name)
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            what = f"{flag} can't be used: a run's settings come from the conf/ of qlora-exp"
            raise ConfigError(what, f"{flag} {value}", hint)


def _check_displayed_config(flags: argparse.Namespace) -> None:
    """Check that ``--cfg`` and ``--info`` have one configuration with valid overrides to show."""
    flag = f"--cfg {flags.cfg}" if flags.cfg else f"--info {flags.info}"
    if not (flags.cfg or flags.info):
        return
    raise_all(problems_of(flags.overrides, multirun=flags.multirun))
    if flags.multirun:
        first = [first_choice(text) for text in flags.overrides]
        raise ConfigError(
            f"{flag} shows one configuration, and -m asks for several",
            " ".join([flag, "-m", *flags.overrides]),
            f"python -m qlora_exp {flag} {shlex.join(first)}, or for all: qlora-exp plan {shlex.join(flags.overrides)}",
        )
    if flags.resolve:
        try:
            OmegaConf.resolve(compose_raw(flags.overrides))
        except OmegaConfBaseException as error:
            raise unresolved_error(error, str(getattr(error, "full_key", None) or "the configuration")) from None


def _check(overrides: Sequence[str], multirun: bool) -> None:
    """Check everything before Hydra starts. The sweep itself checks the points of a study."""
    if not multirun:
        compose_run(overrides)
    elif BASIC_SWEEPER in overrides:
        check_multirun(overrides)
        check_hydra(overrides)
    else:
        raise_all(problems_of(overrides, multirun=True))
        check_hydra(overrides)
        compose_raw([text for text in overrides if not is_swept(text)])


def _with_search_path(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` with the folders that hold sweeps/, next to the other overrides: argparse needs those in one
    block."""
    own = [text for text in arguments if text.startswith(f"{SEARCH_PATH}=")]
    rest = [text for text in arguments if text not in own]
    position = next((i for i, text in enumerate(rest) if "=" in text and not text.startswith("-")), len(rest))
    return [*rest[:position], search_path(search_folders(own)), *rest[position:]]


def run_job(raw: Any) -> Any:
    """Hydra's task function: a study's worker, a run, or a run of a multirun.

    It is a module-level function, so that any launcher can pickle it. In a multirun each run has its own process: its
    memory figures are its own, and an out-of-memory kill ends one run, not all. An interruption or wrong input ends the
    multirun.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if raw.workers.job is not None:
        from qlora_exp.orchestration.sweep import work

        return work(raw, unresolved_texts(HydraConfig.get().overrides, "task"))
    multirun = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        OmegaConf.resolve(with_alpha_policy(raw))
        config = as_checked_config(with_one_length(raw, HydraConfig.get().overrides.task))
        code = _run_in_subprocess(config) if multirun else run_with_progress(config)
    except QloraExpError as error:
        print_error(error)
        raise ExitCode(EXIT_WRONG_INPUT) from None
    if multirun and code in (EXIT_INTERRUPTED, EXIT_WRONG_INPUT):
        raise ExitCode(code)
    _codes.append(code)
    return code


def _run_in_subprocess(config: Config) -> int:
    text = yaml.safe_dump(to_plain(config), allow_unicode=True)
    stop_signals: list[int] = []
    child: subprocess.Popen[str] | None = None

    def pass_on(number: int, frame: object) -> None:
        """Pass the signal on: the child saves and says how to resume, this process only waits. Ctrl-C reaches the child
        anyway."""
        if signals.meaning_of(number) is not signals.Meaning.SAME:
            stop_signals.append(number)
            if child is not None and number != signal.SIGINT:
                child.send_signal(signal.SIGTERM)

    with signals.handle_signals(pass_on):
        environment = heap.environment_for_training() if heap.on_cpu(config.training.device.value) else {}
        command, environment = [sys.executable, "-m", "qlora_exp.runs.job"], {**os.environ, **environment}
        kills = memory_limits.out_of_memory_kills()
        child = subprocess.Popen(command, stdin=subprocess.PIPE, encoding="utf-8", env=environment)
        if any(number != signal.SIGINT for number in stop_signals):
            child.send_signal(signal.SIGTERM)
        child.communicate(text)
    if child.returncode >= 0:
        return child.returncode
    if stop_signals:  # the child was killed before it handled the signal
        return EXIT_INTERRUPTED
    complete_killed_record(config, child.pid, -child.returncode, kills)
    return EXIT_RUN_FAILED
