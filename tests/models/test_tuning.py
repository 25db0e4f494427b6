"""Methods other than LoRA: what they train, what a plan says of it; and the base they start from stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_exp.architecture.tuned_weights import trained_modules, tuned_tensors
from qlora_exp.config.compose import compose
from qlora_exp.errors import Problems, QloraExpError
from qlora_exp.estimate.weights_and_optimizer import frozen_bytes, trained_bytes
from qlora_exp.models.base import load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.models.tuning import attach, load_tuned, merged_tuned, without_tuning
from qlora_exp.models.weight_bytes import weight_bytes
from qlora_exp.orchestration.command import study_spec
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.execute import execute
from qlora_exp.training.outcome import Interrupted
from tests.conftest import save_tiny_model

QUICK = [
    *("tracking=off", "training.device=cpu", "training.max_steps=4", "training.batch_size=4", "seed=1"),
    *("training.logging_steps=1", "task.max_train_items=64", "evaluation.max_items=8", "evaluation=quick"),
    *("evaluation.max_items=8", "training.learning_rate=1e-3", "evaluation.baselines=false"),
]
METHODS = {
    "full": ["method=full", "quantization=fp32"],
    "full in bf16": ["method=full", "quantization=bf16"],
    "full in 8-bit Adam": ["method=full", "quantization=fp32", "training.optimizer=adamw_8bit"],
    "layerwise": ["method=layerwise", "quantization=fp32", "method.layers=[1,3]"],
    "selective": ["method=selective", "quantization=fp32", "method.parameters=[norms,embeddings]"],
    "bottleneck": ["method=bottleneck", "quantization=nf4", "method.size=4"],
}
TOKENS = torch.tensor([[5, 9, 300, 41, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def bases() -> BaseCache:
    return BaseCache()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods") / "outputs"


@pytest.fixture(scope="module")
def runs(bases: BaseCache, output: Path) -> dict[str, RunRecord]:
    """One run of each method, one after the other on warm bases."""
    return {
        name: execute(compose([*QUICK, *given, f"output_root={output}"]), bases=bases)
        for name, given in METHODS.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_has_the_bytes_that_a_run_measures(runs: dict[str, RunRecord], name: str) -> None:
    record = runs[name]
    assert record.status is Status.COMPLETED, record.failure
    config, memory = compose([*QUICK, *METHODS[name]]), record.memory
    assert record.plan is not None
    architecture = describe(config.model)
    planned = trained_bytes(architecture, (), config, record.plan.compute_dtype)
    frozen = frozen_bytes(architecture, config, record.plan.compute_dtype)
    assert planned.trainable_parameters == record.plan.trainable_parameters
    assert (planned.adapter_bytes, planned.gradient_bytes) == (memory.adapter_bytes, memory.gradient_bytes)
    assert (planned.optimizer_bytes, planned.file_bytes) == (memory.optimizer_bytes, memory.saved_bytes)
    assert frozen.base_weight_bytes == memory.base_weight_bytes
    assert frozen.quantization_state_bytes == memory.quantization_state_bytes


@pytest.mark.parametrize("name", METHODS)
def test_saved_weights_are_the_trained_model_and_without_them_it_is_the_base_bit_by_bit(
    runs: dict[str, RunRecord], bases: BaseCache, output: Path, name: str
) -> None:
    config = compose([*QUICK, *METHODS[name]])
    base = bases.get(config, "cpu")
    folder = OutputPaths.of(output).run(runs[name].run_id).weights
    untuned, tuned = logits(base.model), load_tuned(base, config, folder)
    assert not torch.equal(logits(tuned), untuned)
    before = logits(tuned)
    with without_tuning(tuned):
        assert torch.equal(logits(tuned), untuned)
    assert torch.equal(logits(tuned), before)
    assert torch.equal(logits(base.model), untuned)
    repeated = execute(compose([*QUICK, *METHODS[name], f"output_root={output}"]), bases=bases)
    assert repeated.scores == runs[name].scores  # so training left the warm base as it was, too


def test_merging_gives_the_model_in_one_piece(runs: dict[str, RunRecord], bases: BaseCache, output: Path) -> None:
    for name in ("full", "layerwise", "selective"):
        config = compose([*QUICK, *METHODS[name]])
        folder = OutputPaths.of(output).run(runs[name].run_id).weights
        merged, fingerprint = merged_tuned(config, folder)
        assert fingerprint == runs[name].model_fingerprint
        assert torch.equal(logits(merged), logits(load_tuned(bases.get(config, "cpu"), config, folder)))
        assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # still tied
    folder = OutputPaths.of(output).run(runs["bottleneck"].run_id).weights
    with pytest.raises(QloraExpError, match="can't be merged"):
        merged_tuned(compose([*QUICK, *METHODS["bottleneck"]]), folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_full_trains_every_parameter_and_the_others_those_that_they_name(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / family)
    local = ["model=local", f"model.path={folder}", "quantization=fp32"]
    architecture = describe(compose(local).model)

    def trained(*given: str) -> set[str]:
        config = compose([*local, *given])
        model = load_base(config, "cpu").model
        model = attach(model, config, trained_modules(architecture, config), architecture)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        planned = trained_bytes(architecture, (), config, "float32")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == planned.trainable_parameters
        assert weight_bytes(model).adapter_bytes == planned.adapter_bytes
        return names

    everything = {name for name, _ in load_base(compose(local), "cpu").model.named_parameters()}
    assert trained("method=full") == everything
    last = trained("method=layerwise", "method.layers=last:1")
    assert last == {name for name in everything if ".1." in name and ".0." not in name.split(".experts")[0]}
    norms = trained("method=selective")
    assert norms == {name for name in everything if "norm" in name or "ln_" in name}
    assert not norms & trained("method=selective", "method.parameters=[attention]")


def test_bottlenecks_begin_as_the_base_in_every_quantization_and_gradient_checkpointing_changes_nothing(
    output: Path, bases: BaseCache
) -> None:
    for mode in ("fp32", "int8"):
        config = compose([*QUICK, "method=bottleneck", f"quantization={mode}"])
        base = bases.get(config, "cpu")
        model = attach(bases.model(base), config, (), describe(config.model))
        assert torch.equal(logits(model), logits(base.model))
    given = [*QUICK, "method=bottleneck", "quantization=fp32", "method.after=[mlp]", f"output_root={output}"]
    plain, recomputed = (
        execute(compose([*given, f"training.gradient_checkpointing={choice}"]), bases=bases) for choice in ("off", "on")
    )
    assert plain.scores == recomputed.scores


@pytest.mark.parametrize("name", ["layerwise", "bottleneck", "gradient"])
def test_a_training_that_was_interrupted_goes_on_to_the_same_weights(
    output: Path, bases: BaseCache, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = ["method=selective", "method.parameters=gradient:0.01", "quantization=fp32"]
    given = [*QUICK, *METHODS.get(name, gradient), "training.save_every_steps=2", f"output_root={output}"]
    given.append("training.max_steps=6")
    whole = execute(compose(given), bases=bases)
    from qlora_exp.training import trainer

    original, seen = trainer._MeteredTrainer.training_step, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 4:
            raise Interrupted(3)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer._MeteredTrainer, "training_step", interrupted)
    record = execute(compose(given), bases=bases)
    assert record.status is Status.INTERRUPTED
    monkeypatch.undo()
    resumed = execute(compose(given), bases=bases, resume=record.run_id)
    assert resumed.training is not None
    assert resumed.training.resumed_from_step == 2
    assert resumed.scores.after == whole.scores.after


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        (["method=full", "quantization=nf4"], "need 16 or 32 bits", "quantization=bf16"),
        (["method=selective", "quantization=int8"], "need 16 or 32 bits", "quantization=bf16"),
        (["method=full", "quantization=fp16", "training.device=cpu"], "scaled loss", "quantization=bf16"),
        (["method=full", "quantization=fp32", "method.layers=last:2"], "trains all layers", "method=layerwise"),
        (["method=layerwise", "quantization=fp32", "method.layers=null"], "no layers", "last:2"),
        (["method=layerwise", "quantization=fp32", "method.layers=middle"], "can't be layers", "first:4"),
        (["method=selective", "quantization=fp32", "method.parameters=[norm]"], "called norm", "norms"),
        (["method=bottleneck", "method.after=[attn]"], "called attn", "attention"),
        (["method=bottleneck", "method.size=0"], "at least 1", "method.size=16"),
        (["method=bottleneck", "lora.dora=true"], "no LoRA adapters", "method=lora"),
        (["method=ful", "quantization=fp32"], "ful", "full"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_what_would_do(given: list[str], what: str, hint: str) -> None:
    with pytest.raises(QloraExpError) as refused:
        compose(given)
    errors = refused.value.errors if isinstance(refused.value, Problems) else [refused.value]
    assert any(what in str(error) and hint in str(error) for error in errors), str(refused.value)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["method=layerwise", "method.layers=last:9"], "has 4 layers, numbered 0 to 3"),
        (["method=layerwise", "method.layers=[7]"], "has 4 layers, numbered 0 to 3"),
        (["method=selective", "method.parameters=[head]"], "tunes both"),
        (["method=selective", "method.parameters=[biases]"], "has no biases"),
        (["method=selective", "method.parameters=[embeddings]", "method.layers=[0]"], ""),
        (["targets.modules=[layers.0.self_attn.q_proj]", "method.layers=[1]"], "none of the target modules"),
    ],
)
def test_what_the_model_lacks_is_refused_before_anything_is_loaded(given: list[str], what: str) -> None:
    config = compose([*QUICK, "quantization=fp32", *given])
    if not what:  # embeddings are in no layer: method.layers doesn't leave them out
        assert len(tuned_tensors(describe(config.model), config.method)) == 1
        return
    with pytest.raises(QloraExpError) as refused:
        trained_modules(describe(config.model), config)
    assert what in str(refused.value)


@pytest.mark.parametrize("method", ["method=full", "method=full,layerwise"])
def test_a_search_among_equal_trials_is_refused(method: str) -> None:
    with pytest.raises(QloraExpError, match=r"trials that differ in lora\.r would be equal"):
        study_spec([method, "quantization=fp32", "lora.r=4,8"])
    assert study_spec(["method=lora,full", "quantization=fp32", "lora.r=4,8"]).spec.n_trials == 4
    assert study_spec([method, "quantization=fp32", "training.learning_rate=1e-4,1e-3"]).spec.n_trials in (2, 4)


def test_layers_choose_among_lora_targets(bases: BaseCache) -> None:
    config = compose([*QUICK, "quantization=fp32", "method.layers=first:1"])
    architecture = describe(config.model)
    names = trained_modules(architecture, config)
    assert {name.split(".")[2] for name in names} == {"0"}
    everywhere = replace(config, method=replace(config.method, layers=None))
    assert len(trained_modules(architecture, everywhere)) == 4 * len(names)
