"""The verbs: what they print, what they refuse, and the exit codes that scripts rely on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_exp import load_run
from qlora_exp.cli import main
from qlora_exp.cli.arguments import complete_overrides, complete_runs
from qlora_exp.doctor.machine_checks import checks, disk_space, embedded_assets, writable
from qlora_exp.formatting import bytes_text
from qlora_exp.paths import EMBEDDED, OutputPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import Status
from qlora_exp.runs.console import ProgressReporter
from tests import processes

QUICK = [
    *("training.device=cpu", "training.max_steps=3", "training.batch_size=4", "training.max_length=64"),
    *("training.logging_steps=1", "evaluation=quick", "evaluation.max_items=8", "quantization=fp32"),
]


class Runs:
    """One finished run, its rerun with the same seed, and its rerun at another rank, in a folder of their own."""

    def __init__(self, folder: Path, model: Path, task: Path) -> None:
        self.output = folder / "outputs"
        given = ["model=local", f"model.path={model}", "task=local", "task.kind=classification", f"task.path={task}"]
        self.codes = [main(["run", *QUICK, *given, f"output_root={self.output}", "name=first"])]
        self.first = self.ids()[0]
        self.codes.append(main(["rerun", self.first, "name=again", "--output-root", str(self.output)]))
        self.codes.append(main(["rerun", self.first, "name=wider", "lora.r=16", "--output-root", str(self.output)]))
        by_name = {load_run(str(self.output / "runs" / run)).name: run for run in self.ids()}
        self.again, self.wider = by_name["again"], by_name["wider"]

    def ids(self) -> list[str]:
        return sorted(path.name for path in (self.output / "runs").iterdir())

    def losses(self, run: str) -> list[float]:
        lines = (self.output / "runs" / run / "curve.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("cli")
    return Runs(folder, tiny_models["llama"], write_colour_task(folder / "colours.jsonl"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a verb printed, after checking its exit code."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err


def test_rerun_with_the_same_seed_gives_the_same_losses(runs: Runs) -> None:
    assert runs.codes == [0, 0, 0]
    assert len(runs.losses(runs.first)) == 3
    assert runs.losses(runs.again) == runs.losses(runs.first)
    assert runs.losses(runs.wider) != runs.losses(runs.first)


def test_rerun_finds_the_data_from_another_folder(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.output.parent)
    recorded = load_run(str(runs.output / "runs" / runs.first)).config["model"]["path"]
    given = ["model=local", f"model.path={recorded}", "task=local", "task.kind=classification"]
    output = tmp_path / "outputs"
    assert main(["run", *QUICK, *given, "task.path=colours.jsonl", f"output_root={output}", "tracking=off"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["rerun", "last", "--output-root", str(output)]) == 0
    first, again = (load_run(path.name, str(output)) for path in sorted((output / "runs").iterdir()))
    assert first.data == again.data
    assert first.scores == again.scores


def test_ls_runs_is_one_table_and_the_command_that_opens_it(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = told(capsys, "ls", "runs", "--output-root", str(runs.output)).splitlines()
    assert max(map(len, lines[:-2])) <= 100
    assert lines[0] == "3 runs, all llama base fp32 attention lr0.0002 s1"
    assert lines[1].split() == ["run", "settings", "accuracy", "on", "validation", "peak", "tokens/s", "time", "status"]
    row = next(line for line in lines if line.startswith(runs.wider[-4:]))
    record = load_run(str(runs.output / "runs" / runs.wider))
    assert record.scores.before is not None
    assert record.scores.after is not None
    assert row.split()[1] == "r16"
    assert f"{record.scores.before.accuracy:.3f} → {record.scores.after.accuracy:.3f}" in row
    assert row.rstrip().endswith("COMPLETED")
    assert f"qlora-exp ui --output-root {runs.output}" in lines[-2]
    assert f"sqlite:///{runs.output.parent / 'mlflow.db'}" in lines[-1]


def test_ls_runs_filters_sorts_and_shows_any_field(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    listed = ["ls", "runs", "--output-root", str(runs.output), "--json"]
    everything = json.loads(told(capsys, *listed))
    assert sorted(row["run_id"] for row in everything) == runs.ids()
    assert [row["run_id"] for row in json.loads(told(capsys, *listed, "--where", "lora.r>8"))] == [runs.wider]
    assert json.loads(told(capsys, *listed, "--where", "status=failed")) == []
    by_rank = json.loads(told(capsys, *listed, "--sort", "-r", "--limit", "1", "--columns", "lora.r,scheduler"))
    short = next(row["short_id"] for row in everything if row["run_id"] == runs.wider)
    assert by_rank == [{"run_id": runs.wider, "short_id": short, "lora.r": 16, "training.scheduler": "cosine"}]
    wrong = told(capsys, *listed, "--where", "acuracy>0.5", code=2)
    assert "there is no field 'acuracy'" in wrong
    assert "did you mean accuracy" in wrong
    assert "is not a condition" in told(capsys, *listed, "--where", "accuracy", code=2)


def test_ls_runs_shows_the_readable_and_names_the_damaged(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_record(runs.output / "runs" / runs.first / "record.json")
    write_json(tmp_path / "runs" / "good" / "record.json", record)
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "record.json").write_text('{"schema_version": 1, "run')
    shown = told(capsys, "ls", "runs", "--output-root", str(tmp_path))
    assert record.run_id[-4:] in shown
    assert "not shown: the record can't be read" in shown


def test_ls_runs_tells_a_run_whose_process_died(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_record(runs.output / "runs" / runs.first / "record.json")
    config = {**record.config, "tracking": {**record.config["tracking"], "enabled": False}}
    write_json(tmp_path / "o" / "runs" / "dead" / "record.json", record.replace(status=Status.RUNNING, config=config))
    assert "INTERRUPTED" in told(capsys, "ls", "runs", "--output-root", str(tmp_path / "o"))


def test_show_json_is_the_record_on_disk(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", runs.first, "--json", "--output-root", str(runs.output))
    on_disk = (runs.output / "runs" / runs.first / "record.json").read_text(encoding="utf-8")
    assert json.loads(shown) == json.loads(on_disk)


def test_show_begins_with_the_lines_that_matter(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", runs.first, "--output-root", str(runs.output))
    record = load_run(str(runs.output / "runs" / runs.first))
    assert len(shown.splitlines()) <= 16
    assert shown.splitlines()[0].split()[:2] == ["status", "COMPLETED"]
    headings = {line.split()[0] for line in shown.splitlines() if not line.startswith(" ")}
    expected = {"run", "model", "LoRA", "training", "data", "accuracy", "loss", "memory", "speed"}
    assert expected | {"files", "next"} <= headings
    assert f"qlora-exp export {runs.first[-4:]} --output-root {runs.output}" in shown
    if record.memory.peak_train_bytes is not None:  # a process that has run before may not know it
        assert bytes_text(record.memory.peak_train_bytes) in shown


def test_show_all_names_every_known_figure_with_its_unit(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", runs.first, "--all", "--output-root", str(runs.output))
    record = load_run(str(runs.output / "runs" / runs.first))
    line = next(line for line in shown.splitlines() if line.startswith("memory.adapter_bytes"))
    assert bytes_text(record.memory.adapter_bytes) in line
    assert "speed.train_seconds" in shown


def test_diff_shows_what_differs_and_only_that(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [line.split()[0] for line in told(capsys, "diff", *_three(runs)).splitlines()]
    assert keys.index("[settings]") < keys.index("lora.r") < keys.index("[results]")
    assert keys.index("[results]") < keys.index("plan.trainable_parameters")
    assert "quantization.mode" not in keys
    assert "run_id" not in keys
    assert "plan.config_fingerprint" not in keys
    assert "plan.config_fingerprint" in told(capsys, "diff", "--all", *_three(runs))


def test_diff_json_has_each_difference_once(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(told(capsys, "diff", "--json", *_three(runs)))
    assert (content["first"], content["second"]) == (runs.first, runs.wider)
    by_key = {row["key"]: row for row in content["differences"]}
    assert len(by_key) == len(content["differences"])
    expected = {"section": "settings", "key": "lora.r", "first": 8, "second": 16, "change": None}
    assert by_key["lora.r"] == expected
    parameters = by_key["plan.trainable_parameters"]
    assert parameters["change"] == parameters["second"] - parameters["first"]


def _three(runs: Runs) -> list[str]:
    return [runs.first, runs.wider, "--output-root", str(runs.output)]


@pytest.mark.parametrize("say", [lambda run: run, lambda run: run[-4:], lambda run: run[:-1], lambda run: "last"])
def test_a_run_is_found_by_id_part_or_last(say, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert runs.wider in told(capsys, "show", say(runs.wider), "--output-root", str(runs.output))


def test_a_run_is_found_by_its_folder_from_anywhere(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs.output / "runs")
    assert runs.first in told(capsys, "show", runs.first)


def test_an_ambiguous_run_names_the_candidates(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", "20", "--output-root", str(runs.output), code=2)
    assert "matches 3 runs" in shown
    assert runs.first in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rum"], ["No such command 'rum'", "run"]),
        (["ls", "modles"], ["'modles'", "did you mean models?"]),
        (["show", "nowhere", "--output-root", "empty"], ["there are no runs yet", "empty/runs"]),
        (["run", "lora.rank=8"], ["lora.rank", "did you mean lora.r=8?"]),
        (["validate", "quantization=nf5"], ["quantization", "nf4"]),
        (["run", "--from", "nothing.yaml"], ["there is no file nothing.yaml"]),
        (["run", "--resume", "last", "lora.r=4"], ["a resumed run keeps its configuration", "rerun"]),
        (["run", "-m", "lora.r=8,x"], ["lora.r", "whole number"]),
        (["data", "preview", "--split", "tran"], ["tran", "train"]),
        (["ui", "--output-root", "empty"], ["there are no tracked runs yet"]),
        (["validate", "task=local", "task.path=nothing.jsonl"], ["nothing.jsonl"]),
        (["validate", "tracking.uri=sqlight:///x.db"], ["tracking.uri", "sqlite"]),
    ],
)
def test_wrong_input_ends_with_exit_code_2_and_no_traceback(
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = told(capsys, *arguments, code=2)
    assert "Traceback" not in shown
    for text in expected:
        assert text in shown
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_resumed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is left to do" in told(
        capsys, "run", "--resume", runs.first, "--output-root", str(runs.output), code=2
    )


def test_a_failed_run_ends_with_exit_code_1(runs: Runs, tmp_path: Path) -> None:
    changes = ["training.learning_rate=1e30", "training.warmup_ratio=0", f"output_root={tmp_path / 'outputs'}"]
    assert main(["rerun", runs.first, *changes, "--output-root", str(runs.output)]) == 1


def test_the_starter_folder_is_valid_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "task.jsonl" in told(capsys, "init", str(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path / "mine")
    assert "departments: 36 train, 12 validation, 12 test items" in told(capsys, "validate", "--from", "task.yaml")
    shown = told(capsys, "validate", "--from", "task.yaml", "training.max_steps=7", "quantization=fp32")
    assert "training 7 steps" in shown
    assert "float32 weights" in shown or "fp32 weights" in shown


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task.jsonl").write_text("mine")
    assert "task.jsonl would be overwritten" in told(capsys, "init", str(tmp_path), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["task.jsonl"]
    assert (tmp_path / "task.jsonl").read_text() == "mine"


def test_data_preview_marks_exactly_the_trained_tokens(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    task = runs.output.parent / "colours.jsonl"
    model = load_run(str(runs.output / "runs" / runs.first)).config["model"]["path"]
    given = ["model=local", f"model.path={model}", "task=local", f"task.path={task}", "-n", "1"]
    lines = told(capsys, "data", "preview", *given).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("Item "))
    head, line = lines[place - 1 : place + 1]
    marked = line[line.index("[") :].replace("][", "").strip("[]")
    assert any(marked.startswith(f" {colour}") for colour in ("red", "yellow", "green", "blue"))
    assert "trained" in head


def test_doctor_finds_every_quantization_mode_training_rightly(tmp_path: Path) -> None:
    found = {check.name: check for check in checks(tmp_path / "outputs")}
    modes = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
    assert [mode for mode in modes if found[f"train in {mode}"].ok is not True] == []
    wanted = {"python", "packages", "torch", "bf16", "threads", "disk", "output_root", "mlflow database", "git"}
    assert wanted | {"cuda driver", "gpu memory", "embedded model"} <= set(found)
    assert [check for check in found.values() if check.ok is False and not check.fix] == []


def test_doctor_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database")
    capsys.readouterr()
    assert main(["doctor", "--no-self-test", "--output-root", str(tmp_path / "outputs")]) == 1
    lines = capsys.readouterr().out.splitlines()
    problem = next(position for position, line in enumerate(lines) if line.startswith("PROBLEM mlflow database"))
    assert lines[problem + 1].strip().startswith("do: ")


def test_doctor_tells_an_embedded_file_that_is_not_as_built(tmp_path: Path) -> None:
    assert embedded_assets().ok
    copy = shutil.copytree(EMBEDDED, tmp_path / "embedded")
    (copy / "task" / "test.jsonl").write_text("{}\n")
    (copy / "base" / "model.safetensors").unlink()
    found = embedded_assets(copy)
    assert found.ok is False
    assert "base/model.safetensors, task/test.jsonl" in found.detail
    assert found.fix
    (copy / "SHA256SUMS").unlink()
    assert embedded_assets(copy).ok is False


def test_doctor_looks_where_the_output_would_be_made(tmp_path: Path) -> None:
    outputs = OutputPaths.of(tmp_path / "a" / "b")
    assert disk_space(outputs).ok
    assert writable(outputs).ok
    assert not (tmp_path / "a").exists()


def test_sync_has_nothing_to_add_to_what_was_delivered(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "sync", "--output-root", str(runs.output)).startswith("3 already there")


def test_completion_offers_choices_keys_and_runs(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "quantization=nf4" in complete_overrides("quantization=n")
    assert "lora.rslora=" in complete_overrides("lora.r")
    assert "targets=" in complete_overrides("t")
    monkeypatch.chdir(runs.output.parent)
    assert complete_runs(runs.first) == [runs.first]
    assert complete_runs("")[0] == "last"


def test_the_shell_completes_a_verb() -> None:
    environment = {
        **os.environ,
        "_QLORA_EXP_COMPLETE": "complete_bash",
        "COMP_WORDS": "qlora-exp val",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "qlora_exp.cli"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["validate"]


def test_ctrl_c_ends_with_exit_code_130(runs: Runs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "qlora_exp.cli", "rerun", runs.first, "training.max_steps=5000"]
    with log.open("w") as stream:
        process = processes.Popen(
            [*command, f"output_root={tmp_path / 'outputs'}", "--output-root", str(runs.output)],
            stdout=stream, stderr=stream,
        )  # fmt: skip
        while "step " not in log.read_text() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert "Traceback" not in log.read_text()
    assert "--resume" in log.read_text()


def test_a_log_gets_few_lines_and_the_last_step() -> None:
    stream = io.StringIO()
    with ProgressReporter(stream) as progress:
        progress.phase("train")
        for step in range(1, 1001):
            progress.step(step, 1000, {"loss": 1 / step})
        progress.note("done")
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 12
    assert "step 1000/1000, loss 0.001" in lines[-2]
    assert lines[-1] == "done"


def test_a_pipe_that_closes_early_is_no_error() -> None:
    command = f"{sys.executable} -m qlora_exp.cli ls models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_help_groups_all_commands_and_cuts_no_description(capsys: pytest.CaptureFixture[str]) -> None:
    import typer.main

    from qlora_exp.cli import HELP_GROUPS, app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(name for names in HELP_GROUPS.values() for name in names) == sorted(commands)
    assert main(["--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for name, command in commands.items():
        assert f"{name} {' '.join(command.help.partition(chr(10) * 2)[0].split())}" in page
