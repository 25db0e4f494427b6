"""``tracking.also``: TensorBoard's files say what the record says, MLflow's run stays the same, and no reporter ends a
run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora_exp.cli import main
from qlora_exp.config.allowed_values import REPORTERS
from qlora_exp.records.files import read_curve, read_record
from qlora_exp.records.types import RunRecord, Status
from tests.conftest import write_colour_task

SHORT = [
    *("training.device=cpu", "training.max_steps=6", "training.batch_size=4", "training.max_length=64"),
    *("training.logging_steps=2", "training.evaluate_every_steps=3", "evaluation=quick", "evaluation.max_items=8"),
    *("tracking=off", "quantization=fp32"),
]


@pytest.fixture(scope="module")
def root(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("reporters")
    task = write_colour_task(folder / "colours.jsonl")
    given = ["model=local", f"model.path={tiny_models['llama']}", "task=local", f"task.path={task}"]
    return folder, [*SHORT, *given, "task.kind=classification"]


def run(root: tuple[Path, list[str]], name: str, *overrides: str) -> tuple[Path, RunRecord]:
    folder, words = root
    assert main(["run", *words, f"output_root={folder / name}", *overrides]) == 0
    [run_folder] = (folder / name / "runs").iterdir()
    return run_folder, read_record(run_folder / "record.json")


@pytest.fixture(scope="module")
def plain(root: tuple[Path, list[str]]) -> tuple[Path, RunRecord]:
    return run(root, "plain")


def test_tensorboard_has_the_curve_the_final_scores_and_the_settings(
    root: tuple[Path, list[str]], plain: tuple[Path, RunRecord]
) -> None:
    folder, record = run(root, "board", "tracking.also=[tensorboard]")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    curve = read_curve(folder / "curve.jsonl")

    def points(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    for tag, column in (("train/loss", "loss"), ("eval/loss", "validation_loss")):
        expected = {point["step"]: point[column] for point in curve if point.get(column) is not None}
        assert len(expected) >= 2
        assert points(tag) == pytest.approx(expected)
    after, before = record.scores.after, record.scores.before
    assert after is not None
    assert before is not None
    assert points("eval/tuned_accuracy") == pytest.approx({6: after.accuracy})
    assert points("eval/base_loss")[6] == pytest.approx(before.loss)
    hparams = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    started = plugin_data_pb2.HParamsPluginData.FromString(hparams).session_start_info
    assert started.hparams["lora.r"].number_value == 8
    assert started.hparams["quantization.mode"].string_value == "fp32"
    assert read_curve(plain[0] / "curve.jsonl")[-1]["loss"] == curve[-1]["loss"]
    assert plain[1].scores == record.scores
    assert not (plain[0] / "tensorboard").exists()


def test_the_names_are_those_of_transformers_integrations() -> None:
    assert set(REPORTERS) <= set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("verb", ["run", "validate", "sweep"])
def test_a_library_that_is_missing_is_reported_before_anything_is_written(
    verb: str,
    root: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # W&B's files of an earlier run, which Python could import as a package
    monkeypatch.syspath_prepend(tmp_path)
    words = ["base_or_instruct"] if verb == "sweep" else []
    assert main([verb, *words, "training.engine=sleep", "training.sleep_seconds=0.01", "tracking.also=[wandb]"]) == 2
    error = capsys.readouterr().err
    assert "wandb isn't installed" in error
    assert "pip install wandb" in error
    assert {path.name for path in tmp_path.iterdir()} == {"wandb"}


def test_a_name_that_is_none_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for given, answer in (("tensorbord", "did you mean tensorboard?"), ("mlflow", "tracking=off")):
        assert main(["validate", f"tracking.also=[{given}]"]) == 2
        assert answer in capsys.readouterr().err


STUB = """
runs, finished = [], []
class Config(dict):
    def update(self, values, **kwargs):
        super().update(values)
class Run:
    name, id, summary = "stub", "1", {}
    def _label(self, **kwargs): pass
config, run, __version__ = Config(), None, "0.99"
def init(project, name, **kwargs):
    global run
    run = Run()
    runs.append((project, name, []))
def log(values, **kwargs):
    runs[-1][2].append(values)
def define_metric(*args, **kwargs): pass
def termwarn(*args, **kwargs): pass
def finish():
    global run
    run = None
    finished.append(runs[-1][1])
"""
"""What transformers' callback calls of wandb."""


def test_weights_and_biases_gets_a_run_of_its_own_for_each_run_and_may_fail(
    root: tuple[Path, list[str]],
    plain: tuple[Path, RunRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    for folder in ("sdk", "sdk/lib"):
        (package / folder / "__init__.py").touch()
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    import wandb

    folders = [run(root, name, "tracking.also=[wandb]", "tracking.experiment=mine") for name in ("one", "two")]
    assert [(project, name) for project, name, _ in wandb.runs] == [("mine", path.name) for path, _ in folders]
    assert wandb.finished == [path.name for path, _ in folders]
    logged = {key: value for entry in wandb.runs[1][2] for key, value in entry.items()}
    after = folders[1][1].scores.after
    assert after is not None
    assert logged["eval/tuned_loss"] == after.loss
    assert "train/loss" in logged

    monkeypatch.setattr(wandb, "log", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("no network")))
    run(root, "breaks", "tracking.also=[wandb]")
    assert wandb.run is None
    monkeypatch.setattr(wandb, "init", lambda **kwargs: (_ for _ in ()).throw(RuntimeError("no network")))
    capsys.readouterr()
    _, record = run(root, "fails", "tracking.also=[wandb]")
    assert record.status is Status.COMPLETED
    assert record.scores == plain[1].scores
    assert "wandb failed, and the run continues without it: no network" in capsys.readouterr().err
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        sys.modules.pop(name, None)
