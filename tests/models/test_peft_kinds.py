"""Each row of the table of PEFT's kinds, with a small model: allowed or refused, start, sizes, saving, merge."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qlora_exp.architecture.tuned_weights import trained_modules
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Quantization
from qlora_exp.config.peft_kinds import BASES, MEASURED_WITH, PEFT_KINDS
from qlora_exp.errors import Problems, QloraExpError
from qlora_exp.estimate.weights_and_optimizer import frozen_bytes, trained_bytes
from qlora_exp.models.base import Base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.models.tuning import attach, load_tuned, merged_tuned, save_tuned, tuned_parameters, without_tuning
from qlora_exp.models.weight_bytes import weight_bytes
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import Status
from qlora_exp.runs.execute import execute
from tests.conftest import save_tiny_model

MODES = {"fp32": "fp32", "16 bit": "bf16", "4 bit": "nf4", "int8": "int8"}
SMALL = {
    "miss": "r: 4",
    "shira": "r: 4",
    "road": "group_size: 8, variant: road_2",
    "vera": "r: 8",
    "randlora": "r: 8",
    "fourierft": "n_frequency: 20",
    "lokr": "r: 2, decompose_both: true",
    "oft": "oft_block_size: 24",
    "supertuning": "sparsity: 0.9",
}
"""Options that fit a model of width 64; those that no default covers."""
TOKENS = torch.tensor([[5, 9, 300, 41, 7, 8], [11, 12, 400, 13, 14, 15]])
CELLS = [(name, column) for name, kind in PEFT_KINDS.items() for column in MODES if column not in kind.refused]
REFUSED_BY_PEFT = [
    (name, column) for name, kind in PEFT_KINDS.items() for column in MODES if column in kind.refused and kind.options
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("peft") / "llama")


@pytest.fixture(scope="module")
def bases() -> BaseCache:
    return BaseCache()


def settings(tiny: Path, name: str, column: str) -> list[str]:
    options = f"method.options={{{SMALL.get(name, '')}}}"
    local = ["model=local", f"model.path={tiny}", f"quantization={MODES[column]}", "training.device=cpu", "seed=3"]
    return [*local, "method=peft", f"method.peft_type={name}", options]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def train_a_little(model: Any, autocast: bool) -> None:
    model.train()
    parameters = [parameter for _, parameter in tuned_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as on a GPU
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
    model.eval()


def attached(config: Any, base: Base) -> Any:
    from qlora_exp.models.base import clone_sharing_weights

    architecture = describe(config.model)
    return attach(clone_sharing_weights(base), config, trained_modules(architecture, config), architecture)


def test_the_table_is_of_the_installed_version_and_names_options_that_peft_has() -> None:
    assert peft.__version__.startswith(f"{MEASURED_WITH}."), "measure the rows again, and change MEASURED_WITH"
    assert set(MODES) == set(BASES.values())
    for name, kind in PEFT_KINDS.items():
        fields = {field.name: field.default for field in dataclasses.fields(getattr(peft, kind.config))}
        for option, default in kind.options.items():
            assert fields[option] == default, (name, option)


@pytest.mark.parametrize(("name", "column"), CELLS)
def test_an_allowed_kind_starts_at_the_base_trains_saves_and_merges_as_its_row_says(
    tiny: Path, bases: BaseCache, tmp_path: Path, name: str, column: str
) -> None:
    compute = ["quantization.compute_dtype=bfloat16"] if column == "4 bit" else []  # as on a GPU
    config, kind = compose([*settings(tiny, name, column), *compute]), PEFT_KINDS[name]
    base, architecture = bases.get(config, "cpu"), describe(config.model)
    untuned = logits(base.model)
    model = attached(config, base)
    rounding = 1e-5 if column == "fp32" else 2e-2  # of 16 bits; some compute int8 layers from dequantized weights
    assert torch.allclose(logits(model), untuned, atol=rounding) is kind.starts_at_base

    adapted = [shape for shape in architecture.weights if shape.name in trained_modules(architecture, config)]
    planned = trained_bytes(architecture, adapted, config, base.compute_dtype)
    assert planned.trainable_parameters == sum(parameter.numel() for _, parameter in tuned_parameters(model))
    counted = weight_bytes(model)
    assert planned.adapter_bytes == counted.adapter_bytes
    frozen = frozen_bytes(architecture, config, base.compute_dtype, adapted).base_weight_bytes
    if name in ("randlora", "vera") and column != "fp32":  # PEFT keeps their fixed matrices in 16 bits there
        assert 0.99 * frozen < counted.base_weight_bytes <= frozen
    else:
        assert counted.base_weight_bytes == frozen

    train_a_little(model, autocast=column in ("16 bit", "4 bit"))
    trained = logits(model)
    assert not torch.equal(trained, untuned)
    with without_tuning(model):
        assert torch.equal(logits(model), untuned)
    save_tuned(model, tmp_path)
    assert torch.equal(logits(load_tuned(base, config, tmp_path)), trained)
    assert torch.equal(logits(base.model), untuned)
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(input_ids=TOKENS[:1], use_cache=True, **greedy),
        model.generate(input_ids=TOKENS[:1], use_cache=False, **greedy),
    )
    if column == "fp32":  # a run is merged into the unquantized base
        merged, _ = merged_tuned(config, tmp_path)
        assert torch.allclose(logits(merged), trained, atol=1e-5)


@pytest.mark.parametrize(("name", "column"), REFUSED_BY_PEFT)
def test_a_refused_kind_fails_in_peft_or_is_another_model(
    tiny: Path, bases: BaseCache, monkeypatch: pytest.MonkeyPatch, name: str, column: str
) -> None:
    """The refusal is needed: without it the run fails after loading, or silently starts elsewhere."""
    given = settings(tiny, name, column)
    with pytest.raises(QloraExpError, match=f"{name} can't be trained on {MODES[column]}"):
        compose(given)
    config = compose(settings(tiny, name, "fp32"))
    config.quantization.mode = Quantization(MODES[column])
    base = bases.get(config, "cpu")
    try:
        same = torch.allclose(logits(attached(config, base)), logits(base.model), atol=2e-2)
    except (RuntimeError, QloraExpError):
        return
    assert not same


def test_no_kind_leaves_variables_in_the_environment(
    tiny: Path, bases: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial process would start other processes with them, and no forked one."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "clang++")
    before = dict(os.environ)
    for name in (name for name, column in CELLS if column == "fp32"):
        config = compose(settings(tiny, name, "fp32"))
        attached(config, bases.get(config, "cpu"))
        assert dict(os.environ) == before, name


@pytest.mark.parametrize("name", ["fourierft", "randlora", "vera", "boft", "ia3", "shira"])
def test_random_values_are_equal_on_each_base_in_float32_or_quantized(tiny: Path, bases: BaseCache, name: str) -> None:
    starts = []
    for column in ("fp32", "4 bit", "int8"):
        config = compose(settings(tiny, name, column))
        starts.append(dict(tuned_parameters(attached(config, bases.get(config, "cpu")))))
    for parameter, value in starts[0].items():
        assert torch.equal(value, starts[1][parameter])
        assert torch.equal(value, starts[2][parameter])


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        (["method=peft"], "no kind of adapter is chosen", "ia3"),
        (["method=peft", "method.peft_type=ia4"], "no kind ia4", "ia3"),
        (["method=peft", "method.peft_type=oft", "method.options={block_size: 8}"], "no option", "oft_block_size"),
        (["method=peft", "method.peft_type=miss", "method.options={r: 0}"], "at least 1", "64"),
        (["method=peft", "method.peft_type=miss", "method.options={r: x}"], "an integer", "64"),
        (["method=peft", "method.peft_type=oft", "method.options={coft: 1}"], "true or false", "False"),
        (["method=peft", "method.peft_type=loha", "quantization=nf4"], "packed", "quantization=fp32"),
        (["method=peft", "method.peft_type=adalora", "quantization=fp32"], "removes ranks", "method=lora"),
        (["method=peft", "method.peft_type=prefix", "quantization=fp32"], "virtual tokens", "ia3"),
        (["method=selective", "quantization=fp32", "method.parameters=magnitude:2"], "between 0 and 1", "0.01"),
        (["method=selective", "quantization=fp32", "method.parameters=gradients:0.1"], "gradients", "gradient:0.01"),
        (["method=selective", "quantization=nf4", "method.parameters=magnitude:0.1"], "16 or 32 bits", "bf16"),
    ],
)
def test_a_choice_that_no_row_allows_is_refused_before_anything_loads(given: list[str], what: str, hint: str) -> None:
    with pytest.raises(QloraExpError) as refused:
        compose(given)
    errors = refused.value.errors if isinstance(refused.value, Problems) else [refused.value]
    assert any(what in str(error) and hint in str(error) for error in errors), str(refused.value)


def test_options_that_fit_no_layer_are_refused_by_the_plan(tiny: Path) -> None:
    local = ["model=local", f"model.path={tiny}", "quantization=fp32", "method=peft"]
    for given in (
        ["method.peft_type=boft", "method.options={boft_block_size: 5}"],
        ["method.peft_type=road", "method.options={group_size: 7}"],
        ["method.peft_type=shira", "method.options={r: 500}"],
        ["method.peft_type=hra", "method.options={r: 3}"],
        ["method.peft_type=supertuning", "method.options={sparsity: 1.5}"],
        ["method.peft_type=road", "method.options={group_size: 8, variant: road_9}"],
    ):
        config = compose([*local, *given])
        architecture = describe(config.model)
        adapted = [shape for shape in architecture.weights if shape.name in trained_modules(architecture, config)]
        with pytest.raises(QloraExpError, match=r"method\.options"):
            trained_bytes(architecture, adapted, config, "float32")


RUN = [
    *("tracking=off", "training.device=cpu", "training.max_steps=4", "training.batch_size=4", "seed=1"),
    *("training.logging_steps=1", "task.max_train_items=64", "evaluation=quick", "evaluation.max_items=8"),
    *("training.learning_rate=1e-3", "evaluation.baselines=false", "evaluation.before=false"),
]


@pytest.mark.parametrize(
    "given",
    [
        ["method=peft", "method.peft_type=oft", "quantization=nf4"],
        ["method=selective", "method.parameters=gradient:0.01", "quantization=bf16"],
    ],
)
def test_a_run_records_what_its_plan_says_and_merges(tmp_path: Path, given: list[str]) -> None:
    config = compose([*RUN, *given, f"output_root={tmp_path}"])
    record = execute(config, bases=BaseCache())
    assert record.status is Status.COMPLETED, record.failure
    assert record.plan is not None
    assert record.training is not None
    architecture = describe(config.model)
    adapted = [shape for shape in architecture.weights if shape.name in trained_modules(architecture, config)]
    planned, memory = trained_bytes(architecture, adapted, config, record.plan.compute_dtype), record.memory
    assert (planned.adapter_bytes, planned.gradient_bytes) == (memory.adapter_bytes, memory.gradient_bytes)
    assert planned.optimizer_bytes == memory.optimizer_bytes
    folder = OutputPaths.of(tmp_path).run(record.run_id).adapter
    merged, _ = merged_tuned(config, folder)
    unquantized = compose([*RUN, *given, "quantization=fp32"])
    reference = load_tuned(BaseCache().get(unquantized, "cpu"), unquantized, folder)
    assert torch.allclose(logits(merged), logits(reference), atol=1e-4)


def test_the_largest_entries_are_trained_by_size_or_by_gradient(tiny: Path, bases: BaseCache) -> None:
    from qlora_exp.data.load import load_data
    from qlora_exp.models.tokenizers import load_tokenizer

    local = ["model=local", f"model.path={tiny}", "quantization=fp32", "method=selective", "task.max_train_items=8"]
    masks = {}
    for score in ("magnitude", "gradient"):
        config = compose([*local, f"method.parameters={score}:0.02"])
        base, architecture = bases.get(config, "cpu"), describe(config.model)
        items = load_data(config, load_tokenizer(config.model), 128).train
        modules = trained_modules(architecture, config)
        from qlora_exp.models.base import clone_sharing_weights

        model = attach(clone_sharing_weights(base), config, modules, architecture, items)
        layer = model.get_base_model().get_submodule(modules[0])
        masks[score] = set(layer.supertuning_indices["default"].tolist())
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
    weight = base.model.get_submodule(modules[0]).weight
    assert masks["magnitude"] == set(weight.abs().flatten().topk(len(masks["magnitude"])).indices.tolist())
    assert len(masks["gradient"]) == len(masks["magnitude"])
    assert masks["gradient"] != masks["magnitude"]


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
    for name, kind in PEFT_KINDS.items():
        cells = [f"`{name}`", *("no" if column in kind.refused else "yes" for column in MODES)]
        cells += ["yes" if kind.starts_at_base else "no", ", ".join(f"`{option}`" for option in kind.options) or "–"]
        assert f"| {' | '.join(cells)} |" in text
    assert f"PEFT {MEASURED_WITH}" in text
