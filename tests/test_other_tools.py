"""Other tools' names for our settings: they exist in those tools, and files of those tools become ours."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_exp.cli import main
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.choices import groups
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Method
from qlora_exp.config.imported_settings import as_yaml, converted, tool_of, tool_of_file
from qlora_exp.config.other_tools import ARGS, BNB, COUNTERPARTS, LORA, SCRIPT, SFT, counterpart, tool_names
from qlora_exp.config.other_values import VALUES, value_here
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import Config
from qlora_exp.orchestration.command import study_spec

FILES = Path(__file__).parent / "settings_of_other_tools"
DOCS = Path(__file__).parents[1] / "docs" / "other_tools.md"

COMING = {"training.epochs", "model.adapter", "model.id", "tracking.also"}
"""Settings that a version may lack: an error then names the nearest ones of those that exist."""


def test_the_names_are_fields_of_the_installed_libraries() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments
    from trl import ModelConfig, ScriptArguments, SFTConfig

    def fields(*kinds: Any) -> set[str]:
        return {field.name for kind in kinds for field in dataclasses.fields(kind)}

    assert set(tool_names(ARGS)) <= fields(TrainingArguments)
    assert set(tool_names(SFT)) <= fields(SFTConfig)
    assert set(tool_names(LORA)) <= fields(LoraConfig)
    assert set(tool_names(BNB)) <= set(inspect.signature(BitsAndBytesConfig).parameters)
    assert set(tool_names(SCRIPT)) <= fields(ModelConfig, ScriptArguments)


def test_each_key_of_ours_in_the_table_exists() -> None:
    names = [row.key for row in COUNTERPARTS.values() if row.key is not None]
    assert len(names) >= 60
    missing = {name for name in names if name not in groups() and not _exists(name)}
    assert missing <= COMING
    for key, values in VALUES.items():
        for name, value in values.items():
            assert value_here(key, name.upper()) == value
            assert problems_of([f"{key}={hydra_value(value)}"], multirun=False) == []


def _exists(key: str) -> bool:
    kind: Any = Config
    for part in key.split("."):
        hints = inspect.get_annotations(kind, eval_str=True) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            return False
        options = getattr(hints[part], "__args__", ())
        kind = next((option for option in options if dataclasses.is_dataclass(option)), hints[part])
    return True


def test_the_page_names_each_key_that_has_a_counterpart() -> None:
    page = DOCS.read_text(encoding="utf-8")
    rows = {name: row for name, row in COUNTERPARTS.items() if row.tools != ("scripts",)}
    assert [name for name, row in rows.items() if row.key is not None and f"`{name}`" not in page] == []


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda file: file.name)
def test_no_key_of_a_file_is_dropped_and_the_result_composes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(file)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    target = tmp_path / f"{file.stem}.qlora.yaml"
    text = target.read_text(encoding="utf-8")
    for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        names = [f"{key}.{name}" for name in value] if key == "quantization_config" else [key]
        for name in names:
            assert f"# {name}" in text or f", {name}" in text or f"{name}:" in printed or f" {name}" in printed, name
    config = compose(combined_overrides(target, ["seed=3"]))
    assert config.seed == 3
    assert "SECRET" not in text + printed
    assert main(["import", str(file)]) == 2  # nothing is overwritten
    assert target.read_text(encoding="utf-8") == text


def imported(name: str, tmp_path: Path) -> Config:
    target = tmp_path / f"{name}.yaml"
    assert main(["import", str(FILES / name), "-o", str(target)]) == 0
    return compose(combined_overrides(target, []))


def test_a_file_of_axolotl_keeps_its_meaning(tmp_path: Path) -> None:
    config = imported("axolotl.yml", tmp_path)
    assert (config.model.family, config.model.variant.name) == ("smollm2_360m", "base")
    assert (config.quantization.mode.name, config.quantization.compute_dtype.value) == ("nf4", "bfloat16")
    assert (config.lora.r, config.lora.alpha, config.lora.alpha_policy) == (32, 64, "fixed")
    assert (config.training.batch_size, config.training.micro_batch_size) == (8, 2)
    assert (config.targets.set, config.training.max_length) == ("all_linear", 1024)
    assert str(config.task.path).endswith("data/orders.jsonl")
    assert (config.task.columns.prompt, config.task.columns.completion) == ("question", "answer")
    assert (config.training.learning_rate, config.training.optimizer) == (2e-4, "paged_adamw_32bit")


def test_a_file_of_llama_factory_keeps_its_meaning(tmp_path: Path) -> None:
    config = imported("llamafactory.yaml", tmp_path)
    assert (config.model.family, config.quantization.mode.name) == ("qwen3_1_7b", "nf4")
    assert config.targets.modules == ["q_proj", "v_proj"]
    assert (config.training.batch_size, config.training.micro_batch_size) == (8, 1)
    assert (config.task.validation_fraction, config.task.max_train_items) == (0.1, 1000)


FACTORY = {
    "model_name_or_path": "Qwen/Qwen3-0.6B",
    "stage": "sft",
    "cutoff_len": 256,
    "lora_rank": 16,
    "template": "qwen3",
}
AXOLOTL = {"base_model": "Qwen/Qwen3-0.6B", "sequence_len": 256, "datasets": [{"path": "data/a.jsonl"}], "lora_r": 16}
ADAPTER = {"base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1", "peft_type": "LORA", "r": 16, "lora_alpha": 32}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FACTORY, {"lora.r": 16}),
        (FACTORY | {"finetuning_type": "full"}, {"method": "full"}),
        (FACTORY | {"finetuning_type": "freeze"}, {"method": "layerwise", "method.layers": "last:2"}),
        (
            FACTORY | {"finetuning_type": "freeze", "freeze_trainable_layers": -4},
            {"method": "layerwise", "method.layers": "first:4"},
        ),
        (FACTORY | {"finetuning_type": "oft"}, {"method": "peft", "method.peft_type": "oft"}),
        (
            FACTORY | {"additional_target": "embed_tokens,lm_head"},
            {"lora.modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        (AXOLOTL | {"adapter": None}, {"method": "full", "quantization": "bf16"}),
        (AXOLOTL, {"method": "full"}),
        (AXOLOTL | {"adapter": "lora"}, {"lora.r": 16, "quantization": "bf16"}),
        (AXOLOTL | {"adapter": "qlora"}, {"lora.r": 16, "quantization": "nf4"}),
        (ADAPTER | {"peft_type": "IA3"}, {"method": "peft", "method.peft_type": "ia3"}),
        (ADAPTER | {"use_dora": True, "use_rslora": True}, {"lora.dora": True, "lora.rslora": True}),
        (ADAPTER | {"init_lora_weights": "eva"}, {"lora.init": "eva"}),
        (AXOLOTL | {"adapter": "lora", "peft_init_lora_weights": "pissa_niter_4"}, {"lora.init": "pissa"}),
        (ADAPTER | {"alpha_pattern": {"mlp\\.down_proj": 64}}, {"lora.alpha_pattern": {"mlp.down_proj": 64}}),
        (ADAPTER | {"layers_to_transform": [0, 1]}, {"method.layers": [0, 1]}),
        (ADAPTER | {"modules_to_save": ["lm_head"]}, {"lora.modules_to_save": ["lm_head"]}),
    ],
    ids=repr,
)
def test_what_another_tool_trains_is_what_the_imported_settings_train(
    content: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    tool = tool_of(content)
    assert tool is not None
    result = converted(tool, content)
    assert {key: result.settings.get(key) for key in expected} == expected, result.without
    if "method" in expected:
        assert not [key for key in result.settings if key.startswith("lora.")]
        assert [reason for key, reason in result.without.items() if "lora_r" in key or key.startswith("r:")] == [
            f"method={expected['method']} has no LoRA adapters"
        ]
    else:
        assert "method" not in result.settings
    target = tmp_path / "settings.yaml"
    target.write_text(as_yaml(result, "file", str(target)), encoding="utf-8")
    assert compose(combined_overrides(target, [])) == compose(
        [f"{key}={hydra_value(value)}" for key, value in result.settings.items()]
    )


def test_a_kind_of_adapter_without_a_counterpart_is_listed(tmp_path: Path) -> None:
    result = converted("PEFT's adapter_config.json", ADAPTER | {"peft_type": "POLY"})
    assert any("POLY" in key for key in result.without)


def test_arguments_that_are_impossible_here_are_listed_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = imported("training_args.json", tmp_path)
    assert (config.training.max_steps, config.training.warmup_ratio) == (400, 0.1)
    assert config.training.scheduler == "cosine"  # the default: cosine_with_min_lr can't be set up
    printed = capsys.readouterr().out
    assert "cosine_with_min_lr" in printed
    assert "num_train_epochs: 3.0 (max_steps ends the training first)" in printed


def test_a_file_without_quantization_is_not_quantized(tmp_path: Path) -> None:
    assert imported("sft_script.yaml", tmp_path).quantization.mode.name == "bf16"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("training_args.bin", b"\x80\x05", ("pickle", "to_json_string")),
        ("broken.json", b"{", ("not valid JSON",)),
        ("ours.yaml", b"lora.r: 8\n", ("qlora-exp run --from",)),
        ("other.yaml", b"colour: red\n", ("no key of the file",)),
        ("list.json", b"[1]", ("no settings",)),
    ],
)
def test_what_can_not_be_imported_is_refused_with_the_reason(
    name: str, content: bytes, says: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["import", str(tmp_path / name), "-o", str(tmp_path / "out.yaml")]) == 2
    message = capsys.readouterr().err
    assert all(text in message for text in says), message
    assert not (tmp_path / "out.yaml").exists()


def test_another_tools_file_behind_from_names_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(shutil.copy(FILES / "axolotl.yml", tmp_path))
    assert tool_of_file(file) == "Axolotl"
    for arguments in (["run", "--from", str(file)], ["run", str(file)]):
        assert main(arguments) == 2
        assert f"qlora-exp import {file}" in capsys.readouterr().err


def test_a_secret_of_a_file_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "args.json"
    file.write_text(
        json.dumps({"learning_rate": 1e-4, "hub_token": "hf_abcdefghijklmnop", "seed": 3}), encoding="utf-8"
    )
    assert main(["import", str(file), "-o", str(tmp_path / "out.yaml")]) == 0
    assert "hf_abc" not in capsys.readouterr().out + (tmp_path / "out.yaml").read_text(encoding="utf-8")


def test_a_nested_name_counts_by_its_last_part() -> None:
    assert counterpart("training_args.learning_rate") is COUNTERPARTS["learning_rate"]
    assert counterpart("training.epocs") is None


@pytest.mark.parametrize(
    ("overrides", "pruner", "options", "line"),
    [
        (["sweep.pruner=median"], "median", {}, "asha's options are left out: min_resource, reduction_factor"),
        (["sweep.pruner=none"], "none", {}, "asha's options are left out: min_resource, reduction_factor"),
        (["sweep.pruner=asha"], "asha", {"min_resource": 40, "reduction_factor": 2}, None),
        (
            ["sweep.pruner=median", "+sweep.pruner_options.n_startup_trials=3"],
            "median",
            {"n_startup_trials": 3},
            "asha's options are left out: min_resource, reduction_factor",
        ),
    ],
)
def test_a_pruner_can_be_exchanged(
    overrides: list[str], pruner: str, options: dict[str, Any], line: str | None, tmp_path: Path
) -> None:
    command = study_spec(["sweeps=lora_search", f"output_root={tmp_path}", *overrides])
    assert (command.spec.pruner, command.spec.pruner_options) == (pruner, options)
    assert [text.partition(", so ")[2] for text in command.left_out] == ([line] if line else [])


def test_a_sampler_can_be_exchanged(tmp_path: Path) -> None:
    command = study_spec(["sweeps=pareto", f"output_root={tmp_path}", "sweep.sampler=tpe"])
    assert (command.spec.sampler, command.spec.sampler_options) == ("tpe", {})


def test_options_of_another_pruner_on_the_command_line_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "lora_search", "sweep.pruner=median", "sweep.pruner_options.min_resource=3"]) == 2
    assert "MedianPruner has no option min_resource" in capsys.readouterr().err


def test_a_pruner_on_the_command_line_replaces_the_one_of_a_from_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sweep: {pruner: asha, pruner_options: {min_resource: 4}}\n", encoding="utf-8")
    assert combined_overrides(file, ["sweep.pruner=median"]) == ["sweep.pruner=median"]
    assert "sweep.pruner=median replaces it" in capsys.readouterr().err


def test_a_searched_alpha_is_fixed_in_each_trial(tmp_path: Path) -> None:
    from qlora_exp.estimate.candidates import search_space

    planned = search_space(["lora.alpha=8,16", "lora.r=4,8"]).points
    assert {point.config.lora.alpha_policy for point in planned if point.config} == {"fixed"}
    spec = study_spec(["lora.alpha=8,16", f"output_root={tmp_path}"]).spec
    assert spec.settings["lora.alpha_policy"] == "fixed"
    assert study_spec(["lora.r=8,16", f"output_root={tmp_path}"]).spec.settings["lora.alpha_policy"] == "2r"


@pytest.mark.parametrize(
    ("content", "key", "value", "says"),
    [
        ("micro_batch_size: 2\nbatch_size: 16\n", "training.batch_size", 16, None),
        ("datasets: [{path: a/b}, {path: c/d}]\n", "task.hub_id", "a/b", "c/d"),
        ("datasets: [{path: json, data_files: [a.jsonl, b.jsonl]}]\n", "task.path", "a.jsonl", "b.jsonl"),
        ("val_set_size: 200\n", "task.validation_fraction", None, "task.validation_fraction=0.1"),
        ("val_set_size: 0.2\n", "task.validation_fraction", 0.2, None),
    ],
)
def test_what_axolotl_would_do_is_kept_or_named(content: str, key: str, value: Any, says: str | None) -> None:
    from qlora_exp.config.imported_settings import AXOLOTL_FILE, converted

    found = converted(AXOLOTL_FILE, yaml.safe_load(f"base_model: a/b\n{content}"))
    got = found.settings.get(key)
    assert str(got).endswith(str(value)) if value is not None else got is None
    assert says is None or any(says in f"{name} {why}" for name, why in found.without.items())


def test_the_qat_of_axolotl_becomes_ours_where_the_format_is_an_integer(tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "qat.yaml", tmp_path / "out.yaml"
    text = "base_model: meta-llama/Llama-3.2-3B\nsequence_len: 512\nmicro_batch_size: 4\nbf16: true\nqat:\n"
    file.write_text(f"{text}  activation_dtype: int8\n  weight_dtype: int4\n  group_size: 32\n")
    assert main(["import", str(file), "-o", str(out)]) == 0
    config = compose(combined_overrides(out, []))
    qat = config.training.qat
    assert (qat.format, qat.group, qat.symmetric) == ("int4", "32", True)
    assert config.method.kind is Method.full
    file.write_text(f"{text}  weight_dtype: nvfp4\n")
    capsys.readouterr()
    assert main(["import", str(file), "-o", str(tmp_path / "other.yaml")]) == 0
    assert "not a value of training.qat.format" in " ".join(capsys.readouterr().out.split())
