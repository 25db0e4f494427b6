"""Loss on general text: every token once, per byte, and an interval over documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qlora_exp.config.compose import compose
from qlora_exp.data.load import load_data
from qlora_exp.data.sources import read_general_text
from qlora_exp.evaluation.forgetting import DocumentLoss, answer_losses, forgetting, text_losses
from qlora_exp.paths import EMBEDDED


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_documents_are_scored_window_by_window_after_a_start_token(
    family: str, make_model: Callable[..., Any], tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    limit = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[family]
    model = make_model(family, **{limit: 16})
    documents = ["short", "é" * 20, "a document of more than two windows in length"]
    found = text_losses(model, tokenizer, documents, make_config(batch_size=2))
    for document, (nats, size, tokens) in zip(documents, found, strict=True):
        ids = tokenizer(document)["input_ids"]
        expected = 0.0
        for at in range(0, len(ids), 16):
            window = ids[at : at + 16]
            with torch.no_grad():
                logits = model(torch.tensor([[tokenizer.eos_token_id, *window[:-1]]])).logits[0].double()
            expected -= float(logits.log_softmax(dim=-1)[torch.arange(len(window)), window].sum())
        assert nats == pytest.approx(expected, rel=1e-5)
        assert (size, tokens) == (len(document.encode()), len(ids))


def test_only_as_many_documents_as_asked_are_scored(
    make_model: Callable[..., Any], tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    documents = ["one", "two", "three"]
    found = text_losses(make_model("gpt2"), tokenizer, documents, make_config(forgetting_documents=2))
    assert [loss.size_bytes for loss in found] == [3, 3]
    assert text_losses(make_model("gpt2"), tokenizer, [], make_config()) == []


def test_of_a_chat_the_answer_counts_given_all_before_it_and_what_does_not_fit_is_left_out(
    make_model: Callable[..., Any], tokenizer: Any, make_item: Callable[..., Any], make_config: Callable[..., Any]
) -> None:
    model = make_model("gpt2", n_positions=24)
    chats = [make_item("1", "user: a ?", "réd"), make_item("2", "user: " + "b" * 30, "no"), make_item("3", "c", "blue")]
    found = answer_losses(model, tokenizer, chats, make_config())
    assert [(loss.size_bytes, loss.tokens) for loss in found] == [(4, 5), (4, 5)]
    for chat, loss in zip((chats[0], chats[2]), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([chat.prompt_ids + chat.completion_ids])).logits[0].double()
        likelihoods = logits.log_softmax(dim=-1)[len(chat.prompt_ids) - 1 : -1]
        expected = -float(likelihoods[torch.arange(len(chat.completion_ids)), chat.completion_ids].sum())
        assert loss.nats == pytest.approx(expected, rel=1e-5)


def test_by_default_at_least_fifty_thousand_tokens_are_scored(tokenizer: Any, base_config: Any) -> None:
    """With the embedded pair's tokenizer, and with any other whose tokens are 4.5 bytes long or shorter."""
    chosen = read_general_text()[: base_config.evaluation.forgetting_documents]
    embedded = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    assert sum(len(ids) for ids in embedded(list(chosen), add_special_tokens=False)["input_ids"]) >= 50_000
    assert sum(len(document.encode()) for document in chosen) / 4.5 >= 50_000


@pytest.mark.parametrize("system", [True, False], ids=["with system", "without system"])
def test_general_chats_are_written_by_the_models_own_template_and_only_in_the_chat_format(system: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "instruct"))
    if not system:
        refuse = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{%- endif %}"
        tokenizer.chat_template = refuse + tokenizer.chat_template
    config = compose(["model.variant=instruct"])
    chats = load_data(config, tokenizer, config.training.max_length).general_chats
    assert 100 < len(chats) < 200 if not system else len(chats) == 200
    for chat in chats:
        assert chat.prompt.endswith("<|im_start|>assistant\n")
        assert chat.completion == chat.answer == tokenizer.decode(chat.completion_ids)
    plain = compose(["model.variant=instruct", "task.format=plain"])
    assert load_data(plain, tokenizer, plain.training.max_length).general_chats == ()


def test_the_difference_is_over_all_bytes_and_its_interval_over_documents() -> None:
    before = [DocumentLoss(10.0, 10, 4), DocumentLoss(40.0, 30, 9)]
    found = forgetting(before, [DocumentLoss(12.0, 10, 4), DocumentLoss(43.0, 30, 9)], "notes")
    assert found.before_nats_per_byte == pytest.approx(50 / 40)
    assert found.after_nats_per_byte == pytest.approx(55 / 40)
    assert found.difference == pytest.approx(5 / 40)
    # d = 1/8; residuals 2 − 10/8 = 0.75 and 3 − 30/8 = −0.75; se = sqrt(2/1 · 2·0.75²)/40; t(0.975, 1) = 12.7062.
    half = 12.706205 * 1.5 / 40
    assert found.high == pytest.approx(0.125 + half, rel=1e-5)
    assert found.low == pytest.approx(0.125 - half, rel=1e-5)
    assert (found.documents, found.tokens, found.text) == (2, 13, "notes")


def test_documents_of_one_size_have_the_paired_t_interval() -> None:
    before, after = np.array([3.0, 5.0, 4.0, 8.0]), np.array([4.0, 5.5, 4.0, 9.0])
    found = forgetting(*([DocumentLoss(value, 2, 1) for value in side] for side in (before, after)), "notes")
    error = (after - before).std(ddof=1) / 2 / 2
    assert found.low == pytest.approx(found.difference - 3.182446 * error, rel=1e-5)


def test_one_document_gives_no_interval_and_other_documents_are_refused() -> None:
    one = [DocumentLoss(3.0, 2, 1)]
    assert forgetting(one, [DocumentLoss(4.0, 2, 1)], "notes").low is None
    with pytest.raises(ValueError, match="same documents"):
        forgetting(one, [DocumentLoss(4.0, 3, 1)], "notes")
    with pytest.raises(ValueError, match="at least one"):
        forgetting([], [], "notes")


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        sizes = rng.integers(200, 2000, 40)
        shift = sizes * 0.05 + rng.normal(0, 10, 40) * np.sqrt(sizes / 1000)
        found = forgetting(
            [DocumentLoss(100.0, int(size), 1) for size in sizes],
            [DocumentLoss(100.0 + float(change), int(size), 1) for change, size in zip(shift, sizes, strict=True)],
            "notes",
        )
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.05 <= found.high
    assert 455 <= covered <= 495  # nominal 475
