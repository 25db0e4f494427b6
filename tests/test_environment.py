from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_exp.config.enums import DeviceChoice
from qlora_exp.errors import ConfigError
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Environment
from qlora_exp.system.environment import git_state, is_alive, package_versions, probe, process_identity


def test_the_environment_says_what_runs_here_and_survives_json() -> None:
    import torch

    found = probe()
    assert found.packages["torch"] == torch.__version__
    assert found.torch_threads == torch.get_num_threads()
    assert found.device.name
    assert found.cpu_cores is not None
    assert found.cpu_cores >= 1
    assert found.memory_bytes is not None
    assert found.memory_bytes > 2**28
    assert from_dict(Environment, to_dict(found)) == found


def test_a_cpu_can_be_asked_for() -> None:
    assert probe(DeviceChoice.cpu).device.kind == "cpu"


def test_a_missing_cuda_device_is_told() -> None:
    import torch

    if torch.cuda.is_available():
        assert probe(DeviceChoice.cuda).device.kind == "cuda"
        return
    with pytest.raises(ConfigError, match="no CUDA device"):
        probe(DeviceChoice.cuda)


def test_versions_need_no_import() -> None:
    code = (
        "import sys; from qlora_exp.system.environment import package_versions; v = package_versions();"
        "sys.exit('torch' not in v or 'torch' in sys.modules or 'mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert package_versions()["qlora-exp"]


def test_this_process_lives() -> None:
    assert is_alive(process_identity())


def test_a_dead_process_a_reused_pid_and_another_boot_are_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = process_identity()
    other = replace(me, pid=child.pid, start_ticks=None)
    assert is_alive(other)
    child.kill()
    assert child.wait() != 0
    assert not is_alive(other)
    if me.start_ticks is not None:
        assert not is_alive(replace(me, start_ticks=me.start_ticks - 1))
    if me.boot_id is not None:
        assert is_alive(replace(me, boot_id="another boot")) is False


def test_a_process_of_another_host_is_unknown_whatever_its_pid_and_boot() -> None:
    me = process_identity()
    assert me.host
    elsewhere = replace(me, host=f"not-{me.host}")
    assert is_alive(elsewhere) is None
    assert is_alive(replace(elsewhere, boot_id="another boot", pid=2**22 + 1)) is None
    assert is_alive(replace(me, host=None)) is True  # written by an earlier version
    if me.boot_id is not None:
        assert is_alive(replace(me, host=None, boot_id="another boot")) is None


def test_a_zombie_is_not_alive() -> None:
    if sys.platform != "linux":
        pytest.skip("zombies are told by /proc")
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # end of file: the child has ended and nobody has waited for it
    identity = replace(process_identity(), pid=child.pid, start_ticks=None)
    deadline = time.monotonic() + 30  # its output is closed a moment before it has ended
    while is_alive(identity) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(identity)
    child.wait()


def test_unknown_start_and_boot_leave_the_pid_to_decide() -> None:
    assert is_alive(replace(process_identity(), start_ticks=None, boot_id=None))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "qlora_exp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return package


def test_a_checkout_has_a_commit_and_says_when_it_is_dirty(checkout: Path) -> None:
    commit, dirty = git_state(checkout)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (checkout / "__init__.py").write_text("x = 1\n")
    git_state.cache_clear()
    assert git_state(checkout) == (commit, True)


def test_a_package_installed_inside_somebody_elses_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "lib" / "qlora_exp"
    installed.mkdir(parents=True)
    assert git_state(installed) == (None, None)
