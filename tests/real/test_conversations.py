"""Conversations as files hold them: leaks, fields that hold nothing, values that no template writes, plain text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from qlora_exp.config.enums import Format, InvalidRows, Learn
from qlora_exp.config.schema import Config
from qlora_exp.data.few_shot import few_shot_draws
from qlora_exp.data.load import load_data
from qlora_exp.errors import DataError, Problems

Configure = Callable[..., Config]
WithTemplate = Callable[[str], Any]


def talk(number: int, **first_answer: Any) -> dict[str, Any]:
    """Two questions with their answers; settings of the first answer by keyword."""
    return {
        "messages": [
            {"role": "user", "content": f"Item {number}?"},
            {"role": "assistant", "content": "Which one?", **first_answer},
            {"role": "user", "content": "The lime."},
            {"role": "assistant", "content": "green"},
        ]
    }


def with_validation(config: Config, rows: list[dict[str, Any]]) -> Config:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (Path(str(config.task.path)) / "validation.jsonl").write_text(text, encoding="utf-8")
    return config


def refusal(config: Config, tokenizer: Any) -> str:
    with pytest.raises((DataError, Problems)) as error:
        load_data(config, tokenizer, 4096)
    return str(error.value)


@pytest.mark.parametrize(
    "written",
    [{"weight": 0}, {"weight": None}, {"content": [{"type": "text", "text": "Which one?"}]}],
    ids=["weight", "no weight", "parts"],
)
def test_a_conversation_is_a_leak_however_it_is_written(
    written: dict[str, Any], tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    config = with_validation(chat_task([talk(1), talk(2)]), [talk(2, **written)])
    assert "leak between splits" in refusal(config, tokenizer_with("llama3"))


def test_conversations_of_which_other_answers_are_learned_are_no_duplicates(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    rows = [talk(n, **({"weight": 0} if twice else {})) for n in range(8) for twice in (False, True)]
    config = chat_task([*rows, talk(1)], learn=Learn.all, validation_fraction=0.2)
    (Path(str(config.task.path)) / "validation.jsonl").unlink()
    record = load_data(config, tokenizer_with("llama3"), 4096).record
    assert record.dropped_reasons == {"exact duplicate": 1}


@pytest.mark.parametrize("value", [datetime.datetime(2026, 1, 2), b"\xff"], ids=["time", "bytes"])
@pytest.mark.parametrize("format", [Format.chat, Format.plain])
def test_a_field_that_is_no_json_is_named_and_can_be_left_out(
    value: object, format: Format, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    config = chat_task([talk(1), talk(2)], format=format)
    folder = Path(str(config.task.path))
    for split, numbers in (("train", (1, 2)), ("validation", (3,))):
        (folder / f"{split}.jsonl").unlink()
        rows = [talk(number, sent=value) for number in numbers]
        Dataset.from_list(rows).to_parquet(str(folder / f"{split}.parquet"))
    message = refusal(config, tokenizer_with("qwen3"))
    assert "is not a JSON value" in message
    assert "task.ignore_fields=[sent]" in message
    config.task.ignore_fields = ["sent"]
    assert len(load_data(config, tokenizer_with("qwen3"), 4096).train) == 2


def test_fields_that_hold_nothing_are_as_if_they_were_not_there(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    empty = {"annotations": [], "audio": None, "tool_calls": [], "metadata": {}, "refusal": ""}
    found = load_data(chat_task([talk(1, **empty), talk(2)]), tokenizer_with("qwen3"), 4096)
    expected = load_data(chat_task([talk(1), talk(2)]), tokenizer_with("qwen3"), 4096)
    assert [item.ids for item in found.train] == [item.ids for item in expected.train]
    later = chat_task([talk(1, refusal=""), talk(2, refusal="No.")])
    assert "the field 'refusal'" in refusal(later, tokenizer_with("qwen3"))


def test_a_prefix_that_the_first_row_lacks_is_in_the_record_and_the_fingerprint(
    tokenizer_with: WithTemplate, chat_task: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = [{**one} for one in talk(1)["messages"]]
    thinking[-1]["reasoning_content"] = "Limes are green."
    config = chat_task([{"messages": thinking}, talk(2)], invalid_rows=InvalidRows.error)
    record = load_data(config, tokenizer_with("qwen3"), 4096).record
    assert record.answer_prefix == "<think>\n\n</think>\n\n"
    assert record.answer_prefix_variables == {"enable_thinking": False}
    monkeypatch.setattr("qlora_exp.data.load._fingerprint_extras", lambda *_: [])
    assert load_data(config, tokenizer_with("qwen3"), 4096).record.fingerprint != record.fingerprint


def test_plain_conversations_have_the_same_space_after_each_role(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    texts = ("你好", "晴", "天气?", "晴")
    roles = ("user", "assistant") * 2
    rows = [
        {
            "messages": [
                {"role": r, "content": f"{n}{t}" if r == "user" else t} for r, t in zip(roles, texts, strict=True)
            ]
        }
        for n in range(4)
    ]
    config = chat_task(rows, format=Format.plain)
    tokenizer = tokenizer_with("qwen3")
    splits = load_data(config, tokenizer, 4096)
    assert (
        splits.train[0].prompt + splits.train[0].completion == "User: 0你好\nAssistant: 晴\nUser: 0天气?\nAssistant: 晴"
    )
    config.evaluation.few_shots, config.evaluation.few_shot_draws = 1, 1
    [draw] = few_shot_draws(config, tokenizer, splits, splits.validation, (), None)
    assert (draw.validation[0].prompt + draw.validation[0].completion).count("Assistant: 晴") == 4


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_cut_conversation_learns_what_is_left_of_all_answers(
    tokens: int, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    rows = [talk(1), talk(2)]
    for row in rows:
        row["messages"][-1]["content"] = "green, and yellow where it was left in the sun for a few days"
    config, tokenizer = chat_task(rows, learn=Learn.all), tokenizer_with("llama3")
    whole = load_data(config, tokenizer, 4096)
    length = max(len(item.prompt_ids) for item in (*whole.train, *whole.validation)) + tokens
    for item, full in zip(load_data(config, tokenizer, length).train, whole.train, strict=True):
        assert item.ids == full.ids[:length]
        assert item.completion_mask == full.completion_mask[:length]
        assert sum(item.completion_mask) < sum(full.completion_mask)
