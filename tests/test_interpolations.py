"""Interpolations (``${…}``): trial, record, `best`, `rerun` and a study that goes on name one configuration."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.compose import Composer, compose
from qlora_exp.config.from_record import recorded_overrides
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.candidates import search_space
from qlora_exp.orchestration.command import run_overrides, study_spec
from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import read_runs
from qlora_exp.runs.entry_points import config_from_plain
from qlora_exp.study.spec import read_spec
from qlora_exp.study.study import Study

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0", "tracking=off"]
NOT_OF_A_TRIAL = ("sweep", "workers", "output_root", "budget", "notify")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"LR": "1e-3", "R": "8", "MODE": "int8", "WHO": "Ann ${x} 'B'", "KEY": "r"}.items():
        monkeypatch.setenv(name, value)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *arguments])


def sweep_file(text: str) -> None:
    Path("sweeps").mkdir(exist_ok=True)
    Path("sweeps/mine.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")


def of_a_trial(config: Config | dict[str, Any]) -> dict[str, Any]:
    plain = config if isinstance(config, dict) else to_plain(config)
    return {key: value for key, value in plain.items() if key not in NOT_OF_A_TRIAL}


FIXED_ALPHA = "lora.alpha_policy=fixed"
LOCAL = ["task=local", "task.completion='{y}'"]
COMMANDS: list[dict[str, Any]] = [
    {
        "lora.alpha=${lora.r}": lambda c, r: c.lora.alpha == r,
        'training.learning_rate="${oc.decode:${oc.env:LR}}"': lambda c, r: c.training.learning_rate == 1e-3,
        "name='${oc.env:WHO} r${lora.r}'": lambda c, r: c.name == f"Ann ${{x}} 'B' r{r}",
        r"task.prompt='\${lora.r} is ${lora.r}'": lambda c, r: c.task.prompt == f"${{lora.r}} is {r}",
        "task.path=rows_${lora.r}.jsonl": lambda c, r: c.task.path == f"{os.getcwd()}/rows_{r}.jsonl",
        "quantization=${oc.env:MODE}": lambda c, r: c.quantization.mode.value == "int8",
        "training.max_steps=${seed}": lambda c, r: c.training.max_steps == 1,
    },
    {
        'lora.alpha="${lora.${oc.env:KEY}}"': lambda c, r: c.lora.alpha == r,
        "training.batch_size=${oc.env:UNSET,16}": lambda c, r: c.training.batch_size == 16,
        "targets.modules=[q_proj,'${oc.env:KEY}_proj']": lambda c, r: c.targets.modules == ["q_proj", "r_proj"],
        "task.path=${oc.env:KEY}/${lora.r}": lambda c, r: c.task.path == f"{os.getcwd()}/r/{r}",
        "seed=${oc.env:R}": lambda c, r: c.seed == 8,
        "training.max_steps=${oc.env:R,16}": lambda c, r: c.training.max_steps == 8,
    },
    {
        'lora.alpha="${oc.env:UNSET,${lora.r}}"': lambda c, r: c.lora.alpha == r,
        "task.path=${quantization.mode}.jsonl": lambda c, r: c.task.path == f"{os.getcwd()}/nf4.jsonl",
        'training.batch_size="${oc.decode:${oc.env:R}}"': lambda c, r: c.training.batch_size == 8,
        "name='${lora.alpha}${lora.r}'": lambda c, r: c.name == f"{r:.1f}{r}",
    },
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_trial_and_the_command_for_it_are_what_one_run_with_its_values_would_be(
    command: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = [FIXED_ALPHA, *LOCAL, *command]
    composer = Composer()
    one = [text for text in given if "MODE" not in text]  # a choice of a group is no value to Hydra
    single = {rank: of_a_trial(composer.compose([*one, f"lora.r={rank}"])) for rank in (4, 16)}
    spec = study_spec([*given, "lora.r=4,16"]).spec
    for name in ("LR", "R", "MODE", "WHO", "KEY"):
        monkeypatch.delenv(name)
    monkeypatch.chdir("/")
    for rank in (4, 16):
        trial = composer.compose([*spec.overrides, f"lora.r={rank}"])
        for text, holds in command.items():
            assert holds_from(holds, trial, rank, tmp_path), text
        same = ("quantization",) if one != given else ()
        assert of_a_trial(trial) | dict.fromkeys(same) == single[rank] | dict.fromkeys(same)
        again = composer.compose(run_overrides(spec, {"lora.r": rank}))
        assert of_a_trial(again) == of_a_trial(trial)
    assert study_spec([*spec.overrides, "lora.r=4,16"]).spec.settings == spec.settings


def holds_from(holds: Any, config: Config, rank: int, folder: Path) -> bool:
    before = os.getcwd()
    os.chdir(folder)
    try:
        return bool(holds(config, rank))
    finally:
        os.chdir(before)


FILES = [
    ("lora: {alpha_policy: fixed, alpha: '${lora.r}'}\nsweep: {params: {lora.r: '4,16'}}", {}),
    ("lora: {alpha_policy: fixed, alpha: '${.r}'}\nsweep: {params: {lora.r: '4,16'}}", {}),
    ("training: {learning_rate: '${oc.decode:${oc.env:LR}}'}\nsweep: {params: {lora.r: '4,16'}}", {}),
    ("training: {max_steps: '${oc.env:R}'}\nsweep: {params: {lora.r: '4,16'}, seed: '${oc.env:R}'}", {}),
    ("lora: {alpha_policy: fixed}\nsweep: {params: {lora.r: '4,16', lora.alpha: '${lora.r},32'}}", {}),
    ("lora: {alpha_policy: fixed}\nsweep: {params: {lora.r: '${oc.env:R},16', lora.alpha: '${lora.r}'}}", {}),
    ("lora: {alpha_policy: fixed}\n", {"lora.r": "4,16", "lora.alpha": "${lora.r},32"}),
    ("lora: {alpha_policy: fixed}\n", {"lora.r": "4,16", "lora.alpha": "${oc.env:R},${lora.r}"}),
]


@pytest.mark.parametrize(("text", "params"), FILES)
def test_a_sweeps_file_and_hydras_own_params_are_read_once_for_each_trial(
    text: str, params: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_file(text)
    spec = study_spec(["sweeps=mine"], params).spec
    points = list(points_of_spec(spec))
    assert len(points) == spec.n_trials
    here = [of_a_trial(compose(["sweeps=mine", *point])) for point in points]
    if params:
        assert {config["lora"]["alpha"] for config in here} >= {4.0, 16.0}
    for name in ("LR", "R"):
        monkeypatch.delenv(name)
    assert [of_a_trial(compose([*spec.overrides, *point])) for point in points] == here
    assert [of_a_trial(compose(run_overrides(spec, dict(point_of(point))))) for point in points] == here


def points_of_spec(spec: Any) -> list[list[str]]:
    from qlora_exp.study.space import grid, point_overrides

    return [list(point_overrides(point)) for point in grid(spec.axes)]


def point_of(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    from qlora_exp.config.overrides import override_key, override_value

    return [(override_key(text), override_value(text)) for text in overrides]


def test_record_best_rerun_and_resume_name_the_trials_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_file("training: {max_steps: '${oc.env:R}', batch_size: '${lora.r}'}\nsweep: {params: {seed: '${lora.r},1'}}")
    command = [
        *("sweeps=mine", FIXED_ALPHA, "lora.alpha=${lora.r}", "lora.r=4,16", "sweep.name=s", *SLEEP),
        *('training.learning_rate="${oc.decode:${oc.env:LR}}"', r"task.prompt='\${x} ${lora.r}'"),
        *("name='${oc.env:WHO}'", r"""hydra.sweeper.params={lora.dropout: '"${oc.decode:0.${oc.env:R}}",0'}"""),
    ]
    assert hydra(*command, "sweep.n_trials=3") == 0
    for name, value in {"LR": "1e-2", "R": "9", "WHO": "Bob"}.items():
        monkeypatch.setenv(name, value)
    assert main(["resume", "s", "sweep.n_trials=8"]) == 0
    outputs = OutputPaths.of("outputs")
    spec = read_spec(outputs.study("s"))
    records, _ = read_runs(outputs)
    by_run = {record.run_id: record for record in records}
    rows = Study.open(spec, outputs.study("s")).trials()
    assert len(rows) == len(records) == 8
    composer = Composer()
    for row in rows:
        record = by_run[str(row.run_id)]
        config = of_a_trial(record.config)
        rank = config["lora"]["r"]
        assert (config["lora"]["alpha"], config["training"]["batch_size"], config["training"]["max_steps"]) == (
            *(rank, rank, 8),
        )
        assert (config["name"], config["task"]["prompt"]) == ("Ann ${x} 'B'", f"${{x}} {rank}")
        assert config["training"]["learning_rate"] == 1e-3
        assert config["lora"]["dropout"] in (0.8, 0.0)
        assert config["seed"] in (1, rank)
        assert of_a_trial(composer.compose(run_overrides(spec, row.params))) == config
        assert row.number % 3 or of_a_trial(compose(recorded_overrides(record))) == config
        assert of_a_trial(config_from_plain(record.config)) == config
    capsys.readouterr()
    assert main(["best", "s"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("qlora-exp run"))
    best = min((row for row in rows), key=lambda row: row.values[0] or 0)
    assert of_a_trial(compose(combined_overrides(Path(shlex.split(line)[3]), None))) == of_a_trial(
        by_run[str(best.run_id)].config
    )


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (
            "training.max_steps=${oc.env:R}",
            "training.max_steps=${oc.env:R}",
            "training.max_steps: 8 in the study, 9 now",
        ),
        ("sweeps=mine", "sweeps=mine", "training.batch_size: 8 in the study, 9 now"),
        (
            "training.max_steps=${workers.count}",
            "training.max_steps=${workers.count}",
            "max_steps: 2 in the study, 3 now",
        ),
    ],
)
def test_another_value_of_what_a_setting_reads_is_another_study(
    before: str, now: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file("training: {batch_size: '${oc.env:R}'}")
    assert hydra("lora.r=4", "sweep.name=s", *SLEEP, before, "workers.count=2") == 0
    assert hydra("lora.r=4", "sweep.name=s", *SLEEP, before, "workers.count=2") == 0
    monkeypatch.setenv("R", "9")
    assert hydra("lora.r=4", "sweep.name=s", *SLEEP, now, "workers.count=3") == 2
    assert told in capsys.readouterr().err
    monkeypatch.delenv("R")
    assert hydra("lora.r=4,8", "sweep.name=other", *SLEEP, now.replace("${workers.count}", "${oc.env:R}")) == 2
    shown = capsys.readouterr().err
    assert "the environment variable R is not set" in shown
    assert "export R=VALUE" in shown


def test_a_study_of_an_earlier_version_goes_on_though_it_kept_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    command = ["lora.r=4,8", "sweep.name=s", *SLEEP, "training.max_steps=${oc.env:R}"]
    assert hydra(*command, "sweep.n_trials=1") == 0
    spec = read_spec(OutputPaths.of("outputs").study("s"))
    stored = optuna.load_study(study_name="s", storage=spec.storage)
    stored.set_user_attr("settings", {**stored.user_attrs["settings"], "training.max_steps": "${oc.env:R}"})
    assert hydra(*command) == 0


@pytest.mark.parametrize("text", ["name=${hydra:job.name}", "name=${hydra.job.name}", "name='r ${hydra:job.num}'"])
def test_what_only_hydra_knows_is_refused_with_what_to_write(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_file(text.replace("=", ": ", 1))
    for call in (
        lambda: main(["validate", text]),
        lambda: hydra("lora.r=4,8", *SLEEP, text),
        lambda: hydra("lora.r=4,8", *SLEEP, "sweeps=mine"),
    ):
        assert call() == 2
        told = capsys.readouterr().err
        assert "${hydra" in told
        assert "${model.family}" in told
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "sweeps"]


def test_a_plan_counts_each_point_with_its_own_values() -> None:
    planned = search_space(
        ["lora.r=4,16", FIXED_ALPHA, "lora.alpha=${lora.r}", "training.batch_size=${lora.r}", "seed=1,${lora.r}"]
    )
    seen = {(p.config.lora.alpha, p.config.training.batch_size, p.config.seed) for p in planned.points if p.config}
    assert seen == {(4, 4, 1), (4, 4, 4), (16, 16, 1), (16, 16, 16)}


def test_a_ladder_knows_that_alpha_follows_the_rank() -> None:
    given = [
        "model.variant=base,instruct",
        "sweep.sampler=ladder",
        "sweep.ladder.r_max=32",
        "sweep.ladder.margin=0.1",
        FIXED_ALPHA,
    ]
    follows = study_spec([*given, "lora.alpha=${lora.r}"]).spec.ladder
    constant = study_spec([*given, "lora.alpha=${training.batch_size}"]).spec.ladder
    assert follows is not None
    assert constant is not None
    assert {one.rate_exponent for one in follows.ladders} == {-0.5}
    assert {one.rate_exponent for one in constant.ladders} == {0.0}


@pytest.mark.parametrize("text", ["a ${b}", "\\${b}", "${", "}${lora.r}{", "\\\\${b} \\"])
def test_a_recorded_text_with_a_dollar_is_read_as_it_is(text: str) -> None:
    from qlora_exp.config.overrides import escape_interpolations, hydra_value
    from qlora_exp.records.types import RunRecord, Status
    from tests.test_repetition import ENVIRONMENT

    config = to_plain(compose([f"task.prompt={hydra_value(escape_interpolations(text))}"]))
    assert config["task"]["prompt"] == text
    record = RunRecord(1, "run", "name", Status.COMPLETED, "2026-11-21T00:00:00+00:00", None, config, ENVIRONMENT)
    assert to_plain(compose(recorded_overrides(record))) == config
    assert to_plain(config_from_plain(config)) == config


def test_an_error_that_names_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "http://user:geheim1@127.0.0.1:9")
    spec = study_spec(["lora.r=4,8", "training.engine=sleep", "tracking.uri=${oc.env:STORE}"]).spec
    assert "geheim1" not in repr(spec)
    with pytest.raises(QloraExpError):
        study_spec(["lora.r=4,8", "training.max_steps=${oc.env:STORE}"])
