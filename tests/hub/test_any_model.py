"""``model=hub``: any model by its id, from a Hub on the loopback, from the cache, or refused in one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_exp import load_run
from qlora_exp.config.from_record import recorded_overrides
from qlora_exp.records.model_card import model_card
from qlora_exp.tracking.fields import run_params
from tests.conftest import write_colour_task
from tests.hub.fake_hub import FakeHub, serving
from tests.hub.test_hub import SHORT, called


@pytest.fixture(scope="module")
def hub(tiny_models: dict[str, Path]) -> FakeHub:
    names = ("someone/tiny", "someone/tiny-Instruct")
    return FakeHub({("models", name): tiny_models["llama"] for name in names})


@pytest.mark.long
def test_an_id_is_enough_to_plan_to_train_and_to_train_again_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    write_colour_task(tmp_path / "colours.jsonl")
    task = ["task=local", "task.path=colours.jsonl", "tracking=off"]
    pair = ["model=hub", "model.id=someone/tiny", "model.instruct_id=someone/tiny-Instruct"]
    with serving(hub):
        planned = called("plan", hub.url, tmp_path, *pair, "--json")
        assert not [asked for asked in hub.asked if "safetensors" in asked]
        first = called("run", hub.url, tmp_path, *pair, *task, *SHORT)
    assert planned.returncode == 0, planned.stderr
    assert [run["settings"]["model"] for run in json.loads(planned.stdout)] == ["someone/tiny"]
    assert first.returncode == 0, first.stderr
    folder = next((tmp_path / "outputs" / "runs").iterdir())
    record = load_run(folder)
    assert "-tiny-base-nf4-" in record.run_id
    assert record.name.startswith("tiny-base nf4 ")
    assert str(record.model_fingerprint).startswith("hub:someone/tiny@")
    assert "A LoRA adapter for `someone/tiny` (base" in model_card(record)
    assert run_params(record)["model.family"] == "someone/tiny"
    assert recorded_overrides(record)[:1] == ["model=hub"]

    again = called("run", hub.url, tmp_path, *pair, *task, *SHORT, "seed=2")  # nobody answers there any longer
    assert again.returncode == 0, again.stderr
    other = called("run", hub.url, tmp_path, *pair, *task, "model.variant=instruct")
    assert other.returncode == 2
    assert "the weights of someone/tiny-Instruct are not all in the local cache" in other.stderr


COMMANDS = """
import sys
from qlora_exp.cli import main
for name in sys.argv[1:]:
    print(name, main(["validate", "model=hub", f"model.id=someone/{name}"]), file=sys.stderr)
"""


def test_a_model_that_the_hub_does_not_give_is_one_message(hub: FakeHub, tmp_path: Path) -> None:
    closed = {"someone/gated": (403, "GatedRepo"), "someone/private": (401, "RepoNotFound")}
    with serving(FakeHub(hub.repositories, closed=closed)) as refusing:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": refusing.url, "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", COMMANDS, "gated", "private", "absent"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert lines == [
        "error: someone/gated is gated",
        "  where: model.id = someone/gated",
        "  do:    accept its licence at https://huggingface.co/someone/gated and run: hf auth login",
        "gated 2",
        "error: the Hub has no model someone/private",
        "  where: model.id = someone/private",
        "  do:    check its spelling; a private one needs: hf auth login",
        "private 2",
        "error: the Hub has no model someone/absent",
        "  where: model.id = someone/absent",
        "  do:    check its spelling; a private one needs: hf auth login",
        "absent 2",
    ]
