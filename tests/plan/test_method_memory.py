"""What a plan says that each tuning method keeps for its backward pass, against what autograd saves."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_exp.architecture.families import known_architecture
from qlora_exp.architecture.tuned_weights import trained_modules
from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Method
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.activations import TrainingPass, saved_bytes_per_token
from qlora_exp.estimate.backward import backward_of
from qlora_exp.estimate.candidates import search_space
from qlora_exp.estimate.peak import predicted_peak
from qlora_exp.estimate.weights_and_optimizer import trained_bytes
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.models.tuning import attach
from qlora_exp.records.types import Status
from qlora_exp.runs.execute import execute
from tests.plan.test_activations import cuda_autocast

ROWS, LENGTH = 2, 128
CASES = {
    "LoRA in the last layer": ["targets=all_linear", "method.layers=last:1"],
    "LoRA on the MLP's last projection": ["targets.modules=[down_proj]", "method.layers=[1,2]"],
    "full": ["method=full"],
    "the last layers": ["method=layerwise", "method.layers=last:2"],
    "layers apart": ["method=layerwise", "method.layers=[1,3]"],
    "norms": ["method=selective", "method.parameters=[norms]"],
    "embeddings": ["method=selective", "method.parameters=[embeddings]"],
    "MLP of one layer": ["method=selective", "method.parameters=[mlp]", "method.layers=[2]"],
    "bottlenecks": ["method=bottleneck"],
    "one bottleneck behind the last MLP": ["method=bottleneck", "method.after=[mlp]", "method.layers=last:1"],
}


@pytest.fixture(scope="module")
def bases() -> BaseCache:
    return BaseCache()


@pytest.mark.parametrize(
    ("name", "autocast"),
    [(name, on) for name in CASES for on in (False, True) if not (on and name.startswith("LoRA"))],
)
def test_kept_bytes_of_a_method_are_what_autograd_saves(bases: BaseCache, name: str, autocast: bool) -> None:
    config = compose([f"quantization={'bf16' if autocast else 'fp32'}", *CASES[name]])
    base, architecture = bases.get(config, "cpu"), describe(config.model)
    modules = trained_modules(architecture, config)
    model = attach(bases.model(base), config, modules, architecture).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    inner = (model.get_base_model() if config.method.kind is Method.lora else model).base_model
    with (
        cuda_autocast() if autocast else contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    width = 2 if autocast else 4
    setting = TrainingPass(
        *(config.lora.r if config.method.kind is Method.lora else 0, width, width, False, LENGTH, False),
        autocast=autocast,
    )
    backward = backward_of(architecture, config.method, modules)
    last_norm = 4 * architecture.hidden_size + backward.last_norm * backward.stream_bytes(width, autocast)
    per_token = saved_bytes_per_token(architecture, modules, setting, backward).layers + last_norm
    weights = set(modules) if config.method.kind in TUNES_WEIGHTS else set()
    copies = sum(
        2 * shape.in_features * shape.out_features
        for shape in architecture.weights
        # A copy is saved where the layer's input has a gradient: in the first trained MLP its last projection's alone.
        if shape.name in weights and (name != "MLP of one layer" or shape.name.endswith("down_proj"))
    )
    if name == "bottlenecks" or name.startswith("one bottleneck"):
        places = len(backward.bottlenecks) * len(config.method.after)
        copies = 2 * places * 2 * config.method.size * architecture.hidden_size
    counted = per_token * ROWS * LENGTH + (copies if autocast else 0)
    saved = sum(storage.nbytes() for storage in kept.values())
    assert counted == pytest.approx(saved, rel=0.02)


def test_layers_before_the_first_trained_one_cost_nothing_with_checkpointing_either() -> None:
    """So the last layers' backward pass is all of it: their inputs are kept, and those of no other layer."""
    config = compose(["model=smollm2_135m", "quantization=bf16", "method=layerwise", "method.layers=last:5"])
    architecture = known_architecture(config.model)
    assert architecture is not None
    modules = trained_modules(architecture, config)
    backward = backward_of(architecture, config.method, modules)
    setting = TrainingPass(0, 2, 2, False, LENGTH, False, cuda=True, autocast=True)
    assert saved_bytes_per_token(architecture, modules, setting, backward).inputs == 5 * architecture.hidden_size * 2


@pytest.mark.parametrize("method", ["method=layerwise", "method=lora"])
def test_checkpointing_recomputes_no_layer_before_the_first_trained_one(
    bases: BaseCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    calls, forward, layers, steps = [0], LlamaMLP.forward, 4, 2

    def counted(self: Any, *args: Any) -> Any:
        calls[0] += self.training
        return forward(self, *args)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    given = [
        *(method, "method.layers=last:1", "quantization=fp32", f"training.max_steps={steps}", "training.batch_size=4"),
        *("evaluation=quick", "evaluation.before=false", "evaluation.max_items=8", "tracking=off", "seed=1"),
        *("task.max_train_items=64", "training.device=cpu", f"output_root={tmp_path}"),
    ]
    scores = {}
    for choice, recomputed in (("on", 1), ("off", 0)):
        calls[0] = 0
        record = execute(compose([*given, f"training.gradient_checkpointing={choice}"]), bases=bases)
        assert record.status is Status.COMPLETED, record.failure
        assert calls[0] == steps * (layers + recomputed)
        scores[choice] = record.scores.after
    assert scores["on"] == scores["off"]


def test_a_published_configuration_in_numbers() -> None:
    """Llama 3.2 1B has 1,235,814,400 parameters: the head is the embedding; 16 layers of 60,821,504 each."""
    weights = 1_235_814_400
    layer = 2 * (2048 * 2048 + 512 * 2048) + 3 * 2048 * 8192 + 2 * 2048
    embedding, norms = 128_256 * 2048, (2 * 16 + 1) * 2048
    assert embedding + 16 * layer + 2048 == weights

    def planned(*given: str) -> Any:
        config = compose(["model=llama3_2_1b", "quantization=bf16", *given])
        architecture = known_architecture(config.model)
        assert architecture is not None
        modules = trained_modules(architecture, config)
        adapted = [shape for shape in architecture.weights if shape.name in modules]
        return trained_bytes(architecture, adapted, config, "bfloat16"), predicted_peak(
            architecture, modules, config, "cuda"
        )

    sizes = {
        "method=full": weights,
        "method=layerwise method.layers=last:2": 2 * layer,
        "method=selective method.parameters=[norms]": norms,
        "method=selective method.parameters=[embeddings]": embedding,
        "method=bottleneck method.size=16": 2 * 16 * (2 * 16 * 2048 + 2048 + 16),
    }
    for given, parameters in sizes.items():
        trained, peak = planned(*given.split())
        assert trained.trainable_parameters == parameters
        assert trained.adapter_bytes == trained.gradient_bytes == 4 * parameters  # float32 masters and gradients
        assert 8 * parameters <= trained.optimizer_bytes < 8 * parameters + 4096  # AdamW: two moments, and step counts
        inserted = "bottleneck" in given
        assert 0 < trained.file_bytes - (4 if inserted else 2) * parameters < 65536  # as saved, and a header
        own = 0 if inserted else parameters
        assert peak.base.total_bytes == pytest.approx(2 * (weights - own), rel=0.001, abs=4096)
    full, few = (planned(*given)[1] for given in (["method=full"], ["method=layerwise", "method.layers=last:2"]))
    assert full.peak_bytes > 16 * weights > few.peak_bytes


def test_a_plans_limit_tells_which_methods_fit() -> None:
    """24 GB: Llama 3.2 1B in 16 bits takes LoRA and the last layers; full tuning takes 16 bytes a parameter."""
    points = search_space(
        ["model=llama3_2_1b", "quantization=bf16", "method=lora,layerwise,full", "training.learning_rate=1e-4"]
    ).points
    assert [point.config is not None for point in points] == [True, True, True]
    peaks = {}
    for point in points:
        assert point.config is not None
        architecture = known_architecture(point.config.model)
        assert architecture is not None
        modules = trained_modules(architecture, point.config)
        peaks[str(point.config.method.kind.value)] = predicted_peak(architecture, modules, point.config, "cuda")
    needed = {kind: peak.needed_bytes for kind, peak in peaks.items()}
    assert needed["lora"] < needed["layerwise"] < needed["full"]
    with pytest.raises(QloraExpError, match="need 16 or 32 bits"):
        compose(["model=llama3_2_1b", "quantization=nf4", "method=full"])
