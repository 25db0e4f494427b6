"""A sweep through its doors: what a command means, who may work on a study, what the verbs show."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import BaseFileLock

from qlora_exp.cli import main
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import to_plain
from qlora_exp.errors import QloraExpError
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.sweep import jobs_of
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.study.spec import read_spec, write_spec
from qlora_exp.system.environment import process_identity
from tests import processes

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.1", "tracking=off"]
SWEEPS = [
    *("base_or_instruct", "demo", "instruct_or_base", "lora_search", "pareto", "rank_by_quantization", "rank_doubling"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *arguments])


def only_study() -> StudyPaths:
    [folder] = Path("outputs/studies").absolute().iterdir()
    return StudyPaths(folder)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def trials(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["trials", "last", "--csv"]) == 0
    return rows(capsys.readouterr().out)


def from_file(command: str) -> list[str]:
    """The overrides of ``qlora-exp run --from FILE …``."""
    words = shlex.split(command)
    assert words[:3] == ["qlora-exp", "run", "--from"]
    return combined_overrides(Path(words[3]), words[4:])


@pytest.mark.parametrize("name", SWEEPS)
def test_each_sweep_composes_at_every_corner_and_ends(name: str) -> None:
    asked = study_spec([f"sweeps={name}"])
    assert asked.spec.name == name
    assert asked.spec.question
    assert 6 <= asked.spec.n_trials <= 48
    assert compose([f"sweeps={name}"]).sweep is not None


def test_the_same_settings_in_another_order_are_the_same_study() -> None:
    one = study_spec(["lora.r=4,8", "quantization=nf4,int8", "training.max_steps=5"]).spec
    other = study_spec(["training.max_steps=5", "quantization=nf4,int8", "lora.r=4,8", "workers.count=2"]).spec
    different = study_spec(["lora.r=4,8", "quantization=nf4,int8", "training.max_steps=6"]).spec
    assert one.name == other.name != different.name
    assert one.name.startswith("multirun-")
    assert one.n_trials == 4
    assert one.sampler == "grid"


def test_the_command_line_goes_before_the_file_and_the_file_before_hydras_params() -> None:
    file = study_spec(["sweeps=rank_by_quantization"], {"lora.r": "1,2", "seed": "1,2"}).spec
    assert file.space == {"lora.r": "4,8,16,32", "quantization": "fp16,int8,nf4", "seed": "1,2"}
    given = study_spec(["sweeps=rank_by_quantization", "lora.r=64,128", "quantization=nf4"]).spec
    assert given.space == {"lora.r": "64,128", "quantization": "nf4"}
    assert given.n_trials == 2


def test_a_search_over_intervals_needs_an_end() -> None:
    with pytest.raises(QloraExpError) as caught:
        study_spec(["training.learning_rate=tag(log,interval(1e-4,1e-2))"])
    assert "sweep.n_trials" in str(caught.value)
    spec = study_spec(["training.learning_rate=tag(log,interval(1e-4,1e-2))", "sweep.n_trials=7"]).spec
    assert (spec.sampler, spec.n_trials) == ("tpe", 7)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.r=interval(0,8)", "sweep.n_trials=2"], ["lora.r"]),
        (["lora.r=int(interval(0,8))", "sweep.n_trials=2"], ["lora.r", "0"]),
        (["lora.dropout=interval(0.0,1.5)", "sweep.n_trials=2"], ["lora.dropout", "1.5"]),
        (["quantization=fp32,nf4", "lora.init=kaiming,pissa"], ["pissa"]),
        (["hydra.sweeper.params={lora.rank: '4,8'}"], ["lora.rank", "lora.r"]),
        (["sweep.params={lora.r: '4,8'}"], ["sweep.params"]),
        (["sweeps=lora_serch"], ["lora_serch", "lora_search"]),
        (["sweeps=demo,pareto"], ["sweeps"]),
        (["workers.count=1,2"], ["workers.count", "axis"]),
        (["lora.r=4,8", "sweep.pruner=median"], ["evaluate_every_steps"]),
        (["lora.r=4,8", "sweep.n_trials=0"], ["sweep.n_trials"]),
        (["lora.r=4,8", "sweep.objectives=[minimize scores.after.los]"], ["scores.after.loss"]),
    ],
)
def test_what_is_wrong_is_told_before_the_first_trial(
    overrides: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert hydra(*overrides, *SLEEP) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert [text for text in expected if text not in told] == []
    assert not list(Path.cwd().glob("outputs/runs/*"))


def test_a_sweep_of_ones_own_is_found_and_may_not_take_a_name_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mine"]) == 0
    os.chdir("mine")
    spec = study_spec(["sweeps=my_sweep"]).spec
    assert spec.space["lora.r"] == "4,8,16"
    capsys.readouterr()
    assert main(["ls", "sweeps"]) == 0
    shown = capsys.readouterr().out
    assert "my_sweep" in shown
    assert "lora_search" in shown
    Path("sweeps/my_sweep.yaml").rename("sweeps/demo.yaml")
    with pytest.raises(QloraExpError) as caught:
        study_spec(["sweeps=demo"])
    assert str(Path.cwd() / "sweeps" / "demo.yaml") in str(caught.value)


def test_a_grid_is_run_once_and_the_same_command_finds_it_complete(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantization=nf4,int8", "lora.r=4,8", *SLEEP]
    assert hydra(*command) == 0
    shown = trials(capsys)
    assert list(shown[0]) == ["number", "status", "value", "run_id", "seconds", "quantization", "lora.r"]
    assert [(row["quantization"], row["lora.r"]) for row in shown] == [
        *(("nf4", "4"), ("nf4", "8"), ("int8", "4"), ("int8", "8")),
    ]
    assert {row["status"] for row in shown} == {"COMPLETED"}
    assert hydra(*command) == 0
    assert "sweep.name" in capsys.readouterr().out
    assert trials(capsys) == shown
    assert not only_study().orchestrator.exists()


def test_a_searched_key_can_be_fixed_though_others_depend_on_it() -> None:
    spec = study_spec(["sweeps=lora_search", "lora.alpha_policy=2r", "lora.r=4,8"]).spec
    assert spec.space["lora.alpha_policy"] == "2r"


def test_a_study_goes_on_with_the_settings_that_it_began_with_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweeps").mkdir()
    file = Path("sweeps/mine.yaml")
    text = "# @package _global_\nsweep: {params: {lora.r: '4,8'}}\ntraining: {max_steps: STEPS}\n"
    file.write_text(text.replace("STEPS", "5"))
    assert main(["sweep", "mine", *SLEEP]) == 0
    before = read_spec(only_study())
    file.write_text(text.replace("STEPS", "7"))
    assert main(["sweep", "mine", *SLEEP]) == 2
    assert "training.max_steps: 5 in the study, 7 now" in capsys.readouterr().err
    assert read_spec(only_study()) == before
    file.write_text(text.replace("STEPS", "5"))
    assert main(["sweep", "mine", *SLEEP, "sweep.n_trials=3", "budget.usd_per_hour=2", "sweep.name=mine"]) == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("workers.count=0", "workers.count must lie between 1 and 1024"),
        ("workers.jobs=0", "workers.jobs must lie between 1 and 1024"),
        ("workers.lease_seconds=1", "lease"),
        ("workers.hang_seconds=0", "workers.hang_seconds must be above 0"),
        ("sweep.n_trials=0", "sweep.n_trials must be at least 1"),
        ("sweep.name=''", "a study's name can't be empty"),
        ("sweep.max_failures=-1", "sweep.max_failures must be at least 0"),
        ("sweep.max_attempts=0", "sweep.max_attempts must be at least 1"),
        ("sweep.out_of_memory_retries=-1", "sweep.out_of_memory_retries must be at least 0"),
        ("sweep.sampler_options.multivariate=true", "+sweep.sampler_options.multivariate=true"),
        ("+sweep.pruner_options.multivariate=true", "NopPruner has no option"),
        ("sweep.constraints=['memory.peak <= x']", "the constraint can't be parsed"),
        ("sweep.warm_start=[earlier]", "no earlier study of this name"),
    ],
)
def test_a_wrong_search_is_told_and_writes_nothing(wrong: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("lora.r=4,8", *SLEEP, wrong) == 2
    assert told in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("name", SWEEPS)
def test_two_trials_of_each_sweep_run_without_a_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", name, "sweep.n_trials=2", *SLEEP]) == 0
    shown = trials(capsys)
    assert len(shown) == 2
    assert ("value" in shown[0]) == (name != "pareto")


def test_best_is_a_command_that_composes_to_the_best_trials_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "rank_by_quantization", "lora.r=4,8", *SLEEP]) == 0
    best = min(trials(capsys), key=lambda row: float(row["value"]))
    assert main(["best", "last"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("qlora-exp run"))
    config = compose(from_file(line))
    assert (config.lora.r, config.quantization.mode.value) == (int(best["lora.r"]), best["quantization"])
    assert config.training.max_steps == 200


def test_a_study_that_somebody_works_on_is_refused_with_the_holder_unless_joined(
    capsys: pytest.CaptureFixture[str],
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        paths = OutputPaths.of("outputs").study("held")
        stat = Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()
        mine = process_identity()
        write_json(paths.orchestrator, {"pid": holder.pid, "start_ticks": int(stat[19]), "boot_id": mine.boot_id})
        command = ["lora.r=4,8", "sweep.name=held", *SLEEP]
        assert hydra(*command) == 2
        assert str(holder.pid) in capsys.readouterr().err
        assert hydra(*command, "sweep.join=true") == 0
        assert json.loads(paths.orchestrator.read_text())["pid"] == holder.pid
    finally:
        holder.communicate()
    assert hydra(*command, "sweep.n_trials=2") == 0
    assert not paths.orchestrator.exists()


def test_a_stopped_study_resumes_without_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "rank_by_quantization", "lora.r=4,8,16", "quantization=nf4", *SLEEP]
    slow = [sys.executable, "-m", "qlora_exp.cli", *command, "training.sleep_seconds=3", "sweep.name=slow"]
    child = processes.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    paths = OutputPaths.of("outputs").study("slow")
    deadline = time.monotonic() + 120
    while not any('"RUNNING"' in file.read_text() for file in Path("outputs").glob("runs/*/record.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    assert main(["status", "slow"]) == 0
    assert f"process {child.pid}" in capsys.readouterr().out
    assert main(["stop", "slow"]) == 0
    told, _ = child.communicate(timeout=120)
    assert child.returncode == 130, told
    assert "qlora-exp resume slow" in told
    assert main(["resume", "slow"]) == 0
    shown = trials(capsys)
    assert [row["status"] for row in shown] == ["COMPLETED"] * 3
    assert len({row["run_id"] for row in shown}) == 3
    assert len(list(Path("outputs/runs").iterdir())) == 3
    assert not paths.orchestrator.exists()


def test_a_killed_orchestrators_study_goes_on_with_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lora.r=2,4,8", *SLEEP, "training.sleep_seconds=1"]
    child = processes.Popen([sys.executable, "-m", "qlora_exp", "-m", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path("outputs").glob("runs/*/record.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert hydra(*command) == 0
    shown = trials(capsys)
    assert [(row["lora.r"], row["status"]) for row in shown] == [(r, "COMPLETED") for r in ("2", "4", "8")]


def test_too_many_failures_end_a_study_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["seed=range(1,9)", *SLEEP, "training.sleep_fault=fail", "sweep.max_failures=2", "sweep.max_attempts=1"]
    assert hydra(*command) == 1
    assert len(list(Path("outputs/runs").iterdir())) < 8


def test_cleaning_says_first_and_never_takes_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("lora.r=2,4,8", *SLEEP) == 0
    shown = trials(capsys)
    outputs = OutputPaths.of("outputs")
    for row in shown:
        for folder in (outputs.run(row["run_id"]).adapter, outputs.run(row["run_id"]).checkpoints):
            folder.mkdir()
            (folder / "weights").write_bytes(b"0" * 1000)
    best = min(shown, key=lambda row: float(row["value"]))["run_id"]
    assert main(["clean", "last"]) == 0
    assert "5 kB would be freed" in capsys.readouterr().out
    assert all(outputs.run(row["run_id"]).adapter.is_dir() for row in shown)
    assert main(["clean", "last", "--yes"]) == 0
    assert [row["run_id"] for row in shown if outputs.run(row["run_id"]).adapter.is_dir()] == [best]
    assert not any(outputs.run(row["run_id"]).checkpoints.is_dir() for row in shown)
    assert all(read_record(outputs.run(row["run_id"]).record).synthetic for row in shown)


def test_the_studys_file_holds_no_password() -> None:
    uri = "http://user:geheim1@127.0.0.1:9"
    asked = study_spec(["lora.r=4,8", "training.engine=sleep", f"tracking.uri='{uri}'"])
    write_spec(asked.spec, asked.paths)
    assert "geheim1" not in asked.paths.spec.read_text()
    assert any("geheim1" in text for text in asked.spec.overrides)
    assert read_spec(asked.paths).synthetic


def test_what_hydra_sets_for_a_job_reaches_its_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    told = "+hydra.job.env_set.PYTHONPROFILEIMPORTTIME='1'"
    assert hydra("lora.r=4,8", *SLEEP, told) == 0
    [log] = only_study().logs.iterdir()
    assert "import time:" in log.read_text()


def test_the_basic_sweeper_is_still_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("hydra/sweeper=basic", "lora.r=4,8", *SLEEP) == 0
    assert len(list(Path("outputs/runs").iterdir())) == 2
    assert not Path("outputs/studies").exists()


def test_a_base_configuration_may_need_its_axes(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("lora.alpha_policy=fixed", "lora.alpha=8,16", *SLEEP) == 0
    assert [(row["lora.alpha"], row["status"]) for row in trials(capsys)] == [("8", "COMPLETED"), ("16", "COMPLETED")]


@pytest.mark.parametrize(
    "pruner", [("wilcoxon",), ("asha", "+sweep.pruner_options={min_resource: 4, reduction_factor: 2}")]
)
def test_a_worse_trial_is_pruned(pruner: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    name, *options = pruner
    command = ["training.learning_rate=1e-3,1e-9", "training.evaluate_every_steps=4", f"sweep.pruner={name}"]
    assert hydra(*command, *options, *SLEEP) == 0
    assert [row["status"] for row in trials(capsys)] == ["COMPLETED", "PRUNED"]


def test_the_best_of_trials_that_all_break_a_constraint_is_none_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hydra("lora.r=4,8", "sweep.constraints=['speed.total_seconds <= 0.0001']", "sweep.name=s", *SLEEP) == 0
    capsys.readouterr()
    assert main(["best", "s"]) == 2
    assert "none of 2 completed trials satisfies speed.total_seconds <= 0.0001" in capsys.readouterr().err


def test_hyperband_stops_worse_trials_of_a_study_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Each process that works on the study must see a trial in the same bracket."""
    options = "+sweep.pruner_options={min_resource: 4, max_resource: 40, reduction_factor: 2}"
    command = ["training.learning_rate=1e-3,1e-9", "seed=1,2,3,4,5,6", "training.evaluate_every_steps=4"]
    command += ["sweep.pruner=hyperband", options, "sweep.name=bands", *SLEEP]
    assert hydra(*command, "sweep.n_trials=6") == 0
    assert hydra(*command, "sweep.n_trials=12") == 0
    shown = trials(capsys)
    assert len(shown) == 12
    ended = {row["training.learning_rate"]: set[str]() for row in shown}
    for row in shown:
        ended[row["training.learning_rate"]].add(row["status"])
    assert "PRUNED" in ended["1e-09"]
    assert ended["0.001"] == {"COMPLETED"}


def test_a_study_goes_on_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a sweep and a task of the folder that it began in."""
    Path("sweeps").mkdir()
    own = "# @package _global_\ntask: {source: local, path: rows.jsonl}\nsweep: {params: {lora.r: '4,8'}}\n"
    Path("sweeps/mine.yaml").write_text(own, encoding="utf-8")
    command = ["model=local", "model.path=one,two", "tracking.uri=sqlite:///runs.db", "sweep.max_failures=null"]
    assert main(["sweep", "mine", *command, *SLEEP, "sweep.n_trials=1"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    root = ["--output-root", str(tmp_path / "outputs")]
    assert main(["resume", "mine", "sweep.n_trials=4", *root]) == 0
    capsys.readouterr()
    assert main(["trials", "mine", "--csv", *root]) == 0
    shown = rows(capsys.readouterr().out)
    paths = [str(tmp_path / name) for name in ("one", "one", "two", "two")]
    assert sorted(row["model.path"] for row in shown) == paths
    configs = [read_record(OutputPaths.of(tmp_path / "outputs").run(row["run_id"]).record).config for row in shown]
    assert {config["task"]["path"] for config in configs} == {str(tmp_path / "rows.jsonl")}
    assert {config["tracking"]["uri"] for config in configs} == {f"sqlite:///{tmp_path / 'runs.db'}"}
    assert list(elsewhere.iterdir()) == []
    assert main(["best", "mine", *root]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("qlora-exp run"))
    assert compose(from_file(line)).task.path == str(tmp_path / "rows.jsonl")


def test_a_study_goes_on_from_a_folder_with_another_sweep_of_its_sweeps_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "# @package _global_\nsweep: {{params: {{lora.r: '{}'}}}}\n"
    for folder, ranks in ((tmp_path, "4,8"), (tmp_path / "elsewhere", "2,16,32")):
        (folder / "sweeps").mkdir(parents=True)
        (folder / "sweeps" / "mine.yaml").write_text(text.format(ranks), encoding="utf-8")
    assert main(["sweep", "mine", *SLEEP, "sweep.n_trials=1"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    root = ["--output-root", str(tmp_path / "outputs")]
    assert main(["resume", "mine", "sweep.n_trials=2", *root]) == 0
    capsys.readouterr()
    assert main(["trials", "mine", "--csv", *root]) == 0
    assert [row["lora.r"] for row in rows(capsys.readouterr().out)] == ["4", "8"]


def test_a_study_on_a_read_only_disk_is_shown_and_resume_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hydra("lora.r=4,8", *SLEEP, "sweep.name=s", "sweep.n_trials=1") == 0
    capsys.readouterr()

    def refuse(lock: BaseFileLock, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", lock.lock_file)

    monkeypatch.setattr(BaseFileLock, "acquire", refuse)
    assert main(["trials", "s"]) == 0
    assert main(["resume", "s"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: Read-only file system")
    assert "Traceback" not in told


PASSWORD = "geheim4711"


def test_the_password_of_a_studys_storage_is_in_no_file_and_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///file:{tmp_path}/outputs/studies.db?password={PASSWORD}&uri=true"
    assert hydra("lora.r=4,8", f"sweep.storage='{url}'", "sweep.name=s", "sweep.n_trials=1", *SLEEP) == 0
    assert (tmp_path / "outputs" / "studies.db").is_file()
    for verb in ("status", "best", "trials", "clean", "resume"):
        assert main([verb, "s"]) == 2
        assert "QLORA_EXP_STORAGE" in capfd.readouterr().err
        if verb != "resume":
            assert main([verb, "s", "--storage", url]) == 0
    assert main(["resume", "s", "sweep.n_trials=2", "--storage", url]) == 0
    monkeypatch.setenv("QLORA_EXP_STORAGE", url)
    assert main(["resume", "s", "sweep.n_trials=2"]) == 0
    assert main(["trials", "s", "--csv"]) == 0
    told = capfd.readouterr()
    assert told.out.count("COMPLETED") == 2
    assert PASSWORD not in told.out + told.err
    holding = [file for file in tmp_path.rglob("*") if file.is_file() and PASSWORD.encode() in file.read_bytes()]
    assert holding == []


def test_a_study_begun_with_the_environments_storage_names_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_EXP_STORAGE", "postgresql://user:geheim4711@db/studies")
    asked = study_spec(["lora.r=4,8"])
    assert asked.spec.storage.endswith("@db/studies")
    assert not any(PASSWORD in text for text in asked.spec.overrides)
    assert not any(PASSWORD in text for job in jobs_of(asked) for text in job)


def test_a_complete_study_is_delivered_with_its_trials_where_mlflow_lacks_them() -> None:
    """As after a kill between the last trial's end and its delivery."""
    command = ["lora.r=4,8", *SLEEP[:2], "sweep.name=late"]
    assert hydra(*command, "tracking=off") == 0
    assert hydra(*command) == 0
    with sqlite3.connect("mlflow.db") as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)] * 3
        children = database.execute("SELECT COUNT(*) FROM tags WHERE key = 'mlflow.parentRunId'").fetchone()
    assert children == (2,)


def test_best_yaml_in_mlflow_is_the_best_trials_configuration() -> None:
    """With what all trials have alike, the file of the sweep included."""
    always = [*SLEEP[:2], "training.max_steps=30", "task.goal='accuracy >= 0.6'"]
    assert main(["sweep", "rank_by_quantization", "lora.r=4,8", "quantization=nf4", "workers.count=1", *always]) == 0
    [file] = Path("mlartifacts").rglob("best.yaml")
    again = compose(combined_overrides(file, None))
    records = [read_record(file) for file in Path("outputs/runs").glob("*/record.json")]
    [best] = (record for record in records if record.config["lora"]["r"] == 8)  # the larger rank is better asleep, too
    kept = ("lora", "targets", "quantization", "training", "task")
    assert {key: to_plain(again)[key] for key in kept} == {key: best.config[key] for key in kept}


def test_failed_trials_are_run_again_where_asked_and_nothing_else_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of them fail while a file is missing; then it is there."""
    command = ["seed=1,2", "training.sleep_fault=none,fail", *SLEEP, "sweep.name=mended", "sweep.max_failures=null"]
    assert hydra(*command) == 0
    assert "qlora-exp resume mended --retry failed" in capsys.readouterr().out
    before = trials(capsys)
    assert main(["resume", "mended", "--retry", "faild"]) == 2
    assert "failed" in capsys.readouterr().err
    assert main(["resume", "mended", "--retry", "out_of_memory"]) == 0
    assert "no trial ended as out of memory" in capsys.readouterr().out
    assert main(["resume", "mended", "--retry", "failed"]) == 0
    assert "run again: trials" in capsys.readouterr().out
    after = trials(capsys)
    failed = [row["number"] for row in before if row["status"] == "FAILED"]
    assert len(failed) == 2
    for old, new in zip(before, after, strict=True):
        record = read_record(OutputPaths.of("outputs").run(new["run_id"]).record)
        assert (old["number"], old["run_id"], old["status"]) == (new["number"], new["run_id"], new["status"])
        assert len(record.earlier_failures) == (1 if old["number"] in failed else 0)
        assert (old == new) or old["number"] in failed
