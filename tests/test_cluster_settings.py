"""What reaches a cluster's workers, and what is refused before a sweep starts."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from qlora_exp.config.choices import choice_names
from qlora_exp.config.override_errors import LAUNCHER_PACKAGES, LAUNCHER_PRESETS, problems_of
from qlora_exp.doctor.cluster_checks import cluster_checks, storage_problem, worker_view
from qlora_exp.errors import ConfigError, StudyError
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.launchers import check_shared_storage, prepare_launcher, ray_settings, worker_variables
from qlora_exp.paths import CONF

ENVIRONMENT = {"QLORA_EXP_STORAGE": "postgresql://u:p@h/d", "HF_TOKEN": "t", "HOME": "/root", "DATA": "/data"}


def test_workers_get_secrets_and_the_variables_that_overrides_name() -> None:
    texts = ["task.path='${oc.env:DATA}/rows.jsonl'", "name='${oc.env:MISSING,none}'"]
    found = worker_variables(texts, ENVIRONMENT)
    assert found == {name: ENVIRONMENT[name] for name in ("DATA", "HF_TOKEN", "QLORA_EXP_STORAGE")}


def test_a_variable_that_the_user_sets_for_rays_workers_wins() -> None:
    given = {"address": "auto", "runtime_env": {"env_vars": {"HF_TOKEN": "other"}, "working_dir": "."}}
    settings = ray_settings(given, {"HF_TOKEN": "t", "DATA": "/data"})
    assert settings["runtime_env"] == {"env_vars": {"HF_TOKEN": "other", "DATA": "/data"}, "working_dir": "."}


@pytest.mark.parametrize(("given", "size"), [({}, None), ({"object_store_memory": 10**8}, 10**8)])
def test_ray_gets_the_size_of_an_object_store_only_from_the_user(given: dict[str, int], size: int | None) -> None:
    assert ray_settings(given, {})["object_store_memory"] == size


def test_sqlite_with_workers_on_another_machine_is_refused(tmp_path: Path) -> None:
    spec = study_spec(["lora.r=1,2", f"output_root={tmp_path}"]).spec
    here = socket.gethostname()
    check_shared_storage(spec, [here, here])
    with pytest.raises(StudyError, match=r"several machines.*node7") as refused:
        check_shared_storage(spec, [here, "node7.example.org"])
    assert "QLORA_EXP_STORAGE" in str(refused.value.hint)


class SlurmLauncher:
    """As submitit's plugin, by name."""


def test_slurm_without_its_commands_or_without_an_answer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = study_spec(["lora.r=1,2", f"output_root={tmp_path}"]).spec
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="Slurm's commands aren't installed here"):
        prepare_launcher(SlurmLauncher(), spec, {})
    for name, text in (("sbatch", ""), ("srun", ""), ("sinfo", "echo 'slurm_load_node: no controller' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ConfigError, match="Slurm doesn't answer: slurm_load_node: no controller"):
        prepare_launcher(SlurmLauncher(), spec, {})
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho node7\n")
    with pytest.raises(StudyError, match="several machines"):
        prepare_launcher(SlurmLauncher(), spec, {})


def test_each_preset_has_a_launcher_with_a_package_and_a_name_that_no_plugin_has() -> None:
    presets = choice_names(CONF / "hydra" / "launcher")
    assert presets == sorted(LAUNCHER_PRESETS)
    assert set(LAUNCHER_PRESETS.values()) <= set(LAUNCHER_PACKAGES)
    assert not set(presets) & {*LAUNCHER_PACKAGES, "basic"}


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
@pytest.mark.parametrize("choice", ["ray", "ray_cluster"])
def test_a_launcher_that_is_not_installed_is_named_with_its_package(choice: str) -> None:
    [problem] = problems_of([f"hydra/launcher={choice}"], multirun=True)
    assert f"{choice!r} isn't installed" in problem.what
    assert problem.hint == "pip install hydra-ray-launcher"


def test_a_lock_that_another_process_could_take_is_seen(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("x")
    assert worker_view(tmp_path)["locked"] is False


def test_a_storage_that_does_not_answer_is_a_problem() -> None:
    problem = storage_problem("postgresql+psycopg://me:geheim@127.0.0.1:1/none")
    assert problem is not None
    assert "geheim" not in problem


def test_the_workers_of_this_machine_share_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_EXP_STORAGE", raising=False)
    found = list(cluster_checks(["tracking.uri=http://127.0.0.1:9", f"output_root={tmp_path}"], None))
    assert [check.name for check in found if check.ok is not True] == ["tracking"]
    assert list(tmp_path.iterdir()) == []
