"""The kit for GPU machines (tests/benchmarks/gpu_acceptance.py): it goes on after anything that a stage does, and says
so. What its stages check is rehearsed by `make gpu-rehearsal`."""

from __future__ import annotations

import importlib
import json
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_exp.system import gpus

Kept = pytest.MonkeyPatch
BENCHMARKS = Path(__file__).parent / "benchmarks"
HANGS_SECONDS, BOX_SECONDS = 4.0, 60.0
STAGES = {
    "fine": "findings.check('all', True, 1, 1); findings.not_checked('speed', 'a GPU'); findings.row('t', size=2.0)",
    "wrong": "findings.check('a sum', 1 + 1 == 3, 2, 3)",
    "crashing": "findings.check('before', True, 1, 1); import os; print('last words', flush=True); os._exit(3)",
    "hanging": "findings.check('before', True, 1, 1); print('waits', flush=True); child(); time.sleep(600)",
    "leaving": "findings.check('all', True, 1, 1); child()",
    "silent": "",
}
PREAMBLE = """
import pathlib, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from gpu_kit.runner import Findings
out, name = pathlib.Path(sys.argv[2]), sys.argv[3]
findings = Findings(out / f"{name}.json")
with (out / "started").open("a") as stream:
    stream.write(name + "\\n")

def child():
    "A process with its own session, which outlives this one."
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    with (out / "children").open("a") as stream:
        stream.write(f"{process.pid}\\n")

"""


@pytest.fixture(scope="module")
def kit() -> Iterator[Any]:
    """The script as a module; ``kit.runner`` and ``kit.packing`` are its parts."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        module = importlib.import_module("gpu_acceptance")
        vars(module)["runner"] = importlib.import_module("gpu_kit.runner")
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def call(kit: Any, out: Path, *names: str, **changes: Any) -> Any:
    boxes = {"hanging": HANGS_SECONDS}
    settings = {
        "stages": [kit.runner.Stage(name, boxes.get(name, BOX_SECONDS)) for name in names],
        "command_of": lambda name: [sys.executable, "-c", PREAMBLE + STAGES[name], str(BENCHMARKS), str(out), name],
        "out": out,
        "version": "1",
        "resume": out / "state.json",
    }
    return kit.runner.Call(**{**settings, **changes})


def results(out: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((out / "state.json").read_text())["stages"]
    return stages


def started(out: Path) -> list[str]:
    return (out / "started").read_text().split()


def test_whatever_a_stage_does_the_others_run_and_the_end_says_what_failed(
    kit: Any, tmp_path: Path, monkeypatch: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kit.runner, "LEFT_SECONDS", 0.2)
    names = ("hanging", "crashing", "leaving", "wrong", "silent", "fine")
    assert kit.runner.run(call(kit, tmp_path, *names)) == 1
    found = results(tmp_path)
    statuses = {name: found[name]["status"] for name in names}
    assert statuses == dict.fromkeys(names, "failed") | {"hanging": "timeout", "fine": "ok"}
    for name in ("hanging", "crashing"):
        assert [check["name"] for check in found[name]["checks"]] == ["before"], "what it found until then is kept"
    assert found["crashing"]["exit_code"] == 3
    assert "last words" in found["crashing"]["log_tail"]
    assert "waits" in found["hanging"]["log_tail"]
    assert [check["name"] for check in found["leaving"]["checks"] if not check["ok"]] == ["no process is left"]
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    assert not [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    printed = capsys.readouterr().out
    assert "FAILED  wrong: a sum: got 2, wanted 3" in printed
    assert "CRASHED crashing: exit code 3" in printed
    assert "TIMEOUT hanging" in printed
    assert printed.splitlines()[-1] == "DONE: 4 of 6 checks"


def test_a_call_without_failures_ends_with_0_and_counts_what_was_not_checked(
    kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kit.runner.run(call(kit, tmp_path, "fine")) == 0
    assert "1 of 1 checks, 1 not checked here" in capsys.readouterr().out


def test_the_next_call_continues_where_time_was_over(kit: Any, tmp_path: Path) -> None:
    """The state is all that it needs: on some machines nothing else is kept."""
    calls = [call(kit, tmp_path, "wrong", "fine", call_seconds=BOX_SECONDS) for _ in range(2)]
    assert kit.runner.run(calls[0]) == 75
    assert started(tmp_path) == ["wrong"]
    assert kit.runner.run(calls[1]) == 1, "the first call's failure isn't forgotten"
    assert started(tmp_path) == ["wrong", "fine"]
    assert kit.runner.run(call(kit, tmp_path, "wrong", "fine", again=True)) == 1
    assert kit.runner.run(call(kit, tmp_path, "wrong", "fine", again=True)) == 1
    assert started(tmp_path) == ["wrong", "fine", "wrong"], "what failed is repeated once"


def test_a_result_of_other_code_or_of_a_rehearsal_is_not_used(kit: Any, tmp_path: Path) -> None:
    for changes in ({"rehearsal": True}, {}, {"version": "2"}, {"version": "2"}):
        assert kit.runner.run(call(kit, tmp_path, "fine", **changes)) == 0
    assert started(tmp_path) == ["fine"] * 3


def test_a_damaged_state_is_named(kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_text('{"stages": ')
    assert kit.runner.run(call(kit, tmp_path, "fine")) == 2
    assert f"{tmp_path / 'state.json'} is no state" in capsys.readouterr().out


def test_a_stage_that_never_fits_is_refused(kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.runner.run(call(kit, tmp_path, "fine", call_seconds=BOX_SECONDS / 2)) == 2
    assert "--call-seconds must be at least" in capsys.readouterr().out


def test_without_a_gpu_the_call_is_refused(
    kit: Any, tmp_path: Path, monkeypatch: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "cards", tuple)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert kit.main(["--out", str(tmp_path / "out")]) == 2
    assert "make gpu-rehearsal" in capsys.readouterr().out
    assert kit.main(["--rehearse", "--only", "preflight,cell"]) == 2
    assert "no stage cell: choose from preflight" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_every_stage_is_a_function_and_fits_into_a_call_of_ten_minutes(kit: Any) -> None:
    assert len({stage.name for stage in kit.STAGES}) == len(kit.STAGES)
    minutes = round(sum(stage.box_seconds for stage in kit.STAGES) / 60)
    assert f"add up to {minutes} minutes" in (BENCHMARKS.parents[1] / "CONTRIBUTING.md").read_text().replace("\n", " ")
    for stage in kit.STAGES:
        assert callable(getattr(importlib.import_module(f"gpu_kit.{stage.module}"), stage.function))
        assert stage.box_seconds <= 540


def fake_download(folder: Path, pinned: list[str], python: str) -> None:
    """Wheels of 0.1 MB; bitsandbytes has 1 MB more, almost all in a library that isn't sent."""
    for requirement in pinned:
        name = requirement.partition("==")[0]
        library, size = ("libbitsandbytes_cuda118.so", 1_100_000) if name == "bitsandbytes" else ("data", 100_000)
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/{library}", random.Random(name).randbytes(size))
            wheel.writestr(f"{name}/libbitsandbytes_cuda130.so", b"kept")
            record = f"{name}/{library},,\n{name}/libbitsandbytes_cuda130.so,,\n"
            wheel.writestr(f"{name}-1.dist-info/RECORD", record)


def test_wheels_that_are_too_large_are_refused(
    kit: Any, tmp_path: Path, monkeypatch: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 wheels have 2.4 MB, with the library 3.5."""
    monkeypatch.setattr(kit.packing, "repository_bytes", lambda: 30 * 2**20)
    monkeypatch.setattr(kit.packing, "download", fake_download)
    pack = ["--sets", "A", "--limit-mib"]
    assert kit.main(["--pack", str(tmp_path / "small"), *pack, "32.5"]) == 0
    assert kit.main(["--pack", str(tmp_path / "large"), *pack, "32"]) == 1
    assert "MiB too much" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "small" / "bitsandbytes-1-py3-none-any.whl") as wheel:
        libraries = [name for name in wheel.namelist() if name.endswith(".so")]
        assert libraries == ["bitsandbytes/libbitsandbytes_cuda130.so"]
        assert b"cuda118" not in wheel.read("bitsandbytes-1.dist-info/RECORD")
    assert kit.main(["--pack", str(tmp_path), "--sets", "AX"]) == 2
    assert "no set X" in capsys.readouterr().out


CELL = {
    "table": "cells",
    "cell": "nf4 r=16",
    "config": {"mode": "nf4", "r": 16, "rows": 4},
    "predicted_peak_bytes": 10_000_000_000,
    "measured_peak_bytes": 11_000_000_000,
    "measured_over_predicted": 1.1,
    "measured_reserved_bytes": 12_100_000_000,
    "context_bytes": 700 * 2**20,
    "tokens_per_second": 9000.0,
}


@pytest.mark.parametrize("rehearsal", [False, True])
def test_a_state_becomes_a_page_a_table_and_constants(
    rehearsal: bool, kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [{"name": "a ratio", "ok": False, "got": "1.1", "wanted": "0.95 to 1.05"}]
    share = {"table": "calibrated share", "low": 0.4, "middle": 0.5, "high": 0.6, "cells": 7}
    card = {"table": "card", "name": "NVIDIA A100"}
    stage = {"status": "failed", "seconds": 3.0, "checks": checks, "numbers": [card, CELL, share]}
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"rehearsal": rehearsal, "stages": {"cells": stage}}))
    docs = tmp_path / "docs"
    assert kit.main(["--collect", str(state), "--docs", str(docs)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "CUDA_CONTEXT_BYTES = 700 * 2**20",
        "CUDA_FRAGMENTS = 0.100",
        'RELATIVE_ERROR["cuda"] = 0.10',
        "(0.40, 0.50, 0.60)",
    ):
        assert line in printed
    page = (docs / "gpu.md").read_text()
    assert ("REHEARSAL" in page) == rehearsal
    assert "NVIDIA A100" in page
    assert "| cells | a ratio | 1.1 | 0.95 to 1.05 |" in page
    header, row = (docs / "predicted_memory_cuda.csv").read_text().splitlines()
    assert header.startswith("mode,r,rows,predicted_peak_bytes,measured_peak_bytes,measured_over_predicted")
    assert row.startswith("nf4,16,4,10000000000,11000000000,1.1")


def test_a_rehearsal_never_becomes_documentation(kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"rehearsal": True, "stages": {"cells": {"numbers": [CELL]}}}))
    assert kit.main(["--collect", str(state)]) == 2
    assert "rehearsal" in capsys.readouterr().out
    state.write_text("{}")
    assert kit.main(["--collect", str(state)]) == 2
