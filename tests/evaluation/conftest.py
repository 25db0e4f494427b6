"""Tiny random models of several architectures with a byte tokenizer, and tasks built by hand."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item, Splits
from qlora_exp.records.types import Data

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    # A window shorter than most prompts: the cache forgets, positions and distances must still be right.
    "mistral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    },
    # Convolution or state-space layers: their cache is written in place and can't be shared between continuations.
    "lfm2": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
    "mamba": {"hidden_size": 32, "state_size": 4},
    # Linear attention whose states are kept beside the cache's layers.
    "minimax": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention"],
    },
    # Experts, with a loss for their router that its configuration asks for.
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    },
    # Causal masks of its own, by place, as large as its positions: fewer than a prompt and all options together.
    "gpt_neo": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 36,
    },
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", padding_side="right"
    )


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Any]:
    def make(family: str, **changes: Any) -> Any:
        torch.manual_seed(3)
        shape: dict[str, Any] = {"num_hidden_layers": 2} if family not in ("gpt2", "gpt_neo") else {}
        # Large initial weights: a timid random model gives nearly equal logits, and a test that can't tell rows apart.
        shape |= {"vocab_size": len(tokenizer), "initializer_range": 0.3, "tie_word_embeddings": False}
        shape |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(family, **(shape | SHAPES[family] | changes))
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def make_item(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Item]:
    def make(item_id: str, prompt: str, answer: str, label: str | None = None) -> Item:
        completion = f" {answer}"
        return Item(
            item_id=item_id,
            prompt=prompt,
            completion=completion,
            prompt_ids=tuple(tokenizer(prompt)["input_ids"]),
            completion_ids=tuple(tokenizer(completion)["input_ids"]),
            end_ids=(tokenizer.eos_token_id,),
            label=label,
            answer=answer,
            completion_bytes=len(answer.encode()),
            extra={},
        )

    return make


@pytest.fixture(scope="session")
def make_splits(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Splits]:
    def make(
        train: list[Item], validation: list[Item], test: list[Item] | None = None, labels: tuple[str, ...] = ()
    ) -> Splits:
        record = Data("t", "f", len(train), len(validation), 0, 0, {}, labels, None, None, None, None, 0)
        ids = {label: tuple(tokenizer(f" {label}")["input_ids"]) for label in labels}
        return Splits(
            tuple(train), tuple(validation), tuple(test or ()), labels, ids, "plain", record, ("some text", "more")
        )

    return make


LABELS = ("red", "redder", "blue", "x", "green")
"""One option begins another, one is a single token after the space, lengths differ."""


@pytest.fixture(scope="session")
def colours(make_item: Callable[..., Item], make_splits: Callable[..., Splits]) -> Splits:
    rng = random.Random(5)
    items = []
    for number in range(40):
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 30)))
        label = rng.choice(LABELS)
        items.append(make_item(f"{number}", f"{text}:", label, label))
    return make_splits(items[20:], items[:13], items[13:20], LABELS)


@pytest.fixture(scope="session")
def base_config() -> Config:
    return compose(["task.goal=null"])


@pytest.fixture(scope="session")
def make_config(base_config: Config) -> Callable[..., Config]:
    def make(**evaluation: Any) -> Config:
        changed = dataclasses.replace(base_config.evaluation, **({"max_new_tokens": 6} | evaluation))
        return dataclasses.replace(base_config, evaluation=changed)

    return make
