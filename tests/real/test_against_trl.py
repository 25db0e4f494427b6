"""Token ids and masks of conversations, token by token beside those that plain TRL makes of the same rows.

Differences that are meant, each with its test below:

* What a template writes by itself before an answer, and a generation prompt inside ``{% generation %}``, are not
  learned: the model never has to write them.
* An answer is stripped of white space at its ends.
* A call's arguments that are JSON text are read as an object where the template would write them as a quoted string.
* A template that reads contents only as parts is given a text as one part.
* The date is ``task.date``, not today's.
* A row that the template writes only in part is refused. TRL trains on what is left of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from qlora_exp.config.enums import Format, InvalidRows, Learn, TaskKind
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.data.load import load_data, to_training_dataset
from qlora_exp.errors import DataError, Problems
from tests.real.conftest import TEMPLATES, in_form

Configure = Callable[..., Config]
WithTemplate = Callable[[str], Any]
Labelled = list[tuple[list[int], list[int]]]

MARKED = [name for name in TEMPLATES if name.endswith("_training") and not name.startswith("deepseek")]
PLAIN = [name for name in TEMPLATES if name not in MARKED and not name.startswith(("deepseek", "glm4moe"))]
USER, ANSWER = {"role": "user", "content": "What colour is a lime?"}, {"role": "assistant", "content": "Green"}
TURNS = [USER, ANSWER, {"role": "user", "content": "And a plum?"}, {"role": "assistant", "content": "Blue, I think"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"id": "call00000", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Ulm"}}}
CALLING = [
    {"role": "user", "content": "Weather in Ulm?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00000", "name": "get_weather", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny"},
]


class Plain:
    """SFTTrainer's own preparation of rows, with one small model for all tokenizers."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
        self.settings = SFTConfig(
            *(str(folder),), max_length=4096, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            disable_tqdm=True, **settings,
        )  # fmt: skip
        self.model = model

    def rows(self, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Labelled:
        # Tools as JSON text: Arrow would give every schema the keys of all others.
        data = [{**row, "tools": json.dumps(row["tools"])} if "tools" in row else row for row in rows]
        trainer = SFTTrainer(
            self.model, self.settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


@pytest.fixture(scope="module")
def of_the_completion(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def of_all_answers(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp("trl"), assistant_only_loss=True)


def ours(config: Config, tokenizer: Any) -> Labelled:
    data = to_training_dataset(load_data(config, tokenizer, 4096).train)
    return [(list(row["input_ids"]), list(row["labels"])) for row in data]


def as_prompt_and_completion(template: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as TRL reads prompts and completions."""
    found = []
    for row in rows:
        messages = in_form(template, row["messages"])
        others = {key: value for key, value in row.items() if key != "messages"}
        found.append({"prompt": messages[:-1], "completion": messages[-1:], **others})
    return found


def learned_by_trl_alone(mine: Labelled, theirs: Labelled, tokenizer: Any) -> set[str]:
    """The texts that TRL learns and we don't. Anything else that differs fails."""
    texts = set()
    for (ids, labels), (their_ids, their_labels) in zip(mine, theirs, strict=True):
        assert ids == their_ids
        assert all(label in (-100, their) for label, their in zip(labels, their_labels, strict=True))
        run: list[int] = []
        for label, their in [*zip(labels, their_labels, strict=True), (0, 0)]:
            if label == -100 and their != -100:
                run.append(their)
            elif run:
                texts.add(tokenizer.decode(run))
                run = []
    return texts


ROWS = [{"messages": [USER, ANSWER]}, {"messages": TURNS}, {"messages": [USER, *TURNS[2:]]}]
"""One turn, two turns, two questions before an answer."""
ALTERNATING = ("cohere", "cohere2", "gemma", "gemma3", "llava_next")
"""Their templates refuse two questions in a row."""
WRITTEN_BY_THE_TEMPLATE = {
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": " to=user<|message|>",
    "nemotron": "</think>",
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "\n</think>\n\n",
    "qwen3_6": "\n</think>\n\n",
    "qwen3_8": "\n</think>\n\n",
}
"""What TRL learns beside the last answer; no model has to write it where this project generates."""


@pytest.mark.parametrize("template", PLAIN)
def test_the_last_answer_is_learned_as_trl_learns_a_completion(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, of_the_completion: Plain
) -> None:
    tokenizer = tokenizer_with(template)
    rows = ROWS[:2] if template in ALTERNATING else ROWS
    mine = ours(chat_task(rows), tokenizer)
    theirs = of_the_completion.rows(tokenizer, as_prompt_and_completion(template, rows))
    meant = {WRITTEN_BY_THE_TEMPLATE[name(template)]} if name(template) in WRITTEN_BY_THE_TEMPLATE else set()
    assert learned_by_trl_alone(mine, theirs, tokenizer) == meant


MARKED_BEFORE_ANSWERS = {
    "glm4moe_training": "\n<think></think>\n",
    "gptoss_training": "<|start|>assistant<|channel|>final<|message|>",
    "muse_glimmer_training": "<|start|>assistant to=user<|message|>",
    "nemotron_3_5_lightning_training": "<think></think>",
    "nemotron_3_nano_training": "<think></think>",
    "nemotron_3_super_training": "<think></think>",
    "nemotron_3_ultra_training": "<think></think>",
    "qwen2_5_training": "\n",
    **{f"qwen3{size}_training": "<think>\n\n</think>\n\n" for size in ("", "_5_think", "_5_nothink", "_6", "_8")},
}
"""The generation prompt and what else a template's marks hold that the model never has to write."""


@pytest.mark.parametrize("template", MARKED)
def test_all_answers_are_learned_as_trl_learns_marked_ones(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, of_all_answers: Plain
) -> None:
    tokenizer = tokenizer_with(template)
    mine = ours(chat_task(ROWS[:2], learn=Learn.all), tokenizer)
    theirs = of_all_answers.rows(tokenizer, [{"messages": in_form(template, row["messages"])} for row in ROWS[:2]])
    meant = {MARKED_BEFORE_ANSWERS[template]} if template in MARKED_BEFORE_ANSWERS else set()
    assert learned_by_trl_alone(mine, theirs, tokenizer) == meant


KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tools": ({"messages": [USER, ANSWER], "tools": TOOLS}, ("get_weather",)),
    "a call in the middle": ({"messages": CALLING, "tools": TOOLS}, ("get_weather", "Ulm", "sunny")),
    "a call at the end": ({"messages": CALLING[:2], "tools": TOOLS}, ("get_weather", "Ulm")),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]}, ("Be brief.",)),
    "a name": ({"messages": [{**USER, "name": "Annabel"}, ANSWER]}, ("Annabel",)),
    "reasoning": ({"messages": [USER, {**ANSWER, "reasoning_content": "Limes are."}]}, ("Limes are.",)),
}
"""Rows with more than roles and texts, and what a model would have to see or learn of them."""
FAMILIES = (
    *("cohere", "diffusion_gemma", "gemma3", "gemma4_v5", "glm4moe_training", "gptoss", "lfm2_2_5", "llama3"),
    *(
        "llama3_1",
        "llama3_2",
        "muse_glimmer",
        "nemotron_3_nano",
        "phi3",
        "qwen2_5",
        "qwen3",
        "qwen3_5_think",
        "smolvlm",
    ),
)


@pytest.mark.parametrize("template", FAMILIES)
def test_whole_messages_are_read_as_trl_reads_them_and_refused_where_trl_drops_a_part(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, of_the_completion: Plain
) -> None:
    tokenizer = tokenizer_with(template)
    rows = [row for row, _ in KINDS.values()]
    config = chat_task([*rows, ROWS[0]], invalid_rows=InvalidRows.drop)
    items = {int(i.item_id.rpartition(":")[2]): i for i in load_data(config, tokenizer, 4096).train}
    for number, (row, parts) in enumerate(KINDS.values(), start=1):
        try:
            [(ids, labels)] = of_the_completion.rows(tokenizer, as_prompt_and_completion(template, [row]))
        except Exception:  # the template refuses the row, with any error
            assert number not in items
            continue
        text = tokenizer.decode(ids)
        assert (number in items) == all(part in text for part in parts)
        if number in items:
            mine = [(list(items[number].ids), labels_of(items[number]))]
            more = learned_by_trl_alone(mine, [(ids, labels)], tokenizer)
            assert more <= {WRITTEN_BY_THE_TEMPLATE.get(name(template)), *REPEATED_HEADERS.get(template, ())}


REPEATED_HEADERS = {"diffusion_gemma": ("<|turn>model\n",)}
"""Written after a tool's answer, where the generation prompt has no header."""


def name(template: str) -> str:
    return "nemotron" if template.startswith("nemotron") else template.removesuffix("_training")


def labels_of(item: Item) -> list[int]:
    return [token if learned else -100 for token, learned in zip(item.ids, item.completion_mask, strict=True)]


@pytest.mark.parametrize("template", ["llama3_1", "qwen2_5", "qwen3", "qwen3_5_think", "gptoss", "lfm2_2_5_vl"])
def test_arguments_that_are_json_text_are_written_once(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, of_the_completion: Plain
) -> None:
    """OpenAI's form. TRL writes them as a quoted string, or can't, where the template expects an object."""
    quoted = {**CALL, "function": {"name": "get_weather", "arguments": json.dumps({"city": "Ulm"})}}
    rows = [{"messages": [CALLING[0], {**CALLING[1], "tool_calls": [c]}], "tools": TOOLS} for c in (quoted, CALL)]
    tokenizer = tokenizer_with(template)
    [first], [second] = (ours(chat_task([row]), tokenizer) for row in rows)
    assert first == second
    [theirs] = of_the_completion.rows(tokenizer, as_prompt_and_completion(template, rows[1:]))
    assert first[0] == theirs[0]


@pytest.mark.parametrize("template", ["llama3", "gemma", "lfm2", "qwen3", "gemma3", "idefics3"])
def test_parts_of_text_are_read_as_the_text(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, of_the_completion: Plain
) -> None:
    """TRL writes the list itself, or nothing, where the template reads contents as one text."""
    spaced = {**ANSWER, "content": "Green \n"}
    parted = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in (USER, spaced)]
    tokenizer = tokenizer_with(template)
    [first], [second] = (ours(chat_task([{"messages": row}]), tokenizer) for row in (parted, [USER, spaced]))
    assert first == second
    [theirs] = of_the_completion.rows(tokenizer, as_prompt_and_completion(template, [{"messages": [USER, ANSWER]}]))
    assert first[0] == theirs[0]


@pytest.mark.parametrize("template", ["llama3", "qwen2_5", "gptoss_training", "qwen3_training", "phi3_training"])
def test_an_answer_of_weight_0_is_not_learned_and_changes_nothing_else(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    tokenizer = tokenizer_with(template)
    weighted = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]
    [(whole, both)] = ours(chat_task([{"messages": TURNS}], learn=Learn.all), tokenizer)
    [(ids, labels)] = ours(chat_task([{"messages": weighted}], learn=Learn.all), tokenizer)
    [(_, last)] = ours(chat_task([{"messages": TURNS}]), tokenizer)
    assert ids == whole
    learned = [tokenizer.decode([label for label in one if label != -100]) for one in (both, labels, last)]
    assert "Green" in learned[0]
    assert "Green" not in learned[1]
    assert learned[1].startswith("Blue, I think")
    assert learned[1].strip() == learned[2].strip()
    assert ours(chat_task([{"messages": weighted}]), tokenizer) == [(ids, last)]


def test_weights_that_ask_for_what_is_not_learned_are_refused(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    tokenizer = tokenizer_with("llama3")
    for row, says in (
        ([USER, {**ANSWER, "weight": 0}], "the last answer has the weight 0"),
        ([USER, {**ANSWER, "weight": 1}, *TURNS[2:]], "task.learn=all"),
        ([USER, {**ANSWER, "weight": 0.5}], "0: not learned"),
    ):
        with pytest.raises(DataError, match=says):
            load_data(chat_task([{"messages": row}, ROWS[0]]), tokenizer, 4096)


@pytest.mark.parametrize("template", ["llama3", "qwen2_5", "gemma3", "lfm2", "qwen3_instruct_2507", "smolvlm"])
def test_unmarked_answers_are_all_learned_as_by_trls_marked_template(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure, of_all_answers: Plain
) -> None:
    tokenizer = tokenizer_with(template)
    mine = ours(chat_task(ROWS[:2], learn=Learn.all), tokenizer)
    rows = [{"messages": in_form(template, row["messages"])} for row in ROWS[:2]]
    theirs = of_all_answers.rows(tokenizer_with(f"{template}_training"), rows)
    texts = [
        [tokenizer.decode([label for label in labels if label != -100]).split() for _, labels in one]
        for one in (mine, theirs)
    ]
    assert texts[0] == texts[1]  # but for white space, as the newline of the generation prompt


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "phi3", "qwen3_5_think"])
def test_a_template_that_rewrites_earlier_answers_is_refused_where_all_are_learned(
    template: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    """TRL takes another template in its place."""
    with pytest.raises((DataError, Problems), match="rewrites earlier turns") as error:
        load_data(chat_task([ROWS[1]], learn=Learn.all), tokenizer_with(template), 4096)
    assert "{% generation %}" in str(error.value)


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpt_rows_are_read_as_the_same_messages_with_roles(
    column: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    texts = [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [{column: [{"from": names[role], "value": text} for role, text in texts]}]
    expected = [{column: [{"role": role, "content": text} for role, text in texts]}]
    read = []
    for given in (rows, expected):
        config = chat_task(given)
        config.task.columns.messages = column
        read.append(load_data(config, tokenizer_with("llama3"), 4096).train[0])
    assert read[0].prompt == read[1].prompt
    assert (read[0].ids, read[0].answer) == (read[1].ids, read[1].answer)


def test_labels_given_as_parts_are_compared_with_all_options(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    rows = [
        {
            "messages": [
                {**USER, "content": f"Item {n}?"},
                {"role": "assistant", "content": [{"type": "text", "text": t}]},
            ]
        }
        for n, t in enumerate(("red", "green") * 3)
    ]
    config = chat_task(rows, kind=TaskKind.classification)
    splits = load_data(config, tokenizer_with("smolvlm"), 4096)
    assert splits.labels == ("green", "red")
    assert {item.label: item.completion_ids for item in splits.train} == splits.label_ids


def test_a_tool_may_give_nothing_back(tokenizer_with: WithTemplate, chat_task: Configure) -> None:
    row = {"messages": [*CALLING[:2], {**CALLING[2], "content": ""}, CALLING[3]], "tools": TOOLS}
    [(ids, _)] = ours(chat_task([row]), tokenizer_with("qwen3"))
    assert "<tool_response>\n\n</tool_response>" in tokenizer_with("qwen3").decode(ids)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("tools", "hammer", "task.columns.tools=null"),
        ("tools", ["hammer"], "tool 1 is str"),
        ("chat_template_kwargs", [1], "expected an object"),
        ("chat_template_kwargs", {"nonsense": 1}, "no variable 'nonsense'"),
        ("messages", [{"role": "user", "content": [{"type": "image"}]}, ANSWER], "type 'image'"),
        ("messages", [USER, {**ANSWER, "function_call": {"name": "<|im_end|>"}}], "special token in the text"),
    ],
)
def test_what_is_not_understood_is_named(
    column: str, value: Any, says: str, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    config = chat_task([{"messages": [USER, ANSWER], column: value}, ROWS[1]])
    with pytest.raises((DataError, Problems)) as error:
        load_data(config, tokenizer_with("qwen3"), 4096)
    assert says in str(error.value)


def test_ignored_fields_are_as_if_they_were_not_there(tokenizer_with: WithTemplate, chat_task: Configure) -> None:
    row = {"messages": [{**USER, "name": "Annabel", "id": 3}, {**ANSWER, "weight": 0}]}
    config = chat_task([row], ignore_fields=["name", "id", "weight"])
    tokenizer = tokenizer_with("qwen3")
    assert ours(config, tokenizer) == ours(chat_task([{"messages": [USER, ANSWER]}]), tokenizer)


UNUSED = {"refusal": None, "annotations": [], "audio": None, "function_call": {}, "tool_calls": [], "name": ""}
"""Fields that API clients write in every message, whether they hold something or not."""


@pytest.mark.parametrize("format", [Format.chat, Format.plain])
def test_fields_that_hold_nothing_are_no_obstacle(
    format: Format, tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    rows = [{"messages": [{**message, **UNUSED} for message in row["messages"]]} for row in ROWS[:2]]
    tokenizer = tokenizer_with("qwen3")
    assert ours(chat_task(rows, format=format), tokenizer) == ours(chat_task(ROWS[:2], format=format), tokenizer)


def test_a_field_is_checked_though_another_row_has_it_empty(tokenizer_with: WithTemplate, chat_task: Configure) -> None:
    rows = [{"messages": [{**USER, "name": name}, ANSWER]} for name in ("", "Annabel")]
    with pytest.raises((DataError, Problems), match="field 'name'"):
        load_data(chat_task(rows), tokenizer_with("qwen3"), 4096)


def test_a_refused_tool_call_is_not_sent_to_the_plain_format(
    tokenizer_with: WithTemplate, chat_task: Configure
) -> None:
    """Neither format can write it: a hint to use the other one would lead in a circle."""
    tokenizer = copy.deepcopy(tokenizer_with("qwen3"))
    tokenizer.chat_template = "{%- for m in messages %}{{- m['role'] + ': ' + m.content + '<|im_end|>' }}{%- endfor %}"
    call = {"role": "assistant", "tool_calls": [CALL]}
    row = {"messages": [CALLING[0], call, *CALLING[2:]]}
    with pytest.raises((DataError, Problems)) as error:
        load_data(chat_task([row]), tokenizer, 4096)
    assert "may not know tool calls" in str(error.value)
    assert "task.format=plain" not in str(error.value)


def test_plain_text_refuses_what_only_a_template_can_write(tokenizer_with: WithTemplate, chat_task: Configure) -> None:
    for row in (row for row, _ in KINDS.values()):
        config = chat_task([row], format=Format.plain)
        with pytest.raises((DataError, Problems)) as error:
            load_data(config, tokenizer_with("qwen3"), 4096)
        assert "not for the plain format" in str(error.value)
        assert "task.format=chat" in str(error.value)


def test_parquets_nulls_are_not_written(tokenizer_with: WithTemplate, chat_task: Configure, tmp_path: Path) -> None:
    """Arrow gives each object the keys of all others, and a template would write ``"country": null``."""
    other = json.loads(json.dumps(TOOLS).replace("city", "country"))
    call = {**CALL, "function": {"name": "get_weather", "arguments": {"country": "Peru"}}}
    calling = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
    rows = [{"messages": CALLING, "tools": TOOLS}, {"messages": calling, "tools": other}]
    config, tokenizer = chat_task(rows), tokenizer_with("qwen3")
    expected = ours(config, tokenizer)
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = (Path(str(config.task.path)) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        Dataset.from_list([json.loads(line) for line in lines]).to_parquet(str(folder / f"{split}.parquet"))
    config.task.path = str(folder)
    assert ours(config, tokenizer) == expected
