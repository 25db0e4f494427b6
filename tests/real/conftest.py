"""Chat templates as they are published, and small tokenizers that know their control tokens."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.paths import EMBEDDED
from tests.real.cases_input import Families

TEMPLATES = {file.stem: file for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
CONTROL = re.compile(r"<\|[^|<>{}'\"\s]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_[a-z]+>|\[/?[A-Za-z]+\]")
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tokens that models write as text: published tokenizers don't call them special."""


READ_PARTS_ALONE = tuple(name for name in TEMPLATES if name.startswith(("idefics3", "llava_next", "smolvlm")))
"""Templates of models that see, which leave out a content that is a text: such a text is given as one part."""


@pytest.fixture(autouse=True)
def _task_date_is_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers renders with today's date, the project with ``task.date``: the same day, to compare them."""

    class Today(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Today:
            return cls(2026, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Today)


def as_transformers(tokenizer: Any, template: str, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
    """The conversation as transformers renders it."""
    return str(tokenizer.apply_chat_template(in_form(template, messages), tokenize=False, **settings))


def in_form(template: str, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form that the template reads."""
    if template not in READ_PARTS_ALONE:
        return list(messages)
    return [{**one, "content": [{"type": "text", "text": one.get("content") or ""}]} for one in messages]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def _bare() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    tokenizer.model_max_length = 10**9
    tokenizer.add_tokens(list(WORDS))
    tokenizer.bos_token = tokenizer.bos_token or "<|endoftext|>"
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_with(_bare: PreTrainedTokenizerBase) -> Callable[[str], Any]:
    """The embedded tokenizer with a template, by its name or as it is, and each control token that it writes."""

    @functools.lru_cache
    def make(template: str) -> Any:
        text = TEMPLATES[template].read_text(encoding="utf-8") if template in TEMPLATES else template
        tokenizer = copy.deepcopy(_bare)
        tokenizer.chat_template = text
        tokens = sorted({token for token in CONTROL.findall(text) if token not in WORDS})
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        return tokenizer

    return make


@pytest.fixture(scope="session")
def _composed() -> Config:
    return compose(["task=local", "task.path=rows.jsonl", "model.variant=instruct", "task.invalid_rows=error"])


@pytest.fixture
def chat_task(tmp_path: Path, _composed: Config) -> Callable[..., Config]:
    """A configuration whose task is ``train`` and, to validate on, its last row; settings of the task by keyword."""

    def make(train: Sequence[dict[str, Any]], **task: Any) -> Config:
        folder = tmp_path / f"rows{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        last = json.loads(json.dumps(train[-1]).replace("?", " now?", 1))
        for split, rows in (("train", train), ("validation", [last])):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        config = copy.deepcopy(_composed)
        config.task.path, config.task.test_fraction = str(folder), 0.0
        if "messages" in train[0]:
            config.task.columns.messages = "messages"
        for key, value in task.items():
            assert hasattr(config.task, key)
            setattr(config.task, key, value)
        return config

    return make
