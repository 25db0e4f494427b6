"""``inspect`` and ``chat`` on a GGUF file: its own probabilities, next to the base of the run it was exported from."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import shutil
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

gguf = pytest.importorskip("gguf")
RUN = [
    *("model.variant=instruct", "training.device=cpu", "training.max_steps=6", "training.batch_size=8"),
    *("training.learning_rate=0.005", "quantization=nf4", "evaluation=quick", "evaluation.max_items=4"),
    *("evaluation.before=false", "tracking=off"),
]
NO_LLAMA = "qlora_exp.inspection.gguf_models.why_not"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "outputs"
    root = ["--output-root", str(folder)]
    assert main(["run", *RUN, f"output_root={folder}"]) == 0
    assert main(["export", "last", "--formats", "q8_0,q4_0", "--check-items", "0", *root]) == 0
    return folder


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NO_LLAMA, lambda: "llama.cpp isn't installed: pip install it")


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def file_of(outputs: Path, kind: str = "q4_0") -> Path:
    return find_run("last", OutputPaths.of(outputs)).export / f"model-{kind}.gguf"


@pytest.mark.usefixtures("without_llama_cpp")
def test_probabilities_are_those_of_the_files_weights_and_of_the_runs_base(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    file = file_of(outputs)
    found = inspected(capsys, str(file), "--item", "0", "--steps", "4")
    ids, chosen = [token for token, _ in found["prompt_tokens"]], [step["token_id"] for step in found["steps"]]
    record = read_record(find_run("last", OutputPaths.of(outputs)).record)
    dequantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for model, name in ((dequantized, "tuned"), (load_base(config_from_plain(record.config), "cpu").model, "base")):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1].float()
        for step, row in zip(found["steps"], logits.log_softmax(-1), strict=True):
            assert step[f"probability_{name}"] == pytest.approx(math.exp(row[step["token_id"]]), rel=1e-3, abs=1e-6)
            assert step[f"top_{name}"][0]["token_id"] == int(row.argmax())
    assert found["run_id"] == record.run_id
    assert found["file"] == str(file)
    assert "dequantized to float32" in found["notes"][0]
    # The same file by other names; another file has other weights; the run itself has no file.
    root = ("--item", "0", "--steps", "4", "--output-root", str(outputs))
    assert inspected(capsys, "last", "--gguf", "q4_0", *root) == found
    other = inspected(capsys, "last", "--gguf", "q8_0", *root)
    assert other["steps"][0]["top_base"] == found["steps"][0]["top_base"]
    assert other["steps"][0]["probability_tuned"] != found["steps"][0]["probability_tuned"]
    assert inspected(capsys, "last", *root)["file"] is None


@pytest.mark.usefixtures("without_llama_cpp")
def test_a_file_whose_run_is_not_known_is_inspected_alone(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(file_of(outputs), tmp_path / "on a phone.gguf"))
    found = inspected(capsys, str(file), "a large wild cat", "--steps", "3")
    assert found["run_id"] is None
    assert found["base_answer"] is None
    assert all(step["probability_base"] is None and step["top_base"] == [] for step in found["steps"])
    assert found["prompt"].startswith("<|im_start|>user\na large wild cat")  # by the template in the file
    of_run = inspected(
        capsys, "last", "a large wild cat", "--gguf", str(file), "--steps", "3", "--output-root", str(outputs)
    )
    assert of_run["prompt_tokens"] == found["prompt_tokens"]
    for alone, paired in zip(found["steps"], of_run["steps"], strict=True):
        assert alone["probability_tuned"] == paired["probability_tuned"]
        assert paired["probability_base"] is not None
    page = tmp_path / "new" / "page.html"
    assert main(["inspect", str(file), "a large wild cat", "--steps", "3", "--html", str(page)]) == 0
    printed, text = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert "base says" not in printed
    assert "most likely, base" not in text
    assert text.count('<details class="token">') == len(found["steps"])


@pytest.mark.usefixtures("without_llama_cpp")
def test_a_base_whose_files_have_changed_is_not_shown_next_to_the_file(
    outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_exp.inspection.subject.fingerprint", lambda source: "sha256:another")
    found = inspected(capsys, str(file_of(outputs)), "a cat", "--steps", "1")
    assert found["base_answer"] is None
    assert "the base's files have changed" in found["notes"][1]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python isn't installed")
def test_llama_cpp_says_what_transformers_says_up_to_rounding(
    outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(file_of(outputs, "q8_0")), "--item", "0", "--steps", "4", "--branch", "0=a")
    phone = inspected(capsys, *arguments)
    monkeypatch.setattr(NO_LLAMA, lambda: "llama.cpp isn't installed")
    exact = inspected(capsys, *arguments)
    assert "llama.cpp" in phone["notes"][0]
    assert phone["steps"][0]["probability_tuned"] == pytest.approx(exact["steps"][0]["probability_tuned"], abs=0.02)
    assert phone["steps"][0]["probability_base"] == exact["steps"][0]["probability_base"]
    for ours, theirs in zip(phone["options"][:3], exact["options"][:3], strict=True):
        assert ours["tuned"] == pytest.approx(theirs["tuned"], abs=0.03)


def test_a_file_that_ends_llama_cpps_process_is_computed_by_transformers(
    outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import qlora_exp.export.llama_cpp as runtime

    crashing = tmp_path / "measure_llama_cpp.py"
    crashing.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", encoding="utf-8")
    monkeypatch.setattr(runtime, "why_not", lambda: None)
    monkeypatch.setattr(NO_LLAMA, lambda: None)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "llama_cpp.py"))
    found = inspected(capsys, str(file_of(outputs)), "a cat", "--steps", "1")
    assert "llama.cpp can't run the file" in found["notes"][0]
    assert found["steps"][0]["probability_tuned"] > 0


@pytest.mark.usefixtures("without_llama_cpp")
def test_chat_talks_to_a_file(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(file_of(outputs), tmp_path / "model.gguf"))
    saved = tmp_path / "new" / "talk.json"
    lines = ["/inspect", "a wild cat", "/base", "and a tame one", "/inspect", f"/save {saved}"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(file), "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert "dequantized to float32" in printed
    assert "hasn't answered yet" in printed
    assert "the base of this file isn't known" in printed
    assert "base: " not in printed
    talk = json.loads(saved.read_text(encoding="utf-8"))
    assert talk["file"] == str(file)
    assert [turn["role"] for turn in talk["tuned"]] == ["user", "assistant"] * 2
    assert main(["chat", str(file), "--only", "base"]) == 2
    assert "isn't known" in capsys.readouterr().err


def unknown_architecture(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "new.gguf", "an_architecture_of_tomorrow")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "new.gguf"


def test_what_is_no_model_or_no_file_of_the_run_is_refused_with_what_would_do(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.gguf").write_text("no model", encoding="utf-8")
    (tmp_path / "folder.gguf").mkdir()
    elsewhere = tmp_path / "export"
    shutil.copytree(file_of(outputs).parent, elsewhere)
    results = json.loads((elsewhere / "export.json").read_text(encoding="utf-8"))
    (elsewhere / "export.json").write_text(json.dumps(results | {"run_id": "another"}), encoding="utf-8")
    other = elsewhere / "model-q4_0.gguf"
    calls: list[tuple[list[str], str]] = [
        ([str(tmp_path / "txt.gguf")], "did you mean"),
        ([str(tmp_path / "text.gguf")], "the file isn't GGUF"),
        ([str(unknown_architecture(tmp_path))], "an_architecture_of_tomorrow"),
        (["last", "--gguf", "exported"], "2 exported GGUF files"),
        (["last", "--gguf", "q3_k"], "q4_0, q8_0"),
        (["last", "--gguf", str(other)], "exported from another run: another"),
        ([str(other), "--gguf", "q4_0"], "two GGUF files"),
        ([str(other), "--item", "0"], "there are no items"),
        (["last", "--html", str(tmp_path)], "it is a folder"),
        ([str(tmp_path / "folder.gguf")], "did you mean"),
        (["last", "--html", str(tmp_path / "text.gguf" / "page.html")], "can't be written"),
    ]
    for arguments, words in calls:
        prompt = [] if "--item" in arguments else ["a cat"]
        assert main(["inspect", arguments[0], *prompt, *arguments[1:], "--output-root", str(outputs)]) == 2, arguments
        assert words in capsys.readouterr().err, arguments
