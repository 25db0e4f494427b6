"""Scores are what their definitions say, recomputed here from the models themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qlora_exp.config.compose import compose
from qlora_exp.evaluation.base_scores import write_items
from qlora_exp.evaluation.likelihood import domain_prompt
from qlora_exp.evaluation.scoring import evaluate_model, limit_items, marginal


def nats(model: Any, prompt: tuple[int, ...], target: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + target])).logits[0].double().log_softmax(dim=-1)
    return -sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(target))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model("llama", initializer_range=0.15)


def option_matrix(model: Any, items: Any, splits: Any) -> np.ndarray:
    return np.array(
        [[-nats(model, item.prompt_ids, splits.label_ids[label]) for label in splits.labels] for item in items]
    )


def test_losses_are_micro_averages_with_end_tokens_and_bits_per_byte_without(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    items = colours.validation
    scores = evaluate_model(model, tokenizer, items, colours, make_config(generate=False)).scores
    total = sum(nats(model, item.prompt_ids, item.completion_ids + item.end_ids) for item in items)
    tokens = sum(len(item.completion_ids) + 1 for item in items)
    without_end = sum(nats(model, item.prompt_ids, item.completion_ids) for item in items)
    assert scores.loss == pytest.approx(total / tokens, rel=1e-5)
    assert scores.loss_per_item == pytest.approx(total / len(items), rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    answer_bytes = sum(len(item.answer.encode()) for item in items)
    assert scores.bits_per_byte == pytest.approx(without_end / math.log(2) / answer_bytes, rel=1e-5)
    assert (scores.split, scores.items) == ("validation", len(items))
    assert scores.exact_match is None


def test_loss_is_what_the_model_itself_calls_loss_on_the_trained_tokens(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    item = colours.validation[0]
    ids = torch.tensor([item.ids])
    labels = ids.masked_fill(~torch.tensor([item.completion_mask]).bool(), -100)
    with torch.no_grad():
        expected = float(model(ids, labels=labels).loss)
    assert evaluate_model(model, tokenizer, [item], colours, make_config()).scores.loss == pytest.approx(expected)


def test_accuracies_follow_their_four_rules(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    items, wanted = colours.validation, [item.label for item in colours.validation]
    found = evaluate_model(model, tokenizer, items, colours, make_config(generate=False))
    matrix = option_matrix(model, items, colours)
    probabilities = np.exp(matrix) / np.exp(matrix).sum(axis=1, keepdims=True)
    lengths = [len(colours.label_ids[label]) for label in colours.labels]
    colon = colours.train[0].prompt_ids[-1:]  # all that the prompts have in common
    priors = np.array([-nats(model, colon, colours.label_ids[label]) for label in colours.labels])
    rules = {
        "predicted": matrix,
        "predicted_calibrated": matrix - np.log(probabilities.mean(axis=0)),
        "predicted_normalized": matrix / lengths,
        "predicted_pmi": matrix - priors,
    }
    for column, scored in rules.items():
        assert found.items[column].to_pylist() == [colours.labels[best] for best in scored.argmax(axis=1)]
    assert len({tuple(found.items[column].to_pylist()) for column in rules}) == 4  # this model tells the rules apart
    for score, column in [
        (found.scores.accuracy, "predicted"),
        (found.scores.accuracy_calibrated, "predicted_calibrated"),
        (found.scores.accuracy_normalized, "predicted_normalized"),
        (found.scores.accuracy_pmi, "predicted_pmi"),
    ]:
        predicted = found.items[column].to_pylist()
        assert score == pytest.approx(sum(a == b for a, b in zip(predicted, wanted, strict=True)) / len(items))
    assert found.label_marginal == pytest.approx(
        dict(zip(colours.labels, probabilities.mean(axis=0), strict=True)), rel=1e-4
    )


def test_test_items_are_calibrated_by_the_marginal_of_the_validation_split(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    config = make_config(generate=False)
    validation = evaluate_model(model, tokenizer, colours.validation, colours, config)
    given = evaluate_model(
        model, tokenizer, colours.test, colours, config, split="test", label_marginal=validation.label_marginal
    )
    estimated = evaluate_model(model, tokenizer, colours.test, colours, config, split="test")
    assert given.label_marginal == estimated.label_marginal == validation.label_marginal
    assert given.items == estimated.items
    shares = np.array([validation.label_marginal[label] for label in colours.labels])
    expected = (option_matrix(model, colours.test, colours) - np.log(shares)).argmax(axis=1)
    assert given.items["predicted_calibrated"].to_pylist() == [colours.labels[best] for best in expected]
    assert given.scores.split == "test"


def test_calibration_by_hand_takes_away_a_constant_preference() -> None:
    log_likelihoods = np.log([[0.6, 0.2], [0.3, 0.1]])  # both items: 3/4 for the first option
    assert marginal(log_likelihoods) == pytest.approx([0.75, 0.25])
    assert marginal(np.array([[-1000.0, -1001.0]])).sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([(1, 2, 7, 3), (1, 2, 8, 8, 3), (1, 2, 9, 3)], (1, 2, 3)),
        ([(1, 5), (1, 5, 5), (1, 5, 5, 5)], (1, 5)),  # no token counts twice
        ([(4, 1), (5, 1)], (1,)),
        ([(4, 1), (5, 2)], ()),
        ([(4, 1), (4, 1)], (4, 1)),
        ([(4, 1), ()], ()),
    ],
)
def test_the_domain_prompt_is_what_all_prompts_begin_and_end_with(
    prompts: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    assert domain_prompt(prompts) == expected


def test_the_gold_option_of_an_item_has_the_completions_own_likelihood(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    table = evaluate_model(model, tokenizer, colours.validation, colours, make_config(generate=False)).items
    matrix = option_matrix(model, colours.validation, colours)
    gold = [-row[colours.labels.index(item.label)] for row, item in zip(matrix, colours.validation, strict=True)]
    assert table["completion_nats"].to_pylist() == pytest.approx(gold, rel=1e-5)


def test_items_come_back_from_parquet_as_they_were(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    found = evaluate_model(model, tokenizer, colours.validation, colours, make_config())
    write_items(found.items, tmp_path / "run" / "items.parquet", keep_texts=True)
    assert pq.read_table(tmp_path / "run" / "items.parquet") == found.items
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["items.parquet"]


def test_an_item_without_a_prompt_is_scored_after_a_start_token(
    model: Any,
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    item = make_item("1", "", "word")
    scores = evaluate_model(model, tokenizer, [item], make_splits([item], [item]), make_config()).scores
    expected = nats(model, (tokenizer.eos_token_id,), item.completion_ids + item.end_ids)
    assert scores.loss_per_item == pytest.approx(expected, rel=1e-5)


def test_no_items_give_no_numbers_rather_than_zeros(
    model: Any, tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    found = evaluate_model(model, tokenizer, [], colours, make_config())
    assert (found.scores.items, found.scores.loss, found.scores.accuracy) == (0, None, None)
    assert found.items.num_rows == 0


def test_adapters_take_part_in_the_scores(
    make_model: Callable[..., Any], tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    import peft

    base = make_model("gpt2")
    plain = evaluate_model(base, tokenizer, colours.validation, colours, make_config()).scores
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    same = evaluate_model(adapted, tokenizer, colours.validation, colours, make_config()).scores
    assert same.loss == pytest.approx(plain.loss, rel=1e-6)  # B begins as zeros: nothing has changed yet
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = evaluate_model(adapted, tokenizer, colours.validation, colours, make_config()).scores
    assert changed.loss != pytest.approx(plain.loss, rel=1e-3)


def test_a_limit_draws_from_the_whole_of_a_sorted_file_and_small_draws_are_part_of_larger_ones(
    make_item: Callable[..., Any],
) -> None:
    items = [make_item(f"{number:03}", "Colour:", "red" if number < 50 else "blue") for number in range(100)]
    few, more = (
        limit_items(items, compose(["task=local", "task.path=colours.jsonl", f"evaluation.max_items={limit}"]))
        for limit in (12, 40)
    )
    ids = [[item.item_id for item in drawn] for drawn in (few, more)]
    assert (len(ids[0]), len(ids[1])) == (12, 40)
    assert set(ids[0]) < set(ids[1])
    assert ids[1] == sorted(ids[1])
    assert {item.answer for item in few} == {"red", "blue"}
