"""Hydra's own flags at our door: those with values too, and no other configuration in the place of ours."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_exp.orchestration.hydra_app import main


@pytest.mark.parametrize("value", ["elsewhere", "a=b"])
@pytest.mark.parametrize(
    "flag",
    ["--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"],
)
def test_a_flag_that_would_take_away_our_configuration_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([flag, value, "lora.r=4"], ["lora.r=4", flag, value], ["-m", "lora.r=4,8", flag, value]):
        assert main(given) == 2
        told = capsys.readouterr().err
        assert "can't be used" in told
        assert value in told
        assert "do:" in told


def test_a_flag_that_does_not_exist_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--no-such-flag", "lora.r=4"])
    assert ended.value.code == 2


def test_the_value_of_a_flag_is_no_override(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "qlora_exp", "lora.r=4", "--cfg", "job", "--package", "lora"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "r: 4" in shown
    assert "quantization" not in shown


def test_help_that_nobody_reads_to_its_end_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m qlora_exp --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout
    assert done.stderr == ""
