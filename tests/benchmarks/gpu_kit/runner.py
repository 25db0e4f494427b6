"""Runs the stages one after the other: each in its own process, within its time, with a state that a later call
continues. Imports neither torch nor the product's training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TOKEN_VARIABLE = "QLORA_EXP_GPU_KIT"
"""In the environment of every process that a stage starts, directly or not: what is left of it is found by this."""
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CALL_AGAIN = 0, 1, 2, 75
LOG_TAIL_CHARACTERS = 2000
LEFT_SECONDS = 5.0
"""Time for a stage's processes to end after it."""
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Stage:
    """``box_seconds``: the most it may take."""

    name: str
    box_seconds: float


class Findings:
    """What a stage finds. The file is written after each finding, so that a stage that is killed keeps what it had."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.checks: list[dict[str, Any]] = []
        self.numbers: list[dict[str, Any]] = []

    def check(self, name: str, ok: bool, got: Any, wanted: Any) -> None:
        self.checks.append({"name": name, "ok": bool(ok), "got": str(got)[:500], "wanted": str(wanted)})
        self._write()

    def not_checked(self, name: str, wanted: Any) -> None:
        """For a check that needs a GPU, in a rehearsal."""
        self.checks.append({"name": name, "ok": None, "got": "not checked here", "wanted": str(wanted)})
        self._write()

    def row(self, table: str, **numbers: Any) -> None:
        self.numbers.append({"table": table, **numbers})
        self._write()

    def _write(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"checks": self.checks, "numbers": self.numbers}), encoding="utf-8")
        part.replace(self.file)


@dataclass(frozen=True)
class Call:
    """One call of the kit. ``command_of``: the command of a stage, which writes ``<out>/<stage>.json``.

    ``call_seconds``: how long this call may take; ``None``: as long as needed. ``again``: repeat stages that failed,
    once. ``version``: of the code; a stage's result for another version is not used.
    """

    stages: Sequence[Stage]
    command_of: Callable[[str], Sequence[str]]
    out: Path
    version: str
    resume: Path | None = None
    call_seconds: float | None = None
    again: bool = False
    rehearsal: bool = False
    at_once: int = 1
    """Stages side by side; on a GPU one, so that nothing else is measured."""
    environment: Mapping[str, str] | None = None
    about: Mapping[str, Any] | None = None
    """Stored in the state, e.g. the commit."""


def run(call: Call) -> int:
    """Run the stages that have no result yet, and return the exit code: 0 all checks passed, 1 one failed, 75 time is
    over and the same command continues, 2 a stage can never start."""
    began = time.monotonic()
    call.out.mkdir(parents=True, exist_ok=True)
    try:
        state = read_state(call.resume, call.version, call.rehearsal)
    except (ValueError, KeyError, AttributeError) as error:
        print(f"error: {call.resume} is no state of this kit ({error}): pass another file, or delete it")
        return EXIT_USAGE
    state |= {"version": call.version, "rehearsal": call.rehearsal, **(call.about or {})}
    results: dict[str, Any] = state["stages"]
    chosen = [stage for stage in call.stages if not _is_done(results.get(stage.name), call.again)]
    for stage in chosen:
        if call.call_seconds is not None and stage.box_seconds > call.call_seconds:
            print(f"error: stage {stage.name} may take {stage.box_seconds:.0f} s: --call-seconds must be at least that")
            return EXIT_USAGE
    _write_state(call.out, state)  # a stage may read earlier ones' numbers there
    waiting: list[str] = []
    writing = threading.Lock()

    def run_in_time(stage: Stage) -> None:
        late = call.call_seconds is not None and time.monotonic() - began + stage.box_seconds > call.call_seconds
        if late and stage is not chosen[0]:  # the first one always starts, or no call would get further
            waiting.append(stage.name)
            return
        result = run_stage(call, stage) | {"repeated": stage.name in results}
        with writing:
            results[stage.name] = result
            _write_state(call.out, state)
            print(stage_line(stage.name, result), flush=True)

    if call.at_once == 1:  # in this thread, so that Ctrl-C ends the stage
        for stage in chosen:
            run_in_time(stage)
    else:
        with ThreadPoolExecutor(call.at_once) as pool:
            list(pool.map(run_in_time, chosen))
    _write_state(call.out, state)
    text = summary(state, waiting)
    (call.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    if waiting:
        return EXIT_CALL_AGAIN
    wanted = [results[stage.name]["status"] for stage in call.stages]
    return EXIT_OK if set(wanted) <= {"ok"} else EXIT_FAILED


def read_state(file: Path | None, version: str, rehearsal: bool) -> dict[str, Any]:
    """Return the state in ``file``, without stages that ran other code, or with mocks where this call has none."""
    if file is None or not file.is_file():
        return {"stages": {}}
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if state.get("rehearsal", False) != rehearsal:
        return {"stages": {}}
    state["stages"] = {name: one for name, one in state["stages"].items() if one.get("version") == version}
    return state


def _is_done(result: Mapping[str, Any] | None, again: bool) -> bool:
    if result is None:
        return False
    return result["status"] == "ok" or not again or bool(result.get("repeated"))


def run_stage(call: Call, stage: Stage) -> dict[str, Any]:
    """Run one stage in its own session; a crash, an exit or a hang costs its time and nothing else.

    A process of it that is left afterwards is a failed check, and is killed.
    """
    result, log = call.out / f"{stage.name}.json", call.out / f"{stage.name}.log"
    result.unlink(missing_ok=True)
    token = uuid.uuid4().hex
    environment = {**(os.environ if call.environment is None else call.environment), TOKEN_VARIABLE: token}
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(call.command_of(stage.name)),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(stage.box_seconds)
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            _kill_session(process)
            processes_of(token, kill=True)
            raise
        if code is None:
            _kill_session(process)
    seconds = round(time.monotonic() - began, 1)
    left = [] if code is None else _left_processes(token)
    processes_of(token, kill=True)
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {"checks": [], "numbers": []}
    if left:
        found["checks"].append({"name": "no process is left", "ok": False, "got": str(left), "wanted": "none"})
    bad = any(check["ok"] is False for check in found["checks"])
    status = "timeout" if code is None else "failed" if code or bad or not result.is_file() else "ok"
    tail = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
    return {
        "status": status,
        "seconds": seconds,
        "exit_code": code,
        "version": call.version,
        **found,
        "log_tail": tail if status != "ok" else "",
    }


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _left_processes(token: str) -> list[str]:
    until = time.monotonic() + LEFT_SECONDS
    while (left := processes_of(token)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def processes_of(token: str, kill: bool = False) -> list[str]:
    """Return the living processes that have ``token`` in their environment, as ``pid command``, and perhaps kill them.

    The environment is inherited, also by processes with sessions of their own.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TOKEN_VARIABLE) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200].strip()}")
                if kill:
                    process.kill()
    return found


def source_version(folders: Sequence[str] = ("qlora_exp", "conf", "sweeps", "tests/benchmarks/gpu_kit")) -> str:
    """Return a digest of the code that the stages run: a result belongs to it, also where there is no git."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml") and "__pycache__" not in file.parts:
                digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _write_state(out: Path, state: Mapping[str, Any]) -> None:
    part = out / "state.json.part"
    part.write_text(json.dumps(state, indent=1), encoding="utf-8")
    part.replace(out / "state.json")


def stage_line(name: str, result: Mapping[str, Any]) -> str:
    checks = result["checks"]
    done = [check for check in checks if check["ok"] is not None]
    passed, others = sum(check["ok"] for check in done), len(checks) - len(done)
    unchecked = f", {others} not checked here" if others else ""
    return f"{result['status']:8}{name:16}{result['seconds']:7.1f} s  {passed} of {len(done)} checks{unchecked}"


def summary(state: Mapping[str, Any], waiting: Sequence[str]) -> str:
    """Return the tables of all numbers, the stages, and last the failed checks and what to do."""
    results: Mapping[str, Any] = state["stages"]
    lines = ["REHEARSAL: no GPU was used, no number below is a measurement of one", ""] if state["rehearsal"] else []
    for name, result in results.items():
        for row in result["numbers"]:
            shown = (f"{key}={_short(value)}" for key, value in row.items() if key not in ("table", "config"))
            lines.append(f"{name}: {row['table']}: {'  '.join(shown)}")
    lines += ["", *(stage_line(name, result) for name, result in results.items())]
    checks = [check for result in results.values() for check in result["checks"] if check["ok"] is not None]
    for name, result in results.items():
        for check in result["checks"]:
            if check["ok"] is False:
                lines.append(f"FAILED  {name}: {check['name']}: got {check['got']}, wanted {check['wanted']}")
        if result["status"] == "timeout":
            lines.append(f"TIMEOUT {name}: killed after {result['seconds']:.0f} s; end of its log:")
        elif result["status"] == "failed" and result["exit_code"]:
            lines.append(f"CRASHED {name}: exit code {result['exit_code']}; end of its log:")
        if result["status"] == "timeout" or result.get("exit_code"):
            lines += [f"        {line}" for line in result["log_tail"].splitlines()[-8:]]
    passed = f"{sum(check['ok'] for check in checks)} of {len(checks)} checks"
    lines.append(f"CONTINUE: {passed}; call again for {', '.join(waiting)}" if waiting else f"DONE: {passed}")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
