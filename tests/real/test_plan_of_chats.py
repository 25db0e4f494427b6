"""A plan counts conversations as a run tokenizes them, though it renders templates without transformers."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.data.chat_template import render_conversation
from qlora_exp.data.encoding import encode_rows
from qlora_exp.data.load import load_data
from qlora_exp.data.splits import load_rows
from qlora_exp.estimate.tokenizer_file import FileTokenizer
from qlora_exp.estimate.tokens import RowCounter
from qlora_exp.models.tokenizers import load_tokenizer
from tests.conftest import save_tiny_model
from tests.real.conftest import TEMPLATES, in_form
from tests.real.test_against_trl import CALLING, FAMILIES, KINDS, ROWS, TOOLS, TURNS, USER

Configure = Callable[..., Config]
WithTemplate = Callable[[str], Any]
DATE = datetime.date(2026, 1, 1)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, dict[str, Any]]] = {
    "turns": (TURNS, None, {}),
    "system": ([{"role": "system", "content": "Be brief."}, *TURNS], None, {}),
    "calls": (CALLING, TOOLS, {}),
    "null": ([USER, {"role": "assistant", "content": None, "reasoning": "So.", "name": None}], None, {}),
    "variable": ([*TURNS, USER], None, {"enable_thinking": False}),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_are_rendered_and_marked_as_by_transformers(template: str, tokenizer_with: WithTemplate) -> None:
    tokenizer = tokenizer_with(template)
    compared = 0
    for written, tools, variables in CONVERSATIONS.values():
        messages = in_form(template, written)
        for prompt in (False, True):
            settings = {"add_generation_prompt": prompt, "tools": tools, **variables}
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
            except Exception:  # the template refuses them, with any error
                continue
            ours = render_conversation(
                *(tokenizer.chat_template, messages, tokenizer.special_tokens_map),
                generation_prompt=prompt, date=DATE, tools=tools, variables=variables,
            )  # fmt: skip
            compared += 1
            assert ours.text == text
            if "{%- generation" in tokenizer.chat_template or "{% generation" in tokenizer.chat_template:
                coded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
                marked = [t for t, m in zip(coded["input_ids"], coded["assistant_masks"], strict=True) if m]
                spans = "".join(text[begin:end] for begin, end in ours.marks)
                assert tokenizer.decode(marked).split() == spans.split()
    assert compared >= 2


@pytest.mark.parametrize("template", FAMILIES)
def test_a_tokenizer_by_its_file_encodes_whole_messages_as_transformers_does(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(template)
    tokenizer.save_pretrained(tmp_path / "saved")
    by_file = FileTokenizer(tmp_path / "saved")
    examples = load_rows(chat_task([row for row, _ in KINDS.values()] + ROWS[:2]).task).train
    for every_turn in (False, True):
        settings: dict[str, Any] = {"date": DATE, "every_turn": every_turn}
        assert encode_rows(examples, by_file, "chat", **settings) == encode_rows(
            examples, tokenizer, "chat", **settings
        )


@pytest.mark.parametrize("template", ["qwen3_training", "qwen2_5", "gptoss_training"])
@pytest.mark.parametrize("learn", ["last", "all"])
def test_a_plan_counts_learned_tokens_as_a_run_does(
    learn: str, template: str, chat_task: Configure, tmp_path: Path
) -> None:
    model, task = save_tiny_model("llama", tmp_path / "model"), chat_task([*ROWS[:2], *ROWS[:2]])
    config = compose(
        [
            *("model=local", f"model.path={model}", f"model.chat_template={TEMPLATES[template]}", "task=local"),
            *(f"task.path={task.task.path}", "task.columns.messages=messages", "task.format=chat"),
            *(f"task.learn={learn}", "task.test_fraction=0"),
        ]
    )
    items = load_data(config, load_tokenizer(config.model), config.training.max_length).train
    planned = RowCounter().of(config)
    assert planned is not None
    assert planned.rows == len(items)
    assert planned.mean_tokens == sum(len(item.ids) for item in items) / len(items)
    assert planned.lengths.row_max_loss_tokens == max(sum(item.completion_mask) for item in items)
