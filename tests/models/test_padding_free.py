"""Training without padding has the losses of padded training; where an architecture can't, rows are padded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_exp import run
from qlora_exp.architecture import padding
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.candidates import Candidate
from qlora_exp.estimate.planner import Planner
from qlora_exp.estimate.tokens import RowCounter
from qlora_exp.models import attention as rows_of_attention
from qlora_exp.models.adapters import attach_adapters
from qlora_exp.models.attention import attention_by_rows, measured_padding_reason
from qlora_exp.models.base import load_base
from qlora_exp.models.inspect import describe
from qlora_exp.paths import EMBEDDED, RunPaths
from qlora_exp.records.files import read_curve
from qlora_exp.records.types import Plan, RunRecord, Status
from qlora_exp.runs.prepare import plan_for_model, prepare
from qlora_exp.system import environment
from qlora_exp.training.outcome import PruneCheck
from qlora_exp.training.trainer import train
from tests.models.test_every_architecture import MODERN, SIZES, UNQUANTIZED

WITHOUT, PADDED = "training.padding_free=on", "training.padding_free=off"
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL = {"vision_config": VISION | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
FAST = ("gemma3_text", "gpt2", "phi3", "qwen3_moe")
"""A sliding window that is long enough, positions that are learned, fused projections, and experts."""


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny random model without dropout, which would draw other numbers without padding."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    end = tokenizer.eos_token_id
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    tokens["pad_token_id"] = tokenizer.pad_token_id
    sizes = {**MULTIMODAL, "text_config": MODERN | tokens} if family == "gemma3" else SIZES[family]
    config = AutoConfig.for_model(family, **sizes, **tokens, **changes)
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or "pdrop" in key or "jitter" in key):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path) -> Path:
    """Write rows whose lengths differ: of 7 to 27 tokens."""
    colours = ("red", "yellow", "green", "blue")
    rows = [
        {"prompt": "the fruit " * (1 + number % 9) + f"number {number} is", "completion": colours[number * number % 4]}
        for number in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def configured(model: Path, rows: Path, *overrides: str) -> Config:
    sizes = ("training.max_steps=4", "training.batch_size=8", "training.max_length=96", "training.logging_steps=1")
    return compose(
        [
            *("model=local", f"model.path={model}", "task=local", "task.kind=classification", f"task.path={rows}"),
            *("targets=all_linear", "training.device=cpu", "training.learning_rate=1e-3", *sizes, *overrides),
        ]
    )


def trained_losses(config: Config, folder: Path, report: PruneCheck | None = None) -> tuple[Plan, list[float]]:
    """Train as a run does; return its plan, and the losses of its steps and validations."""
    ready = prepare(config, environment.probe(config.training.device))
    base = load_base(config, "cpu")
    assert not ready.plan.padding_free or measured_padding_reason(base.model, longest_row=30) is None
    model = attach_adapters(base.model, config, ready.modules)
    model.train()
    paths, validation = RunPaths(folder), ready.splits.validation
    reported = {"report": report} if report is not None else {}
    train(ready.plan, model, ready.tokenizer, ready.splits.train, validation, config, paths, **reported)
    points = read_curve(paths.curve)
    return ready.plan, [point[key] for point in points for key in ("loss", "validation_loss") if key in point]


def assert_equal_losses(model: Path, rows: Path, folder: Path, *overrides: str) -> None:
    found = []
    for choice in (PADDED, WITHOUT):
        config = configured(model, rows, "training.evaluate_every_steps=4", choice, *overrides)
        plan, losses = trained_losses(config, folder / choice)
        assert plan.padding_free is (choice is WITHOUT), plan.padded_because
        found.append(losses)
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], abs=5e-6)


def test_a_validation_row_that_is_longer_than_a_window_counts_if_it_is_read(rows: Path, tmp_path: Path) -> None:
    """For ``plan``, for what ``validate`` and a run prepare, and for the loaded model."""
    model = save_model("gemma3_text", tmp_path / "model", sliding_window=30)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(rows, data / "train.jsonl")
    long = {"prompt": "the fruit " * 14 + "number 81 is", "completion": "red"}
    other = {"prompt": "the fruit number 82 is", "completion": "yellow"}
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (other, long)))
    for overrides, padded in (((), False), (("training.evaluate_every_steps=2",), True)):
        config = configured(model, data, "quantization=fp32", *overrides)
        ready = prepare(config, environment.probe(config.training.device))
        planned = Planner(counter=RowCounter()).plan(Candidate({}, config))
        loaded = replace(ready, plan=replace(ready.plan, padding_free=True, padded_because=None))
        plan = plan_for_model(loaded, load_base(config, "cpu").model, config)
        for found in (ready.plan.padded_because, plan.padded_because, " ".join(planned.notes)):
            assert ("window of 30 tokens" in (found or "")) is padded
    with pytest.raises(ConfigError, match="window of 30 tokens"):
        prepare(configured(model, data, WITHOUT, "training.evaluate_every_steps=2"), environment.probe("cpu"))


def test_keys_are_repeated_where_no_kernel_takes_fewer_of_them(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(save_model("qwen3_moe", tmp_path / "model"), rows, "quantization=fp32")
    model = load_base(config, "cpu").model
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    asked: list[tuple[int, ...]] = []

    def takes_groups(query: torch.Tensor) -> bool:
        asked.append(tuple(query.shape))
        return False

    monkeypatch.setattr(rows_of_attention, "_takes_groups", takes_groups)
    assert measured_padding_reason(model, longest_row=30) is None
    assert asked


@pytest.mark.parametrize("family", FAST)
def test_losses_are_those_of_padded_training(family: str, rows: Path, tmp_path: Path) -> None:
    assert_equal_losses(save_model(family, tmp_path / "model"), rows, tmp_path, "quantization=fp32")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(padding.PADDING_FREE_TYPES))
def test_losses_of_every_listed_architecture_are_those_of_padded_training(
    family: str, rows: Path, tmp_path: Path
) -> None:
    mode = "fp32" if family in UNQUANTIZED else "nf4"
    assert_equal_losses(save_model(family, tmp_path / "model"), rows, tmp_path, f"quantization={mode}")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(SIZES) - padding.PADDING_FREE_TYPES))
def test_every_other_architecture_is_padded_and_the_plan_says_why(family: str, rows: Path, tmp_path: Path) -> None:
    model = save_model(family, tmp_path / "model")
    plan = prepare(configured(model, rows), environment.probe("cpu")).plan
    assert plan.padding_free is False
    assert plan.padded_because
    with pytest.raises(ConfigError, match="can't be trained without padding"):
        prepare(configured(model, rows, WITHOUT), environment.probe("cpu"))


@pytest.mark.parametrize(
    "settings",
    [
        ("quantization=nf4", "training.micro_batch_size=4"),
        ("quantization=fp32", "training.micro_batch_size=1"),
        ("quantization=int8", "training.gradient_checkpointing=on"),
    ],
    ids=("nf4, accumulated", "one row at a time", "int8, checkpointed"),
)
def test_losses_of_the_embedded_model_are_those_of_padded_training(
    settings: tuple[str, ...], rows: Path, tmp_path: Path
) -> None:
    assert_equal_losses(EMBEDDED / "base", rows, tmp_path, *settings)


def test_in_16_bit_batches_are_rounded_up_by_rows_without_a_loss(rows: Path, tmp_path: Path) -> None:
    tokens, losses = [], []
    for choice in (PADDED, WITHOUT):
        config = configured(EMBEDDED / "base", rows, "quantization=bf16", choice)
        plan, found = trained_losses(config, tmp_path / choice)
        assert plan.length_multiple > 1
        tokens.append(read_curve(RunPaths(tmp_path / choice).curve)[-1]["tokens"])
        losses.append(found)
    assert tokens[0] == tokens[1]  # rows that round up aren't counted
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_a_window_that_covers_every_row_covers_them_when_their_length_is_rounded_up(rows: Path, tmp_path: Path) -> None:
    model = save_model("gemma3_text", tmp_path / "model", sliding_window=30)
    plan, losses = trained_losses(configured(model, rows, "quantization=bf16", WITHOUT), tmp_path / "run")
    assert (plan.padding_free, plan.length_multiple, len(losses)) == (True, 16, 4)


def test_items_of_a_validation_have_the_nats_of_padded_ones(rows: Path, tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def ask(step: int, value: float, items: Any) -> bool:
        seen.append(list(items))
        return False

    for choice in (PADDED, WITHOUT):
        config = configured(EMBEDDED / "base", rows, "quantization=fp32", "training.evaluate_every_steps=4", choice)
        trained_losses(config, tmp_path / choice, PruneCheck(ask, per_item=True))
    assert len(seen) == 2
    assert len(seen[0]) > 1
    assert seen[1] == pytest.approx(seen[0], abs=1e-4)


def test_a_row_does_not_see_the_others(rows: Path) -> None:
    model = load_base(configured(EMBEDDED / "base", rows, "quantization=fp32"), "cpu").model
    lengths = (7, 12, 9)
    bounds = torch.tensor([0, 7, 19, 28], dtype=torch.int32)
    batch = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "max_length_q": 12}
    ids = torch.arange(100, 128)[None]
    changed = ids.clone()
    changed[0, 7:19] += 500  # the middle row
    with torch.no_grad(), attention_by_rows(model):
        first, second = (model(one, **batch, cu_seq_lens_q=bounds, use_cache=False).logits[0] for one in (ids, changed))
    torch.testing.assert_close(first[:7], second[:7], rtol=0, atol=0)
    torch.testing.assert_close(first[19:], second[19:], rtol=0, atol=0)
    assert (first[7:19] - second[7:19]).abs().max() > 0.1
    assert model.config._attn_implementation == "sdpa"


def test_rows_longer_than_a_sliding_window_are_padded(rows: Path, tmp_path: Path) -> None:
    model = save_model("gemma3_text", tmp_path / "model", sliding_window=16)
    plan = prepare(configured(model, rows), environment.probe("cpu")).plan
    assert (plan.padding_free, "window of 16 tokens" in (plan.padded_because or "")) == (False, True)
    wide = save_model("gemma3_text", tmp_path / "wide", sliding_window=32)
    assert prepare(configured(wide, rows), environment.probe("cpu")).plan.padding_free
    # The layers themselves refuse, too, if the configuration hides a window.
    base = load_base(configured(model, rows, "quantization=fp32"), "cpu").model
    assert measured_padding_reason(base, longest_row=16) is None
    assert "window of 16 tokens" in (measured_padding_reason(base, longest_row=17) or "")


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attention_is_padded(attention: str, rows: Path) -> None:
    config = configured(EMBEDDED / "base", rows, f"model.attention={attention}")
    assert f"model.attention={attention}" in (padding.planned_padding_reason(describe(config.model), config, 30) or "")
    with pytest.raises(ConfigError, match=f"model.attention={attention} needs padded rows"):
        configured(EMBEDDED / "base", rows, f"model.attention={attention}", WITHOUT)


def run_once(model: Path, rows: Path, folder: Path, *overrides: str) -> RunRecord:
    return run(
        *("model=local", f"model.path={model}", "task=local", "task.kind=classification", f"task.path={rows}"),
        *("quantization=fp32", "targets=all_linear", "tracking=off", f"output_root={folder}", "training.device=cpu"),
        *("training.max_steps=2", "training.batch_size=4", "training.max_length=96", "evaluation.max_items=4"),
        *("evaluation.forgetting=false", "evaluation.baselines=false", *overrides),
    )


def test_a_model_whose_logits_differ_is_padded_and_the_record_says_so(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model("bloom", tmp_path / "model")
    with pytest.raises(ConfigError, match="bloom can't be trained without padding"):
        run_once(model, rows, tmp_path / "refused", WITHOUT)
    assert not (tmp_path / "refused").exists()
    # As for an architecture that was listed by mistake: only its logits show it.
    monkeypatch.delitem(padding.REASONS, "bloom")
    monkeypatch.setattr(padding, "PADDING_FREE_TYPES", frozenset({"bloom"}))
    record = run_once(model, rows, tmp_path / "outputs")
    assert record.status is Status.COMPLETED, record.failure
    assert record.plan is not None
    assert record.plan.padding_free is False
    assert record.plan.padded_because
    assert (record.plan.predicted_padded_tokens or 0) > (record.plan.predicted_train_tokens or 0)
    with pytest.raises(ConfigError, match="bloom can't be trained without padding"):
        run_once(model, rows, tmp_path / "tried", WITHOUT)


def test_the_listed_and_the_refused_architectures_are_those_that_tests_train() -> None:
    assert not padding.PADDING_FREE_TYPES & set(padding.REASONS)
    assert padding.PADDING_FREE_TYPES - set(SIZES) == {"gemma3"}
