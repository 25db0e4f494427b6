"""The Hydra door: ``python -m qlora_exp [-m] key=value …``."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser

from qlora_exp import compose, heap, memory_limits
from qlora_exp.app import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    Ended,
    end_killed_run,
    run_and_tell,
    tell,
)
from qlora_exp.config import Config, register, to_plain
from qlora_exp.errors import ConfigError, QloraExpError, raise_all
from qlora_exp.paths import CONF
from qlora_exp.ranks import one_rank_only


def main(arguments: Sequence[str] | None = None) -> int:
    """The Hydra door. Exit codes: 0, 1 a run failed, 2 wrong input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = get_args_parser().parse_args(given)  # as Hydra itself does; it ends with 2 for a flag that doesn't exist
    multirun = flags.multirun
    asks = any((flags.help, flags.hydra_help, flags.info, flags.cfg, flags.shell_completion))
    _codes.clear()
    try:
        if not asks:
            one_rank_only()
        _check_flags(flags)
        if not asks:
            _check(flags.overrides, multirun)
        if BASIC in flags.overrides:
            given = compose.without_globs(given, flags.overrides)
        _hydra(_with_search_path(given))
    except QloraExpError as error:
        tell(error)
        return EXIT_WRONG_INPUT
    except Ended as ended:
        return ended.code
    except KeyboardInterrupt:
        print("interrupted; the same command begins again where it can" if asks else "interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # ``… --help | head``, as in the verbs
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return max(_codes, default=EXIT_COMPLETED)


BASIC = "hydra/sweeper=basic"
"""Hydra's own sweeper: a process per run, no study."""

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


_codes: list[int] = []
"""Exit codes of the jobs that ran in this process: Hydra drops what its jobs return."""


def _check(overrides: Sequence[str], multirun: bool) -> None:
    """Everything that can be wrong, before Hydra starts. The points of a study are checked by the sweep itself."""
    if not multirun:
        compose.compose(overrides)
    elif BASIC in overrides:
        compose.check_multirun(overrides)
        compose.check_hydra(overrides)
    else:
        raise_all(compose.problems_of(overrides, multirun=True))
        compose.check_hydra(overrides)
        compose.compose_raw([text for text in overrides if not compose.is_swept(text)])


def _with_search_path(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the folders that hold sweeps/, among the overrides: argparse wants them in one row."""
    given = [text for text in arguments if text.startswith(f"{compose.SEARCH_PATH}=")]
    others = [text for text in arguments if text not in given]
    place = next((i for i, text in enumerate(others) if "=" in text and not text.startswith("-")), len(others))
    return [*others[:place], compose.search_path(compose.search_folders(given)), *others[place:]]


def _hydra(arguments: Sequence[str]) -> None:
    import hydra

    register()
    sys.argv = ["qlora_exp", *arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(one_job)()


def one_job(raw: Any) -> Any:
    """Hydra's task function: a study's worker, a run, or a run of a multirun. In a function of the module's own, so
    that any launcher can carry it to another process.

    In a multirun each run has a process of its own: its memory figures are then its own, and an out-of-memory kill ends
    one run, not all of them. An interruption or wrong input ends the multirun.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    if raw.workers.job is not None:
        from qlora_exp.sweep import work

        return work(raw, list(HydraConfig.get().overrides.task))
    multirun = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        OmegaConf.resolve(raw)
        config = compose.checked(raw)
        code = _in_own_process(config) if multirun else run_and_tell(config)
    except QloraExpError as error:
        tell(error)
        raise Ended(EXIT_WRONG_INPUT) from None
    if multirun and code in (EXIT_INTERRUPTED, EXIT_WRONG_INPUT):
        raise Ended(code)
    _codes.append(code)
    return code


def _in_own_process(config: Config) -> int:
    text = yaml.safe_dump(to_plain(config), allow_unicode=True)
    # Ctrl-C reaches the child too, which saves and says how to resume; this process only waits for it.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        environment = heap.environment() if heap.on_cpu(config.training.device.value) else {}
        command, environment = [sys.executable, "-m", "qlora_exp.job"], {**os.environ, **environment}
        kills = memory_limits.kills()
        child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
        child.communicate(text)
    finally:
        signal.signal(signal.SIGINT, previous)
    if child.returncode >= 0:
        return child.returncode
    end_killed_run(config, child.pid, -child.returncode, kills)
    return EXIT_RUN_FAILED
