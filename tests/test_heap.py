"""Whatever trains on a CPU runs with the heap that joins what is freed, unless its user has told glibc otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_exp.system import heap

pytestmark = pytest.mark.skipif(heap.tunables_for_training() is None, reason="the C library isn't glibc")
SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.01", "training.device=cpu", "tracking=off"]
DOORS = {
    "the verb": ["qlora_exp.cli", "run"],
    "the Hydra app": ["qlora_exp"],
    "a sweep's host": ["qlora_exp", "-m", "lora.r=4"],
    "a job of the basic sweeper": ["qlora_exp", "-m", "hydra/sweeper=basic", "lora.r=4"],
}


def told(door: Sequence[str], tmp_path: Path, **environment: str) -> str | None:
    """What the run that came through ``door`` says it was told."""
    module, *arguments = door
    command = [sys.executable, "-m", module, *arguments, *SLEEP, f"output_root={tmp_path}"]
    inherited = {name: value for name, value in os.environ.items() if name != heap.MALLOC_VARIABLE}
    subprocess.run(command, env=inherited | environment, check=True, capture_output=True)
    [record] = tmp_path.glob("runs/*/record.json")
    found: str | None = json.loads(record.read_text(encoding="utf-8"))["environment"]["glibc_tunables"]
    return found


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_run_has_it_through_every_door(door: list[str], tmp_path: Path) -> None:
    assert told(door, tmp_path) == heap.TUNABLES


@pytest.mark.parametrize("chosen", ["", "glibc.malloc.arena_max=2"])
@pytest.mark.parametrize("door", ["the verb", "a sweep's host"])
def test_what_the_user_has_told_glibc_stays(door: str, chosen: str, tmp_path: Path) -> None:
    assert told(DOORS[door], tmp_path, GLIBC_TUNABLES=chosen) == chosen


@pytest.mark.slow
def test_a_training_needs_less_memory_with_it(tmp_path: Path) -> None:
    given = ["training.max_steps=3", "training.batch_size=32", "training.device=cpu", "evaluation=quick"]
    given += ["evaluation.before=false", "evaluation.max_items=1", "tracking=off", "quantization=fp32"]
    needed = {}
    for tunables in ("", heap.TUNABLES):
        root = tmp_path / str(len(tunables))
        command = [sys.executable, "-m", "qlora_exp.cli", "run", *given, f"output_root={root}"]
        subprocess.run(command, env=os.environ | {heap.MALLOC_VARIABLE: tunables}, check=True, capture_output=True)
        [record] = root.glob("runs/*/record.json")
        needed[tunables] = json.loads(record.read_text(encoding="utf-8"))["memory"]["train_working_set_bytes"]
    assert needed[heap.TUNABLES] < 0.95 * needed[""]


def test_a_program_that_calls_the_command_is_not_begun_again(tmp_path: Path) -> None:
    arguments = ["qlora-exp", "run", *SLEEP, f"output_root={tmp_path}"]
    program = f"import sys; print('once', flush=True); sys.argv = {arguments!r}\nfrom qlora_exp.cli import main; main()"
    inherited = {name: value for name, value in os.environ.items() if name != heap.MALLOC_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-"], input=program, env=inherited, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("once") == 1
    [record] = tmp_path.glob("runs/*/record.json")
    assert json.loads(record.read_text(encoding="utf-8"))["environment"]["glibc_tunables"] is None


def test_a_command_that_asks_something_else_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.delenv(heap.MALLOC_VARIABLE, raising=False)
    monkeypatch.setattr(os, "execve", lambda *arguments: begun.append(arguments))
    for arguments, again in ((["lora.r=4", "training.device=cpu"], 1), (["--help"], 0), (["-m", "lora.r=4,8"], 0)):
        begun.clear()
        monkeypatch.setattr(sys, "argv", ["qlora-exp", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "qlora-exp", *arguments])
        heap.reexec_with_tunables([*arguments, "training.device=cpu"])
        assert len(begun) == again, arguments
    assert heap.merges_free_chunks(heap.TUNABLES)
    assert not heap.merges_free_chunks(None)
    assert not heap.merges_free_chunks("glibc.malloc.tcache_count=0")
