"""LoRA+, ranks by module, and OLoRA where PEFT's can't compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_exp.architecture.shapes import WeightShape
from qlora_exp.architecture.tuned_weights import trained_modules
from qlora_exp.cli import main
from qlora_exp.config.compose import check_multirun, compose, compose_run
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.peak import expert_backward_bytes
from qlora_exp.estimate.weights_and_optimizer import adapter_bytes, frozen_bytes, trained_bytes
from qlora_exp.models.activation_start import check_start_rows, start_rows
from qlora_exp.models.adapters import attach_adapters
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.models.tuning import attach, load_tuned, merged_tuned, without_tuning
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import Status
from qlora_exp.runs.execute import execute
from qlora_exp.tracking.fields import run_params
from tests.conftest import save_tiny_model

ONE_STEP = [
    *("tracking=off", "training.device=cpu", "training.max_steps=1", "training.batch_size=4", "seed=1"),
    *("training.learning_rate=1e-3", "training.scheduler=constant", "training.warmup_ratio=0"),
    *("task.max_train_items=16", "evaluation=quick", "evaluation.max_items=4", "evaluation.baselines=false"),
    *("lora.rank_pattern={q_proj: 2}", "targets=attention"),
    *("evaluation.before=false", "quantization=nf4", "training.weight_decay=0"),
]


@pytest.mark.parametrize(("ratio", "expected"), [("null", 1e-3), ("8", 8e-3)])
def test_the_first_step_of_b_is_the_learning_rate_times_the_ratio_and_modules_have_their_ranks(
    tmp_path: Path, ratio: str, expected: float
) -> None:
    """Adam's first step moves each value by the learning rate, in the direction of its gradient."""
    config = compose([*ONE_STEP, f"lora.loraplus_lr_ratio={ratio}", f"output_root={tmp_path}"])
    record = execute(config, bases=BaseCache())
    assert record.status is Status.COMPLETED, record.failure
    saved = load_file(OutputPaths.of(tmp_path).run(record.run_id).adapter / "adapter_model.safetensors")
    largest = max(float(value.abs().max()) for name, value in saved.items() if "lora_B" in name)
    assert largest == pytest.approx(expected, rel=1e-3)
    ranks = {name.split(".")[-3]: value.shape[0] for name, value in saved.items() if "lora_A" in name}
    assert ranks == {"q_proj": 2, "k_proj": 8, "v_proj": 8, "o_proj": 8}
    assert record.plan is not None
    assert record.plan.trainable_parameters == sum(value.numel() for value in saved.values())
    assert record.memory.adapter_bytes == 4 * record.plan.trainable_parameters
    planned = adapter_bytes(adapted_layers(config), config.lora, config.training.optimizer)
    assert (planned.optimizer_bytes, planned.file_bytes) == (record.memory.optimizer_bytes, record.memory.saved_bytes)


def adapted_layers(config: Config) -> list[WeightShape]:
    architecture = describe(config.model)
    names = trained_modules(architecture, config)
    return [shape for shape in architecture.weights if shape.name in names]


def test_olora_on_transposed_layers_is_refused_by_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "gpt2")
    given = ["plan", "model=local", f"model.path={folder}", "quantization=fp32", "lora.init=olora"]
    assert main([*given, "training.device=cpu"]) == 2
    assert "lora.init=pissa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["lora.rank_pattern={w_proj: 4}"], "no target module is called w_proj"),
        (["lora.rank_pattern={q_proj: 0}"], "1 to 65536"),
        (["lora.rank_pattern={q_proj: 4}", "lora.rslora=true"], "lora.rank_pattern=null"),
        (["lora.rank_pattern={q_proj: 4}", "method=full", "quantization=fp32"], "no LoRA adapters"),
        (["lora.alpha_pattern={w_proj: 4}"], "no target module is called w_proj"),
        (["lora.alpha_pattern={q_proj: 0}"], "a positive number"),
        (["lora.alpha_pattern={q_proj: 4}", "lora.rslora=true"], "lora.alpha_pattern=null"),
        (["lora.alpha_pattern={q_proj: 4}", "method=full", "quantization=fp32"], "no LoRA adapters"),
        (["lora.init=eva", "lora.r=193"], "lora.r=192 or less"),
        (["lora.modules_to_save=[embed_tokens]"], "they are tied"),
        (["lora.modules_to_save=[embed_token]"], "embed_tokens"),
        (["lora.modules_to_save=[down_proj]"], "targets gives it an adapter"),
        (["lora.modules_to_save=[]"], "lora.modules_to_save=[lm_head]"),
        (["lora.modules_to_save=[lm_head]", "method.layers=last:2"], "method.layers=null"),
        (["lora.modules_to_save=[lm_head]", "method=full", "quantization=fp32"], "no LoRA adapters"),
        (["lora.modules_to_save=[lm_head]", "quantization=fp16"], "scaled loss"),
    ],
)
def test_ranks_that_fit_no_module_or_setting_are_refused_by_the_plan(
    given: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "quantization=nf4", "training.device=cpu", "targets=attention", *given]) == 2
    assert hint in " ".join(capsys.readouterr().err.split())


def test_a_run_whose_method_has_no_lora_refuses_its_settings_and_a_grid_of_methods_takes_them(tmp_path: Path) -> None:
    given = ["method=full", "quantization=fp32", f"output_root={tmp_path}"]
    with pytest.raises(QloraExpError, match="method=full has no LoRA adapters") as refused:
        compose_run([*given, "lora.r=16", "lora.dropout=0.1"])
    assert "lora.r=16" in str(refused.value)
    assert "lora.dropout=0.1" in str(refused.value)
    assert compose_run([*given, "lora.r=8"]).method.kind.value == "full", "8 is what it is anyway"
    check_multirun(["method=full,lora", "quantization=fp32", "lora.r=16"])


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "nf4"])
def test_eva_starts_at_the_principal_directions_of_what_the_layers_read_and_leaves_the_base_as_it_is(
    quantization: str, tiny_models: dict[str, Path]
) -> None:
    """torch's singular value decomposition of the activations themselves is the reference."""
    folder = tiny_models["llama"]
    given = ["model=local", f"model.path={folder}", f"quantization={quantization}", "lora.r=4", "lora.init=eva"]
    config = compose([*given, "targets=all_linear", "lora.rank_pattern={down_proj: 6}"])
    architecture = describe(config.model)
    names = trained_modules(architecture, config)
    items = [item_of(range(5 + 7 * row % 40, 5 + 7 * row % 40 + 9 + row % 5)) for row in range(80)]
    base = load_base(config, "cpu")
    before = {name: value.clone() for name, value in base.model.state_dict().items() if torch.is_tensor(value)}
    model = attach_adapters(clone_sharing_weights(base), config, names, items)
    again = attach_adapters(clone_sharing_weights(base), config, names, items)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items() if name in before)
    assert not any(module._forward_pre_hooks for module in base.model.modules())
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        a = layer.lora_A["default"].weight.detach()
        rank = 6 if name.endswith("down_proj") else 4
        assert a.shape[0] == rank
        assert not layer.lora_B["default"].weight.any()
        assert torch.equal(a, again.get_base_model().get_submodule(name).lora_A["default"].weight)
        read = torch.cat(inputs_of(clone_sharing_weights(base), name, start_rows(items, config.seed))).double()
        centred = read - read.mean(0)
        values = torch.linalg.svdvals(centred)
        captured = torch.linalg.norm(centred @ a.double().T) ** 2
        assert float(captured / (values[:rank] ** 2).sum()) > 0.98, name
        assert torch.allclose(a @ a.T, torch.eye(rank), atol=1e-4)


def item_of(tokens: range) -> Item:
    ids = tuple(tokens)
    return Item("row:1", "", "", ids[:-1], ids[-1:], (), None, "", 0, {})


def inputs_of(model: Any, name: str, items: Sequence[Item]) -> list[torch.Tensor]:
    read: list[torch.Tensor] = []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for item in items:
            model(input_ids=torch.tensor([item.ids]), use_cache=False)
    return read


def test_eva_on_fewer_tokens_than_directions_is_refused() -> None:
    with pytest.raises(QloraExpError, match="27 tokens of 3 training rows"):
        check_start_rows([item_of(range(9))] * 3, 27, 1)
    check_start_rows([item_of(range(9))] * 3, 26, 1)


EXPERTS = [
    *("tracking=off", "training.device=cpu", "training.max_steps=2", "training.batch_size=4", "seed=1"),
    *("evaluation=quick", "evaluation.max_items=4", "evaluation.baselines=false", "targets=attention", "lora.r=4"),
    *("task=local", "task.kind=classification", "training.learning_rate=1e-2"),
]


@pytest.mark.parametrize(
    "given",
    [
        ["quantization=nf4", "lora.target_parameters=[experts.gate_up_proj,experts.down_proj]"],
        ["quantization=bf16", "lora.target_parameters=[down_proj]", "lora.init=gaussian"],
        ["quantization=fp32", "lora.target_parameters=[gate_up_proj,down_proj]", "lora.rslora=true"],
    ],
    ids=" ".join,
)
def test_experts_parameters_get_adapters_that_are_planned_saved_and_merged_and_the_base_stays(
    given: list[str], tmp_path: Path, colour_task: Path
) -> None:
    folder = save_tiny_model("mixtral", tmp_path / "mixtral")
    local = ["model=local", f"model.path={folder}", f"task.path={colour_task}", f"output_root={tmp_path / 'out'}"]
    config = compose([*EXPERTS, *local, *given])
    architecture, bases = describe(config.model), BaseCache()
    before = {name: value.clone() for name, value in bases.get(config, "cpu").model.named_parameters()}
    record = execute(config, bases=bases)
    assert record.status is Status.COMPLETED, record.failure
    base = bases.get(config, "cpu")
    assert before.keys() == dict(base.model.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
    plan, memory, adapter = record.plan, record.memory, OutputPaths.of(tmp_path / "out").run(record.run_id).adapter
    assert plan is not None
    planned = trained_bytes(architecture, adapted_layers(config), config, plan.compute_dtype)
    assert planned.trainable_parameters == plan.trainable_parameters
    assert (planned.adapter_bytes, planned.gradient_bytes) == (memory.adapter_bytes, memory.gradient_bytes)
    assert (planned.optimizer_bytes, planned.file_bytes) == (memory.optimizer_bytes, memory.saved_bytes)
    saved = load_file(adapter / "adapter_model.safetensors")
    of_experts = {name: value for name, value in saved.items() if "experts" in name}
    assert len(of_experts) == 2 * 2 * len(config.lora.target_parameters or ())
    assert run_params(record)["lora.target_parameters"] == ",".join(config.lora.target_parameters or ())
    assert all(value.any() for value in of_experts.values()), "B starts at zero, and has moved"
    loaded, merged = load_tuned(base, config, adapter), merged_tuned(config, adapter)[0]
    own = load_base(compose([*EXPERTS, *local, *given, "quantization=fp32"]), "cpu").model
    experts = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(merged.get_parameter(experts), own.get_parameter(experts))
    tokens = torch.arange(5, 25).reshape(1, 20)
    with torch.no_grad():
        tuned = loaded(input_ids=tokens).logits.float()
        with without_tuning(loaded):
            assert torch.equal(loaded(input_ids=tokens).logits, base.model(input_ids=tokens).logits)
        if config.quantization.mode.value == "fp32":
            assert torch.allclose(tuned, merged(input_ids=tokens).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "given", "hint"),
    [
        ("llama", ["lora.target_parameters=[experts.down_proj]"], "targets=mlp"),
        ("mixtral", ["lora.target_parameters=[experts.down]"], "experts.down_proj"),
        ("mixtral", ["lora.target_parameters=[down_proj]", "lora.dropout=0.1"], "lora.dropout=0"),
        ("mixtral", ["lora.target_parameters=[down_proj]", "lora.init=eva"], "lora.init=kaiming"),
    ],
)
def test_parameters_that_get_no_adapter_are_refused_by_the_plan(
    family: str, given: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(family, tmp_path / family)
    local = ["plan", "model=local", f"model.path={folder}", "quantization=fp32", "training.device=cpu"]
    assert main([*local, "targets=attention", *given]) == 2
    assert hint in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("names", ["down_proj", "gate_up_proj", "gate_up_proj,down_proj"])
def test_the_bytes_that_experts_adapters_keep_for_backward_are_what_autograd_saves(names: str, tmp_path: Path) -> None:
    folder = save_tiny_model("mixtral", tmp_path / "mixtral")
    given = ["model=local", f"model.path={folder}", "quantization=fp32", "targets=attention", "lora.r=4"]
    config = compose([*given, f"lora.target_parameters=[{names}]"])
    counted = expert_backward_bytes(describe(config.model), config, 128, 4, checkpointing=False)
    assert saved_by_autograd(config) - saved_by_autograd(compose(given)) == pytest.approx(counted, rel=0.02)


def saved_by_autograd(config: Config) -> int:
    architecture = describe(config.model)
    base = load_base(config, "cpu")
    model = attach(clone_sharing_weights(base), config, trained_modules(architecture, config), architecture).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().base_model(input_ids=torch.arange(5, 133).reshape(2, 64), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


WHOLE = [
    *("tracking=off", "training.device=cpu", "training.max_steps=2", "training.batch_size=4", "seed=1"),
    *("evaluation=quick", "evaluation.max_items=4", "evaluation.baselines=false", "targets=all_linear"),
    *(
        "task=local",
        "task.kind=classification",
        "lora.modules_to_save=[embed_tokens,lm_head]",
        "training.learning_rate=1e-2",
    ),
]


@pytest.mark.parametrize(
    "given",
    [
        ["quantization=nf4"],
        ["quantization=bf16", "training.optimizer=adamw_8bit"],
        ["quantization=fp32", "lora.init=pissa", "training.save_every_steps=1"],
    ],
    ids=" ".join,
)
def test_whole_modules_are_planned_trained_saved_and_merged_and_the_base_stays(
    given: list[str], tmp_path: Path, colour_task: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path / "llama")
    local = ["model=local", f"model.path={folder}", f"task.path={colour_task}", f"output_root={tmp_path / 'out'}"]
    config = compose([*WHOLE, *local, *given])
    architecture, bases = describe(config.model), BaseCache()
    digests = {name: value.clone() for name, value in bases.get(config, "cpu").model.named_parameters()}
    record = execute(config, bases=bases)
    assert record.status is Status.COMPLETED, record.failure
    base = bases.get(config, "cpu")
    assert all(torch.equal(value, digests[name]) for name, value in base.model.named_parameters())
    assert not any(value.requires_grad for value in base.model.parameters())
    plan, memory, adapter = record.plan, record.memory, OutputPaths.of(tmp_path / "out").run(record.run_id).adapter
    assert plan is not None
    planned = trained_bytes(architecture, adapted_layers(config), config, plan.compute_dtype)
    assert planned.trainable_parameters == plan.trainable_parameters
    assert (planned.adapter_bytes, planned.gradient_bytes) == (memory.adapter_bytes, memory.gradient_bytes)
    assert (planned.optimizer_bytes, planned.file_bytes) == (memory.optimizer_bytes, memory.saved_bytes)
    assert frozen_bytes(architecture, config, plan.compute_dtype).base_weight_bytes == memory.base_weight_bytes
    saved = load_file(adapter / "adapter_model.safetensors")
    names = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert names == {name for name in saved if "lora_" not in name}
    exact = {name: value.float() for name, value in load_base(config, "cpu").model.named_parameters()}
    for name in names:
        own = exact[name.removeprefix("base_model.model.")]
        assert (saved[name].float() - own).abs().max() > 5e-3
    loaded, merged = load_tuned(base, config, adapter), merged_tuned(config, adapter)[0]
    assert torch.equal(merged.get_output_embeddings().weight, saved["base_model.model.lm_head.weight"].float())
    assert merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight
    tokens = torch.arange(5, 25).reshape(1, 20)
    with torch.no_grad():
        tuned = loaded(input_ids=tokens).logits.float()
        with without_tuning(loaded):
            assert torch.equal(loaded(input_ids=tokens).logits, base.model(input_ids=tokens).logits)
        if config.quantization.mode.value == "fp32":
            assert torch.allclose(tuned, merged(input_ids=tokens).logits, atol=1e-4)
