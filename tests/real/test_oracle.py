"""A model that answers with exactly its trained tokens is scored as right, under every chat template that TRL ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.config.enums import InvalidRows, TaskKind
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Splits
from qlora_exp.data.load import load_data
from qlora_exp.errors import DataError, Problems
from qlora_exp.evaluation.generation import check_answers, perfect_answers, stop_rule
from tests.real.conftest import TEMPLATES, as_transformers
from tests.real.perfect import oracle_score, perfect_generations

Configure = Callable[..., Config]
WithTemplate = Callable[[str], Any]

UNSTABLE = "template without a stable prompt"
REFUSED = {
    # These open a think block in the generation prompt, and write plain answers without one.
    "deepseek_r1_distill": UNSTABLE,
    "deepseek_r1_distill_training": UNSTABLE,
    "deepseekv3": UNSTABLE,
    "deepseekv3_training": UNSTABLE,
    # Nothing ends an answer but the next turn.
    "glm4moe": "template without an end of turn",
}
EMPTY_THINK, CLOSED_THINK = "<think>\n\n</think>\n\n", "\n</think>\n\n"
NO_THINKING = {"enable_thinking": False}
PREFIXES: dict[str, tuple[str, dict[str, bool] | None]] = {
    "glm4moe_training": ("\n<think></think>\n", None),
    "gptoss": ("<|channel|>final<|message|>", None),
    "muse_glimmer": (" to=user<|message|>", None),
    "qwen3": (EMPTY_THINK, NO_THINKING),
    "qwen3_5_think": (CLOSED_THINK, NO_THINKING),
    "qwen3_6": (CLOSED_THINK, NO_THINKING),
    "qwen3_8": (CLOSED_THINK, None),
}
"""What a template writes between its generation prompt and an answer, and the variable that puts it into the prompt."""


def conversation(*texts: str, system: str | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * (len(texts) // 2)
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, *({"role": r, "content": t} for r, t in zip(roles, texts, strict=True))]}


ROWS = [
    conversation("Item 1? cherry", "red"),
    conversation("Item 2? lemon", "yellow and\n\nround"),
    conversation("Item 3? lime", "e"),  # a letter of every control token
    conversation("Hi 4?", "Hello", "Item 4? plum", "blue"),
    conversation("Item 5? sky", '{"colour": "blue", "é": [1, 2]}'),
]


def loaded(config: Config, tokenizer: Any) -> Splits:
    config.evaluation.max_new_tokens = None
    return load_data(config, tokenizer, 4096)


def refusal(config: Config, tokenizer: Any) -> str:
    with pytest.raises((DataError, Problems)) as error:
        loaded(config, tokenizer)
    return str(error.value)


REASONED = [
    {"role": "user", "content": "Item 6? fig"},
    {"role": "assistant", "reasoning_content": "It is a fruit.", "content": "purple"},
]
REASONING = [{"messages": REASONED}, conversation("Item 7? kiwi", "<think>\nIt is a fruit.\n</think>\n\ngreen")]
"""As a field of the message, and in its text: learned whole, or refused."""


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_perfect_model_is_scored_as_right_and_what_the_template_adds_is_of_the_prompt(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    tokenizer, config = tokenizer_with(template), chat_task([*ROWS, *REASONING, ROWS[0]])
    config.task.invalid_rows = InvalidRows.drop
    if template in REFUSED:
        config.task.invalid_rows = InvalidRows.error
        assert REFUSED[template] in refusal(config, tokenizer)
        return
    splits = loaded(config, tokenizer)
    assert oracle_score(splits, tokenizer, config) == (1.0, 0.0)
    check_answers(splits, tokenizer, config)
    rows = dict(enumerate([*ROWS, *REASONING], start=1))
    items = {int(item.item_id.rpartition(":")[2]): item for item in splits.train}
    assert set(items) >= set(range(1, len(ROWS) + 1))  # only reasoning may be refused
    for number, item in items.items():
        messages = rows.get(number, ROWS[0])["messages"]
        assert tokenizer.decode(item.ids) == as_transformers(tokenizer, template, messages)
        assert item.completion_bytes == len(item.completion.strip().encode())
        if number <= len(ROWS):
            assert item.answer == item.completion.strip() == messages[-1]["content"]
        elif number <= len(rows):
            assert "It is a fruit." in item.completion
            assert "It is a fruit." not in item.prompt
    check_prefix(template, splits, tokenizer)


def check_prefix(template: str, splits: Splits, tokenizer: Any) -> None:
    prefix, variables = PREFIXES.get(template, PREFIXES.get(template.removesuffix("_training"), ("", None)))
    found = splits.record.answer_prefix_variables
    if template.startswith("nemotron"):  # the generation prompt opens a think block, and plain answers have none
        variables = NO_THINKING
    assert (splits.record.answer_prefix, found) == (prefix or None, variables)
    asked = ROWS[0]["messages"][:1]
    served = as_transformers(tokenizer, template, asked, add_generation_prompt=True, **(found or {}))
    assert splits.train[0].prompt == (served if found else served + prefix)


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t not in REFUSED and not t.endswith("_training")])
def test_one_letter_labels_are_valid_answers_of_a_perfect_model(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    letters = ("a", "e", "t", "_")
    rows = [{"prompt": f"Question {n}? one", "completion": letters[n % 4]} for n in range(8)]
    tokenizer, config = tokenizer_with(template), chat_task(rows, kind=TaskKind.classification)
    splits = loaded(config, tokenizer)
    assert oracle_score(splits, tokenizer, config) == (1.0, 0.0)


def test_the_check_at_load_and_real_generation_agree(tokenizer_with: WithTemplate, chat_task: Configure) -> None:
    tokenizer, config = tokenizer_with("gptoss"), chat_task([*ROWS, REASONING[0]])
    splits = loaded(config, tokenizer)
    generated = perfect_generations(splits, tokenizer, config)
    rule = stop_rule(splits, tokenizer, config)
    assert perfect_answers([item for item, _ in generated], tokenizer, rule) == [text for _, text in generated]


def test_an_answer_that_no_model_could_give_is_refused_before_a_run(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    """A tokenizer that doesn't give back what it read."""
    tokenizer = tokenizer_with("qwen2_5")
    config = chat_task([*ROWS, conversation("Item 6? word", "caf\u00e9 lait")])
    splits = loaded(config, tokenizer)
    told = type(tokenizer)
    lossy = type(
        "Lossy", (told,), {"decode": lambda self, *a, **k: told.decode(self, *a, **k).replace("caf\u00e9", "caf")}
    )
    tokenizer.__class__ = lossy
    with pytest.raises(DataError, match=r"2 of 7 answers would be scored as wrong") as error:
        check_answers(splits, tokenizer, config)
    assert "train.jsonl, row 6" in str(error.value)
    assert "evaluation.generate=false" in str(error.value)


def test_an_answer_longer_than_all_training_answers_can_be_right(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    tokenizer, config = tokenizer_with("qwen2_5"), chat_task(ROWS[:2])
    file = Path(str(config.task.path)) / "validation.jsonl"
    file.write_text(file.read_text().replace("yellow and", "yellow " * 40))
    assert oracle_score(loaded(config, tokenizer), tokenizer, config) == (1.0, 0.0)


@pytest.mark.parametrize("template", ["llama3", "qwen3", "gemma", "cohere"])
def test_an_indented_answer_is_learned_as_the_template_writes_it(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    """Some templates trim it."""
    row = conversation("Item 1? code", "    y = 1\n    return y")
    tokenizer, config = tokenizer_with(template), chat_task([row, row])
    splits = loaded(config, tokenizer)
    assert oracle_score(splits, tokenizer, config) == (1.0, 0.0)
    assert tokenizer.decode(splits.train[0].ids) == as_transformers(tokenizer, template, row["messages"])
