"""``qlora-exp inspect``: the probabilities are the models' own, and the base is the base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_exp.cli import main
from qlora_exp.models.base import load_base
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.find import find_run
from qlora_exp.runs.entry_points import config_from_plain

RUN = [
    *("training.device=cpu", "training.max_steps=20", "training.batch_size=8", "training.max_length=64"),
    *("training.learning_rate=0.01", "evaluation=quick", "evaluation.max_items=12", "evaluation.before=false"),
    *("quantization=nf4", "targets=all_linear", "tracking=off"),
]


@pytest.fixture(scope="module")
def outputs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("inspect")
    task = write_colour_task(folder / "colours.jsonl")
    given = ["model=local", f"model.path={tiny_models['llama']}", "task=local", "task.kind=classification"]
    assert main(["run", *RUN, *given, f"task.path={task}", f"output_root={folder / 'outputs'}"]) == 0
    return folder / "outputs"


Inspect = Any


@pytest.fixture
def inspect(outputs: Path, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def inspected(*arguments: str) -> dict[str, Any]:
        assert main(["inspect", "last", *arguments, "--json", "--output-root", str(outputs)]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return inspected


def test_probabilities_are_those_of_a_plain_forward_pass_of_tuned_model_and_base(
    outputs: Path, inspect: Inspect
) -> None:
    from qlora_exp import load_run

    found = inspect("--item", "0", "--steps", "5", "--branch", "1=red")
    ids = [token for token, _ in found["prompt_tokens"]]
    chosen = [step["token_id"] for step in found["steps"]]
    tuned, _ = load_run("last", output_root=str(outputs)).model()
    record = read_record(find_run("last", OutputPaths.of(outputs)).record)
    base = load_base(config_from_plain(record.config), "cpu").model
    for model, name in ((tuned, "tuned"), (base, "base")):
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        for step, row in zip(found["steps"], expected, strict=True):
            assert step[f"probability_{name}"] == pytest.approx(math.exp(row[step["token_id"]]), rel=1e-3, abs=1e-6)
            assert step[f"top_{name}"][0]["token_id"] == int(row.argmax())
            assert step[f"entropy_{name}"] == pytest.approx(float(-(row.exp() * row).sum()), rel=1e-3)
    assert [step["forced"] for step in found["steps"]][:2] == [False, True]
    greedy = [step for step in found["steps"] if not step["forced"]]
    assert all(step["rank_tuned"] == 1 for step in greedy)
    assert any(step["rank_base"] > 1 for step in greedy)  # the run has learned something
    assert all(step["divergence"] > 0 for step in found["steps"])


def test_an_items_labels_have_the_probabilities_that_its_score_came_from(outputs: Path, inspect: Inspect) -> None:
    import pyarrow.parquet as pq

    file = find_run("last", OutputPaths.of(outputs)).items("after", "validation")
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 12  # evaluation.max_items of a larger split: only these are items of the run
    first = inspect("--item", "0", "--steps", "1")
    assert first == inspect("--item", rows[0]["item_id"], "--steps", "1")
    rows = rows[:4]
    for row in rows:
        found = inspect("--item", row["item_id"], "--steps", "1")
        assert found["expected"] == row["label"]
        assert found["options"][0]["label"] == row["predicted"]
        for model in ("tuned", "base"):
            assert sum(option[model] for option in found["options"]) == pytest.approx(1)


def test_sampled_tokens_repeat_with_their_seed_and_show_what_they_were_drawn_from(inspect: Inspect) -> None:
    draw = ("--item", "1", "--steps", "6", "--sample")
    first, again = (inspect(*draw, "temperature=5,top_k=4,seed=3") for _ in range(2))
    other = inspect(*draw, "temperature=5,top_k=4,seed=4")
    assert first == again
    assert [s["token_id"] for s in first["steps"]] != [s["token_id"] for s in other["steps"]]
    for step in first["steps"]:
        assert step["drawn_candidates"] == 4
        assert step["token_id"] in [one["token_id"] for one in step["top_tuned"]] or step["rank_tuned"] == 4
        assert sum(one["probability"] for one in step["drawn_from"]) <= 1 + 1e-6
        # The model's own probability is another one than that with which the token was drawn.
        assert step["drawn_from"][0]["probability"] != pytest.approx(step["top_tuned"][0]["probability"], rel=1e-3)


def test_a_prompt_of_ones_own_is_written_as_the_run_writes_prompts(inspect: Inspect) -> None:
    of_item = inspect("--item", "0", "--steps", "2")
    own = inspect(of_item["prompt"], "--steps", "2")
    assert own["prompt_tokens"] == of_item["prompt_tokens"]
    assert own["steps"] == of_item["steps"]
    assert own["expected"] is None


def test_the_page_is_offline_escapes_texts_and_has_every_step(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = tmp_path / "page.html"
    given = ["--steps", "3", "--html", str(page), "--output-root", str(outputs)]
    assert main(["inspect", "last", "<script>alert(1)</script> is", *given]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "://" not in text
    printed = capsys.readouterr().out
    assert text.count("<th>token ") == sum(line[:1].isdecimal() for line in printed.splitlines())
    assert max(map(len, printed.splitlines())) <= 100


def test_a_run_that_trained_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "outputs")
    assert main(["run", "training.engine=sleep", "training.max_steps=1", "tracking=off", f"output_root={root}"]) == 0
    assert main(["inspect", "last", "a cat", "--output-root", root]) == 2
    assert "trained no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--item 0"),
        (["a prompt", "--item", "0"], "either a PROMPT or --item"),
        (["  "], "the prompt is empty"),
        (["--item", "12"], "0 to 11"),
        (["--item", "colours.jsonl:x"], "colours.jsonl:"),
        (["--item", "0", "--branch", "red"], "--branch '0= plant'"),
        (["--item", "0", "--branch", "99=red"], "steps 0 to"),
        (["--item", "0", "--sample", "temprature=1"], "temperature"),
        (["--item", "0", "--sample", "temperature=hot"], "temperature=1"),
        (["--item", "0", "--sample", "top_p=0"], "top_p above 0"),
    ],
)
def test_a_wrong_call_is_refused_with_what_would_do(
    arguments: list[str], words: str, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "last", *arguments, "--output-root", str(outputs)]) == 2
    assert words in capsys.readouterr().err
