"""Tiny tokenizers of three kinds, and a configuration whose task is a file made by the test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_exp.config.compose import compose
from qlora_exp.config.enums import TaskKind
from qlora_exp.config.schema import Config

TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CORPUS = [
    "What colour is the sky? The sky is blue. Is grass green or red? Grass is green; blood is red.",
    "Question: how many legs has a spider? Answer: eight legs. A cat has four legs and a bird two.",
    "Definition: a small animal that barks. Category: animal. A tree is a plant, stone is an object.",
] * 4
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def _wrapped(tokenizer: Tokenizer, chat: bool) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>" if chat else "</s>", pad_token="<pad>"
    )
    if chat:
        wrapped.chat_template = TEMPLATE
    return wrapped


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _around(tokenizer: Tokenizer, before: str, after: str) -> Tokenizer:
    named = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=named
    )
    return tokenizer


def _sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], initial_alphabet=list("0123456789\n\t東京üß")
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _around(tokenizer, "<s>", "")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """plain: byte-level BPE. chat: the same with a template. bos, bos_eos: with tokens put around any text."""
    return {
        "plain": _wrapped(_byte_level(), chat=False),
        "chat": _wrapped(_byte_level(), chat=True),
        "bos": _wrapped(_around(_byte_level(), "<s>", ""), chat=False),
        "bos_eos": _wrapped(_around(_byte_level(), "<s>", "</s>"), chat=False),
        "sentencepiece": _wrapped(_sentencepiece_like(), chat=False),
        "chat_with_bos": _wrapped(_around(_byte_level(), "<s>", ""), chat=True),
    }


@pytest.fixture(scope="session")
def _composed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("composed") / "data.jsonl"
    path.write_text("{}")
    return compose(["task=local", f"task.path={path}"])


Configure = Callable[..., Config]


@pytest.fixture
def configure(_composed: Config) -> Configure:
    """A configuration for ``path``; ``task.KEY`` by keyword, e.g. ``labels=[…]``, columns as ``prompt_column=…``."""

    def make(path: Path, **task: Any) -> Config:
        config = copy.deepcopy(_composed)
        config.task.path = str(path)
        for key, value in task.items():
            if key.endswith("_column"):
                setattr(config.task.columns, key.removesuffix("_column"), value)
            else:
                assert hasattr(config.task, key)
                setattr(config.task, key, TaskKind[value] if key == "kind" else value)
        return config

    return make


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSONL; the file's path."""
    return lambda rows, name="data.jsonl": write_jsonl(tmp_path / name, rows)


@pytest.fixture
def good_rows() -> list[dict[str, Any]]:
    colours = ("red", "green", "blue")
    return [{"prompt": f"Question {n}: what colour?", "completion": colours[n % 3]} for n in range(30)]
