"""A run that starts from an adapter: its base has that adapter in its weights, everywhere and in no other run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_exp import load_run
from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.models.base import load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.models.merging import merged_model
from qlora_exp.records.types import RunRecord

RUN = [
    *("training.device=cpu", "training.max_steps=6", "training.batch_size=8", "training.max_length=64"),
    *("training.learning_rate=0.01", "evaluation=quick", "evaluation.max_items=12", "tracking=off"),
]
TOKENS = torch.arange(40).reshape(2, 20)


def peft_adapter(model: Path, folder: Path, seed: int = 0, **settings: object) -> Path:
    """An adapter of random matrices as PEFT saves it, on the attention of the model in ``model``."""
    base = AutoModelForCausalLM.from_pretrained(model)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(seed)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(chosen | settings))).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def local(model: Path, *more: str) -> list[str]:
    return ["model=local", f"model.path={model}", "model.variant=base", *more]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"v_proj": 2}}])
def test_the_base_of_a_run_is_the_model_with_the_adapter_in_every_quantization(
    settings: dict[str, object], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = peft_adapter(tiny_models["llama"], tmp_path / "lora", **settings)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    expected = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    given = local(tiny_models["llama"], f"model.adapter={adapter}")
    loaded = load_base(compose([*given, "quantization=fp32"]), "cpu")
    torch.testing.assert_close(logits(loaded.model), logits(expected), atol=1e-5, rtol=1e-5)

    expected.save_pretrained(tmp_path / "merged")  # with a tokenizer, it is a model on disk like any other
    for file in tiny_models["llama"].glob("token*"):
        shutil.copy(file, tmp_path / "merged")
    on_disk = load_base(compose([*local(tmp_path / "merged"), "quantization=nf4"]), "cpu")
    quantized = load_base(compose([*given, "quantization=nf4"]), "cpu")
    assert torch.equal(logits(quantized.model), logits(on_disk.model))
    assert quantized.fingerprint == loaded.fingerprint


def test_a_cached_base_is_never_taken_for_the_one_with_an_adapter(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter, cache = peft_adapter(tiny_models["llama"], tmp_path / "lora"), BaseCache()
    bare, started = (compose(local(tiny_models["llama"], *more)) for more in ((), (f"model.adapter={adapter}",)))
    seen = [logits(cache.model(cache.get(config, "cpu"))) for config in (bare, started, bare, started)]
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    changed = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in changed.items()}, adapter / "adapter_model.safetensors")
    assert not torch.allclose(logits(cache.model(cache.get(started, "cpu"))), seen[1], atol=1e-2)


@pytest.fixture(scope="module")
def outputs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on one model: from its own weights, from the first run, and from the second with other settings."""
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("starting")
    task = write_colour_task(folder / "colours.jsonl")
    model = shutil.copytree(tiny_models["llama"], folder / "model")
    data = ["task=local", "task.kind=classification", f"task.path={task}", f"output_root={folder / 'outputs'}"]
    given = ["run", *RUN, *local(model), *data, "quantization=fp32"]
    assert main([*given, "lora.r=4"]) == 0
    assert main([*given, "lora.r=8", "targets=all_linear", "model.adapter=last", "lora.rslora=true"]) == 0
    assert main([*given, "lora.r=2", "targets=mlp", "model.adapter=last"]) == 0
    return folder / "outputs"


@pytest.fixture(scope="module")
def runs(outputs: Path) -> list[Path]:
    return sorted((outputs / "runs").iterdir(), key=lambda folder: load_run(folder).started_at)


def test_a_run_starts_where_the_run_of_its_adapter_ended(runs: list[Path]) -> None:
    records: list[RunRecord] = [load_run(folder) for folder in runs]
    for earlier, later in itertools.pairwise(records):
        assert earlier.scores.after is not None
        assert later.scores.before is not None
        assert later.scores.before.loss == pytest.approx(earlier.scores.after.loss, rel=1e-4)
        assert later.name.startswith(f"model-base+{earlier.run_id[-4:]} ")
    assert len({record.model_fingerprint for record in records}) == 3
    assert len({record.scores.before.loss for record in records if record.scores.before}) == 3


def test_an_export_contains_the_adapters_of_all_runs_before(runs: list[Path], outputs: Path, tmp_path: Path) -> None:
    export = ["export", runs[2].name, "--output-root", str(outputs), "--to", str(tmp_path / "export")]
    assert main([*export, "--formats", "adapter,merged"]) == 0
    merged, _ = merged_model(load_config(runs[2]), runs[2] / "adapter")
    base = AutoModelForCausalLM.from_pretrained(outputs.parent / "model")
    together = PeftModel.from_pretrained(base, str(tmp_path / "export" / "adapter"))
    torch.testing.assert_close(logits(together), logits(merged), atol=1e-4, rtol=1e-4)
    rounded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(rounded), logits(merged), atol=0.1, rtol=0.1)
    card = (tmp_path / "export" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"Training started with the adapter in `{runs[1] / 'adapter'}`" in card


def load_config(run: Path) -> object:
    from qlora_exp.runs.entry_points import config_from_plain

    return config_from_plain(load_run(run).config)


def refusal(model: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        describe(compose(local(model, f"model.adapter={adapter}")).model)
    return str(caught.value)


def test_an_adapter_that_cannot_be_merged_is_refused_before_weights_are_read(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model, settings = tiny_models["llama"], tmp_path / "lora" / "adapter_config.json"
    adapter = peft_adapter(model, tmp_path / "lora")
    written = json.loads(settings.read_text())
    for change, says in (
        ({"peft_type": "IA3"}, "the adapter is IA3, not LoRA"),
        ({"modules_to_save": ["lm_head"]}, "more than LoRA matrices: modules_to_save"),
        ({"bias": "all"}, "more than LoRA matrices: bias"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq"),
    ):
        settings.write_text(json.dumps(written | change))
        assert says in refusal(model, adapter)
    settings.write_text(json.dumps(written))
    assert "has no layer model.layers.0.self_attn.q_proj" in refusal(tiny_models["gpt2"], adapter)

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    wide = {name: torch.zeros(4, 65) if "lora_A" in name else value for name, value in tensors.items()}
    save_file(wide, weights)
    assert "has 64 features there, and 65 here" in refusal(model, adapter)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    assert "more than LoRA matrices: base_model.model.lm_head.weight" in refusal(model, adapter)
    weights.rename(adapter / "adapter_model.bin")
    assert "a pickle can run code" in refusal(model, adapter)


def test_an_adapter_of_another_model_is_refused(runs: list[Path], outputs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(outputs.parent / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    message = refusal(other, runs[1] / "adapter")
    assert f"the adapter of {runs[0].name} was trained on another model" in message
    assert f"model=local model.path={outputs.parent / 'model'} model.variant=base" in message

    adapter = peft_adapter(outputs.parent / "model", tmp_path / "lora")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "some/base"}))
    describe(compose(local(other, f"model.adapter={adapter}")).model)  # a copy on disk may be that model
