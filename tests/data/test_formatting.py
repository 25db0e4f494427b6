"""Rows as token ids: TRL's own ids, in both formats; labels in context; cutting; fingerprint; preview."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from qlora_exp.config.enums import Format, InvalidRows, Variant
from qlora_exp.data.encoding import resolve_format
from qlora_exp.data.items import Splits
from qlora_exp.data.load import load_data, to_training_dataset
from qlora_exp.data.preview import preview_items
from qlora_exp.errors import DataError, Problems

Configure = Callable[..., Any]
RowsFile = Callable[..., Path]
PLAIN = ("plain", "bos", "bos_eos", "sentencepiece")
PROMPTS = ["What colour is the sky?", "Answer: ", "a cat:\n", "Grüße, 東京?", "Is it red or green", "x\n\nCategory:\t"]


AS_IT_STANDS = {"completion_only_loss": True, "dataset_kwargs": {"skip_prepare_dataset": True}}


def sft(tokenizer: Any, data: Any, tmp_path: Path, max_length: int, **settings: Any) -> list[tuple[list[int], Any]]:
    """(input_ids, labels) of every row, as SFTTrainer prepares them."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], **settings}
    config = SFTConfig(output_dir=str(tmp_path), max_length=max_length, **settings)
    trainer = SFTTrainer(LlamaForCausalLM(shape), config, train_dataset=data, processing_class=tokenizer)
    return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


def expected(splits: Splits) -> list[tuple[list[int], list[int]]]:
    rows = []
    for item in splits.train:
        labels = [i if trained else -100 for i, trained in zip(item.ids, item.completion_mask, strict=True)]
        rows.append((list(item.ids), labels))
    return rows


@pytest.fixture
def folder(tmp_path: Path, rows_file: RowsFile) -> Path:
    """The prompts above as training rows with several completions, and other rows to validate on."""
    completions = ["blue", "it has eight legs", "東京", "two\nlines", "red; green", "1"]
    rows_file(
        [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, completions, strict=True)],
        "folder/train.jsonl",
    )
    rows_file([{"prompt": "held out", "completion": "yes"}], "folder/validation.jsonl")
    rows_file([{"prompt": "for answers only", "completion": "no"}], "folder/test.jsonl")
    return tmp_path / "folder"


def in_format(config: Any, format: str) -> Any:
    config.task.format = Format[format]
    return config


@pytest.mark.parametrize("max_length", [512, 24])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_ids_are_those_trl_makes(
    name: str, max_length: int, folder: Path, tokenizers: Any, configure: Configure, tmp_path: Path
) -> None:
    config = in_format(configure(folder, invalid_rows=InvalidRows.drop), "plain")
    splits = load_data(config, tokenizers[name], max_length)
    data = [{"prompt": item.prompt, "completion": whole_completion(item, folder)} for item in splits.train]
    theirs = sft(tokenizers[name], Dataset.from_list(data), tmp_path / "out", max_length)
    assert expected(splits) == theirs
    assert len(theirs) >= 4
    for item in splits.train:
        assert max_length < 512 or item.completion == whole_completion(item, folder)


def whole_completion(item: Any, folder: Path) -> str:
    """What follows the item's prompt in the row: its texts as they are, or with one space between them."""
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(rows[int(item.item_id.rpartition(":")[2]) - 1])
    separator = "" if row["prompt"][-1].isspace() or row["completion"] == "東京" else " "
    text = str(row["prompt"] + separator + row["completion"])
    return text.removeprefix(item.prompt)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["chat", "chat_with_bos"])
def test_chat_ids_are_those_trl_makes(
    name: str, system: str | None, folder: Path, tokenizers: Any, configure: Configure, tmp_path: Path
) -> None:
    splits = load_data(in_format(configure(folder, system=system), "chat"), tokenizers[name], 512)
    first = [{"role": "system", "content": system}] if system else []
    source = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    data = [
        {
            "prompt": [*first, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in source
    ]
    assert expected(splits) == sft(tokenizers[name], Dataset.from_list(data), tmp_path / "out", 512)
    end = tokenizers[name].convert_tokens_to_ids("<|im_end|>")
    for item in splits.train:
        assert item.end_ids[0] == end
        assert tokenizers[name].decode(item.completion_ids) == item.completion == item.answer


def test_conversation_ids_are_those_trl_makes(
    tmp_path: Path, rows_file: RowsFile, tokenizers: Any, configure: Configure
) -> None:
    turns = [("user", "Is grass green?"), ("assistant", "Yes"), ("user", "Is blood?"), ("assistant", "No, red")]
    chats = [[{"role": role, "content": f"{text} {n}"} for role, text in turns] for n in range(5)]
    rows_file([{"messages": chat} for chat in chats[:4]], "c/train.jsonl")
    rows_file([{"messages": chats[4]}], "c/validation.jsonl")  # no test file, and none to be made: test_fraction=0
    config = in_format(configure(tmp_path / "c", messages_column="messages", test_fraction=0.0), "chat")
    splits = load_data(config, tokenizers["chat"], 512)
    data = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats[:4]])
    assert expected(splits) == sft(tokenizers["chat"], data, tmp_path / "out", 512)
    plain = load_data(in_format(config, "plain"), tokenizers["plain"], 512)
    assert plain.train[0].prompt == "User: Is grass green? 0\nAssistant: Yes 0\nUser: Is blood? 0\nAssistant:"
    assert plain.train[0].completion == " No, red 0"


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_trl_trains_on_our_data_set_as_it_stands(
    name: str, folder: Path, tokenizers: Any, configure: Configure, tmp_path: Path
) -> None:
    splits = load_data(in_format(configure(folder), name), tokenizers[name], 512)
    ours = to_training_dataset(splits.train)
    assert expected(splits) == sft(tokenizers[name], ours, tmp_path / "out", 512, **AS_IT_STANDS)


def test_auto_is_chat_for_instruct_and_plain_for_base(folder: Path, configure: Configure) -> None:
    config = configure(folder)
    config.model.variant = Variant.base
    assert resolve_format(config) == "plain"
    config.model.variant = Variant.instruct
    assert resolve_format(config) == "chat"
    assert resolve_format(in_format(config, "plain")) == "plain"


def test_bos_is_put_before_plain_prompts_once_and_never_twice_in_chats(
    folder: Path, tokenizers: Any, configure: Configure
) -> None:
    bos = tokenizers["bos"].bos_token_id
    plain = load_data(in_format(configure(folder), "plain"), tokenizers["bos"], 512)
    assert all(item.prompt_ids[0] == bos and item.ids.count(bos) == 1 for item in plain.train)
    chat = load_data(in_format(configure(folder), "chat"), tokenizers["chat_with_bos"], 512)
    assert all(bos not in item.ids for item in chat.train)


def labelled(rows_file: RowsFile, prompt: str = "noise {n}") -> Path:
    labels = ["red", "green", "blue"]
    rows = [{"prompt": prompt.format(n=n), "label": labels[n % 3]} for n in range(30)]
    return rows_file(rows)


@pytest.mark.parametrize("name", [*PLAIN, "chat"])
def test_label_ids_are_the_ids_that_the_items_are_trained_on(
    name: str, rows_file: RowsFile, tokenizers: Any, configure: Configure
) -> None:
    config = configure(labelled(rows_file), kind="classification", label_column="label")
    splits = load_data(in_format(config, "chat" if name == "chat" else "plain"), tokenizers[name], 512)
    assert splits.labels == ("blue", "green", "red") == tuple(splits.label_ids) == splits.record.labels
    for item in (*splits.train, *splits.validation, *splits.test):
        assert splits.label_ids[str(item.label)] == item.completion_ids
        assert item.answer == item.label
        assert item.completion_bytes == len(item.answer)


def test_a_plain_label_is_tokenized_with_its_space(rows_file: RowsFile, tokenizers: Any, configure: Configure) -> None:
    config = in_format(configure(labelled(rows_file), kind="classification", label_column="label"), "plain")
    tokenizer = tokenizers["plain"]
    label_ids = load_data(config, tokenizer, 512).label_ids
    alone = tuple(tokenizer("red", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(label_ids["red"]) == " red"
    assert label_ids["red"] != alone


def test_prompts_that_end_differently_are_refused_for_labels(
    rows_file: RowsFile, tokenizers: Any, configure: Configure
) -> None:
    rows = [{"prompt": f"noise {n}" + "\n" * (n == 17), "label": ("red", "green")[n % 2]} for n in range(30)]
    config = in_format(configure(rows_file(rows), kind="classification", label_column="label"), "plain")
    with pytest.raises(DataError, match="other tokens after this prompt") as error:
        load_data(config, tokenizers["plain"], 512)
    assert "data.jsonl, row" in str(error.value)


def test_chat_without_a_template_says_what_to_do(folder: Path, tokenizers: Any, configure: Configure) -> None:
    with pytest.raises(DataError, match="no chat template") as error:
        load_data(in_format(configure(folder), "chat"), tokenizers["plain"], 512)
    assert "task.format=plain" in str(error.value)
    assert "model.chat_template=" in str(error.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}", "no system here"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ 'X' if add_generation_prompt }}", "differently when"),
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] + '|' if m['role'] != 'assistant' else m['content'] }}{% endfor %}",
         "puts nothing after an answer"),
        ("{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}", "doesn't write it as it is"),
    ],
)  # fmt: skip
def test_an_unfit_chat_template_is_told(
    template: str, says: str | None, folder: Path, tokenizers: Any, configure: Configure
) -> None:
    tokenizer = copy.deepcopy(tokenizers["chat"])
    tokenizer.chat_template = template
    config = in_format(configure(folder, system="Be brief."), "chat")
    if says is None:
        assert load_data(config, tokenizer, 512).train[0].completion == "blue"
        return
    with pytest.raises((DataError, Problems)) as error:
        load_data(config, tokenizer, 512)
    assert says in str(error.value)
    assert "train.jsonl, row 1" in str(error.value)
    assert "task.format=plain" in str(error.value)
    assert str(error.value).count("where:") == 1  # one message, though every row has the fault
    assert "other rows" in str(error.value)


@pytest.mark.parametrize(("format", "column"), [("plain", "completion"), ("chat", "completion"), ("chat", "prompt")])
def test_control_tokens_written_in_a_row_are_refused(
    format: str, column: str, rows_file: RowsFile, good_rows: Any, tokenizers: Any, configure: Configure
) -> None:
    good_rows[4][column] += "<|im_end|>\n<|im_start|>"
    with pytest.raises(DataError, match="special token in the text") as error:
        load_data(in_format(configure(rows_file(good_rows)), format), tokenizers[format], 512)
    assert "data.jsonl, row 5" in str(error.value)


def test_a_completion_cut_away_is_refused_or_dropped(
    rows_file: RowsFile, good_rows: Any, tokenizers: Any, configure: Configure
) -> None:
    good_rows[6]["prompt"] = "What colour? " * 100
    config = in_format(configure(rows_file(good_rows)), "plain")
    with pytest.raises(DataError, match="completion truncated away") as error:
        load_data(config, tokenizers["plain"], 64)
    for part in ("data.jsonl, row 7", "max_length is 64", "training.max_length="):
        assert part in str(error.value)
    config.task.invalid_rows = InvalidRows.drop
    record = load_data(config, tokenizers["plain"], 64).record
    assert record.dropped_reasons == {"completion truncated away": 1}
    assert record.dropped_rows == 1
    assert record.train_items + record.validation_items + record.test_items == 29


def test_a_completion_cut_short_is_counted_and_its_text_is_what_is_left(
    rows_file: RowsFile, good_rows: Any, tokenizers: Any, configure: Configure
) -> None:
    for row in good_rows:
        row["completion"] = "it has eight legs and a bird has two. " * 10
    splits = load_data(in_format(configure(rows_file(good_rows)), "plain"), tokenizers["plain"], 48)
    assert splits.record.truncated_items == 30
    item = splits.train[0]
    assert len(item.ids) == 48
    assert item.end_ids == ()
    assert item.completion == tokenizers["plain"].decode(item.completion_ids)
    assert item.completion_bytes == len(item.completion.strip()) < len(item.answer)


def test_half_a_label_is_no_label(rows_file: RowsFile, tokenizers: Any, configure: Configure) -> None:
    config = in_format(configure(labelled(rows_file), kind="classification", label_column="label"), "chat")
    lengths = load_data(config, tokenizers["chat"], 512).train[0]
    longest = len(lengths.prompt_ids) + 1
    with pytest.raises((DataError, Problems)) as error:
        load_data(config, tokenizers["chat"], longest)
    assert "completion truncated away" in str(error.value)


def test_the_fingerprint_changes_with_any_row_template_or_format_and_nothing_else(
    rows_file: RowsFile, good_rows: Any, tokenizers: Any, configure: Configure
) -> None:
    def fingerprint(rows: Any, format: str = "plain", name: str = "data.jsonl", **task: Any) -> str:
        config = in_format(configure(rows_file(rows, name), **task), format)
        return load_data(config, tokenizers["chat"], 512).record.fingerprint

    first = fingerprint(good_rows)
    assert len(first) == 64
    assert fingerprint(good_rows, name="other.jsonl") == first
    others = {
        fingerprint(good_rows, "chat"),
        fingerprint(good_rows, system="Be brief."),
        fingerprint(good_rows, prompt="{prompt}"),
        fingerprint(good_rows, split_seed=1),
        fingerprint(good_rows, max_train_items=10),
        *(fingerprint([*good_rows[:n], {**good_rows[n], "completion": "pink"}, *good_rows[n + 1 :]]) for n in range(3)),
    }
    assert len(others) == 8
    assert first not in others


def test_the_fingerprint_of_the_rows_is_the_same_for_every_tokenizer_and_format(
    rows_file: RowsFile, good_rows: Any, tokenizers: Any, configure: Configure
) -> None:
    def fingerprint(rows: Any, tokenizer: str = "chat", format: str = "plain") -> str | None:
        return load_data(
            in_format(configure(rows_file(rows)), format), tokenizers[tokenizer], 512
        ).record.rows_fingerprint

    first = fingerprint(good_rows)
    assert first is not None
    assert {fingerprint(good_rows, name) for name in tokenizers} == {first}
    assert fingerprint(good_rows, format="chat") == first
    assert fingerprint([{**good_rows[0], "completion": "pink"}, *good_rows[1:]]) != first


def test_the_record_says_what_the_template_costs_and_whether_it_was_trained(
    folder: Path, tokenizers: Any, configure: Configure
) -> None:
    config = configure(folder)
    config.model.variant = Variant.instruct
    config.model.template_tokens_trained = {"instruct": True}
    chat = load_data(config, tokenizers["chat"], 512)
    plain = load_data(in_format(config, "plain"), tokenizers["chat"], 512)
    probe = tokenizers["chat"]("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert chat.record.template_tokens == len(probe["input_ids"])
    assert (plain.record.template_tokens, plain.record.template_tokens_trained) == (0, None)
    assert chat.record.template_tokens_trained is True
    config.model.template_tokens_trained = {}
    assert load_data(in_format(config, "chat"), tokenizers["chat"], 512).record.template_tokens_trained is None
    lengths = [len(item.prompt_ids) for item in chat.train]
    assert chat.record.mean_prompt_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert chat.format == "chat"
    assert len(chat.general_text) > 100


@pytest.mark.parametrize("name", ["plain", "chat", "sentencepiece"])
def test_preview_marks_exactly_the_trained_tokens(
    name: str, folder: Path, tokenizers: Any, configure: Configure
) -> None:
    config = in_format(configure(folder), "chat" if name == "chat" else "plain")
    splits = load_data(config, tokenizers[name], 512)
    shown = preview_items(splits, tokenizers[name], "train", 3)
    assert [item.item_id for item, _ in shown] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    for item, tokens in shown:
        assert tuple(token.id for token in tokens) == item.ids
        assert [token.id for token in tokens if token.trained] == [*item.completion_ids, *item.end_ids]
        if name == "sentencepiece":  # it writes a space with the word, not before it
            assert all(token.text for token in tokens)
        else:
            assert "".join(token.text for token in tokens) == tokenizers[name].decode(item.ids)
    with pytest.raises(DataError, match="no split 'tset'") as error:
        preview_items(splits, tokenizers[name], "tset", 1)
    assert "did you mean test" in str(error.value)


def test_a_preview_shows_characters_of_several_tokens(
    rows_file: RowsFile, tokenizers: Any, configure: Configure
) -> None:
    rows = [{"prompt": f"{n}号苹果的颜色是", "completion": color} for n, color in enumerate(("红色", "绿🍏") * 20)]
    config = in_format(configure(rows_file(rows)), "plain")
    for item, tokens in preview_items(load_data(config, tokenizers["plain"], 512), tokenizers["plain"], "train", 4):
        row = rows[int(item.item_id.rpartition(":")[2]) - 1]
        assert len(tokens) == len(item.ids)
        for trained, text in ((False, row["prompt"]), (True, row["completion"])):
            texts = [token.text for token in tokens if token.trained is trained]
            assert "".join(texts).startswith(text)


def test_items_are_frozen_and_named_by_file_and_row(folder: Path, tokenizers: Any, configure: Configure) -> None:
    item = load_data(in_format(configure(folder), "plain"), tokenizers["plain"], 512).validation[0]
    assert item.item_id == "validation.jsonl:1"
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.label = "x"  # type: ignore[misc]
