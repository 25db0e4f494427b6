"""Micro-batches chosen in tokens: the same training as with whole batches, in less memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from qlora_exp.architecture.run_plan import config_fingerprint
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.estimator import Estimator, RunEstimate
from qlora_exp.estimate.memory_fit import MemoryLimit, PredictedOutOfMemory, smaller_micro_batch
from qlora_exp.estimate.workload import RowLengths, Workload
from qlora_exp.models.adapters import attach_adapters
from qlora_exp.models.base import load_base
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_curve
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.execute import execute
from qlora_exp.runs.prepare import prepare
from qlora_exp.system import environment
from qlora_exp.training.micro_batches import cut_rows, padded_tokens
from qlora_exp.training.trainer import Trained, train

SETTINGS = [
    *("task=local", "task.kind=generation", "training.device=cpu", "training.batch_size=8", "training.max_steps=6"),
    *("training.logging_steps=1", "training.learning_rate=5e-3", "training.max_length=64", "quantization=fp32"),
]


@pytest.fixture(scope="module")
def uneven_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 5 to about 50 tokens."""
    path, rng = tmp_path_factory.mktemp("task") / "rows.jsonl", random.Random(0)
    rows = [
        {"prompt": "red " * rng.choice((1, 3, 8, 20, 35)), "completion": "blue " * rng.choice((1, 2, 9))}
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def configured(model: Path, task: Path, *overrides: str) -> Config:
    return compose(["model=local", f"model.path={model}", f"task.path={task}", *SETTINGS, *overrides])


def train_once(config: Config, folder: Path) -> tuple[Trained, dict[str, torch.Tensor], list[tuple[int, int]]]:
    """Return what was trained, the adapters, and the shape of each forward pass."""
    ready = prepare(config, environment.probe(config.training.device))
    model = attach_adapters(load_base(config, "cpu").model, config, ready.modules)
    shapes: list[tuple[int, int]] = []
    model.get_base_model().get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape[:2]))
    )
    model.train()
    items, validation = ready.splits.train, ready.splits.validation
    trained = train(ready.plan, model, ready.tokenizer, items, validation, config, RunPaths(folder))
    return trained, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, shapes


def points(folder: Path, key: str) -> list[float]:
    return [point[key] for point in read_curve(RunPaths(folder).curve) if key in point]


@pytest.mark.parametrize("cost", [padded_tokens(), padded_tokens(16), sum])
def test_rows_are_cut_by_length_into_few_micro_batches_within_the_limit(cost: Callable[[Sequence[int]], int]) -> None:
    rng = random.Random(0)
    for limit in (32, 48, 100, 1000):
        lengths = [rng.randint(1, 32) for _ in range(rng.randint(1, 40))]
        groups = cut_rows(lengths, limit, cost)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        assert all(cost([lengths[row] for row in group]) <= limit for group in groups)
        in_order = [lengths[row] for group in groups for row in group]
        assert in_order == sorted(lengths, reverse=True)
        for group, following in itertools.pairwise(groups):
            assert cost([lengths[row] for row in (*group, following[0])]) > limit
    assert cut_rows([5, 9, 2, 4], 10, padded_tokens()) == [[1], [0, 3], [2]]
    assert cut_rows([5, 9, 2, 4], 20, sum) == [[1, 0, 3, 2]]


@pytest.mark.parametrize(("padded", "takes_number"), [(True, True), (False, True), (False, False)])
def test_a_training_in_micro_batches_of_tokens_equals_that_of_whole_batches(
    tiny_models: dict[str, Path],
    uneven_task: Path,
    tmp_path: Path,
    padded: bool,
    takes_number: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``takes_number``: whether the model's class says that its loss takes the number of tokens; Gemma 4's doesn't."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", takes_number, raising=False)
    overrides = ("training.evaluate_every_steps=3", f"training.padding_free={'off' if padded else 'on'}")
    whole = configured(tiny_models["llama"], uneven_task, *overrides)
    cut = configured(tiny_models["llama"], uneven_task, *overrides, "training.micro_batch_tokens=64")
    first, expected, whole_shapes = train_once(whole, tmp_path / "whole")
    second, found, shapes = train_once(cut, tmp_path / "cut")
    for key in ("loss", "gradient_norm"):
        assert points(tmp_path / "cut", key)[0] == pytest.approx(points(tmp_path / "whole", key)[0], rel=1e-6)
        assert points(tmp_path / "cut", key) == pytest.approx(points(tmp_path / "whole", key), rel=1e-4)
    assert points(tmp_path / "cut", "validation_loss") == pytest.approx(
        points(tmp_path / "whole", "validation_loss"), rel=1e-5
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    assert (second.tokens, second.loss_tokens) == (first.tokens, first.loss_tokens)
    assert max(rows * length for rows, length in shapes) <= 64 < max(rows * length for rows, length in whole_shapes)
    computed = [sum(rows * length for rows, length in each) for each in (shapes, whole_shapes)]
    if padded:
        assert computed[0] < 0.8 * computed[1]
        assert len({rows for rows, _ in shapes}) > 2
    else:
        assert computed[0] == computed[1]


def test_a_resumed_training_in_micro_batches_of_tokens_is_bit_equal(
    tiny_models: dict[str, Path], uneven_task: Path, tmp_path: Path
) -> None:
    overrides = ("lora.dropout=0.1", "training.save_every_steps=3", "training.micro_batch_tokens=64")
    config = configured(tiny_models["llama"], uneven_task, *overrides)
    first, undisturbed, _ = train_once(config, tmp_path)
    shutil.rmtree(RunPaths(tmp_path).checkpoints / "checkpoint-6")
    resumed, found, _ = train_once(config, tmp_path)
    assert resumed.training.resumed_from_step == 3
    assert all(torch.equal(value, undisturbed[name]) for name, value in found.items())
    assert (resumed.tokens, resumed.loss_tokens) == (first.tokens, first.loss_tokens)


def test_a_micro_batch_below_the_longest_row_is_refused_before_the_model_is_loaded(
    tiny_models: dict[str, Path], uneven_task: Path
) -> None:
    def prepared(limit: int) -> int | None:
        config = configured(tiny_models["llama"], uneven_task, f"training.micro_batch_tokens={limit}")
        return prepare(config, environment.probe(config.training.device)).plan.longest_row_tokens

    longest = prepared(64)
    assert longest is not None
    assert prepared(longest) == longest
    with pytest.raises(ConfigError, match=f"the longest training row has {longest} tokens") as error:
        prepared(longest - 1)
    assert error.value.where == f"training.micro_batch_tokens = {longest - 1}"
    assert f"training.micro_batch_tokens={longest}" in str(error.value.hint)


PADDED = "training.padding_free=off"


def estimated(memory_bytes: int | None, *overrides: str, cuda: bool = True) -> tuple[Config, Estimator, RunEstimate]:
    from qlora_exp.architecture.families import known_architecture
    from qlora_exp.architecture.targets import resolve_targets
    from qlora_exp.estimate.device import device_by_name
    from qlora_exp.estimate.throughput import MeasuredThroughput

    config = compose(
        ["model=llama3_1_8b", "quantization=nf4", "training.batch_size=64", "training.max_length=1024", *overrides]
    )
    architecture = known_architecture(config.model)
    assert architecture is not None
    rng = random.Random(0)
    lengths = [rng.randint(20, 1024) for _ in range(4000)]
    rows = RowLengths.of([*lengths, 1024], [length // 4 for length in (*lengths, 1024)])
    estimator = Estimator(
        architecture,
        tuple(resolve_targets(architecture, config.targets)),
        device_by_name("h200" if cuda else "cpu").hardware,
        rows=lambda _: rows,
        rates=lambda *_: (MeasuredThroughput(None, None, None), None),
        joined_heap=False,
        memory_bytes=memory_bytes,
        prices={},
    )
    return config, estimator, estimator.estimate(config)


def test_auto_is_the_largest_micro_batch_that_is_predicted_to_fit() -> None:
    auto = "training.micro_batch_tokens=auto"
    for choice, padding, limit in (
        *(("on", "off", 60 * 10**9), ("off", "off", 60 * 10**9)),
        *(("on", "on", 30 * 10**9), ("off", "on", 60 * 10**9)),
    ):
        checkpointing, padded = f"training.gradient_checkpointing={choice}", f"training.padding_free={padding}"
        config, estimator, estimate = estimated(limit, auto, checkpointing, padded)
        tokens = estimate.micro_batch_tokens
        assert tokens is not None
        assert 1024 <= tokens < 64 * 1024
        assert estimate.memory.needed_bytes * 1.5 <= limit
        training = dataclasses.replace(config.training, micro_batch_tokens=round(tokens * 1.05))
        assert estimator.peak(dataclasses.replace(config, training=training)).needed_bytes * 1.5 > limit
        assert (
            estimate.memory
            == estimated(limit, f"training.micro_batch_tokens={tokens}", checkpointing, padded)[2].memory
        )
    assert estimated(10**15, auto)[2].micro_batch_tokens == 64 * 1024
    assert estimated(None, auto)[2].micro_batch_tokens == 64 * 1024
    assert estimated(1, auto)[2].micro_batch_tokens == 1024  # the memory limit refuses it with its parts


def test_auto_checkpoints_only_where_micro_batches_would_be_small_without_it() -> None:
    auto, off = "training.micro_batch_tokens=auto", "training.gradient_checkpointing=off"
    for gigabytes in (12, 24, 48, 80, 141, 400):
        estimate, without = (estimated(gigabytes * 10**9, auto, *extra)[2] for extra in ((), (off,)))
        assert without.micro_batch_tokens is not None
        assert estimate.checkpointing == (without.micro_batch_tokens < 8192)
        if not estimate.checkpointing:
            assert (estimate.memory, estimate.micro_batch_tokens) == (without.memory, without.micro_batch_tokens)
        else:
            assert (estimate.micro_batch_tokens or 0) >= without.micro_batch_tokens
    config = estimated(None, auto, cuda=False)[2]
    assert not config.checkpointing


def test_a_plan_counts_the_largest_micro_batch_and_the_padding_that_is_left() -> None:
    off = "training.gradient_checkpointing=off"
    whole = estimated(None, off, PADDED)[2]
    cut, without_padding = (estimated(None, off, each, "training.micro_batch_tokens=8192")[2] for each in (PADDED, off))
    rows = estimated(None, off, PADDED, "training.micro_batch_size=8")[2]
    # As many tokens, and what attention lays out for rows of similar length.
    assert cut.memory.activation_bytes < without_padding.memory.activation_bytes < 1.3 * cut.memory.activation_bytes
    assert cut.memory.activation_bytes == pytest.approx(rows.memory.activation_bytes, rel=0.01)  # 8 × 1024 tokens
    assert cut.memory.peak_bytes < whole.memory.peak_bytes
    rng = random.Random(0)
    lengths = [min(1024, max(20, round(rng.lognormvariate(5.5, 0.8)))) for _ in range(4000)]
    table = RowLengths.of(lengths, lengths)
    training = compose(["training.batch_size=64", "training.max_length=1024"]).training
    for limit in (2048, 8192, 16384, 65536):
        seen = []
        for _ in range(200):
            step = rng.sample(lengths, 64)
            groups = cut_rows(step, limit, padded_tokens())
            seen.append(sum(len(group) * max(step[row] for row in group) for group in groups) / 64)
        predicted = Workload.of(dataclasses.replace(training, micro_batch_tokens=limit), table).row.padded
        assert predicted == pytest.approx(sum(seen) / len(seen), rel=0.05)


def test_without_padding_a_cut_that_cuts_nothing_changes_no_prediction() -> None:
    on, free = "training.gradient_checkpointing=on", "training.padding_free=on"
    whole, uncut = (estimated(None, on, free, *given)[2] for given in ((), ("training.micro_batch_tokens=65536",)))
    assert uncut.memory == whole.memory


def test_attention_lays_out_no_more_than_is_predicted_for_the_largest_micro_batch() -> None:
    rng = random.Random(1)
    lengths = [min(4000, max(8, round(rng.lognormvariate(4.5, 1.1)))) for _ in range(4000)]
    table = RowLengths.of(lengths, lengths)
    for limit in (4000, 8000, 16000):
        largest = 0
        for _ in range(60):  # an epoch
            step = rng.sample(lengths, 64)
            largest = max(largest, *(len(g) * max(step[row] for row in g) for g in cut_rows(step, limit, sum)))
        assert largest <= table.largest_layout(64, limit) * 1.25
        assert table.largest_layout(64, limit) < 1.6 * largest


def test_a_run_without_the_key_keeps_its_fingerprint() -> None:
    """Earlier versions had no such key."""
    config = compose([])
    cut = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_tokens=4096))
    assert config_fingerprint(config) != config_fingerprint(cut)
    assert "micro_batch_tokens" not in json.dumps(_fingerprinted(config))


def _fingerprinted(config: Config) -> Any:
    from qlora_exp.architecture import run_plan

    seen: list[Any] = []
    digest = run_plan._digest
    try:
        run_plan._digest = lambda value: seen.append(value) or digest(value)
        config_fingerprint(config)
    finally:
        run_plan._digest = digest
    return seen[0]


def run(*overrides: str, **options: Any) -> RunRecord:
    settings = ("tracking=off", "evaluation=quick", "evaluation.before=false", "training.device=cpu")
    return execute(compose([*settings, "training.max_steps=2", "task.max_train_items=64", *overrides]), **options)


def test_memory_that_runs_out_halves_the_tokens_of_a_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = MemoryLimit(10**12, 1, (), allow_borderline=True, halvings=0)
    record = run("training.micro_batch_tokens=auto", memory=limit)
    assert record.status is Status.COMPLETED
    assert record.plan is not None
    longest = record.plan.longest_row_tokens
    assert longest is not None
    rows = record.plan.batch_size
    assert record.plan.micro_batch_tokens == rows * longest
    seen, training, plan = [], record.config["training"], record.plan
    while (smaller := smaller_micro_batch(training, plan)) is not None:
        assert (smaller.key, smaller.before) == ("micro_batch_tokens", plan.micro_batch_tokens)
        plan = dataclasses.replace(plan, micro_batch_tokens=smaller.after)
        seen.append(smaller.after)
    assert seen == [rows * longest // 2**power for power in range(1, rows.bit_length())]

    # A limit between the predictions for the longest row and for the batch.
    low, high = (
        prepare(compose([*_small(), f"training.micro_batch_tokens={tokens}"]), record.environment).plan
        for tokens in (longest, rows * longest)
    )
    bytes_between = ((low.predicted_peak_train_bytes or 0) + (high.predicted_peak_train_bytes or 0)) // 2
    tight = MemoryLimit(bytes_between, 1, (), allow_borderline=False, halvings=0)
    with pytest.raises(PredictedOutOfMemory) as error:
        run(f"training.micro_batch_tokens={rows * longest}", memory=tight)
    assert "training.micro_batch_tokens=" in str(error.value.hint)
    halved = run(f"training.micro_batch_tokens={rows * longest}", memory=dataclasses.replace(tight, halvings=4))
    assert halved.status is Status.COMPLETED
    assert halved.plan is not None
    assert longest <= (halved.plan.micro_batch_tokens or 0) < rows * longest
    assert any("tokens; uses" in warning for warning in halved.warnings)
    assert (halved.plan.batch_size, halved.plan.gradient_accumulation_steps) == (rows, 1)


def _small() -> list[str]:
    return ["evaluation=quick", "training.device=cpu", "training.max_steps=2", "task.max_train_items=64"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.micro_batch_tokens=0"], "a number of tokens"),
        (["training.micro_batch_tokens=all"], "training.micro_batch_tokens=auto"),
        (["training.micro_batch_tokens=64", "training.micro_batch_size=4"], "training.micro_batch_size=null"),
        (["training.micro_batch_tokens=2.5"], "a number of tokens"),
    ],
)
def test_what_is_no_micro_batch_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert says in str(error.value)
    assert "micro_batch_tokens" in str(error.value)
