"""A template that reads the clock is given the task's date: the same text today and at a resume in a year."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from qlora_exp.architecture.run_plan import config_fingerprint
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Splits
from qlora_exp.data.load import load_data
from qlora_exp.errors import QloraExpError
from tests.real.conftest import TEMPLATES

Configure = Callable[..., Config]
WithTemplate = Callable[[str], Any]
CLOCKS = [name for name, file in TEMPLATES.items() if "strftime_now" in file.read_text(encoding="utf-8")]
SAYS = {"llama3_2": "Today Date: 24 Dec 2027", "gptoss": "Current date: 2027-12-24"}
ROWS = [
    {"messages": [{"role": "user", "content": f"Item {n}?"}, {"role": "assistant", "content": "red"}]} for n in range(4)
]


def loaded(tokenizer: Any, chat_task: Configure, date: str = "2026-01-01") -> Splits:
    return load_data(chat_task(ROWS, date=date), tokenizer, 4096)


@pytest.mark.parametrize("template", CLOCKS)
def test_two_days_give_the_same_ids_and_two_dates_do_not(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_with(template)
    today = loaded(tokenizer, chat_task)

    class InAYear(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> InAYear:
            return cls(2027, 7, 7)

    monkeypatch.setattr(chat_template_utils, "datetime", InAYear)
    monkeypatch.setattr(datetime, "datetime", InAYear)
    later = loaded(tokenizer, chat_task)
    assert [item.ids for item in later.train] == [item.ids for item in today.train]
    assert later.record.fingerprint == today.record.fingerprint
    assert later.record.chat_date == "2026-01-01"
    other = loaded(tokenizer, chat_task, date="2027-12-24")
    assert other.record.fingerprint != today.record.fingerprint
    assert other.record.chat_date == "2027-12-24"
    assert other.train[0].ids != today.train[0].ids
    assert SAYS.get(template, "2027") in other.train[0].prompt


@pytest.mark.parametrize("template", ["llama3_1", "qwen3"])
def test_a_template_without_a_clock_knows_no_date(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    first, second = (loaded(tokenizer_with(template), chat_task, date) for date in ("2026-01-01", "2027-12-24"))
    assert first.record.fingerprint == second.record.fingerprint
    assert first.record.chat_date is None


def test_a_date_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(QloraExpError, match=r"task\.date") as error:
        compose(["task=local", f"task.path={tmp_path}", "task.date=tomorrow"])
    assert "2026-01-01" in str(error.value)


def test_the_date_is_part_of_the_configuration() -> None:
    first, second = (compose([f"task.date={date}"]) for date in ("2026-01-01", "2027-12-24"))
    assert config_fingerprint(first) == config_fingerprint(compose([]))
    assert config_fingerprint(first) != config_fingerprint(second)
