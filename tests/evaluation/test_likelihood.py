"""Likelihoods from a shared prompt pass equal those of one plain forward pass per text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_exp.config.compose import compose
from qlora_exp.data.load import load_data
from qlora_exp.evaluation import likelihood
from qlora_exp.evaluation.kv_cache import CausalModel, batches, prefill, scoring_mode
from qlora_exp.evaluation.likelihood import OptionTrie, completion_scores, option_log_likelihoods
from qlora_exp.evaluation.scoring import evaluate_model
from qlora_exp.models.base import load_base
from qlora_exp.models.tokenizers import load_tokenizer

FAMILIES = ("llama", "gpt2", "gpt_neox", "mistral", "lfm2", "mamba", "minimax", "mixtral", "gpt_neo")
OPTIONS = [(5,), (5, 6), (5, 6, 7), (5, 9, 7, 8), (11, 12), (13,), (5, 6, 8)]


def plain_nats(model: Any, prompt: tuple[int, ...], target: tuple[int, ...]) -> list[float]:
    """Nats of each target token: one text, no padding, no cache, no position ids."""
    ids = torch.tensor([prompt + target])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
    start = len(prompt) - 1
    return [-float(log_probabilities[start + at, token]) for at, token in enumerate(target)]


def random_prompts(count: int = 6) -> list[tuple[int, ...]]:
    rng = random.Random(1)
    return [tuple(rng.randrange(256) for _ in range(length)) for length in (3, 31, 1, 17, 9, 30)[:count]]


@pytest.mark.parametrize("family", FAMILIES)
def test_options_score_as_one_forward_pass_each(family: str, make_model: Callable[..., Any]) -> None:
    model, prompts = make_model(family), random_prompts()
    with scoring_mode(model):
        found = option_log_likelihoods(*prefill(CausalModel(model), prompts), OptionTrie.of(OPTIONS))
    for row, prompt in enumerate(prompts):
        for column, option in enumerate(OPTIONS):
            assert float(found[row, column]) == pytest.approx(-sum(plain_nats(model, prompt, option)), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_score_as_one_forward_pass_each(family: str, make_model: Callable[..., Any]) -> None:
    model, prompts = make_model(family), random_prompts()
    completions = [(7,), (1, 2, 3, 4), (9, 9), (200,), (4, 5, 6), (8, 8)]
    ends = [(250,), (), (250, 10), (250,), (250,), ()]
    with scoring_mode(model):
        found = completion_scores(*prefill(CausalModel(model), prompts), completions, ends)
    for prompt, completion, end, result in zip(prompts, completions, ends, found, strict=True):
        nats = plain_nats(model, prompt, completion + end)
        assert result.completion_nats == pytest.approx(sum(nats[: len(completion)]), abs=1e-4)
        assert result.end_nats == pytest.approx(sum(nats[len(completion) :]), abs=1e-4)


def test_hits_are_those_of_the_teacher_forced_argmax(make_model: Callable[..., Any]) -> None:
    model, prompts = make_model("gpt2"), random_prompts()
    with torch.no_grad():
        best = [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in prompts]
    completions = [(best[0],), ((best[1] + 1) % 256,), (best[2],), (best[3],), ((best[4] + 1) % 256,), (best[5],)]
    with scoring_mode(model):
        found = completion_scores(*prefill(CausalModel(model), prompts), completions, [()] * 6)
    assert [result.tokens_correct for result in found] == [1, 0, 1, 1, 0, 1]


def test_bounds_on_memory_change_no_score(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model("llama"), random_prompts()
    trie, completions = OptionTrie.of(OPTIONS), [(1, 2, 3)] * 6
    with scoring_mode(model):
        start = prefill(CausalModel(model), prompts)
        options, nats = option_log_likelihoods(*start, trie), completion_scores(*start, completions, [()] * 6)
        monkeypatch.setattr(likelihood, "TOKENS_PER_PASS", 1)
        monkeypatch.setattr(likelihood, "LOGITS_PER_PASS", 1)
        small_options = option_log_likelihoods(*start, trie)
        small_nats = completion_scores(*start, completions, [()] * 6)
    torch.testing.assert_close(small_options, options, atol=1e-5, rtol=0)
    assert [s.completion_nats for s in small_nats] == pytest.approx([s.completion_nats for s in nats], abs=1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 2, 3, 7])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_long_completion_is_read_in_pieces_with_the_same_scores(
    family: str, tokens_at_once: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of an answer of 8,000 tokens with a vocabulary of 150,000 take 5 GB."""
    model, prompts = make_model(family), random_prompts()
    completions, ends = [tuple(range(5, 5 + length)) for length in (9, 1, 4, 8, 2, 7)], [(250, 3)] * 6
    kept: list[int] = []
    read = CausalModel.__call__

    def counted(self: CausalModel, ids: Any, mask: Any, keep: int, *rest: Any, **named: Any) -> Any:
        kept.append(len(ids) * keep)
        return read(self, ids, mask, keep, *rest, **named)

    with scoring_mode(model):
        causal = CausalModel(model)
        start = prefill(causal, prompts)
        whole = completion_scores(*start, completions, ends)
        monkeypatch.setattr(likelihood, "LOGITS_PER_PASS", tokens_at_once * causal.vocabulary_size)
        monkeypatch.setattr(CausalModel, "__call__", counted)
        pieces = completion_scores(*start, completions, ends)
    assert max(kept) <= tokens_at_once
    for one, other in zip(whole, pieces, strict=True):
        assert other.completion_nats == pytest.approx(one.completion_nats, abs=1e-4)
        assert other.end_nats == pytest.approx(one.end_nats, abs=1e-4)
        assert other.tokens_correct == one.tokens_correct


def test_only_distinct_inner_paths_are_read() -> None:
    assert OptionTrie.of(OPTIONS).paths == ((5, 6), (5, 9, 7), (11,))
    assert OptionTrie.of([(1,), (2,)]).paths == ()


def test_every_option_is_read_by_a_path_that_begins_with_its_inner_part() -> None:
    rng = random.Random(2)
    for _ in range(200):
        options = list({tuple(rng.randrange(3) for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 12))})
        trie = OptionTrie.of(options)
        for option, reader in zip(options, trie.readers, strict=True):
            assert (reader is None) == (len(option) == 1)
            if reader is not None:
                assert trie.paths[reader][: len(option) - 1] == option[:-1]


def test_batches_hold_every_index_once_within_the_bounds() -> None:
    rng = random.Random(3)
    for _ in range(200):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(0, 40))]
        rows, tokens = rng.randint(1, 9), rng.randint(10, 120)
        found = batches(lengths, rows, tokens)
        assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
        for batch in found:
            assert len(batch) <= rows
            assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


@pytest.mark.parametrize(
    ("quantization", "independent"),
    [
        (["quantization=fp32"], True),
        (["quantization=nf4"], True),
        (["quantization=int8", "quantization.int8_threshold=2"], False),  # low, so that a tiny model has outliers
    ],
    ids=["fp32", "nf4", "int8"],
)
def test_only_int8_with_outlier_columns_scores_an_item_by_what_else_is_in_its_batch(
    quantization: list[str], independent: bool, tiny_models: dict[str, Path], colour_task: Path
) -> None:
    """What docs/measures.md says of the batch size."""
    local = ["model=local", f"model.path={tiny_models['llama']}", "task=local", f"task.path={colour_task}"]
    given = [*local, *quantization, "task.kind=classification", "evaluation.generate=false"]
    configs = [compose([*given, f"evaluation.batch_size={rows}"]) for rows in (1, 3, 64)]
    tokenizer = load_tokenizer(configs[0].model)
    splits = load_data(configs[0], tokenizer, 64)
    model = load_base(configs[0], "cpu").model
    alone, few, many = (
        evaluate_model(model, tokenizer, splits.train[:20], splits, config).items["loss_sum_nats"].to_pylist()
        for config in configs
    )
    assert (alone == pytest.approx(many, rel=1e-5) and few == pytest.approx(many, rel=1e-5)) == independent


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_depend_neither_on_the_batch_size_nor_on_the_tokenizers_padding_side(
    family: str,
    batch_size: int,
    make_model: Callable[..., Any],
    tokenizer: Any,
    colours: Any,
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(family)
    whole = evaluate_model(model, tokenizer, colours.validation, colours, make_config(batch_size=64))
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    parts = evaluate_model(model, tokenizer, colours.validation, colours, make_config(batch_size=batch_size))
    for name in whole.items.column_names:
        first, second = whole.items[name].to_pylist(), parts.items[name].to_pylist()
        if name in ("loss_sum_nats", "completion_nats"):
            # The tolerance is relative: a single-precision sum of 40 nats has a last digit of 4e-6.
            assert second == pytest.approx(first, rel=1e-5)
        else:
            assert second == first, name
    assert whole.items["item_id"].to_pylist() == [item.item_id for item in colours.validation]
