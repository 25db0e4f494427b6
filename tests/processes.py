"""Commands that tests start, forked from a server that has imported what they need.

A command is ready within milliseconds where a new interpreter takes seconds. It has its own session, environment,
folder and standard streams. What a fork can't be — another interpreter, other variables, a function before its start —
gets a new interpreter, as :mod:`subprocess` does it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.orchestration.forking import Forked, ForkServer, can_fork
from qlora_exp.system import heap

COMMANDS = ("qlora_exp", "qlora_exp.cli", "qlora_exp.runs.job", "tests.program")
IMPORTED = (
    *(
        "qlora_exp.runs.pipeline",
        "qlora_exp.tracking.run",
        "qlora_exp.tracking",
        "qlora_exp.study",
        "qlora_exp.orchestration",
    ),
    *(
        "qlora_exp.orchestration.worker",
        "qlora_exp.orchestration.hydra_app",
        "qlora_exp.cli",
        "qlora_exp.runs.console",
        "hydra.main",
    ),
    *("optuna.storages", "optuna.samplers", "sqlalchemy.dialects.sqlite", "alembic.migration"),
)


SET_BY_IMPORTS = {
    *("DATASETS_VERBOSITY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"),
    *("HF_HUB_VERBOSITY", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "PYTHONWARNINGS", "TORCHINDUCTOR_CACHE_DIR"),
    *("HF_DATASETS_DISABLE_PROGRESS_BARS", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"),
    *("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"),
}
"""Variables that the product and its libraries set in this process as soon as a test imports them. A command sets them
itself."""


def with_tunables(environment: Mapping[str, str]) -> dict[str, str]:
    """A command that trains on a CPU begins again with these: here it has them from the start."""
    return {**heap.environment_for_training(), **environment}


def as_the_tests_began(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without what imports have set since; with it, every command would need a new interpreter."""
    return {
        name: value
        for name, value in environment.items()
        if name not in SET_BY_IMPORTS or name in ENVIRONMENT or value != os.environ.get(name)
    }


ENVIRONMENT = {name: value for name, value in with_tunables(os.environ).items() if name != "COLUMNS"}
"""As the tests begin, before one of them changes it; COLUMNS is pytest-xdist's."""


@functools.cache
def server() -> ForkServer:
    """One a process of the tests; it ends with that."""
    return ForkServer(ENVIRONMENT, IMPORTED, subprocess.DEVNULL)


class Popen(subprocess.Popen[Any]):
    """A :class:`subprocess.Popen` whose process is forked where it can be."""

    _forked: Forked | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, *others: Any) -> None:  # fmt: skip
        ends = others[:6]  # as subprocess has them: of standard input, output and error, each to read and to write
        if not (preexec_fn or pass_fds or shell):
            self._forked = _forked(args, ends, env, cwd)
        if self._forked is None:
            given = (args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell)
            super()._execute_child(*given, *others)  # type: ignore[misc]
            return
        self._child_created = True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]
        assert self._forked.pid is not None
        self.pid = self._forked.pid

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self._forked is None:
            return super()._internal_poll(*args, **kwargs)  # type: ignore[misc,no-any-return]
        self.returncode = self._forked.poll()
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._forked is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        code = self._forked.poll() if wait_flags else self._forked.wait()
        if code is None:
            return 0, 0
        return self.pid, code << 8 if code >= 0 else -code


def _forked(args: Any, ends: Sequence[int], env: Mapping[str, str] | None, cwd: Any) -> Forked | None:
    """``None``: this command, or one with these variables, needs a new interpreter."""
    if not can_fork() or isinstance(args, str) or list(args[:2]) != [sys.executable, "-m"] or args[2] not in COMMANDS:
        return None
    module, *arguments = [str(part) for part in args[2:]]
    stdin, stdout, stderr = (own if own != -1 else number for number, own in enumerate((ends[0], ends[3], ends[5])))
    environment = as_the_tests_began(with_tunables(os.environ if env is None else env))
    try:
        forked = server().start(module, arguments, (stdin, stdout, stderr), environment, str(cwd or "."))
        forked.has_begun()
    except OSError:
        return None
    return forked


def program(code: str, *arguments: object) -> list[str]:
    """The command that runs ``code`` as ``python -c`` does; it can be forked."""
    return [sys.executable, "-m", "tests.program", code, *map(str, arguments)]


def run(
    args: Sequence[Any],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As :func:`subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, error = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done
