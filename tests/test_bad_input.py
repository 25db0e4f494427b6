"""Mistakes that people make on their first day: each is answered with a setting or a command that works."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import check_multirun, compose
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError


@dataclass(frozen=True)
class Mistake:
    """``typed``: what a user types. ``suggested``: what the *do:* lines name, in their order. ``means``: whether the
    configuration of the suggestion is what was meant."""

    typed: str
    suggested: str
    means: Callable[[Config], Any] = lambda _: True


MISTAKES = [
    Mistake(
        "run lora.rank=8 quantization=nf5",
        "lora.r=8 quantization=nf4",
        lambda c: (c.lora.r, c.quantization.mode.name) == (8, "nf4"),
    ),
    Mistake("run learning_rate=1e-4", "training.learning_rate=1e-4", lambda c: c.training.learning_rate == 1e-4),
    Mistake("run training.lr=1e-4", "training.learning_rate=1e-4", lambda c: c.training.learning_rate == 1e-4),
    Mistake("run per_device_train_batch_size=4", "training.batch_size=4", lambda c: c.training.batch_size == 4),
    Mistake(
        "run per_device_train_batch_size=4 gradient_accumulation_steps=2",
        "training.batch_size=8 training.micro_batch_size=4",
        lambda c: (c.training.batch_size, c.training.micro_batch_size) == (8, 4),
    ),
    Mistake("run lora_r=16", "lora.r=16", lambda c: c.lora.r == 16),
    Mistake("run lora.r=eight", "lora.r=8", lambda c: c.lora.r == 8),
    Mistake("run lora.r=-8", "lora.r=8", lambda c: c.lora.r == 8),
    Mistake("run quantization=4bit", "quantization=nf4", lambda c: c.quantization.mode.name == "nf4"),
    Mistake("run quantization=int4", "quantization=nf4", lambda c: c.quantization.mode.name == "nf4"),
    Mistake("run quantization=8bit", "quantization=int8", lambda c: c.quantization.mode.name == "int8"),
    Mistake("run load_in_4bit=true", "quantization=nf4", lambda c: c.quantization.mode.name == "nf4"),
    Mistake("run load_in_8bit=True", "quantization=int8", lambda c: c.quantization.mode.name == "int8"),
    Mistake(
        "run bf16=true load_in_4bit=true",
        "quantization.compute_dtype=bfloat16 quantization=nf4",
        lambda c: c.quantization.compute_dtype.value == "bfloat16",
    ),
    Mistake("run lora.target_modules=[q_proj]", "targets.modules=[q_proj]", lambda c: c.targets.modules == ["q_proj"]),
    Mistake("run tracking=wandb", "tracking.also=[wandb]"),
    Mistake("run tracking=mlfow", "tracking=mlflow"),
    Mistake("run training.optimizer=adamw8bit", "training.optimizer=adamw_8bit"),
    Mistake("run --model smollm2_135m", "model=smollm2_135m", lambda c: c.model.family == "smollm2_135m"),
    Mistake("run --lora.r 16 seed=2", "seed=2 lora.r=16", lambda c: (c.lora.r, c.seed) == (16, 2)),
    Mistake("run --lora.r=16", "lora.r=16", lambda c: c.lora.r == 16),
    Mistake(
        "run --learning-rate 2e-4 --load_in_4bit",
        "training.learning_rate=0.0002 quantization=nf4",
        lambda c: c.training.learning_rate == 2e-4,
    ),
    Mistake(
        "run --model_name_or_path meta-llama/Llama-3.2-1B-Instruct",
        "model=llama3_2_1b model.variant=instruct",
        lambda c: c.model.variant.name == "instruct",
    ),
    Mistake(
        "run task=local task.path=qa.jsonl task.prompt={question} task.completion={answer}",
        """'task.prompt="{question}"' 'task.completion="{answer}"'""",
        lambda c: (c.task.prompt, c.task.completion) == ("{question}", "{answer}"),
    ),
]
"""Those that need no model and no data file."""

OF_THE_HUB = [
    Mistake("run model=Qwen/Qwen2.5-0.5B", "model=hub model.id=Qwen/Qwen2.5-0.5B"),
    Mistake("run model.path=Qwen/Qwen2.5-0.5B", "model=hub model.id=Qwen/Qwen2.5-0.5B"),
    Mistake("run --model Qwen/Qwen2.5-0.5B", "model=hub model.id=Qwen/Qwen2.5-0.5B"),
]


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, list[str]]:
    """What is printed for a mistake, and its *do:* lines."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    hints = re.findall(r"^\s*do:\s*(.*)$", message, re.MULTILINE)
    assert hints, message
    return message, hints


def settings_in(hint: str) -> list[str]:
    """The settings of the first suggestion in a *do:* line, as a shell reads them."""
    first = re.split(r"\?|; | \(|, or | or ", hint.removeprefix("did you mean "))[0]
    return [word.rstrip(",") for word in shlex.split(first) if re.match(r"\+?[\w.]+=", word)]


def corrected(typed: Sequence[str], hints: Sequence[str]) -> list[str]:
    """The overrides of the next attempt: the suggestions, and what was right already."""
    suggested = list(dict.fromkeys(text for hint in hints for text in settings_in(hint)))
    keys = {text.partition("=")[0] for text in suggested}
    right = [text for text in typed if not problems_of([text], multirun=False)]
    return [*(text for text in right if text.partition("=")[0] not in keys), *suggested]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.typed)
def test_a_mistake_is_answered_by_what_works(mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> None:
    command, *typed = shlex.split(mistake.typed)
    _, hints = answered(capsys, command, *typed)
    suggested = list(dict.fromkeys(text for hint in hints for text in settings_in(hint)))
    assert suggested == shlex.split(mistake.suggested)
    assert mistake.means(compose(corrected([text for text in typed if "=" in text and text[0] != "-"], hints)))


@pytest.mark.parametrize("mistake", OF_THE_HUB, ids=lambda mistake: mistake.typed)
def test_a_model_of_the_hub_is_named_by_its_id(mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> None:
    command, *typed = shlex.split(mistake.typed)
    _, hints = answered(capsys, command, *typed)
    assert [text for hint in hints for text in settings_in(hint)] == mistake.suggested.split()
    assert compose(mistake.suggested.split()).model.family == "hub"


@pytest.mark.parametrize("name", ["4bit", "4-bit", "4", "int4", "bnb-4bit", "q4"])
def test_four_bits_are_never_int8(name: str) -> None:
    [problem] = problems_of([f"quantization={name}"], multirun=False)
    assert problem.hint == "did you mean quantization=nf4?"


def test_a_list_without_brackets_names_the_run_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    message, _ = answered(capsys, "run", "lora.r=8,16")
    assert "qlora-exp run -m lora.r=8,16" in message
    check_multirun(["lora.r=8,16"])


def test_a_sweep_is_found_by_a_similar_name(capsys: pytest.CaptureFixture[str]) -> None:
    _, [hint] = answered(capsys, "sweep", "rank-doubling")
    assert hint == "did you mean qlora-exp sweep rank_doubling?"
    check_multirun(["sweeps=rank_doubling"])


def test_epochs_are_a_length_of_training() -> None:
    assert compose(["training.epochs=3"]).training.epochs == 3
    [problem] = problems_of(["num_train_epochs=3"], multirun=False)
    assert problem.hint == "did you mean training.epochs=3?"


def test_an_alpha_alone_is_fixed() -> None:
    assert compose(["lora.alpha=32"]).lora.alpha_policy == "fixed"
    assert compose(["lora.r=16"]).lora.alpha_policy == "2r"
    with pytest.raises(ConfigError, match="contradicts"):
        compose(["lora.alpha=32", "lora.alpha_policy=2r"])


def test_a_list_of_modules_is_no_axis_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert compose(["targets=q_proj,v_proj"]).targets.modules == ["q_proj", "v_proj"]
    assert compose(["targets=[q_proj]"]).targets.modules == ["q_proj"]
    for mixed in ("targets=attention,mlp", "targets=attention,q_proj"):
        answered(capsys, "run", mixed)


def test_the_target_sets_of_a_sweep_stay_an_axis() -> None:
    assert problems_of(["targets=attention,mlp"], multirun=True) == []
    [problem] = problems_of(["targets=q_proj,v_proj"], multirun=True)
    assert "targets.modules=[q_proj,v_proj]" in str(problem.hint)
    check_multirun(["targets.modules=[q_proj,v_proj]", "lora.r=4,8"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with settings and data files, which is the current one."""
    (tmp_path / "my.yaml").write_text("lora.r: 4\n", encoding="utf-8")
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("run my.yaml", "--from my.yaml"),
        ("plan seed=1 my.yaml", "--from my.yaml"),
        ("run --from nope.yaml", "did you mean --from my.yaml?"),
        ("run mi.yaml", "did you mean --from my.yaml?"),
    ],
)
def test_a_file_of_settings_belongs_behind_from(
    typed: str, hint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(capsys, *typed.split())[1] == [hint]
    os.remove(folder / "my.yaml")
    (folder / "my.yaml").write_text("lora_r: 4\nlora:\n  lora_alpha: 8\n", encoding="utf-8")
    _, hints = answered(capsys, "run", "--from", "my.yaml")
    assert hints == ["did you mean lora.r=4?", "did you mean lora.alpha=8?"]


def test_an_axis_of_a_sweep_has_our_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sweeps").mkdir()
    text = "# @package _global_\nsweep:\n  params: {learning_rate: '1e-4,1e-3', lora.lora_r: '4,8'}\n"
    (folder / "sweeps" / "mine.yaml").write_text(text, encoding="utf-8")
    _, hints = answered(capsys, "sweep", "mine")
    assert hints == ["did you mean training.learning_rate=1e-4,1e-3?", "did you mean lora.r=4,8?"]


def test_mistakes_in_data_and_machine_are_answered_by_what_works(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the embedded model's tokenizer, before any weight is loaded."""
    columns = ["task.columns.prompt=question", "task.columns.completion=answer"]
    _, [hint] = answered(capsys, "validate", "task=local", "task.path=qb.jsonl")
    assert "qa.jsonl" in hint
    local = ["task=local", "task.path=qa.jsonl"]
    _, [hint] = answered(capsys, "validate", *local, "task.columns.prompt=qestion", columns[1])
    assert "question" in hint
    assert main(["validate", *local, *columns]) == 0
    _, [hint] = answered(capsys, "validate", "training.batch_size=100000", "budget.memory_bytes=4000000000")
    [smaller] = settings_in(hint)
    assert smaller.startswith("training.micro_batch_size=")
    assert main(["validate", "training.batch_size=100000", "budget.memory_bytes=4000000000", smaller]) == 0
    _, [hint] = answered(capsys, "validate", "training.device=cuda")
    assert settings_in(hint) == ["training.device=auto"]
    assert main(["validate", *settings_in(hint)]) == 0


LAYOUTS = {
    "messages": lambda n: {
        "messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]
    },
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": f"a {n}"}]},
    "alpaca": lambda n: {"instruction": f"do {n}", "input": "x" * (n % 2), "output": f"a {n}"},
    "labels": lambda n: {"prompt": f"q {n}", "completion": ("red", "green", "blue")[n % 3]},
}


def test_usual_rows_need_no_setting_and_a_missing_label_is_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, row in LAYOUTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(40)), encoding="utf-8")
        assert main(["validate", "task=local", f"task.path={name}.jsonl", "model.variant=instruct"]) == 0, name
    labels = ["task=local", "task.path=labels.jsonl", "task.kind=classification"]
    message, _ = answered(capsys, "validate", *labels, "task.labels=[red,green]")
    assert message.count("'blue'") == 1
    assert main(["validate", *labels, "task.labels=[red,green,blue]"]) == 0


def test_a_model_that_is_not_here_names_what_works_without_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    _, [hint] = answered(capsys, "validate", "model=hub", "model.id=somebody/some-model")
    assert "hf download somebody/some-model" in hint
    assert "model=embedded" in hint
