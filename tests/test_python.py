"""From Python: the examples of docs/python.md and the notebook run on a fresh folder, and say what they say they do."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import qlora_exp
from qlora_exp.errors import ConfigError, Problems, RecordError
from qlora_exp.records.files import read_record

ROOT = Path(__file__).resolve().parents[1]
LADDER = 'sweep("rank_doubling", "sweep.ladder.margin=0.1"'
SLEEPING = ', {"training.engine": "sleep", "training.sleep_seconds": 0.01, "tracking": "off"}'
"""What the page's ladder gets here: trials that train nothing."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the examples of docs/python.md leave, each block run after the one before."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert LADDER in text
    blocks = re.findall(r"```python\n(.*?)```", text.replace(LADDER, LADDER + SLEEPING), re.DOTALL)
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("python")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
    return names


def test_a_run_is_its_record_items_curve_and_model(page: dict[str, Any]) -> None:
    tuned = page["tuned"]
    assert tuned.record == read_record(tuned.paths.record)
    assert tuned.status == "COMPLETED"
    assert tuned.config["targets"]["set"] == "all_linear"
    assert len(page["items"]) == tuned.scores.after.items == 64
    assert page["items"]["correct"].mean() == pytest.approx(tuned.scores.after.accuracy)
    assert page["curve"]["step"].tolist()[-1] == 5
    assert page["figure"].data[0].y[-1] == page["curve"]["loss"].iloc[-1]
    assert "lora_A" in str([name for name, _ in page["model"].named_parameters()])
    assert page["model"].active_peft_config.r == 16
    assert not page["model"].training
    assert page["answer"] is not None
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert twin == tuned
    with pytest.raises(AttributeError):
        _ = tuned.nonesuch


def test_a_study_has_its_trials_its_best_run_plots_and_report(page: dict[str, Any]) -> None:
    study = page["study"]
    trials = study.trials()
    best = trials.sort_values("scores.after.loss_per_item").iloc[0]
    assert trials["lora.r"].tolist() == [4, 8]
    assert study.best.run_id == best["run_id"]
    assert study.best.scores.after.loss_per_item == best["scores.after.loss_per_item"]
    assert study.runs()["run_id"].tolist() == trials["run_id"].tolist()
    assert study.answer is None
    assert list(study.plot("rank").data[0].x) == [4, 8]
    assert page["page"].read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(qlora_exp.errors.AnalysisError, match="no plot 'ranks'"):
        study.plot("ranks")


def test_a_ladder_has_the_answer_that_its_file_has(page: dict[str, Any]) -> None:
    assert page["ladder"].spec.synthetic
    assert page["answer"]["use_rank"] in (8, 16, 32, 64, 128)
    assert page["ladder"].best.config["lora"]["r"] == page["answer"]["use_rank"]


def test_the_table_of_runs_has_one_row_a_run_and_takes_conditions(page: dict[str, Any]) -> None:
    root = page["folder"] / "outputs"
    table = qlora_exp.runs(root)
    assert table["run_id"].is_unique
    assert len(table) == len(list((root / "runs").iterdir()))
    assert set(page["table"]["r"]) == set(table["r"]) - {4}
    one = table[table["run_id"] == page["tuned"].run_id].iloc[0]
    scores, speed = page["tuned"].scores, page["tuned"].speed
    assert (one["loss"], one["scores.before.loss"]) == (scores.after.loss, scores.before.loss)
    assert (one["seconds"], one["training.max_steps"]) == (speed.total_seconds, 5)
    assert len(qlora_exp.runs(root, study="rank_doubling")) == len(page["ladder"].trials())
    trained = qlora_exp.runs(root, where="training.engine!=sleep")
    assert len(trained) == 4
    wide = qlora_exp.runs(root, where=["targets.set=all_linear", "training.engine=sft"])
    assert wide["run_id"].tolist() == [page["tuned"].run_id]
    assert len(qlora_exp.runs(root, where="training.max_tokens!=1")) == len(table)
    assert qlora_exp.runs(root, where="lora.dropout<0").empty
    for wrong, message in (("lora.rank=8", "did you mean"), ("lora.r", "FIELD=VALUE")):
        with pytest.raises(ConfigError) as raised:
            qlora_exp.runs(root, where=wrong)
        assert message in str(raised.value)


def test_wrong_input_is_an_exception_with_the_commands_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for call, arguments in ((qlora_exp.run, ()), (qlora_exp.sweep, ("demo",))):
        with pytest.raises(ConfigError) as one:
            call(*arguments, "lora.rank=8")
        assert (one.value.what, one.value.where) == ("there is no key 'lora.rank'", "lora")
        said = "\n".join(f"# {part}" for part in (one.value.what, one.value.where, one.value.hint))
        assert said in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
        with pytest.raises(Problems) as two:
            call(*arguments, {"lora": {"rank": 8}, "quantization": "nf5"})
        assert len(two.value.errors) == 2
    with pytest.raises(ConfigError, match="sweep"):
        qlora_exp.sweep("rank-doubling")
    with pytest.raises(ConfigError, match="needs a validation loss"):
        qlora_exp.sweep("lora.r=4,8", "sweep.pruner=median")
    for load in (qlora_exp.load_run, qlora_exp.load_study):
        with pytest.raises(RecordError):
            load("nonesuch")
    assert qlora_exp.runs().empty
    assert {"run_id", "loss", "peak_train_bytes", "cost_usd"} <= set(qlora_exp.runs().columns)
    assert list(tmp_path.iterdir()) == []
    assert "lora.rank" not in capsys.readouterr().err


def test_the_name_runs_is_the_table_before_and_after_the_package_of_that_name_is_used() -> None:
    code = (
        "import sys, qlora_exp\nfrom qlora_exp import runs\nassert runs('nowhere').empty\n"
        "import qlora_exp.runs.first_record as room\nfrom qlora_exp.runs import first_record\n"
        "assert room is first_record and qlora_exp.runs is runs and runs('nowhere').empty"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_import_is_light() -> None:
    code = "import sys, qlora_exp; print(*{'torch', 'pandas', 'plotly', 'hydra', 'numpy', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


@pytest.mark.long
def test_the_notebook_runs_on_a_fresh_folder_and_is_stored_without_outputs(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "first_day.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    shown = [output.get("data", {}).get("text/plain", output.get("text", "")) for output in outputs]
    assert any("did you mean lora.r=8?" in text for text in shown)
    assert any("COMPLETED, accuracy" in text for text in shown)
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 3
