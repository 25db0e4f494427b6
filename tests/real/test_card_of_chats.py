"""An adapter's card says with which prompt the adapter has to be served."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qlora_exp.records.model_card import model_card
from tests.tracking import synthetic


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, ()),
        (
            {"answer_prefix": "<think>\n\n</think>\n\n", "answer_prefix_variables": {"enable_thinking": False}},
            (r"<think>\n\n</think>\n\n", '{"enable_thinking": false}'),
        ),
        ({"answer_prefix": "<|channel|>final<|message|>"}, ("<|channel|>final<|message|>", "append it")),
        ({"answer_prefix_variables": {"enable_thinking": False}}, ('{"enable_thinking": false}',)),
        ({"chat_date": "2026-01-01"}, ("asks for the date. It was given 2026-01-01",)),
    ],
)
def test_a_card_says_what_the_template_added_to_the_prompts(data: dict[str, Any], says: tuple[str, ...]) -> None:
    record = synthetic.completed(after=0.61)
    assert record.data is not None
    card = model_card(record.replace(data=dataclasses.replace(record.data, **data)))
    for part in says:
        assert part in card
    assert ("chat template" in card) == bool(says)
