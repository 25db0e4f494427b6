"""``--from FILE``: its values are defaults beneath a sweep's axes; only what is typed fixes one, and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_exp.cli import main
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.choices import sweeps
from qlora_exp.config.compose import compose
from qlora_exp.orchestration.command import SweepCommand, study_spec

NAMES = [choice.name for choice in sweeps()]
A_VALUE = {
    "model.variant": "instruct",
    "quantization": "fp32",
    "lora.r": 2,
    "lora.alpha_policy": "r",
    "lora.alpha": 3.0,
    "lora.dropout": 0.15,
    "training.learning_rate": 0.002,
    "targets": "mlp",
    "task.format": "chat",
    "seed": 7,
    "evaluation.split": "test",
    "method": "layerwise",
    "route": "qlora",
    "distillation": "gold",
}
"""A value that a file may give to each key that the package's sweeps search."""
SLEEP = ["training.engine=sleep", "training.sleep_seconds=0", "tracking=off"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def file_of(settings: dict[str, Any], name: str = "settings.yaml") -> Path:
    Path(name).write_text(yaml.safe_dump(settings))
    return Path(name)


def asked(name: str, settings: dict[str, Any] | None, *typed: str) -> SweepCommand:
    source = file_of(settings) if settings is not None else None
    return study_spec([f"sweeps={name}", *combined_overrides(source, typed, sweep=name)])


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_sets_an_axis_leaves_it_searched(name: str) -> None:
    before = asked(name, None).spec
    # What a ladder begins or, with screening, ends with.
    free = ("seed", "training.learning_rate", "training.max_steps") if before.ladder is not None else ()
    settings = {axis.key: A_VALUE[axis.key] for axis in before.axes if axis.key not in free}
    for key, value in settings.items():
        assert combined_overrides(file_of({key: value}), [], sweep=name) == []
    after = asked(name, settings)
    assert after.spec.axes == before.axes
    assert after.spec.overrides == before.overrides
    assert after.fixed_axes == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [("lora_search", "lora.r=16"), ("lora_search", "targets=mlp"), ("base_or_instruct", "model.variant=base")],
)
def test_what_is_typed_fixes_an_axis_and_is_said(name: str, text: str) -> None:
    key, _, value = text.partition("=")
    found = asked(name, {key: A_VALUE[key]}, text)
    assert found.fixed_axes == (text,)
    assert found.spec.space[key] == value


def test_other_values_of_the_file_hold_for_every_trial() -> None:
    settings = {"lora.r": 4, "lora": {"dropout": 0.1}, "training.max_steps": 7}
    spec = asked("rank_by_quantization", settings, "seed=3").spec
    assert {"lora.dropout": 0.1, "training.max_steps": 7, "seed": 3}.items() <= spec.fixed.items()


def test_the_starter_searches_what_its_sweep_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "."]) == 0
    few = ["sweep.n_trials=3", "sweep.pruner=none", "sweep.sampler=random"]
    assert main(["sweep", "my_sweep", "--from", "task.yaml", *few, *SLEEP]) == 0
    assert "lora.r=4,8,16 × training.learning_rate" in capsys.readouterr().err
    assert main(["trials", "last", "--csv"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split(",")[5:] == ["lora.r", "training.learning_rate"]
    assert len(rows) == 3
    assert main(["sweep", "my_sweep", "--from", "task.yaml", "lora.r=8", "sweep.name=one", *few, *SLEEP]) == 0
    assert capsys.readouterr().err.count("lora.r=8 on the command line fixes an axis of the sweep\n") == 1


@pytest.mark.parametrize("name", ["my_sweep", "base_or_instruct", "rank_doubling"])
def test_a_plan_of_a_sweep_has_the_points_that_the_sweep_has(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "."]) == 0
    capsys.readouterr()

    def points(*arguments: str) -> list[Any]:
        assert main(["plan", *arguments, "--json"]) == 0
        told = capsys.readouterr()
        assert "fixes an axis" not in told.err
        return [run["overrides"] for run in json.loads(told.out)]

    assert points(name, "--from", "task.yaml") == points(name)
    assert main(["plan", name, "--from", "task.yaml", "plan.device=rtx4090", "quantization=nf4"]) == 0
    assert ("quantization=nf4 on the command line" in capsys.readouterr().err) == (name == "base_or_instruct")


@pytest.mark.parametrize(
    ("settings", "typed", "kept", "left_out"),
    [
        ({"targets.modules": ["q_proj"]}, ["targets=mlp"], {}, "targets.modules"),
        ({"model": "local", "model.path": "x", "model.variant": "instruct"}, ["model=embedded"], {}, "model.path"),
        ({"model.variant": "instruct"}, ["model=smollm2_135m"], {"variant": "instruct"}, None),
        ({"model": "local", "model.path": "x"}, ["model=local"], {"path": "x"}, None),
        ({"evaluation.max_items": 8}, ["evaluation=quick"], {}, "evaluation.max_items"),
        ({"task": "local", "task.path": "x", "task.columns": {"prompt": "q"}}, ["task=embedded"], {}, "task.path"),
    ],
)
def test_values_of_a_choice_go_with_the_choice(
    settings: dict[str, Any],
    typed: list[str],
    kept: dict[str, str],
    left_out: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model's path beneath another model would train that one under the other's name."""
    config = compose(combined_overrides(file_of(settings), typed))
    told = capsys.readouterr().err
    assert (left_out or "left out") in told or not left_out
    assert bool(told) == bool(left_out)
    found = {"path": Path(config.model.path or "").name, "variant": config.model.variant.value}
    assert kept.items() <= found.items()
    if left_out:
        assert config == compose([*typed, *(["model.variant=instruct"] if "model.variant" in settings else [])])


def test_a_searched_group_takes_its_own_values() -> None:
    found = asked("lora_search", {"targets": "attention", "targets.modules": ["q_proj"]})
    assert "targets.modules" not in found.spec.fixed
    assert found.spec.axes == asked("lora_search", None).spec.axes
