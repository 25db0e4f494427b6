"""The model that ships is the one that is scored, and a model trained through rounding ships as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qlora_exp.config.checks_ship import WEIGHT_FORMATS
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Quantization
from qlora_exp.config.shipping import QatConfig
from qlora_exp.errors import Problems, QloraExpError
from qlora_exp.export.export import export_run, load_settings
from qlora_exp.models.base import load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.fake_quantization import body_linears, round_linears, strength_at
from qlora_exp.models.merging import dequantized_base
from qlora_exp.models.tuning import load_tuned, merged_tuned, without_tuning
from qlora_exp.paths import OutputPaths
from qlora_exp.quantizers.weight_formats import FORMATS, weight_format
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.execute import execute
from tests.conftest import save_tiny_model

QUICK = [
    *("tracking=off", "training.device=cpu", "training.max_steps=4", "training.batch_size=4", "seed=1"),
    *("task.max_train_items=64", "evaluation=quick", "evaluation.max_items=8", "evaluation.baselines=false"),
    *("training.learning_rate=2e-3", "evaluation.before=false"),
]
TOKENS = torch.tensor([[5, 9, 300, 41, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def bases() -> BaseCache:
    return BaseCache()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ship") / "outputs"


def run(bases: BaseCache, output: Path, *given: str) -> RunRecord:
    record = execute(compose([*QUICK, *given, f"output_root={output}"]), bases=bases)
    assert record.status is Status.COMPLETED, record.failure
    return record


@pytest.mark.parametrize(
    ("given", "levels", "group"),
    [
        (["training.qat.format=int4", "training.qat.group=channel", "training.qat.start_step=2"], 16, "channel"),
        (["training.qat.format=q4_0", "targets=attention_qv", "training.gradient_checkpointing=on"], 16, 32),
        (["training.qat.format=ternary", "method=full", "training.qat.warmup_ratio=0.5"], 3, None),
        (["training.qat.format=int3", "method=layerwise", "quantization=bf16"], 8, 64),
        (["training.qat.format=int4", "quantization=bf16", "targets=mlp"], 16, 64),
    ],
    ids=["int4", "q4_0", "ternary", "int3 in bf16", "LoRA in bf16"],
)
def test_what_qat_trained_is_what_ships(
    bases: BaseCache, output: Path, given: list[str], levels: int, group: Any
) -> None:
    given = ["quantization=fp32", *given]
    record, config = run(bases, output, *given), compose([*QUICK, *given])
    base = bases.get(config, "cpu")
    untuned, folder = logits(base.model), OutputPaths.of(output).run(record.run_id).weights
    tuned = load_tuned(base, config, folder)
    merged, _ = merged_tuned(config, folder)
    exact = config.quantization.mode is Quantization.fp32
    # In bf16 frozen weights are rounded from 16 bits, and what ships from the files' exact ones.
    tolerance = 1e-5 if exact else 0.05
    assert not exact or torch.allclose(logits(tuned), logits(merged), atol=1e-4)
    assert record.scores.trained is not None
    assert record.scores.after is not None
    assert record.scores.trained.loss == pytest.approx(record.scores.after.loss, rel=tolerance)
    assert record.shipped is not None
    assert record.shipped.format == weight_format(str(config.training.qat.format), group=config.training.qat.group).name
    with without_tuning(tuned):
        assert torch.equal(logits(tuned), untuned)
    assert torch.equal(logits(bases.get(config, "cpu").model), untuned)
    for _, layer in body_linears(merged):  # all of them are rounded, with an adapter or without
        size = {"channel": layer.in_features, None: layer.weight.numel()}.get(group, group)
        assert all(len(values.unique()) <= levels for values in layer.weight.reshape(-1, size))


@pytest.mark.parametrize(
    "given",
    [["training.qat.format=int4"], ["training.qat.format=ternary", "method=full"], ["ship=merged", "ship.format=int4"]],
    ids=["LoRA with QAT", "full and ternary", "rounded after training"],
)
def test_transposed_layers_are_rounded_along_their_inputs(tmp_path: Path, given: list[str]) -> None:
    """GPT-2 keeps the weights of its layers transposed."""
    model = ["model=local", f"model.path={save_tiny_model('gpt2', tmp_path / 'gpt2')}", "quantization=fp32"]
    record = run(BaseCache(), tmp_path / "outputs", *model, *given)
    config = compose([*QUICK, *model, *given])
    folder = OutputPaths.of(tmp_path / "outputs").run(record.run_id).weights
    merged, _ = merged_tuned(config, folder)
    assert record.scores.trained is not None
    assert record.scores.after is not None
    if config.training.qat.format is None:
        assert record.scores.trained.loss != record.scores.after.loss
        round_linears(merged, weight_format("int4"), search=True)
    else:
        assert record.scores.trained.loss == pytest.approx(record.scores.after.loss, rel=1e-5)
        tuned = load_tuned(load_base(config, "cpu"), config, folder)
        assert torch.allclose(logits(tuned), logits(merged), atol=1e-4)
    layers = dict(body_linears(merged))
    assert "transformer.h.0.mlp.c_fc" in layers
    group = 64 * 64 if config.training.qat.format == "ternary" else 64
    for name in ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"):
        groups = layers[name].weight.T.reshape(-1, group)
        assert all(len(values.unique()) <= (3 if group > 64 else 16) for values in groups)


def test_a_merged_model_is_rounded_as_its_format_says_and_its_bytes_are_counted(bases: BaseCache, output: Path) -> None:
    record = run(bases, output, "quantization=fp32", "ship=merged", "ship.format=int2", "ship.group=32")
    exact = run(bases, output, "quantization=fp32")
    assert record.shipped is not None
    assert record.plan is not None
    assert record.scores.trained == exact.scores.after  # training is the same
    assert record.scores.after is not None
    assert record.scores.after.loss != exact.scores.after.loss if exact.scores.after else False
    merged, _ = merged_tuned(compose([*QUICK, "quantization=fp32"]), OutputPaths.of(output).run(record.run_id).weights)
    count = sum(layer.weight.numel() for _, layer in body_linears(merged))
    assert record.shipped.bits_per_weight == 2 + (16 + 2) / 32
    assert record.shipped.bytes == count * (2 + 18 / 32) / 8 + 2 * (record.plan.total_parameters - count)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_merging_into_the_dequantized_base_is_the_quantized_base_with_its_adapter(
    bases: BaseCache, output: Path, mode: str
) -> None:
    given = [f"quantization={mode}", "ship=dequantized", "ship.format=null"]
    record, config = run(bases, output, *given), compose([*QUICK, *given])
    base = bases.get(config, "cpu")
    tolerance = 1e-5 if mode == "nf4" else 0.05  # LLM.int8() rounds its inputs, too
    assert float((logits(dequantized_base(config, base).model) - logits(base.model)).abs().mean()) < tolerance
    assert record.scores.trained is not None
    assert record.scores.after is not None
    assert record.scores.after.loss == pytest.approx(record.scores.trained.loss, rel=tolerance)
    as_trained = run(bases, output, f"quantization={mode}", "ship=trained")
    assert as_trained.scores.after == as_trained.scores.trained == record.scores.trained
    assert as_trained.shipped is not None
    assert record.shipped is not None
    assert as_trained.shipped.bytes < record.shipped.bytes


def test_the_exported_file_holds_the_weights_that_were_trained(bases: BaseCache, output: Path, tmp_path: Path) -> None:
    given = ["quantization=fp32", "training.qat.format=q4_0"]
    paths = OutputPaths.of(output).run(run(bases, output, *given).run_id)
    export_run(paths, tmp_path / "export", load_settings({"formats": ["q4_0"], "check_items": 0}))
    merged, _ = merged_tuned(compose([*QUICK, *given]), paths.weights)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "export" / "model-q4_0.gguf").tensors}
    for number, layer in enumerate(merged.model.layers):
        for name, module in (("attn_v", layer.self_attn.v_proj), ("ffn_down", layer.mlp.down_proj)):
            tensor = stored[f"blk.{number}.{name}.weight"]
            held = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(held, module.weight.detach().numpy())


def test_ternary_files_are_for_ternary_weights_whose_rows_fill_their_blocks(bases: BaseCache, output: Path) -> None:
    settings = load_settings({"formats": ["tq1_0"], "check_items": 0})
    exact = OutputPaths.of(output).run(run(bases, output, "quantization=fp32").run_id)
    with pytest.raises(QloraExpError, match="aren't ternary"):
        export_run(exact, None, settings)
    ternary = run(bases, output, "quantization=fp32", "method=full", "training.qat.format=ternary")
    with pytest.raises(QloraExpError, match=r"blocks of 256.*192 inputs"):
        export_run(OutputPaths.of(output).run(ternary.run_id), None, settings)


def test_a_ternary_file_of_a_wide_model_holds_its_weights(output: Path, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "wide", hidden=256)
    given = ["model=local", f"model.path={folder}", "quantization=fp32", "method=full", "training.qat.format=ternary"]
    record = execute(compose([*QUICK, *given, f"output_root={output}"]))
    assert record.status is Status.COMPLETED, record.failure
    paths = OutputPaths.of(output).run(record.run_id)
    export_run(paths, tmp_path / "export", load_settings({"formats": ["tq1_0", "tq2_0"], "check_items": 0}))
    merged, _ = merged_tuned(compose([*QUICK, *given]), paths.weights)
    for kind in ("tq1_0", "tq2_0"):
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "export" / f"model-{kind}.gguf").tensors}
        tensor = stored["blk.1.ffn_down.weight"]
        held = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(held, merged.model.layers[1].mlp.down_proj.weight.detach().numpy())


def test_rounding_grows_from_its_start_to_the_end_of_its_warm_up() -> None:
    qat = QatConfig("ternary", False, "64", start_step=2, warmup_ratio=0.4)
    assert [strength_at(step, 10, qat) for step in range(8)] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert strength_at(0, 10, QatConfig("int4", False, "64", 0, 0.0)) == 1.0


def test_the_names_of_formats_are_known_without_torch() -> None:
    assert WEIGHT_FORMATS == FORMATS


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        (["training.qat.format=int4", "quantization=nf4"], "rounded weights already", "quantization=fp32"),
        (["training.qat.format=ternary", "quantization=fp32"], "don't become ternary", "method=full"),
        (
            ["training.qat.format=int4", "quantization=fp32", "lora.dora=true"],
            "this setting changes",
            "lora.dora=false",
        ),
        (["training.qat.format=int4", "quantization=fp32", "ship=merged"], "it was trained for", "ship=none"),
        (["training.qat.format=int9", "quantization=fp32"], "no weight format", "int"),
        (["ship=merged", "ship.format=q5"], "no weight format", "q"),
        (["ship=merged", "ship.group=big"], "can't share a scale", "ship.group=64"),
        (["ship=dequantized", "quantization=fp32"], "no rounded weights to merge into", "ship=merged"),
        (["ship=merged", "method=bottleneck"], "can't be merged", "ship=trained"),
    ],
)
def test_what_cannot_ship_is_refused_with_what_would_do(given: list[str], what: str, hint: str) -> None:
    with pytest.raises(QloraExpError) as refused:
        compose(given)
    errors = refused.value.errors if isinstance(refused.value, Problems) else [refused.value]
    assert any(what in str(error) and hint in str(error) for error in errors), str(refused.value)


def test_a_format_that_does_not_fit_the_layers_is_refused_before_anything_is_loaded(
    output: Path,
) -> None:
    for given, what in (
        (["ship=merged", "ship.format=int4", "ship.group=100"], "192 inputs.*groups of 100"),
        (["training.qat.format=int4", "training.qat.group=48"], "512 inputs.*groups of 48"),
    ):
        before = set(OutputPaths.of(output).runs.iterdir()) if OutputPaths.of(output).runs.is_dir() else set()
        with pytest.raises(QloraExpError, match=what):
            execute(compose([*QUICK, "quantization=fp32", *given, f"output_root={output}"]))
        after = set(OutputPaths.of(output).runs.iterdir()) if OutputPaths.of(output).runs.is_dir() else set()
        assert before == after
