"""Each family of conf/model, as its publisher writes it, goes the whole line: validate, preview, run, export, oracle.

The folders are small and random (:mod:`tests.real.families`); they lie in the Hub's cache under their published names,
so that ``model=llama3_2_1b`` finds them without a network.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp.cli import main
from qlora_exp.paths import CONF
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from tests.real.families import FAMILIES, KINDS, write_family
from tests.real.perfect_model import loaded, perfect_scores

ROWS = [
    ("Capital of France?", "Paris"),
    ("Write two lines.", "The cat sat down , and said : \"I don't know .\"\nIt isn't 12,345.67 % true !"),
    ("Write Python.", "def f(x):\n    return x + 1\n\n\nprint(f(2))"),
    ("Other alphabets?", "奶酪 naïve café 👍🏽 …"),
    ("A letter?", "y"),
    ("A list?", "- one\n- two\n\t- three"),
    ("JSON?", '{"a": [1, 2], "b": null}'),
    ("Words that name tokens?", "im_end, end_of_turn, eot_id, INST and s"),
    ("And last?", "I think, therefore I am."),
    *((f"{number} + 2 =", str(number + 2)) for number in range(9)),
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VARIANTS = ("base", "instruct")
NO_GGUF = ("gemma3_4b", "mistral_7b")
"""Two towers, which llama.cpp has in two files; and a SentencePiece vocabulary that puts a space before a text."""


def checkpoints(name: str) -> dict[str, str]:
    """Variant → repository, as conf/model has it."""
    found: dict[str, str] = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["checkpoints"]
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def published(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a family's checkpoint into the Hub's cache (both variants: a base takes its template from the other)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def publish(name: str, variant: str) -> Path:
        for each, repository in checkpoints(name).items():
            home = cache / f"models--{repository.replace('/', '--')}"
            if not home.exists():
                (home / "refs").mkdir(parents=True)
                (home / "refs" / "main").write_text(COMMIT)
                write_family(name, each, home / "snapshots" / COMMIT)
        return cache / f"models--{checkpoints(name)[variant].replace('/', '--')}" / "snapshots" / COMMIT

    return publish


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_family_of_the_configuration_is_here() -> None:
    shipped = {file.stem for file in (CONF / "model").glob("*.yaml")} - {"_family", "embedded", "hub", "local"}
    assert shipped == set(FAMILIES)
    assert set(KINDS) <= shipped


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in KINDS for variant in VARIANTS])
def test_the_oracle_is_right_on_every_row_and_never_invalid(
    name: str, variant: str, published: Callable[[str, str], Path], rows: Path, colour_task: Path
) -> None:
    folder = str(published(name, variant))
    given = [f"model={name}", f"model.variant={variant}", "task=local", "evaluation.generate=true"]
    free = perfect_scores(folder, [*given, f"task.path={rows}"])
    wrong = [
        (answer, generated)
        for answer, generated in zip(free.items["answer"].to_pylist(), free.items["generated"].to_pylist(), strict=True)
        if answer != generated
    ]
    assert not wrong
    assert free.scores.exact_match == 1.0
    assert free.scores.loss == pytest.approx(0.0, abs=1e-6)
    chosen = perfect_scores(folder, [*given, "task.kind=classification", f"task.path={colour_task}"])
    assert chosen.scores.exact_match == 1.0
    assert chosen.scores.invalid_answer_rate == 0.0
    assert chosen.scores.accuracy == 1.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_text_begins_once_and_an_answer_ends_where_the_model_stops(
    name: str, variant: str, published: Callable[[str, str], Path], rows: Path
) -> None:
    folder = published(name, variant)
    _, tokenizer, splits = loaded([f"model={name}", f"model.variant={variant}", "task=local", f"task.path={rows}"])
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    starts = {"gemma", "llama", "mistr"}
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    ends = generation["eos_token_id"]
    for item in splits.train:
        if name[:5] in starts:
            assert item.ids[0] == tokenizer.convert_tokens_to_ids(settings["bos_token"])
            assert item.ids.count(item.ids[0]) == 1
        assert item.end_ids[0] in (ends if isinstance(ends, list) else [ends])


def arguments(name: str, variant: str, rows: Path, outputs: Path) -> list[str]:
    return [
        *(f"model={name}", f"model.variant={variant}", "task=local", f"task.path={rows}", "tracking=off"),
        *(f"quantization={'nf4' if variant == 'instruct' else 'bf16'}", "targets=all_linear"),
        *("training.device=cpu", "training.max_steps=5", "training.batch_size=4", "training.max_length=256"),
        *("training.learning_rate=0.01", "evaluation.max_items=4", "evaluation.forgetting_documents=2"),
        f"output_root={outputs}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_goes_from_its_published_files_to_an_exported_model(
    name: str,
    variant: str,
    published: Callable[[str, str], Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gemma 3 4B, of which transformers once wanted token_type_ids in training
    (https://github.com/huggingface/trl/issues/5032), among them."""
    published(name, variant)
    given = arguments(name, variant, rows, tmp_path / "outputs")
    assert main(["validate", *given]) == 0
    assert main(["data", "preview", *given]) == 0
    capsys.readouterr()
    assert main(["run", *given]) == 0, capsys.readouterr().err
    record = read_record(next((tmp_path / "outputs" / "runs").glob("*/record.json")))
    assert record.status is Status.COMPLETED
    _check_learned(record)
    formats = "adapter,merged" if name in NO_GGUF else "adapter,merged,q8_0"
    exported = tmp_path / "exported"
    called = ["export", "last", "--output-root", str(tmp_path / "outputs"), "--to", str(exported)]
    assert main([*called, "--formats", formats]) == 0, capsys.readouterr().err
    _check_exported(exported, record)


def _check_learned(record: RunRecord) -> None:
    """A few rows are enough to lower the loss on them, not on others."""
    assert record.training is not None
    assert record.training.first_loss is not None
    assert record.training.final_loss is not None
    assert record.training.final_loss < record.training.first_loss


def _check_exported(folder: Path, record: RunRecord) -> None:
    """The merged model answers as the run did, and loads without a weight that is missing or left over."""
    told: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    check = next(each for each in told["artefacts"] if each["format"] == "merged")["check"]
    assert check["exported_loss_per_item"] == pytest.approx(check["run_loss_per_item"], rel=0.1)
    _, report = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoTokenizer.from_pretrained(folder / "merged")
