"""A plan counts the task's own rows, as the run will: without torch, by the tokenizer's file."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.data.load import load_data
from qlora_exp.estimate.tokens import PlannedRows, RowCounter, row_lengths
from qlora_exp.estimate.workload import RowLengths
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.paths import EMBEDDED
from tests.conftest import write_colour_task

FEW = ["task.max_train_items=300"]


def as_loaded(config: Config) -> PlannedRows:
    """By transformers' tokenizer and the run's own loading."""
    splits = load_data(config, load_tokenizer(config.model), config.training.max_length)
    lengths = row_lengths(splits)
    scored = [len(item.completion_ids) + len(item.end_ids) for item in splits.train]
    validated = [len(item.prompt_ids) + len(item.completion_ids) + len(item.end_ids) for item in splits.validation]
    found = replace(RowLengths.of(lengths, scored), longest_validation_tokens=max(validated))
    return PlannedRows(len(lengths), len(lengths), statistics.fmean(lengths), found)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.variant=instruct"],
        ["task.format=chat"],  # by the instruct sibling's template
        ["model.variant=instruct", "task.format=plain"],
        ["task.system='Answer in one word.'", "model.variant=instruct"],
    ],
    ids=" ".join,
)
def test_rows_are_counted_as_a_run_tokenizes_them(overrides: list[str]) -> None:
    config = compose([*FEW, *overrides])
    assert RowCounter().of(config) == as_loaded(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_rows_of_a_model_and_a_task_on_disk_are_counted(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    task = write_colour_task(tmp_path / "colours.jsonl")
    config = compose(["model=local", f"model.path={tiny_models[family]}", "task=local", f"task.path={task}"])
    assert RowCounter().of(config) == as_loaded(config)


@pytest.mark.parametrize("variant", ["base", "instruct"])
def test_rows_are_counted_with_the_tokenizer_of_a_gguf_file(
    variant: str, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from qlora_exp.export.gguf import write_gguf

    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    write_gguf(model, EMBEDDED / variant, tmp_path / "m.gguf", "q8_0", "m")
    task = write_colour_task(tmp_path / "colours.jsonl")
    given = ["model=local", f"model.path={tmp_path / 'm.gguf'}", f"model.variant={variant}"]
    config = compose([*given, "task=local", f"task.path={task}"])
    assert RowCounter().of(config) == as_loaded(config)


def test_of_many_rows_some_stand_for_all() -> None:
    config = compose([])
    found, loaded = RowCounter().of(config), as_loaded(config)
    assert found is not None
    assert found.counted < found.rows == loaded.rows
    assert found.mean_tokens == pytest.approx(loaded.mean_tokens, rel=0.03)
    assert found.lengths.longest_tokens == pytest.approx(loaded.lengths.longest_tokens, rel=0.1)
    assert found.lengths.row_max_loss_tokens == pytest.approx(loaded.lengths.row_max_loss_tokens, rel=0.2)
    assert found.lengths.mean_loss_tokens == pytest.approx(loaded.lengths.mean_loss_tokens, rel=0.05)
    assert found.lengths.loss_tokens_deviation == pytest.approx(loaded.lengths.loss_tokens_deviation, rel=0.1)


@pytest.mark.parametrize(
    "overrides", [["training.max_length=26"], ["training.max_length=40", "task.kind=generation", "task.goal=null"]]
)
def test_rows_are_cut_and_refused_as_a_run_does(overrides: list[str]) -> None:
    counter = RowCounter()
    dropping = compose([*FEW, *overrides, "task.invalid_rows=drop"])
    assert counter.of(dropping) == as_loaded(dropping)
    assert counter.of(compose([*FEW, *overrides])) is None  # the run will refuse them


def test_a_template_sees_what_transformers_shows_it(tmp_path: Path) -> None:
    template = tmp_path / "told.jinja"
    template.write_text(
        "{% if tools is not none %}a tool{% endif %}{% for message in messages %}<{{ message.role }}>\n"
        "{{ message.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}",
        encoding="utf-8",
    )
    config = compose([*FEW, "task.format=chat", f"model.chat_template={template}"])
    assert RowCounter().of(config) == as_loaded(config)
    template.write_text("{{ 1 / 0 }}", encoding="utf-8")
    assert RowCounter().of(config) is None


def test_each_checkpoint_counts_with_its_own_tokenizer(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    task = write_colour_task(tmp_path / "colours.jsonl")
    counter, given = RowCounter(), ["model=local", "task=local", f"task.path={task}"]
    configs = [compose([*given, f"model.path={tiny_models[family]}"]) for family in ("llama", "gpt2")]
    assert [counter.of(config) for config in configs] == [as_loaded(config) for config in configs]


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=hub", "task.hub_id=nobody/nothing"],
        ["model=llama3_1_8b"],
        ["task=local", "task.path=nowhere.jsonl"],
        ["task=local", "task.path=broken.jsonl"],
    ],
    ids=" ".join,
)
def test_rows_that_are_not_here_are_unknown(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"prompt": "only half', encoding="utf-8")
    assert RowCounter().of(compose(overrides)) is None
    assert main(["plan", *overrides]) == 0
    assert "for rows as long as training.max_length" in capsys.readouterr().out


@pytest.mark.long
def test_the_plan_and_the_run_predict_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "uncalibrated"))
    given = [*FEW, "training.device=cpu", "training.max_steps=2", "training.batch_size=4", "evaluation=quick"]
    given += ["evaluation.max_items=4", "tracking=off", f"output_root={tmp_path}"]
    assert main(["plan", "--json", *given]) == 0
    [planned] = json.loads(capsys.readouterr().out)
    subprocess.run([sys.executable, "-m", "qlora_exp.cli", "run", *given], check=True, capture_output=True)
    [file] = tmp_path.glob("runs/*/record.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    of_run = record["plan"]
    assert planned["memory"]["peak_bytes"] == of_run["predicted_peak_train_bytes"] + of_run["predicted_context_bytes"]
    assert planned["rows"]["mean_tokens"] * 8 == pytest.approx(of_run["predicted_train_tokens"], abs=0.5)
    assert planned["seconds"] is None
    assert of_run["predicted_train_seconds"] is None

    assert main(["plan", "--json", *given]) == 0  # now by the run that ended
    [planned] = json.loads(capsys.readouterr().out)
    limited = [*given, "budget.seconds=600"]
    told = subprocess.run([sys.executable, "-m", "qlora_exp.cli", "run", *limited], check=True, capture_output=True)
    [file] = set(tmp_path.glob("runs/*/record.json")) - {file}
    of_run = json.loads(file.read_text(encoding="utf-8"))["plan"]
    assert planned["seconds"] == pytest.approx(of_run["predicted_train_seconds"])
    assert planned["other_seconds"] == pytest.approx(of_run["predicted_other_seconds"])
    speed = record["speed"]
    assert planned["other_seconds"] == pytest.approx(speed["total_seconds"] - speed["train_seconds"])
    assert (
        "budget.seconds=600 is enough for about 2 of 2 steps (2–2, from 1 training of this base" in told.stderr.decode()
    )


def test_counting_rows_needs_no_torch() -> None:
    program = "import sys; from qlora_exp.cli import main; main(['plan', 'model.variant=instruct', '--json'])"
    told = "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{program}\n{told}"], capture_output=True, text=True, check=True)
    *said, modules = done.stdout.splitlines()
    assert json.loads("\n".join(said))[0]["rows"]["counted"] > 0
    assert modules.split() == ["False", "False"]


def test_a_plan_says_why_the_tasks_rows_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "task.csv"
    task.write_text("prompt,completion\n" + "".join(f"p{n},c{n}\n" for n in range(20)))
    overrides = ["task=local", f"task.path={task}", "task.columns.group=paragraph"]
    assert main(["plan", *overrides]) == 0
    out = capsys.readouterr().out
    assert "the task's rows can't be read" in out
    assert "paragraph" in out
