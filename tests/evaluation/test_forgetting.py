"""Loss on general text: every token once, per byte, and an interval over documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qlora_exp.evaluation import forgetting, nats_per_byte_by_document


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_documents_are_scored_window_by_window_after_a_start_token(
    family: str, make_model: Callable[..., Any], tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    limit = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[family]
    model = make_model(family, **{limit: 16})
    documents = ["short", "é" * 20, "a document of more than two windows in length"]
    found = nats_per_byte_by_document(model, tokenizer, documents, make_config(batch_size=2))
    for document, (nats, size) in zip(documents, found, strict=True):
        ids = tokenizer(document)["input_ids"]
        expected = 0.0
        for at in range(0, len(ids), 16):
            window = ids[at : at + 16]
            with torch.no_grad():
                logits = model(torch.tensor([[tokenizer.eos_token_id, *window[:-1]]])).logits[0].double()
            expected -= float(logits.log_softmax(dim=-1)[torch.arange(len(window)), window].sum())
        assert nats == pytest.approx(expected, rel=1e-5)
        assert size == len(document.encode())


def test_only_as_many_documents_as_asked_are_scored(
    make_model: Callable[..., Any], tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    documents = ["one", "two", "three"]
    found = nats_per_byte_by_document(make_model("gpt2"), tokenizer, documents, make_config(forgetting_documents=2))
    assert [size for _, size in found] == [3, 3]


def test_the_difference_is_over_all_bytes_and_its_interval_over_documents() -> None:
    found = forgetting([(10.0, 10), (40.0, 30)], [(12.0, 10), (43.0, 30)], text="notes")
    assert found.before_nats_per_byte == pytest.approx(50 / 40)
    assert found.after_nats_per_byte == pytest.approx(55 / 40)
    assert found.difference == pytest.approx(5 / 40)
    # d = 1/8; residuals 2 − 10/8 = 0.75 and 3 − 30/8 = −0.75; se = sqrt(2/1 · 2·0.75²)/40; t(0.975, 1) = 12.7062.
    half = 12.706205 * 1.5 / 40
    assert found.high == pytest.approx(0.125 + half, rel=1e-5)
    assert found.low == pytest.approx(0.125 - half, rel=1e-5)
    assert (found.documents, found.text) == (2, "notes")


def test_documents_of_one_size_have_the_paired_t_interval() -> None:
    before, after = np.array([3.0, 5.0, 4.0, 8.0]), np.array([4.0, 5.5, 4.0, 9.0])
    found = forgetting([(value, 2) for value in before], [(value, 2) for value in after])
    error = (after - before).std(ddof=1) / 2 / 2
    assert found.low == pytest.approx(found.difference - 3.182446 * error, rel=1e-5)


def test_one_document_gives_no_interval_and_other_documents_are_refused() -> None:
    assert forgetting([(3.0, 2)], [(4.0, 2)]).low is None
    with pytest.raises(ValueError, match="same documents"):
        forgetting([(3.0, 2)], [(4.0, 3)])
    with pytest.raises(ValueError, match="at least one"):
        forgetting([], [])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        sizes = rng.integers(200, 2000, 40)
        shift = sizes * 0.05 + rng.normal(0, 10, 40) * np.sqrt(sizes / 1000)
        found = forgetting(
            [(100.0, int(size)) for size in sizes],
            [(100.0 + float(change), int(size)) for change, size in zip(shift, sizes, strict=True)],
        )
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.05 <= found.high
    assert 455 <= covered <= 495  # nominal 475
