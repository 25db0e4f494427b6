"""A record's configuration as overrides: read back, they give the same configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from qlora_exp.architecture.run_plan import config_fingerprint
from qlora_exp.config.compose import compose
from qlora_exp.config.from_record import flat_overrides, recorded_overrides
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import to_plain
from qlora_exp.records.redaction import REDACTED
from qlora_exp.records.types import Device, Environment, RunRecord, Status
from qlora_exp.runs.entry_points import config_from_plain

DEVICE = Device("cpu", None, 1, None, None, None, False)
ENVIRONMENT = Environment("3.11", "linux", {}, DEVICE, None, None, None, None, None, None, None)


def record_of(config: dict[str, Any]) -> RunRecord:
    return RunRecord(1, "run", "name", Status.COMPLETED, "2026-11-21T00:00:00+00:00", None, config, ENVIRONMENT)


RECORDED = [
    [],
    ["model.variant=instruct", "quantization=fp16", "lora.r=4", "seed=7"],
    ["model=local", "model.path=/some/dir with spaces", "training.max_steps=3"],
    ["model=llama3_1_8b", "lora.alpha_policy=fixed", "lora.alpha=32", "targets.modules=[q_proj,v_proj]"],
    [
        "task=local",
        "task.path=rows.jsonl",
        "'task.prompt=\"Q: {q}\\nA:\"'".strip("'"),
        "task.goal='rouge_l >= 0.6'",
    ],
    ["task=hub", "task.hub_id=owner/name", 'task.prompt="{question}"', 'task.completion="{answer}"'],
    ["tracking=off", "training.max_steps=null", "training.max_tokens=1000", "name='it''s'".replace("''", "\\'")],
    ["evaluation=quick", "training.scheduler=linear", "task.labels=[a,'1','true',null_]", "task.kind=classification"],
]


@pytest.mark.parametrize("overrides", RECORDED, ids=lambda overrides: " ".join(overrides) or "defaults")
def test_the_overrides_of_a_record_compose_to_its_configuration(overrides: list[str]) -> None:
    config = to_plain(compose(overrides))
    assert to_plain(compose(recorded_overrides(record_of(config)))) == config


def test_a_record_of_a_version_that_took_steps_and_tokens_is_read_as_it_was_trained_to_its_tokens() -> None:
    config = to_plain(compose(["training.max_steps=null", "training.max_tokens=1000"]))
    config["training"]["max_steps"] = 200
    assert config_from_plain(config).training.max_steps is None


def test_a_record_of_a_version_without_some_settings_of_a_task_is_read() -> None:
    config = to_plain(compose([]))
    del config["task"]["separator"], config["task"]["special_tokens"]
    assert config_from_plain(config).task == compose([]).task


def test_a_record_names_its_files_wherever_it_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(here)
    given = ["task=local", "task.path=rows.jsonl", "model=local", "model.path=../model", "model.chat_template=t.jinja"]
    config = compose(given)
    assert (config.task.path, config.model.path) == (str(here / "rows.jsonl"), str(tmp_path / "model"))
    assert config.model.chat_template == str(here / "t.jinja")
    monkeypatch.chdir(there)
    again = compose(recorded_overrides(record_of(to_plain(config))))
    assert again == config
    assert config_fingerprint(again) == config_fingerprint(config)
    same_file = compose(
        ["task=local", "task.path=../here/rows.jsonl", *given[2:4], f"model.chat_template={here}/t.jinja"]
    )
    assert config_fingerprint(same_file) == config_fingerprint(config)


def test_changes_win_and_a_changed_group_takes_its_own_values() -> None:
    record = record_of(to_plain(compose(["quantization=nf4", "quantization.double_quantization=false", "lora.r=4"])))
    changed = compose(recorded_overrides(record, ["quantization=fp32", "lora.r=32"]))
    assert changed.quantization == compose(["quantization=fp32"]).quantization
    assert changed.lora.r == 32
    assert dataclasses.replace(changed.lora, r=4) == compose(["lora.r=4"]).lora


def test_a_changed_task_asks_for_nothing_of_the_recorded_one() -> None:
    record = record_of(to_plain(compose(["task=local", "task.path=rows.jsonl", "lora.r=4"])))
    assert compose(recorded_overrides(record, ["task=embedded"])).task == compose([]).task


def test_a_redacted_value_is_not_taken_for_a_setting() -> None:
    config = to_plain(compose([]))
    config["tracking"]["uri"] = f"https://me:{REDACTED}@host"
    assert not [text for text in recorded_overrides(record_of(config)) if REDACTED in text]


AWKWARD: tuple[Any, ...] = (
    *("plain", "", "with space", "a,b", "it's", 'say "x"', "back\\slash", "end\\", "1", "1e3", "true", "null", "nan"),
    *("[x]", "{q}\nA:", "a=b", "ü", "$x", "#", 1, 1.5, 1e-05, True, None),
    *(["a b", "c"], {"train": "a-b", "test": "c d"}),
)


@pytest.mark.parametrize("value", AWKWARD, ids=repr)
def test_a_value_is_read_back_by_hydra_as_it_was(value: Any) -> None:
    assert plain(OverridesParser.create().parse_override(f"key={hydra_value(value)}").value()) == value


def plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    return value


def test_a_settings_file_chooses_groups_before_it_sets_keys() -> None:
    given = flat_overrides({"lora": {"r": 4}, "task.path": "rows.jsonl", "task": "local"})
    assert given == ["task=local", "lora.r=4", "task.path=rows.jsonl"]
