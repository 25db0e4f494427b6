"""Batched greedy generation equals one-by-one generation, ends where it should, and leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_exp.data.items import check_positions
from qlora_exp.errors import DataError
from qlora_exp.evaluation.forgetting import text_losses
from qlora_exp.evaluation.generation import MARGIN_TOKENS, StopRule, generate, stop_rule
from qlora_exp.evaluation.kv_cache import CausalModel, prefill, scoring_mode
from qlora_exp.evaluation.scoring import evaluate_model

PROMPTS = ["a", "a much longer prompt than the others:", "bb b", "tell me:"]


def generated(model: Any, tokenizer: Any, prompts: list[str], rule: StopRule) -> list[str]:
    with scoring_mode(model):
        return generate(
            *prefill(CausalModel(model), [tokenizer(text)["input_ids"] for text in prompts]), tokenizer, rule
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral", "lfm2", "mamba"])
def test_a_batch_generates_what_each_prompt_alone_does(
    family: str, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model(family)
    rule = StopRule(frozenset({tokenizer.eos_token_id}), at_newline=False, max_new_tokens=12)
    alone = []
    for text in PROMPTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        alone.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert len(set(alone)) == len(alone)
    assert generated(model, tokenizer, PROMPTS, rule) == alone


@pytest.fixture(scope="module")
def taught(make_model: Callable[..., Any], tokenizer: Any) -> Any:
    """A model that has learnt four answers by heart: one ends in EOS, one in a newline, one begins with newlines."""
    torch.manual_seed(0)
    model = make_model("gpt2", initializer_range=0.02)
    end = tokenizer.eos_token
    texts = [f"q1: red{end}", f"question 2: blue\nq9: nonsense{end}", f"q3:\n\ngreen{end}", f"q4: redredredredred{end}"]
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(150):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.6
    return model.eval()


QUESTIONS = ["q1:", "question 2:", "q3:", "q4:"]


def test_answers_end_at_eos_at_a_newline_after_text_or_at_the_limit(taught: Any, tokenizer: Any) -> None:
    rule = StopRule(frozenset({tokenizer.eos_token_id}), at_newline=True, max_new_tokens=9)
    assert generated(taught, tokenizer, QUESTIONS, rule) == ["red", "blue", "green", "redredre"]


def test_lines_go_on_where_the_tasks_answers_have_several(
    taught: Any,
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    splits = make_splits([make_item("1", "q1:", "a")], [make_item("2", "q2:", "b\nc")])
    rule = stop_rule(splits, tokenizer, make_config(max_new_tokens=40), taught)
    assert not rule.at_newline
    assert generated(taught, tokenizer, QUESTIONS[1:2], rule) == ["blue\nq9: nonsense"]


def test_the_end_of_turn_that_the_task_trains_on_stops_but_ordinary_text_does_not(
    taught: Any,
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    ends = ((tokenizer.pad_token_id, 10), (65,), ())
    items = [dataclasses.replace(make_item("1", "q1:", "a"), end_ids=end) for end in ends]
    rule = stop_rule(make_splits(items, []), tokenizer, make_config(), taught)
    assert rule.token_ids == {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert rule.at_newline


def test_generation_ends_where_the_model_has_no_further_positions(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model("gpt2", n_positions=16)
    rule = StopRule(frozenset(), at_newline=False, max_new_tokens=50)
    with scoring_mode(model):
        start = prefill(CausalModel(model), [[65] * 16, [66] * 10])
        first, second = generate(*start, tokenizer, rule)
    # 16 positions hold the prompt and all generated tokens but the last; a token is at most one character here.
    assert len(first) <= 1
    assert 0 < len(second) <= 7


def test_a_model_that_learnt_the_answers_is_scored_exact(
    taught: Any,
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    items = [make_item("1", "q1:", "RED", "red"), make_item("2", "question 2:", "blue", "blue")]
    splits = make_splits(items, items, labels=("red", "blue"))
    scores = evaluate_model(taught, tokenizer, items, splits, make_config(max_new_tokens=12)).scores
    assert scores.exact_match == 1.0  # case is folded
    assert scores.invalid_answer_rate == 0.0
    assert scores.accuracy == 1.0
    assert scores.rouge_l is None
    other = make_splits(items, items, labels=("green", "yellow", "red"))
    items_of_other = [make_item("2", "question 2:", "green", "green")]
    scores = evaluate_model(taught, tokenizer, items_of_other, other, make_config(max_new_tokens=12)).scores
    assert (scores.exact_match, scores.invalid_answer_rate) == (0.0, 1.0)


def test_free_text_is_scored_by_overlap(
    taught: Any,
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    items = [make_item("1", "q1:", "red wine"), make_item("2", "question 2:", "blue")]
    scores = evaluate_model(taught, tokenizer, items, make_splits(items, items), make_config(max_new_tokens=12)).scores
    assert scores.rouge_l == pytest.approx((2 / 3 + 1) / 2)
    assert scores.token_f1 == pytest.approx((2 / 3 + 1) / 2)
    assert scores.exact_match == 0.5
    assert scores.accuracy is None
    assert scores.invalid_answer_rate is None


def test_the_limit_follows_the_longest_label_or_answer_of_any_split_and_a_given_number_wins(
    make_model: Callable[..., Any],
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    short, long = make_item("1", "a:", "word", "word"), make_item("2", "b:", "a longer answer", "a longer answer")
    free, scored = make_splits([short, long], [short]), make_splits([short], [long])
    labelled = make_splits([short], [short], labels=("word", "another"))
    longest_answer, longest_label = len(long.completion_ids), len(labelled.label_ids["another"])
    assert stop_rule(free, tokenizer, make_config(max_new_tokens=None)).max_new_tokens == longest_answer + MARGIN_TOKENS
    assert (
        stop_rule(scored, tokenizer, make_config(max_new_tokens=None)).max_new_tokens == longest_answer + MARGIN_TOKENS
    )
    assert (
        stop_rule(labelled, tokenizer, make_config(max_new_tokens=None)).max_new_tokens == longest_label + MARGIN_TOKENS
    )
    assert stop_rule(free, tokenizer, make_config(max_new_tokens=3)).max_new_tokens == 3
    model = make_model("gpt2")
    for splits, given, used in ((free, None, longest_answer + MARGIN_TOKENS), (labelled, 3, 3)):
        scores = evaluate_model(model, tokenizer, [short], splits, make_config(max_new_tokens=given)).scores
        assert scores.max_new_tokens == used
    assert evaluate_model(model, tokenizer, [short], free, make_config(generate=False)).scores.max_new_tokens is None


def test_an_answer_that_begins_like_the_longest_label_and_goes_on_is_wrong(
    taught: Any,
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    items = [make_item("4", "q4:", "red", "red")]  # the model says redredredredred
    splits = make_splits(items, items, labels=("red", "x"))
    scores = evaluate_model(taught, tokenizer, items, splits, make_config(max_new_tokens=None)).scores
    assert (scores.exact_match, scores.invalid_answer_rate) == (0.0, 1.0)
    cut = evaluate_model(taught, tokenizer, items, splits, make_config(max_new_tokens=4)).scores
    assert cut.exact_match == 1.0  # what the margin is for


def test_prompts_that_fill_the_context_are_scored_and_their_answers_end_with_it(
    make_model: Callable[..., Any],
    tokenizer: Any,
    make_item: Callable[..., Any],
    make_splits: Callable[..., Any],
    make_config: Callable[..., Any],
) -> None:
    model = make_model("gpt2", n_positions=24)
    item = make_item("1", "p" * 19, "red", "red")  # 19 + 4 + 1
    splits = make_splits([item], [item], labels=("red", "x"))
    check_positions(splits, 24)
    found = evaluate_model(model, tokenizer, [item], splits, make_config(max_new_tokens=50))
    assert len(found.items["generated"][0].as_py()) <= 24 - 19 + 1
    with pytest.raises(DataError, match="takes 23"):
        check_positions(splits, 23)


def test_evaluation_leaves_modes_configuration_and_tokenizer_as_they_were_and_training_goes_on(
    make_model: Callable[..., Any], tokenizer: Any, colours: Any, make_config: Callable[..., Any]
) -> None:
    model = make_model("llama")
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    before = (
        [module.training for module in model.modules()],
        copy.deepcopy(model.config.to_dict()),
        copy.deepcopy(model.generation_config.to_dict()),
        tokenizer.padding_side,
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    evaluate_model(model, tokenizer, colours.validation, colours, make_config())
    text_losses(model, tokenizer, ["some text"], make_config())
    assert [module.training for module in model.modules()] == before[0]
    assert model.config.to_dict() == before[1]
    assert model.generation_config.to_dict() == before[2]
    assert tokenizer.padding_side == before[3]
    assert all(torch.equal(value, before[4][name]) for name, value in model.state_dict().items())
    ids = torch.tensor([colours.train[0].ids])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_modes_are_restored_when_scoring_fails(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2").train()

    def fail() -> None:
        with scoring_mode(model):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.training
