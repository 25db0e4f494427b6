"""Verbs that only read: exact tables, any terminal, nothing written, a disk that can't be written."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths
from qlora_exp.study.spec import read_spec
from qlora_exp.study.study import Study

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0", "tracking=off"]
READING = [["status", "s"], ["best", "s"], ["trials", "s"], ["trials", "s", "--csv"], ["ls", "runs"], ["show", "last"]]
READING += [["diff", "last", "last"], ["clean", "s"]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *arguments])


def test_a_csv_has_every_digit_and_tells_null_from_an_axis_that_a_trial_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = ["0.00012345678901234567", "0.0001234567890123457", "1e-05", "3.3333333333333335e-05"]
    axes = [
        f"training.learning_rate={','.join(rates)}",
        "name=null,'',x",
        *("lora.alpha_policy=2r,fixed", "lora.alpha=12345.678901,2", "lora.rslora=true,false"),
    ]
    conditions = "+sweep.conditions={lora.alpha: 'lora.alpha_policy == fixed', lora.rslora: 'lora.alpha_policy == 2r'}"
    assert hydra(*axes, conditions, *SLEEP, "sweep.name=s", "sweep.n_trials=32") == 0
    spec = read_spec(OutputPaths.of("outputs").study("s"))
    trials = {row.number: row.params for row in Study.read(spec, OutputPaths.of("outputs").study("s")).trials()}
    capsys.readouterr()
    assert main(["trials", "s", "--csv"]) == 0
    shown = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(shown) == len(trials) == 32
    for row in shown:
        params = trials[int(row["number"])]
        assert float(row["training.learning_rate"]) == params["training.learning_rate"]
        assert row["name"] == ("null" if params["name"] is None else params["name"])
        assert row["lora.alpha"] == (repr(params["lora.alpha"]) if "lora.alpha" in params else "")
        assert row["lora.rslora"] == (str(params["lora.rslora"]).lower() if "lora.rslora" in params else "")
    assert len({row["training.learning_rate"] for row in shown}) >= 2
    assert {"null", ""} <= {row["name"] for row in shown}


STREAMS: list[io.TextIOWrapper] = []
"""Kept: loggers hold on to the standard error that they found, and would write to a closed one."""


@contextmanager
def showing_in(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    shown = io.BytesIO()
    STREAMS.extend(io.TextIOWrapper(one, encoding=encoding, write_through=True) for one in (shown, io.BytesIO()))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", STREAMS[-2])
        patched.setattr(sys, "stderr", STREAMS[-1])
        yield shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_verb_shows_its_text_whatever_the_terminal_can_write(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "学习 → ×"
    with showing_in(encoding, monkeypatch) as shown:
        assert hydra("lora.r=4,8", *SLEEP, f"sweep.name='{name}'") == 0
        for verb in (["status", name], ["best", name], ["trials", name], ["ls", "runs"], ["ls", "models"], ["ls"]):
            assert main(verb) == 0
        assert main(["show", "last"]) == 0
        assert main(["plan", "lora.r=4,8"]) == 0
        assert main(["best", "\udcff"]) == 2  # a name that is no UTF-8
    text = shown.getvalue().decode(encoding)
    assert ("->" in text) if encoding != "utf-8" else (name in text)
    assert ("×" in text) is (encoding != "ascii")


def test_under_the_c_locale_a_multirun_works_and_an_argument_that_is_no_text_is_refused() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "qlora_exp", "-m", "hydra/sweeper=basic", "lora.r=4", *SLEEP]
    Path("sweeps").mkdir()
    Path("sweeps/mine.yaml").write_text("# @package _global_\nname: 学习\n", encoding="utf-8")
    done = subprocess.run([*command, "sweeps=mine"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(["show", "last"]) == 0
    done = subprocess.run([*command, "name='学习'"], env=environment, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    assert b"PYTHONUTF8=1" in done.stderr
    assert b"Traceback" not in done.stderr


def files(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def test_reading_a_study_writes_nothing_and_makes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("lora.r=4,8", *SLEEP, "sweep.name=s") == 0
    before = files(Path("outputs"))
    for verb in (command for command in READING if command[0] != "ls"):
        assert main(verb) == 0
    assert files(Path("outputs")) == before
    Path("outputs/optuna.db").unlink()
    for verb in ("status", "best", "trials"):
        capsys.readouterr()
        assert main([verb, "s"]) == 2
        assert "--rebuild" in capsys.readouterr().err
    assert not Path("outputs/optuna.db").exists()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0

    if shutil.which("mount") is None or not mount("--bind", str(folder), str(folder)):
        pytest.skip("mounting needs root")
    try:
        if not mount("-o", "remount,ro,bind", str(folder)):
            pytest.skip("no read-only mounts here")
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("unfinished", [False, True], ids=["finished", "with a log left"])
def test_a_study_on_a_read_only_disk_is_read_by_every_verb_that_only_reads(
    unfinished: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hydra("lora.r=4,8", *SLEEP, "sweep.name=s") == 0
    shutil.copytree("outputs", "copy")
    if unfinished:  # as a killed worker leaves it
        paths = OutputPaths.of("outputs").study("s")
        opened = Study.open(read_spec(paths), paths)
        opened._study.set_user_attr("note", "only in the log")
        for suffix in ("", "-wal"):
            shutil.copyfile(f"outputs/optuna.db{suffix}", f"copy/optuna.db{suffix}")
        assert Path("copy/optuna.db-wal").stat().st_size > 0
    with read_only(tmp_path / "copy"):
        for verb in [*READING, ["status", "s", "--watch"]]:
            assert main([*verb, "--output-root", "copy"]) == 0, capsys.readouterr().err
        assert main(["resume", "s", "sweep.n_trials=3", "--output-root", "copy"]) == 2
        paths = OutputPaths.of("copy").study("s")
        note = Study.read(read_spec(paths), paths)._study.user_attrs.get("note")
        assert note == ("only in the log" if unfinished else None)
