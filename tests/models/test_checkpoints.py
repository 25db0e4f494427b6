"""A folder that doesn't hold exactly the model of its config.json is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.models.base import load_base
from qlora_exp.models.inspect import describe
from qlora_exp.models.sources import fingerprint, resolve_source
from tests.conftest import save_tiny_model

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 0, "n_group": 1},
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 32}
RENAMED = {"block_sparse_moe.gate.": "mlp.gate."}
"""What transformers calls another name than the files do."""


def save_random(family: str, folder: Path, **more: Any) -> Path:
    sizes = (TINY[family] if family == "gpt2" else SIZES | TINY[family]) | more
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=32, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def local(folder: Path) -> Any:
    return compose(["model=local", f"model.path={folder}"]).model


def refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        describe(local(folder))
    assert caught.value.hint
    return caught.value


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the one file of ``folder``."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_random("llama", tmp_path / "model")


@pytest.mark.parametrize("family", TINY)
def test_a_model_that_lacks_any_one_tensor_is_refused_with_its_name(family: str, tmp_path: Path) -> None:
    folder = save_random(family, tmp_path / "model", **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1})
    describe(local(folder))
    whole = load_file(folder / "model.safetensors")
    for lacking in whole:
        kept = {name: tensor for name, tensor in whole.items() if name != lacking}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        message = str(refusal(folder))
        names = [lacking, *(lacking.replace(old, new) for old, new in RENAMED.items())]
        assert any(name in message for name in names), message
        assert "not in its files" in message


def test_a_model_that_lacks_a_tensor_is_refused_at_the_loading_too(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_base(compose(["model=local", f"model.path={folder}"]), "cpu")


def layer_of_biases(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {f"model.layers.0.self_attn.{name}_proj.bias": torch.zeros(8 if name != "q" else 16) for name in "qkv"}


def one_more_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name
    }


def as_dtype(dtype: torch.dtype, name: str = "down_proj.weight") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items() if key.endswith(name)}

    return change


def named(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors |= renamed

    return change


def added(*shapes: tuple[str, tuple[int, ...], torch.dtype]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"model.layers.0.mlp.up_proj.{name}": torch.zeros(shape, dtype=d) for name, shape, d in shapes}

    return change


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(12)


def mlx(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros((24, 2), dtype=torch.uint32)
    added(("scales", (24, 1), torch.float16), ("biases", (24, 1), torch.float16))(tensors)


def twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed_tokens.weight"] = torch.zeros(32, 16)


SPOILED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "biases that the configuration denies": (layer_of_biases, ["q_proj.bias", "without bias"]),
    "more layers than the configuration has": (one_more_layer, ["layers.2", "num_hidden_layers = 2"]),
    "a classifier's head": (lambda t: t.update({"score.weight": torch.zeros(2, 16)}), ["score.weight", "classifier"]),
    "a weight of another shape": (reshaped, ["model.norm.weight", "(12,)", "(16,)"]),
    "one weight under two names": (twice, ["two tensors", "model.embed_tokens.weight"]),
    "values in fp8": (as_dtype(torch.float8_e4m3fn), ["fp8", "F8_E4M3"]),
    "values in int8": (as_dtype(torch.int8), ["down_proj.weight", "I8"]),
    "values in uint8": (as_dtype(torch.uint8), ["down_proj.weight", "U8"]),
    "norms in int8": (as_dtype(torch.int8, "norm.weight"), ["norm.weight", "I8"]),
    "scales of fp8": (added(("weight_scale_inv", (1, 1), torch.float32)), ["fp8"]),
    "GPTQ": (added(("qweight", (2, 24), torch.int32), ("g_idx", (16,), torch.int32)), ["GPTQ"]),
    "AWQ": (added(("qweight", (16, 3), torch.int32), ("qzeros", (1, 3), torch.int32)), ["AWQ"]),
    "HQQ": (added(("W_q", (12, 16), torch.uint8)), ["HQQ"]),
    "bitsandbytes": (added(("weight.absmax", (6,), torch.float32)), ["bitsandbytes"]),
    "compressed-tensors": (added(("weight_packed", (24, 2), torch.int32)), ["compressed-tensors"]),
    "MLX": (mlx, ["MLX"]),
    "names of torch.compile": (named("_orig_mod."), ["torch.compile", "_orig_mod."]),
    "names of PEFT": (named("base_model.model."), ["PEFT", "base_model.model."]),
    "names with a prefix of their own": (named("backbone."), ["not in its files", "backbone."]),
    "names of DistributedDataParallel": (named("module."), ["DistributedDataParallel"]),
    "an adapter's tensors": (added(("lora_A.default.weight", (4, 16), torch.float32)), ["adapter", "merge"]),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_files_that_hold_something_else_are_refused_by_its_name(kind: str, folder: Path) -> None:
    spoil, says = SPOILED[kind]
    rewrite(folder, spoil)
    message = str(refusal(folder))
    assert all(text in message for text in says), message
    assert str(folder) in message


def test_a_tower_for_pictures_is_left_out_of_a_model_that_reads_text(folder: Path) -> None:
    tower = {"vision_tower.encoder.layers.0.fc1.weight": torch.ones(2, 2), "multi_modal_projector.bias": torch.ones(2)}
    rewrite(folder, lambda tensors: tensors.update(tower))
    describe(local(folder))


def test_files_with_masks_and_tables_of_older_versions_load_as_without_them(tmp_path: Path) -> None:
    gpt2, llama = save_random("gpt2", tmp_path / "gpt2"), save_random("llama", tmp_path / "llama")

    def older(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(2)}
        tensors |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}

    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    for place, change in ((gpt2, older), (llama, lambda tensors: tensors.update(frequencies))):
        config = compose(["model=local", f"model.path={place}"])
        before = load_base(config, "cpu").model.state_dict()
        rewrite(place, change)
        describe(config.model)
        after = load_base(config, "cpu").model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def shard(folder: Path, parts: int = 2) -> dict[str, str]:
    """Split the one file of ``folder`` into shards with an index; tensor → file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{part + 1:05d}-of-{parts:05d}.safetensors" for part in range(parts)]
    listed = {name: files[number * parts // len(tensors)] for number, name in enumerate(sorted(tensors))}
    for file in files:
        kept = {name: tensors[name].clone() for name in tensors if listed[name] == file}
        save_file(kept, folder / file, metadata={"format": "pt"})
    write_index(folder, listed)
    return listed


def write_index(folder: Path, listed: dict[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": listed})
    (folder / "model.safetensors.index.json").write_text(text)


def without_index(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def index_lists_too_much(folder: Path) -> None:
    listed = shard(folder)
    write_index(folder, listed | {"model.layers.9.mlp.up_proj.weight": "model-00001-of-00002.safetensors"})


def in_two_shards(folder: Path) -> None:
    listed = shard(folder)
    last = folder / "model-00002-of-00002.safetensors"
    copy = {name: tensor.clone() for name, tensor in load_file(last).items()}
    first = next(name for name, file in listed.items() if file.startswith("model-00001"))
    with safe_open(folder / listed[first], framework="pt") as weights:
        copy[first] = weights.get_tensor(first) + 1
    save_file(copy, last, metadata={"format": "pt"})


def two_sets(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def renamed_to(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))


def adapter_alone(folder: Path) -> None:
    adapter_beside(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def gptq_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    (folder / "quantize_config.json").write_text("{}")


def run_folder(folder: Path) -> None:
    adapter_alone(folder)
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "adapter" / name)


def moved_inside(folder: Path) -> None:
    (folder / "checkpoint-5").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "checkpoint-5" / name)


LAID_OUT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "shards without an index": (without_index, ["no model.safetensors.index.json", "model-00002-of-00003"]),
    "an index that lists what its shard lacks": (index_lists_too_much, ["layers.9.mlp.up_proj", "lists it"]),
    "a tensor in two shards": (in_two_shards, ["is in two files"]),
    "two sets of weights": (two_sets, ["two sets", "2 shards"]),
    "a variant": (renamed_to("model.fp16.safetensors"), ["fp16", "mv "]),
    "the publisher's own format": (renamed_to("consolidated.safetensors"), ["consolidated.safetensors", "own format"]),
    "a part of one process": (renamed_to("shard-00000-model-00000-of-00002.safetensors"), ["distributed"]),
    "a pointer of Git LFS": (pointer, ["Git LFS", "git lfs pull"]),
    "another name": (renamed_to("pytorch_model.safetensors"), ["model.safetensors", "mv "]),
    "an adapter beside a whole model": (adapter_beside, ["adapter_config.json", "whole model", "move"]),
    "an adapter alone": (adapter_alone, ["no model", "its base is a/b", "model=hub model.id=a/b model.adapter="]),
    "GPTQ's own names": (gptq_named, ["GPTQ"]),
    "a folder above": (moved_inside, ["config.json", "checkpoint-5"]),
    "a folder of a run": (run_folder, ["config.json", "give its base, and model.adapter="]),
    "a redirection": (lambda folder: edit(folder, transformers_weights="other.safetensors"), ["other.safetensors"]),
    "MLX by its configuration": (lambda folder: edit(folder, quantization={"bits": 4, "group_size": 64}), ["MLX"]),
    "an fp8 configuration": (lambda folder: edit(folder, quantization_config={"quant_method": "fp8"}), ["by fp8"]),
    "an older compressed-tensors": (
        lambda folder: edit(folder, compression_config={"quant_method": "compressed-tensors"}),
        ["compressed-tensors"],
    ),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_folders_that_transformers_would_read_otherwise_are_refused(layout: str, folder: Path) -> None:
    lay_out, says = LAID_OUT[layout]
    lay_out(folder)
    message = str(refusal(folder))
    assert all(text in message for text in says), message
    assert str(folder) in message


def test_shards_with_their_index_load_and_a_stale_index_alone_changes_nothing(folder: Path) -> None:
    config = compose(["model=local", f"model.path={folder}"])
    whole = load_base(config, "cpu").model.state_dict()
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shard(folder)
    for _ in range(2):
        describe(config.model)
        loaded = load_base(config, "cpu").model.state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole.items())
        for file in folder.glob("model-*"):
            file.unlink()
        (folder / "kept").rename(folder / "model.safetensors") if (folder / "kept").exists() else None


@pytest.mark.parametrize("spoiled", ["fp8", "shards", "adapter"])
@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_every_verb_refuses_before_it_loads(
    verb: str, spoiled: str, tmp_path: Path, colour_task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model", hidden=16)
    if spoiled == "fp8":
        rewrite(folder, as_dtype(torch.float8_e4m3fn))
    else:
        (without_index if spoiled == "shards" else adapter_beside)(folder)
    given = ["model=local", f"model.path={folder}", "task=local", f"task.path={colour_task}"]
    given += ["training.device=cpu", "tracking=off", f"output_root={tmp_path / 'outputs'}"]
    assert main([verb, *given]) == 2
    told = "".join(capsys.readouterr())
    assert {"fp8": "fp8", "shards": "index.json", "adapter": "adapter_config.json"}[spoiled] in told
    assert not (tmp_path / "outputs" / "runs").exists() or not any((tmp_path / "outputs" / "runs").glob("*/adapter"))


def test_further_chat_templates_are_part_of_the_fingerprint(folder: Path) -> None:
    before = fingerprint(resolve_source(local(folder)))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert fingerprint(resolve_source(local(folder))) != before


def test_a_lone_configuration_can_still_be_planned(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert main(["plan", "model=local", f"model.path={folder}", "training.device=cpu"]) == 0
