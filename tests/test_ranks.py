"""One process trains one run: launchers that start several are refused, and a single rank is an ordinary run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qlora_exp import run
from qlora_exp.cli import main as cli
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import to_plain
from qlora_exp.errors import ConfigError
from qlora_exp.orchestration.hydra_app import main as hydra
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.find import run_folders
from qlora_exp.records.types import Status
from qlora_exp.runs import job
from qlora_exp.system.distributed import check_single_rank

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.01", "training.device=cpu", "tracking=off"]
SEVERAL = [
    *({name: "2"} for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    {"RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
]
ONE = [
    {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},
    {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1", "PMI_RANK": "0"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"WORLD_SIZE": "", "RANK": "none"},
]


def doors(folder: Path) -> dict[str, Callable[[], int]]:
    """Every command that trains, as a call that returns its exit code."""
    given = [*SLEEP, f"output_root={folder / 'outputs'}"]
    return {
        "run": lambda: cli(["run", *given]),
        "run -m": lambda: cli(["run", "-m", *given, "lora.r=4,8"]),
        "run --resume": lambda: cli(["run", "--resume", "last", "--output-root", str(folder / "outputs")]),
        "rerun": lambda: cli(["rerun", "last", "--output-root", str(folder / "outputs")]),
        "sweep": lambda: cli(["sweep", "demo", *given]),
        "resume": lambda: cli(["resume", "last", "--output-root", str(folder / "outputs")]),
        "python -m qlora_exp": lambda: hydra(given),
        "python -m qlora_exp -m": lambda: hydra(["-m", *given, "lora.r=4,8"]),
        "job": job.main,
    }


@pytest.mark.parametrize("several", SEVERAL, ids=str)
def test_every_door_refuses_to_be_one_of_several_ranks_before_it_writes(
    several: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    for name, door in doors(tmp_path).items():
        plain = to_plain(compose([*SLEEP, f"output_root={tmp_path / 'outputs'}"]))
        monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump(plain)))
        monkeypatch.setattr(job, "die_with_parent", lambda: None)
        assert door() == 2, name
        told = capsys.readouterr().err
        assert "several processes" in told, name
        assert "unset" in told
    with pytest.raises(ConfigError, match="several processes"):
        run(*SLEEP, f"output_root={tmp_path / 'outputs'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("one", ONE, ids=str)
def test_a_single_rank_is_an_ordinary_run(one: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    assert cli(["run", *SLEEP, f"output_root={tmp_path}"]) == 0
    assert "LOCAL_RANK" not in os.environ


def test_help_is_shown_to_every_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hydra(["--cfg", "job"]) == 0
    assert cli(["run", "--help"]) == 0
    assert "several processes" not in capsys.readouterr().err


def test_what_accelerate_launch_leaves_in_the_environment_changes_no_training() -> None:
    left = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_VERSION": "2"}
    environment = {**left, "LOCAL_RANK": "0", "HOME": "/home/x"}
    check_single_rank(environment)
    assert environment == {"HOME": "/home/x"}


def test_torchrun_with_two_processes_leaves_no_record_and_with_one_a_completed_run(tmp_path: Path) -> None:
    def torchrun(processes: int) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
        trains = ["training.device=cpu", "training.max_steps=1", "evaluation=quick", "evaluation.max_items=8"]
        given = ["-m", "qlora_exp", *trains, "tracking=off", f"output_root={tmp_path / str(processes)}"]
        return subprocess.run([*command, *given], cwd=tmp_path, capture_output=True).returncode

    assert torchrun(2) != 0
    assert list(tmp_path.iterdir()) == []
    assert torchrun(1) == 0
    (folder,) = run_folders(OutputPaths.of(tmp_path / "1"))
    assert read_record(folder.record).status is Status.COMPLETED
