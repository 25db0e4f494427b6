"""What people bring along from Hydra and its official Optuna sweeper is answered with what does it here."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose_raw
from qlora_exp.errors import QloraExpError

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0", "tracking=off"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(list(arguments))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hydra.sweeper.n_trials=20", "sweep.n_trials=20"),
        ("+hydra.sweeper.n_trials=20", "sweep.n_trials=20"),
        ("hydra.sweeper.storage=sqlite:///x.db", "sweep.storage=sqlite:///x.db"),
        ("hydra.sweeper.study_name='a b'", "sweep.name=a b"),
        ("hydra.sweeper.direction=maximize", "[maximize scores.after"),
        ("hydra.sweeper.direction=[minimize,maximize]", "sweep.objectives"),
        ("hydra.sweeper.n_jobs=4", "workers.count=4"),
        ("hydra.sweeper.max_failure_rate=0.2", "sweep.max_failures=0.2"),
        ("hydra.sweeper.sampler.seed=1", "sweep.sampler=tpe"),
        ("hydra/sweeper/sampler=tpe", "sweep.sampler=tpe"),
        ("hydra/sweeper=optuna", "leave it out"),
        ("hydra.sweeper.search_space={lora.r: {type: int}}", "KEY=interval("),
        ("hydra.sweeper.search_space.x.type=int", "KEY=interval("),
        ("hydra.sweeper.params.lora.r=choice(4,8)", "lora.r=VALUES"),
        ("hydra.sweeper.custom_search_space=module.f", "sweep.conditions"),
    ],
)
def test_an_option_of_the_official_sweeper_is_answered_with_ours(
    text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hydra("-m", "lora.r=4,8", *SLEEP, text) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert f"where: {text}" in shown
    assert list(Path.cwd().iterdir()) == []


def test_what_it_tells_to_write_is_right() -> None:
    for text in ("sweep.n_trials=20", "sweep.objectives=[maximize scores.after.accuracy]", "workers.count=4"):
        assert compose_raw([text]) is not None
    with pytest.raises(QloraExpError):
        compose_raw(["sweep.n_trial=20"])


def test_a_file_that_sets_such_options_is_answered_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweeps").mkdir()
    text = "hydra: {sweeper: {n_trials: 5, direction: maximize}}\nsweep: {params: {lora.r: '4,8'}}\n"
    Path("sweeps/mine.yaml").write_text(f"# @package _global_\n{text}")
    assert main(["sweep", "mine", *SLEEP]) == 2
    shown = capsys.readouterr().err
    assert "sweep.n_trials=VALUE" in shown
    assert "sweep.objectives=" in shown
    assert not Path("outputs").exists()


@pytest.mark.parametrize("group", ["targets", "lora", "quantization", "sweep"])
def test_a_group_that_is_left_out_is_answered_with_its_choices(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    for code in (main(["validate", f"~{group}"]), hydra(f"~{group}"), hydra("-m", "lora.r=4,8", f"~{group}")):
        assert code == 2
    shown = capsys.readouterr().err
    assert shown.count(f"the group {group} can't be left out") == 3
    assert f"{group}=" in shown
    assert "None" not in shown


@pytest.mark.parametrize("flags", [["--cfg", "all"], ["--cfg", "job"], ["--cfg", "hydra"], ["--info", "defaults"]])
def test_what_shows_one_configuration_says_so_of_several(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*flags, "-m", "lora.r=4,8", "seed=range(1,4)", "training.learning_rate=interval(1e-4,1e-3)") == 2
    told = capsys.readouterr().err
    assert f"python -m qlora_exp {' '.join(flags)} lora.r=4 seed=1 training.learning_rate=0.0001" in told
    assert "qlora-exp plan lora.r=4,8" in told


def test_what_is_shown_is_checked_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("--cfg", "job", "lora.rr=4") == 2
    assert "did you mean lora.r" in capsys.readouterr().err
    assert hydra("--cfg", "job", "--resolve", "name=${oc.env:UNSET_HERE}") == 2
    assert "UNSET_HERE is not set" in capsys.readouterr().err
    assert hydra("--cfg", "job", "lora.r=4") == 0
    assert "r: 4" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["sweep.name=other", "output_root=elsewhere", "+sweep.name=other"])
def test_a_resumed_study_keeps_its_name_and_its_place(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("-m", "lora.r=4", *SLEEP, "sweep.name=s") == 0
    assert main(["resume", "s", change]) == 2
    told = capsys.readouterr().err
    assert "can't change its" in told
    assert "leave it out" in told
    assert main(["resume", "s", "sweep.name=s"]) == 0
    assert [path.name for path in Path("outputs/studies").iterdir()] == ["s"]
