"""Calls of the command line: in this process for what is quick, in another for what trains."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.contracts.golden_files import ROOT

CARD_RATES = '{"cuda, NVIDIA GeForce RTX 4090": {"fp32": 4e13, "bf16": 9e13, "fp16": 9e13, "int8": 3e13, "nf4": 7e13}}'
"""What ``qlora-exp calibrate`` would have kept in a user's cache, so that plans for this card have seconds."""


@dataclass(frozen=True)
class Called:
    """Exit code, standard output and standard error of a call."""

    code: int
    out: str
    err: str


def console_script() -> importlib.metadata.EntryPoint:
    """``qlora-exp`` as pyproject.toml declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return importlib.metadata.EntryPoint("qlora-exp", project["scripts"]["qlora-exp"], "console_scripts")


def call(*arguments: str) -> Called:
    """``qlora-exp ARGUMENTS`` in this process."""
    main = console_script().load()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as exited:
            code = exited.code if isinstance(exited.code, int) else int(exited.code is not None)
    return Called(code, out.getvalue(), err.getvalue())


def command_line(*arguments: str) -> list[str]:
    """``qlora-exp ARGUMENTS`` as a command of this interpreter and this checkout."""
    script = console_script()
    code = f"import sys, {script.module} as m; sys.argv[0] = 'qlora-exp'; sys.exit(m.{script.attr}())"
    return [sys.executable, "-c", code, *arguments]


def start(folder: Path, *arguments: str, program: Sequence[str] | None = None) -> Called:
    """``qlora-exp ARGUMENTS``, or another Python program, in a process of its own, called in ``folder``."""
    command = command_line(*arguments) if program is None else [sys.executable, *program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    return Called(done.returncode, done.stdout, done.stderr)


def environment(folder: Path) -> dict[str, str]:
    """The caller's environment with this checkout first, one thread, no colours and a cache of its own."""
    paths = [str(ROOT), str(ROOT / "qlora_exp" / "plugins"), os.environ.get("PYTHONPATH", "")]
    return {
        **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "QLORA_EXP_STORAGE")},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **cache(folder),
    }


def cache(folder: Path) -> dict[str, str]:
    """A user's cache in which one card was calibrated: the variables that name it."""
    home = folder / "cache"
    (home / "qlora-exp").mkdir(parents=True, exist_ok=True)
    (home / "qlora-exp" / "rates-2.json").write_text(CARD_RATES, encoding="utf-8")
    return {
        "XDG_CACHE_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }


@contextlib.contextmanager
def called_in(folder: Path) -> Iterator[Path]:
    """Calls of :func:`call` happen in ``folder``, with a cache of its own and 300 columns."""
    variables: Mapping[str, str] = {**cache(folder), "COLUMNS": "300"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with contextlib.chdir(folder):
            yield folder
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
