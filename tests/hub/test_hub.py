"""A model, a data set and a metric of the Hub, by name: from a Hub on the loopback, from the cache, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_exp import load_run
from tests.conftest import write_colour_task
from tests.hub.fake_hub import FakeHub, serving

pytestmark = pytest.mark.long
METRIC = """
import datasets
import evaluate


class Length(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"length": sum(map(len, predictions)) / len(predictions)}
"""
GIVEN = [
    *("model=smollm2_135m", "model.checkpoints.base=someone/tiny"),
    *("task=hub", "task.hub_id=someone/colours", "task.kind=classification", "task.columns.label=completion"),
    *("task.columns.prompt=prompt", "evaluation.metrics=[length]", "tracking=off"),
]
SHORT = [
    *("training.device=cpu", "training.max_steps=1", "training.batch_size=2", "training.max_length=64"),
    *("evaluation=quick", "evaluation.generate=true", "evaluation.max_items=4", "evaluation.before=false"),
]


def called(verb: str, url: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "qlora_exp.cli", verb, *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hub(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FakeHub:
    data, metric = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("metric")
    write_colour_task(data / "train.jsonl")
    (metric / "length.py").write_text(METRIC)
    return FakeHub(
        {
            ("models", "someone/tiny"): tiny_models["llama"],
            ("datasets", "someone/colours"): data,
            ("spaces", "evaluate-metric/length"): metric,
        }
    )


def test_names_of_the_hub_are_enough_for_a_run_and_its_cache_for_the_next(hub: FakeHub, tmp_path: Path) -> None:
    with serving(hub):
        first = called("run", hub.url, tmp_path, *GIVEN, *SHORT)
    assert first.returncode == 0, first.stderr
    record = load_run(next((tmp_path / "outputs" / "runs").iterdir()))
    assert str(record.model_fingerprint).startswith("hub:someone/tiny@")
    assert record.data is not None
    assert record.data.train_items == 96
    assert record.scores.after is not None
    assert record.scores.after.other.keys() == {"length"}

    again = called("validate", hub.url, tmp_path, *GIVEN, "evaluation.metrics=[]")  # nobody answers there any longer
    assert again.returncode == 0, again.stderr
    assert "etry" not in again.stderr


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.checkpoints.base=someone/nothing", "the Hub has no model someone/nothing"),
        ("task.hub_id=someone/nothing", "the Hub has no data set someone/nothing"),
    ],
)
def test_a_name_that_the_hub_does_not_have_is_one_message(
    hub: FakeHub, tmp_path: Path, override: str, says: str
) -> None:
    with serving(hub):
        done = called("validate", hub.url, tmp_path, *GIVEN, override, "evaluation.metrics=[]")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}\n")


def spoiled(model: Path, folder: Path, kind: str) -> Path:
    """A copy of ``model`` as a repository that can't be trained on."""
    copy = Path(shutil.copytree(model, folder / kind))
    weights = copy / "model.safetensors"
    if kind == "adapter":
        (copy / "adapter_config.json").write_text("{}")
    elif kind == "gguf":
        weights.rename(copy / "model-q8_0.gguf")
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, weights, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("kind", "verb", "says"),
    [
        ("adapter", "validate", "adapter_config.json lies next to a whole model"),
        ("gguf", "validate", "it has model-q8_0.gguf"),
        ("fp8", "run", "fp8 (F8_E4M3)"),
    ],
)
def test_a_repository_that_cannot_be_trained_on_is_refused_by_its_files(
    kind: str, verb: str, says: str, hub: FakeHub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    write_colour_task(tmp_path / "colours.jsonl")
    folder = spoiled(tiny_models["llama"], tmp_path, kind)
    task = ["task=local", "task.path=colours.jsonl", "tracking=off", *SHORT]
    given = ["model=smollm2_135m", "model.checkpoints.base=someone/spoiled", *task]
    with serving(FakeHub({("models", "someone/spoiled"): folder})) as spoiled_hub:
        done = called(verb, spoiled_hub.url, tmp_path, *given)
        if kind == "fp8":  # its weights are in the cache now, and looked at before anything else
            again = called("validate", spoiled_hub.url, tmp_path, *given)
            assert again.returncode == 2
            assert says in again.stderr
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_weights_that_are_not_in_the_cache_are_missed_before_a_run_begins(
    hub: FakeHub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    write_colour_task(tmp_path / "colours.jsonl")
    given = ["model=smollm2_135m", "model.checkpoints.base=someone/tiny", "task=local", "task.path=colours.jsonl"]
    with serving(hub):
        assert called("validate", hub.url, tmp_path, *given, "tracking=off").returncode == 0
    done = called("validate", hub.url, tmp_path, *given, "tracking=off")
    assert done.returncode == 2
    assert "the weights of someone/tiny are not all in the local cache" in done.stderr
    assert called("plan", hub.url, tmp_path, *given).returncode == 0


@pytest.mark.parametrize(
    "given",
    [
        ["model=smollm2_135m"],
        ["task=hub", "task.hub_id=someone/colours", "task.columns.prompt=prompt", "task.columns.completion=completion"],
    ],
)
def test_without_a_network_a_name_of_the_hub_is_one_message_and_no_retries(given: list[str], tmp_path: Path) -> None:
    done = called("validate", "http://127.0.0.1:9", tmp_path, *given)
    assert done.returncode == 2
    [message, where, do] = done.stderr.strip().splitlines()
    assert "is not in the local cache, and the Hub can't be reached" in message
    assert where.startswith("  where:")
    assert do.startswith("  do:")
