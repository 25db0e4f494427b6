"""Training equals a plain SFTTrainer script, resumes bit for bit, and stops when the numbers go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_exp.architecture.run_plan import shape_multiples
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import DeviceChoice
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.evaluation.scoring import evaluate_model
from qlora_exp.models.adapters import attach_adapters
from qlora_exp.models.base import load_base
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_curve
from qlora_exp.runs.prepare import prepare
from qlora_exp.system import environment
from qlora_exp.training import checkpoints
from qlora_exp.training.outcome import Diverged, PruneCheck, Pruned
from qlora_exp.training.trainer import Trained, train

SMALL = [
    "task=local",
    "task.kind=classification",
    "training.device=cpu",
    "training.batch_size=8",
    "training.max_steps=6",
    "training.logging_steps=1",
    "training.learning_rate=5e-3",
    "training.max_length=64",
]


def configured(model: Path, task: Path, *overrides: str) -> Config:
    return compose(["model=local", f"model.path={model}", f"task.path={task}", *SMALL, *overrides])


def train_once(config: Config, folder: Path, report=None) -> tuple[Trained, torch.nn.Module]:
    ready = prepare(config, environment.probe(config.training.device))
    base = load_base(config, ready.plan.device)
    model = attach_adapters(base.model, config, ready.modules)
    model.train()
    told = {"report": report} if report else {}
    items, validation = ready.splits.train, ready.splits.validation
    return train(ready.plan, model, ready.tokenizer, items, validation, config, RunPaths(folder), **told), model


def losses(folder: Path) -> list[float]:
    return [point["loss"] for point in read_curve(RunPaths(folder).curve) if "loss" in point]


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_losses_equal_those_of_a_plain_sfttrainer_script(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, family: str
) -> None:
    """The plain script gets text, not tokens: TRL's own tokenization and masking are what ours is held against."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    # GPT-2's dropout draws as many numbers as there are tokens: without padding other ones than the plain script.
    padded = ["training.padding_free=off"] if family == "gpt2" else []
    config = configured(tiny_models[family], colour_task, "quantization=fp32", "targets=all_linear", *padded)
    train_once(config, tmp_path / "ours")

    ready = prepare(config, environment.probe(config.training.device))
    start = adapters(attach_adapters(load_base(config, "cpu").model, config, ready.modules))
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(ready.modules), task_type="CAUSAL_LM")
    plain = get_peft_model(plain, lora)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    rows = [{"prompt": item.prompt, "completion": item.completion} for item in ready.splits.train]
    trainer = SFTTrainer(
        model=plain,
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            seed=config.seed,
            data_seed=config.seed,
            max_length=64,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_models[family]),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == 6
    assert losses(tmp_path / "ours") == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_a_resumed_training_is_bit_equal_to_an_undisturbed_one(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, quantization: str
) -> None:
    common = [f"quantization={quantization}", "lora.dropout=0.1", "training.save_every_steps=3"]
    whole = configured(tiny_models["llama"], colour_task, *common)
    first, undisturbed = train_once(whole, tmp_path / "whole")
    train_once(whole, tmp_path / "part")
    newest = checkpoints.newest_valid(RunPaths(tmp_path / "part").checkpoints)
    assert newest is not None
    assert newest[0].name == "checkpoint-6"
    (newest[0] / "adapter_model.safetensors").write_bytes(b"torn")
    trained, resumed = train_once(whole, tmp_path / "part")
    assert trained.training.resumed_from_step == 3
    expected = adapters(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in adapters(resumed).items())
    assert (trained.tokens, trained.loss_tokens) == (first.tokens, first.loss_tokens)
    assert trained.training.first_loss == first.training.first_loss
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_checkpoints_hold_no_training_arguments(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    train_once(configured(tiny_models["llama"], colour_task, "training.save_every_steps=3"), tmp_path)
    newest = checkpoints.newest_valid(RunPaths(tmp_path).checkpoints)
    assert newest is not None
    names = {path.name for path in newest[0].iterdir()}
    assert "training_args.bin" not in names
    assert "adapter_model.safetensors" in names


def test_adapters_of_a_quantized_model_train_in_the_dtype_that_was_asked_for(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    _, model = train_once(configured(tiny_models["llama"], colour_task, "quantization=nf4"), tmp_path)
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}


def test_an_infinite_learning_rate_ends_as_diverged(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    config = configured(tiny_models["llama"], colour_task, "training.learning_rate=1e30", "training.max_steps=40")
    with pytest.raises(Diverged) as caught:
        train_once(config, tmp_path)
    assert caught.value.step < 40


def test_logits_are_computed_for_the_tokens_that_carry_a_loss_alone(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.utils as head

    projected: list[int] = []

    class Recorded(head._ChunkedLogProbFunction):
        @classmethod
        def apply(cls, hidden: torch.Tensor, *arguments: object) -> object:
            projected.append(len(hidden))
            return super().apply(hidden, *arguments)

    monkeypatch.setattr(head, "_ChunkedLogProbFunction", Recorded)
    before = head._use_triton
    trained, _ = train_once(configured(tiny_models["llama"], colour_task), tmp_path)
    assert len(projected) == 6
    assert sum(projected) == trained.loss_tokens < trained.tokens
    assert head._use_triton is before


class Attentions(TorchDispatchMode):
    """Counts the calls of torch's fused attention."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [["quantization=nf4"], ["quantization=int8", "training.padding_free=off"]], ids=["nf4", "int8, padded"]
)
def test_selective_checkpointing_computes_attention_once_and_trains_the_same_adapters(
    settings: list[str], tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    calls, trained = [], []
    for choice in ("off", "selective", "on"):
        checkpointing = f"training.gradient_checkpointing={choice}"
        config = configured(tiny_models["llama"], colour_task, checkpointing, *settings)
        with Attentions() as attentions:
            trained.append(adapters(train_once(config, tmp_path / choice)[1]))
        calls.append(attentions.calls)
    assert calls[1] == calls[0]
    assert calls[2] == calls[0] + 6 * 2, "six steps and two layers"
    for other in trained[1:]:
        assert all(torch.equal(value, other[name]) for name, value in trained[0].items())


def test_selective_checkpointing_is_refused_where_it_would_keep_nothing(
    tiny_models: dict[str, Path], colour_task: Path
) -> None:
    for family, settings in (("llama", ["model.attention=eager"]), ("gpt2", [])):
        selective = "training.gradient_checkpointing=selective"
        config = configured(tiny_models[family], colour_task, selective, *settings)
        with pytest.raises(ConfigError, match=f"can't keep the attention of {family}") as refused:
            prepare(config, environment.probe("cpu"))
        assert "training.gradient_checkpointing=on" in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        *(["micro_batch_size=1"], ["batch_size=16"], ["gradient_checkpointing=on"]),
        ["gradient_checkpointing=selective"],
    ],
)
def test_operations_are_counted_as_a_training_does_them(settings: list[str], tmp_path: Path) -> None:
    """By torch's own count of matrix products, which has no attention; the first layer's inputs get no gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    steps = ["training.device=cpu", "training.max_steps=4", "training.batch_size=8", "quantization=fp32", "lora.r=32"]
    config = compose([*steps, *(f"training.{setting}" for setting in settings), "task.max_train_items=32"])
    with FlopCounterMode(display=False) as counter:
        trained, _ = train_once(config, tmp_path)
    planned = prepare(config, environment.probe(config.training.device)).plan
    assert planned.train_flops_per_token is not None
    counted = planned.train_flops_per_token * trained.tokens / counter.get_total_flops()
    assert 1.0 < counted < 1.15


def test_in_16_bit_on_a_cpu_few_shapes_are_multiplied_and_the_loss_is_the_same(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.utils as head

    import qlora_exp.architecture.run_plan
    import qlora_exp.training.trainer

    lengths: dict[str, list[int]] = {}
    projected: dict[str, list[int]] = {}
    name = ""

    class Recorded(head._ChunkedLogProbFunction):
        @classmethod
        def apply(cls, hidden: torch.Tensor, *arguments: object) -> object:
            projected.setdefault(name, []).append(len(hidden))
            return super().apply(hidden, *arguments)

    step = qlora_exp.training.trainer._MeteredTrainer.training_step

    def training_step(self, model, inputs, *arguments):
        lengths.setdefault(name, []).append(inputs["input_ids"].shape[1])
        return step(self, model, inputs, *arguments)

    monkeypatch.setattr(head, "_ChunkedLogProbFunction", Recorded)
    monkeypatch.setattr(qlora_exp.training.trainer._MeteredTrainer, "training_step", training_step)
    config = configured(tiny_models["llama"], colour_task, "quantization=bf16")
    name = "rounded up"
    trained, _ = train_once(config, tmp_path / name)
    name = "as they are"
    monkeypatch.setattr(qlora_exp.architecture.run_plan, "shape_multiples", lambda *_: (1, 1))
    train_once(config, tmp_path / name)
    assert (
        {length % 16 for length in lengths["rounded up"]} == {tokens % 64 for tokens in projected["rounded up"]} == {0}
    )
    assert len(set(lengths["as they are"])) > len(set(lengths["rounded up"]))
    assert sum(projected["as they are"]) == trained.loss_tokens < sum(projected["rounded up"])
    assert losses(tmp_path / "rounded up") == pytest.approx(losses(tmp_path / "as they are"), rel=2e-2)


@pytest.mark.parametrize("scored", [0, 5, 64, 70])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("multiple", [1, 64])
def test_only_tokens_with_a_loss_get_logits_with_the_same_values_and_gradients(
    scored: int, biased: bool, multiple: int
) -> None:
    import trl.trainer.utils as head

    from qlora_exp.training.light_trainer import LossTokenLogProbs

    torch.manual_seed(0)
    start = [torch.randn(80, 16), torch.randn(50, 16), torch.randn(50) if biased else None]
    targets, positions = torch.randint(0, 50, (80,)), torch.randperm(80)[:scored].sort().values
    weights = torch.zeros(80).index_fill(0, positions, 1.0) * torch.randn(80)
    found = []
    original = head._ChunkedLogProbFunction
    for function in (original, LossTokenLogProbs(original, positions, multiple)):
        inputs = [tensor.clone().requires_grad_() if tensor is not None else None for tensor in start]
        log_probs, *others = function.apply(*inputs, targets, 1.0, 32, None, 1.0, ())
        (weights @ log_probs).backward()
        assert others == [None] * 4
        found.append([weights * log_probs, *(tensor.grad for tensor in inputs if tensor is not None)])
    for plain, few in zip(*found, strict=True):
        torch.testing.assert_close(few, plain)


def test_in_16_bit_no_row_is_padded_beyond_the_models_positions(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_models["gpt2"], folder)
    settings = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    table = next(name for name in weights if name.endswith("wpe.weight"))
    task = tmp_path / "longer.jsonl"
    task.write_text(colour_task.read_text().replace("Item", "Of all the items in the basket, item"))
    loose = configured(folder, task, "quantization=bf16")
    rows = max(len(item.ids) for item in prepare(loose, environment.probe(loose.training.device)).splits.train)
    assert rows % 16 != 0
    save_file(weights | {table: weights[table][:rows].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings | {"n_positions": rows}))
    config = configured(folder, task, "quantization=bf16", f"training.max_length={rows}")
    trained, _ = train_once(config, tmp_path / "run")
    assert trained.training.steps == 6
    plan = prepare(config, environment.probe(config.training.device)).plan
    assert (plan.length_multiple, plan.logits_multiple) == (1, 64)
    # a length that no position has is never reached
    assert shape_multiples("bfloat16", "cpu", 2048, 1024) == (16, 64)
    assert shape_multiples("bfloat16", "cpu", 1001, 1001) == (1, 64)


def test_a_study_can_stop_a_training(tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path) -> None:
    config = configured(tiny_models["llama"], colour_task, "training.evaluate_every_steps=2")
    seen: list[tuple[int, float]] = []

    def ask(step: int, value: float, items: object) -> bool:
        assert items is None
        seen.append((step, value))
        return step >= 4

    with pytest.raises(Pruned) as caught:
        train_once(config, tmp_path, PruneCheck(ask))
    assert caught.value.step == 4
    assert [step for step, _ in seen] == [2, 4]


def test_a_study_that_wants_it_is_told_each_items_nats_by_the_same_pass(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    every = ["training.max_steps=2", "training.evaluate_every_steps=2", "quantization=fp32"]
    config = configured(tiny_models["llama"], colour_task, *every)
    told: dict[bool, tuple[float, object]] = {}
    for wanted in (False, True):

        def ask(step: int, value: float, items: object, wanted: bool = wanted) -> bool:
            told[wanted] = (value, items)
            return False

        _, model = train_once(config, tmp_path / str(wanted), PruneCheck(ask, per_item=wanted))
    ready = prepare(config, environment.probe(config.training.device))
    scored = evaluate_model(model, ready.tokenizer, ready.splits.validation, ready.splits, config)
    assert told[False][1] is None
    assert told[True][0] == pytest.approx(told[False][0], rel=1e-6)
    assert told[True][1] == pytest.approx(scored.items["loss_sum_nats"].to_pylist(), rel=1e-4)


def test_a_token_budget_stops_at_the_first_step_that_reaches_it(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    config = configured(
        tiny_models["llama"], colour_task, "training.max_steps=null", "training.max_tokens=400", "training.batch_size=4"
    )
    trained, _ = train_once(config, tmp_path)
    tokens = [point["tokens"] for point in read_curve(RunPaths(tmp_path).curve)]
    assert tokens[-1] == trained.tokens
    assert trained.tokens >= 400
    assert tokens[-2] < 400
    assert not trained.training.stopped_early


def test_warm_up_and_schedule_span_a_budget_of_tokens(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    budget = ["training.max_steps=null", "training.max_tokens=2000", "training.batch_size=4"]
    train_once(configured(tiny_models["llama"], colour_task, *budget, "training.warmup_ratio=0.1"), tmp_path)
    rates = [point["learning_rate"] for point in read_curve(RunPaths(tmp_path).curve)]
    assert max(rates) > 0.95 * 5e-3
    assert rates[-1] < 0.1 * 5e-3


def test_the_curve_ends_at_the_last_step_whatever_is_logged_between(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    trained, _ = train_once(configured(tiny_models["llama"], colour_task, "training.logging_steps=4"), tmp_path)
    points = read_curve(RunPaths(tmp_path).curve)
    assert [point["step"] for point in points] == [1, 4, 6]
    assert trained.training.final_loss == points[-1]["loss"]


def test_micro_batches_give_the_same_training(tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path) -> None:
    whole = configured(tiny_models["llama"], colour_task, "quantization=fp32")
    parts = configured(tiny_models["llama"], colour_task, "quantization=fp32", "training.micro_batch_size=2")
    train_once(whole, tmp_path / "whole")
    train_once(parts, tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_the_curve_is_json_lines_with_finite_numbers_only(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    train_once(configured(tiny_models["llama"], colour_task), tmp_path)
    lines = RunPaths(tmp_path).curve.read_text().splitlines()
    points = [json.loads(line) for line in lines]
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "gradient_norm", "tokens"} <= set(points[0])
    assert read_curve(RunPaths(tmp_path).curve) == points


def test_the_validation_loss_of_a_training_is_the_defined_one_whatever_the_batch(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    """Nats of all tokens / all tokens, over the items that the scores are of."""
    shown = {}
    for size in ("8", "2"):
        config = configured(
            tiny_models["llama"],
            colour_task,
            "quantization=fp32",
            "training.learning_rate=1e-12",
            "training.evaluate_every_steps=6",
            f"training.micro_batch_size={size}",
        )
        train_once(config, tmp_path / size)
        shown[size] = read_curve(RunPaths(tmp_path / size).curve)[-1]["validation_loss"]
    ready = prepare(config, environment.probe(config.training.device))
    base = load_base(config, "cpu")
    scored = evaluate_model(base.model, ready.tokenizer, ready.splits.validation, ready.splits, config)
    assert shown["8"] == pytest.approx(shown["2"], abs=1e-5)
    assert shown["8"] == pytest.approx(scored.scores.loss, abs=1e-4)


def test_a_base_with_experts_is_trained_and_scored_by_its_nats_alone(colour_task: Path, tmp_path: Path) -> None:
    """TRL adds the router's loss to both losses and asks for it ever after; texts that are read in parts have none."""
    from tests.conftest import save_tiny_model

    config = configured(
        save_tiny_model("mixtral", tmp_path / "experts"),
        colour_task,
        "quantization=fp32",
        "training.learning_rate=1e-12",
        "training.evaluate_every_steps=6",
        "evaluation.max_items=12",
    )
    _, model = train_once(config, tmp_path / "run")
    told = read_curve(RunPaths(tmp_path / "run").curve)[-1]["validation_loss"]
    ready = prepare(config, environment.probe(config.training.device))
    scored = evaluate_model(model, ready.tokenizer, ready.splits.validation, ready.splits, config)
    assert told == pytest.approx(scored.scores.loss, abs=1e-4)


def test_dora_over_int8_is_refused_where_the_device_turns_out_to_be_a_cpu() -> None:
    config = compose(["training.device=auto", "quantization=int8", "lora.dora=true"])
    with pytest.raises(ConfigError, match="int8"):
        prepare(config, environment.probe(DeviceChoice.cpu))
