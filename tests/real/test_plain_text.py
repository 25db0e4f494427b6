"""Plain text as people write it: words, white space and control tokens of the file are what is trained on."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from qlora_exp.config.compose import compose
from qlora_exp.data.items import Splits
from qlora_exp.data.load import load_data
from qlora_exp.data.texts import same_text
from qlora_exp.errors import DataError, Problems
from qlora_exp.estimate.tokenizer_file import FileTokenizer
from qlora_exp.evaluation.generation import StopRule, as_answer, decode_completions, generate, stop_rule
from qlora_exp.paths import EMBEDDED

LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"),
        *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    ]
)
CORPUS = [
    "def f(x):\n    y = x + 1\n    return y\n",
    "What is it? It is a file. Price: 20 EUR, now cheaper. yes no [INST] What is 1 plus 1? [/INST] 2",
    "if a:\n\tb()\n\n  - c\n",
] * 4
WRITTEN_OUT = ["<filename>", "<fim_prefix>", "[INST]", "[/INST]"]


def wrapped(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **settings
    )


def with_bos(backend: Tokenizer) -> Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_level(split: str | None = None, special: Sequence[str] = ()) -> Tokenizer:
    """Llama 3's and Qwen's kind with ``split``, GPT-2's without."""
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated"), level] if split else [level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    named = ["<s>", "</s>", "<pad>", *special]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=named, initial_alphabet=alphabet)
    )
    return backend


def sentencepiece() -> Tokenizer:
    """Llama 2's and Mistral's kind: a space put in front, bytes for unknown characters, BOS."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    named = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = pre_tokenizers.Split(Regex("\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    backend.pre_tokenizer = words
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=named))
    raw = json.loads(backend.to_str())
    raw["pre_tokenizer"] = None
    raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(raw))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return with_bos(backend)


def unigram() -> Tokenizer:
    """Without bytes for unknown characters."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    texts = ["List one two three. Price cheap yes: 0 1", *("abcdefghijklmnopqrstuvwxyzLP0123456789-:" * 2)] * 3
    named = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=named, unk_token="<unk>")
    backend.train_from_iterator(texts, trainer)
    return backend


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    llama3 = byte_level(LLAMA3_SPLIT, WRITTEN_OUT)
    composed = byte_level(LLAMA3_SPLIT)
    composed.normalizer = normalizers.NFC()
    compatible = byte_level(LLAMA3_SPLIT)
    compatible.normalizer = normalizers.NFKC()
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    plainer = byte_level()
    plainer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    return {
        "embedded": AutoTokenizer.from_pretrained(str(EMBEDDED / "base")),
        "gpt2": wrapped(byte_level()),
        "llama3": wrapped(with_bos(llama3)),
        "sentencepiece": wrapped(sentencepiece(), unk_token="<unk>"),
        "nfc": wrapped(composed),
        "nfkc": wrapped(compatible),
        "lower": wrapped(lower),
        "accents": wrapped(plainer),
        "unigram": wrapped(unigram(), unk_token="<unk>"),
    }


@functools.cache
def composed(*overrides: str) -> Any:
    return compose(["task=local", "task.path=.", "task.format=plain", "task.test_fraction=0", *overrides])


KINDS = ("embedded", "gpt2", "llama3", "sentencepiece")
Load = Callable[..., Splits]


@pytest.fixture
def load(tmp_path: Path, tokenizers: dict[str, Any]) -> Load:
    """Pairs of prompt and completion, a tokenizer's name and overrides → splits."""

    def made(rows: Sequence[tuple[str, str]], tokenizer: str, *overrides: str) -> Splits:
        path = tmp_path / "rows.jsonl"
        lines = [
            row if isinstance(row, dict) else dict(zip(("prompt", "completion"), row, strict=True)) for row in rows
        ]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        config = copy.deepcopy(composed(*overrides))
        config.task.path = str(path)
        return load_data(config, tokenizers[tokenizer], 512)

    return made


def items_of(splits: Splits) -> list[Any]:
    """In the rows' order."""
    items = (*splits.train, *splits.validation, *splits.test)
    return sorted(items, key=lambda item: int(item.item_id.rpartition(":")[2]))


def trl_rows(rows: Sequence[tuple[str, str]], tokenizer: Any, folder: Path) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) as SFTTrainer makes them of the rows as they are."""
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = SFTConfig(
        output_dir=str(folder), max_length=512, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[]
    )
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    trainer = SFTTrainer(LlamaForCausalLM(shape), config, train_dataset=data, processing_class=tokenizer)
    return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


class Oracle:
    """A model's context that continues each row with the tokens it was trained on."""

    def __init__(self, targets: Sequence[Sequence[int]], done: int = 0) -> None:
        self.targets, self.done = [list(target) for target in targets], done
        self.model = SimpleNamespace(max_positions=None)
        self.ids = self.mask = torch.ones((len(targets), 1), dtype=torch.long)

    def logits(self) -> torch.Tensor:
        chosen = [target[min(self.done, len(target) - 1)] for target in self.targets]
        return torch.nn.functional.one_hot(torch.tensor(chosen), 8192).float()

    def select(self, rows: Sequence[int]) -> Oracle:
        return Oracle([self.targets[row] for row in rows], self.done)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Oracle]:
        after = Oracle(self.targets, self.done + 1)
        return after.logits()[:, None], after


def rule_of(splits: Splits, tokenizer: Any) -> StopRule:
    ends = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
    model = SimpleNamespace(generation_config=ends, config=ends)
    return stop_rule(splits, tokenizer, compose([]), model)


def oracle_answers(splits: Splits, tokenizer: Any) -> list[str]:
    """What a model answers that has learned each row by heart."""
    items, rule = items_of(splits), rule_of(splits, tokenizer)
    context: Any = Oracle([[*item.completion_ids, *item.end_ids] for item in items])
    texts = generate(context.logits(), context, tokenizer, rule)
    expected = [decode_completions(item.completion_ids, tokenizer) for item in items]
    return [as_answer(*pair, item.answer) for *pair, item in zip(texts, expected, items, strict=True)]


def numbered(pair: tuple[str, str], count: int) -> list[tuple[str, str]]:
    """Rows like ``pair``, with the row's number for each {n}."""
    return [(pair[0].replace("{n}", str(n)), pair[1].replace("{n}", str(n))) for n in range(count)]


AS_IT_IS = {
    "code after a newline": ("def f{n}(x):\n", "    y = x + {n}\n    return y\n"),
    "a prompt that ends in indentation": ("def f{n}(x):\n    ", "return x + {n}"),
    "tabs": ("if a{n}:\n\t", "b({n})\n\tc()\n"),
    "a completion that brings its space": ("Is it {n}? ->", " yes {n}\n"),
    "a completion that begins with a newline": ("What is {n}?", "\n\nIt is {n}."),
    "a list": ("- a{n}\n", "  - b{n}\n  - c\n"),
    "Chinese": ("问题：{n}加一等于几？答案是", "答案是{n}。"),
    "Chinese after an English word": ("In Chinese, No {n}:", "第{n}"),
    "Japanese": ("質問{n}：猫は", "ねこです{n}"),
    "Thai": ("แมว{n}คือ", "สัตว์{n}"),
    "two spaces": ("Word {n}:  ", "it is {n}"),
}


@pytest.mark.parametrize("tokenizer", KINDS)
def test_white_space_between_prompt_and_completion_is_the_files(
    tokenizer: str, load: Load, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    rows = [row for pair in AS_IT_IS.values() for row in numbered(pair, 3)]
    splits = load(rows, tokenizer)
    items = items_of(splits)
    assert [item.prompt + item.completion for item in items] == [prompt + completion for prompt, completion in rows]
    theirs = trl_rows(rows, tokenizers[tokenizer], tmp_path / "out")
    assert [list(item.ids) for item in items] == [ids for ids, _ in theirs]
    for item, (ids, labels) in zip(items, theirs, strict=True):
        learned = [token if mask else -100 for token, mask in zip(item.ids, item.completion_mask, strict=True)]
        spaces = tokenizers[tokenizer].decode(ids[len(item.prompt_ids) : labels.count(-100)])
        assert learned == labels or not spaces.strip(), "TRL may leave spaces at the prompt's end out of the loss"
    answers = oracle_answers(splits, tokenizers[tokenizer])
    assert all(same_text(answer, item.answer) for answer, item in zip(answers, items, strict=True)), answers


@pytest.mark.parametrize("tokenizer", KINDS)
def test_one_space_stands_between_texts_that_have_none(tokenizer: str, load: Load) -> None:
    items = items_of(load([(f"Question {n}: what colour?", f"red {n}") for n in range(5)], tokenizer))
    assert [item.prompt + item.completion for item in items] == [
        f"Question {n}: what colour? red {n}" for n in range(5)
    ]


@pytest.mark.parametrize(
    ("separator", "between"), [('""', ""), ("null", " "), ('"\n\n###\n\n"', "\n\n###\n\n"), ('" => "', " => ")]
)
def test_a_separator_is_what_stands_between(separator: str, between: str, load: Load, tokenizers: Any) -> None:
    rows = [(f'{{"id": {n}, "name": "', f'item{n}"}}') for n in range(5)]
    for tokenizer in KINDS:
        splits = load(rows, tokenizer, f"task.separator={separator}")
        items = items_of(splits)
        assert [item.prompt + item.completion for item in items] == [between.join(row) for row in rows]
        for answer, item, row in zip(oracle_answers(splits, tokenizers[tokenizer]), items, rows, strict=True):
            assert same_text(answer, row[1])
            assert item.answer == row[1]


def test_a_separator_with_a_backslash_in_place_of_a_newline_is_refused(load: Load) -> None:
    with pytest.raises(DataError, match="a backslash"):
        load([(f"Question {n}", f"yes {n}") for n in range(4)], "gpt2", 'task.separator="\\n"')


def test_a_wrong_indentation_is_a_wrong_answer(load: Load, tokenizers: dict[str, Any]) -> None:
    rows = [(f"def f{n}(x):\n", f"    y = x + {n}\n    return y\n") for n in range(4)]
    for name in KINDS:
        splits = load(rows, name)
        item, tokenizer = items_of(splits)[0], tokenizers[name]
        rule = rule_of(splits, tokenizer)
        dedented = item.completion.replace("    y", "y")
        ids = tokenizer(item.prompt + dedented, add_special_tokens=False)["input_ids"]
        ids = ids[len(tokenizer(item.prompt, add_special_tokens=False)["input_ids"]) :] or ids
        context: Any = Oracle([[*ids, *item.end_ids]])
        (text,) = generate(context.logits(), context, tokenizer, rule)
        answer = as_answer(text, decode_completions(item.completion_ids, tokenizer), item.answer)
        assert "return y" in answer
        assert not same_text(answer, item.answer)


def test_rows_that_differ_in_indentation_only_are_no_duplicates(load: Load) -> None:
    blocks = ["if a:\n    b()\nc()", "if a:\n    b()\n    c()", "if a:\n  b()\nc()", "    if a:\n        b()\nc()"]
    pairs = [("x = 1", "    y\n    z"), ("x = 1", "y\n    z"), ("x = 1 ", "y\n    z"), ("x  = 1", "y\n    z")]
    splits = load([(block, f"it is {block}") for block in blocks] + pairs, "gpt2")
    assert len(items_of(splits)) == 6
    assert splits.record.dropped_reasons == {"exact duplicate": 2}


CONTROL = {
    "an HTML tag": ("Price {n}: <s>20 EUR</s> now 10 EUR. Cheaper?", "yes {n}"),
    "a file name": ("What does `cp <filename> /data{n}` do?", "It copies {n}."),
    "a templated prompt": ("<s>[INST] What is {n} plus 1? [/INST]", "2{n}"),
    "in the completion": ("Strike {n}", "<s>{n}</s>"),
    "at the completion's end": ("What is {n}?", "yes {n}</s>"),
    "over the boundary": ("Write {n} <", "/s> here"),
}


@pytest.mark.parametrize("kind", CONTROL)
def test_control_tokens_that_are_written_out_are_refused_or_read_as_text(
    kind: str, load: Load, tokenizers: dict[str, Any]
) -> None:
    rows = numbered(CONTROL[kind], 4)
    separator = 'task.separator=""' if kind == "over the boundary" else "task.separator=null"
    with pytest.raises((DataError, Problems)) as refused:
        load(rows, "llama3", separator)
    assert "reads as a control token" in str(refused.value)
    assert "task.special_tokens=text" in str(refused.value)
    splits = load(rows, "llama3", separator, "task.special_tokens=text")
    tokenizer = tokenizers["llama3"]
    special = set(tokenizer.all_special_ids)
    for item, row in zip(items_of(splits), rows, strict=True):
        assert (item.ids[0], item.ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not special & set(item.ids[1:-1])
        assert tokenizer.decode(item.ids[1:-1]) == item.prompt + item.completion
        assert item.answer == row[1]
    answers = oracle_answers(splits, tokenizer)
    assert answers == [row[1] for row in rows]


def test_a_templated_prompt_is_read_as_its_tokens_on_request_and_with_one_bos(
    load: Load, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers["llama3"]
    rows = [(f"<s>[INST] What is {n} plus 1? [/INST]", f"{n + 1}") for n in range(4)]
    for item in items_of(load(rows, "llama3", "task.special_tokens=token")):
        names = tokenizer.convert_ids_to_tokens(item.ids)
        assert names.index("<s>") == 0
        assert names.count("<s>") == 1
        assert names.count("[INST]") == names.count("[/INST]") == 1
    with pytest.raises((DataError, Problems), match="in a completion it would end the answer"):
        load([(f"What is {n}?", f"{n}</s>") for n in range(4)], "llama3", "task.special_tokens=token")


def test_a_special_token_that_the_vocabulary_finds_in_ordinary_text_is_refused(load: Load) -> None:
    """Unigram's vocabulary holds "<s>" itself: no other tokens can write it."""
    rows = [(f"Price {n}: <s> cheap", "yes") for n in range(4)]
    with pytest.raises((DataError, Problems), match="no other way to write '<s>'"):
        load(rows, "unigram", "task.special_tokens=text")


def test_tokens_that_are_not_special_are_ordinary_text(load: Load, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["gpt2"]
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<tool_call>", special=False)])
    think = tokenizer.convert_tokens_to_ids("<think>")
    for item in items_of(load([(f"Question {n}", f"<think>a {n}") for n in range(4)], "gpt2")):
        assert think in item.completion_ids


def test_a_plan_counts_the_tokens_that_are_trained_on(load: Load, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    from qlora_exp.data.encoding import date_of, encode_rows
    from qlora_exp.data.splits import load_rows

    rows = [row for pair in (*AS_IT_IS.values(), *CONTROL.values()) for row in numbered(pair, 3)]
    items = {item.item_id: item.ids for item in items_of(load(rows, "llama3", "task.special_tokens=text"))}
    tokenizers["llama3"].save_pretrained(tmp_path / "saved")
    counted = FileTokenizer(tmp_path / "saved")
    config = compose(["task=local", f"task.path={tmp_path / 'rows.jsonl'}", "task.special_tokens=text"])
    examples = load_rows(config.task).train
    for example, encoding in zip(examples, encode_rows(examples, counted, "plain", date=date_of(config)), strict=True):
        assert encoding.prompt_ids + encoding.completion_ids + encoding.end_ids == items[example.item_id]


DECOMPOSED = "cafe\u0301"


def test_an_answer_in_another_normal_form_than_the_tokenizers_is_still_the_answer(
    load: Load, tokenizers: dict[str, Any]
) -> None:
    rows = [(f"Drink {n}:", f"{DECOMPOSED} {n}") for n in range(4)]
    for name in ("nfc", "gpt2", "sentencepiece"):
        splits = load(rows, name)
        for answer, item in zip(oracle_answers(splits, tokenizers[name]), items_of(splits), strict=True):
            assert same_text(answer, item.answer)


def test_what_a_tokenizer_writes_otherwise_is_compared_as_it_writes_it_or_refused(
    load: Load, tokenizers: dict[str, Any]
) -> None:
    for name, text in (("nfkc", "ﬁne ① Ａ"), ("lower", "Paris")):
        splits = load([(f"What {n}?", f"{text} {n}") for n in range(4)], name)
        for answer, item in zip(oracle_answers(splits, tokenizers[name]), items_of(splits), strict=True):
            assert same_text(answer, item.answer)
    with pytest.raises((DataError, Problems), match="tokenizer changes the answer"):
        load([(f"What {n}?", f"caf\u00e9 {n}") for n in range(4)], "accents")


def test_an_answer_with_characters_that_the_tokenizer_lacks_is_refused(load: Load) -> None:
    """The model would be trained on <unk>, or on nothing in their place."""
    rows = [(f"List {n}", f"- one\n- two {n}") for n in range(4)]
    with pytest.raises((DataError, Problems), match=r"tokenizer changes the answer.*without '\\n'"):
        load(rows, "unigram")
    rows += [(f"List {n}", f"- one - two {n}") for n in range(4, 30)]
    assert len(items_of(load(rows, "unigram", "task.invalid_rows=drop", "task.validation_fraction=0.3"))) == 26
