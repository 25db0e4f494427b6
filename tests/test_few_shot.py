"""The untouched model with worked examples before each prompt: which examples, what is read, what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from qlora_exp import run
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.data.few_shot import few_shot_draws
from qlora_exp.data.items import Splits
from qlora_exp.data.load import load_data
from qlora_exp.errors import DataError
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.records.types import Status

SMALL = ["task.max_validation_items=12", "task.max_test_items=12", "evaluation.few_shots=3"]


def composed(*overrides: str) -> Config:
    return compose([*SMALL, "quantization=fp32", "task.goal=null", *overrides])


def loaded(config: Config) -> tuple[Any, Splits]:
    tokenizer = load_tokenizer(config.model)
    return tokenizer, load_data(config, tokenizer, config.training.max_length)


@pytest.fixture(scope="module")
def plain() -> tuple[Config, Any, Splits]:
    config = composed("model.variant=base")
    return config, *loaded(config)


def drawn(made: tuple[Config, Any, Splits], positions: int | None = None) -> Any:
    config, tokenizer, splits = made
    return few_shot_draws(config, tokenizer, splits, splits.validation, splits.test, positions)


def test_the_same_training_rows_are_shown_in_both_formats_to_both_variants(plain: tuple[Config, Any, Splits]) -> None:
    config = composed("model.variant=instruct", "task.format=chat")
    chat = (config, *loaded(config))
    shown = [draw.examples for draw in drawn(plain)]
    assert [draw.examples for draw in drawn(chat)] == shown
    assert len({frozenset(examples) for examples in shown}) == 3
    assert set().union(*shown) <= {item.item_id for item in plain[2].train}


def test_examples_stand_before_the_prompt_as_they_are_trained_on_and_the_answer_stays(
    plain: tuple[Config, Any, Splits],
) -> None:
    _, _, splits = plain
    rows = {item.item_id: item for item in splits.train}
    for draw in drawn(plain):
        texts = [rows[name].prompt + rows[name].completion for name in draw.examples]
        for item, own in zip(draw.test, splits.test, strict=True):
            assert item.prompt == "\n\n".join([*texts, own.prompt])
            assert (item.completion_ids, item.end_ids, item.item_id) == (own.completion_ids, own.end_ids, own.item_id)


def test_in_a_chat_each_example_is_a_turn_with_its_answer() -> None:
    config = composed("model.variant=instruct", "task.format=chat", "task.system='Be brief.'")
    tokenizer, splits = loaded(config)
    prompt = drawn((config, tokenizer, splits))[0].validation[0].prompt
    assert prompt.count("<|im_start|>system") == 1
    assert prompt.count("<|im_start|>user") == prompt.count("<|im_start|>assistant") == 4


def test_as_many_examples_as_fit_the_model_are_shown_and_none_is_refused(plain: tuple[Config, Any, Splits]) -> None:
    all_of_them = drawn(plain)[0]
    longest = max(len(item.prompt_ids) for item in all_of_them.validation + all_of_them.test)
    fewer = drawn(plain, positions=longest)[0]
    assert fewer.examples == all_of_them.examples[: len(fewer.examples)]
    assert 0 < len(fewer.examples) < 3
    with pytest.raises(DataError, match="one example and the longest prompt have"):
        drawn(plain, positions=20)


@pytest.mark.long
def test_a_run_records_every_draw_on_both_splits_and_keeps_them_for_the_next(tmp_path: Path) -> None:
    overrides = [*SMALL, "evaluation.split=test", "training.max_steps=1", "evaluation.forgetting=false"]
    overrides += ["tracking=off", f"output_root={tmp_path / 'out'}", "quantization=fp32"]
    first, second = run(*overrides), run(*overrides, "seed=2")
    assert first.status is Status.COMPLETED, first.failure
    shown = first.scores.few_shot
    assert [(draw.draw, draw.requested, len(draw.examples)) for draw in shown] == [(1, 3, 3), (2, 3, 3), (3, 3, 3)]
    assert all(draw.test is not None and draw.test.exact_match is not None for draw in shown)
    assert len({draw.validation.loss_per_item for draw in shown}) == 3
    assert second.scores.few_shot == shown
    assert len(list((tmp_path / "out").rglob("few_shot/*.json"))) == 1
    assert len(list((tmp_path / "out/runs" / first.run_id).glob("items_few_shot_*_test.parquet"))) == 3


def test_scores_with_examples_are_kept_apart_from_those_without() -> None:
    from qlora_exp.architecture.run_plan import base_fingerprint

    config = composed()
    other = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, few_shots=None))
    assert base_fingerprint(config, "plain") == base_fingerprint(other, "plain")


def test_more_examples_than_training_rows_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 worked examples can't be drawn from 3 training items"):
        run(*SMALL[:2], "evaluation.few_shots=4", "task.max_train_items=3", f"output_root={tmp_path}", "tracking=off")
