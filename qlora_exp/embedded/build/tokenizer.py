"""The pair's tokenizer: byte-level BPE trained on the pretraining text only; for instruct, with a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_exp.embedded.build.splits import CATEGORIES
from qlora_exp.embedded.build.training_texts import Entry

VOCABULARY = 4096
END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTEXT_TOKENS = 512

# The end of turn is inside the generation block: without a loss on it, the model would never learn to stop.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(entries: Iterable[Entry], seed: int) -> Tokenizer:
    """Train byte-level BPE on the rendered entries. Raises ValueError if two task labels begin with the same token."""
    rng = random.Random(f"{seed}/tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((entry.render(rng) for entry in entries), trainer)
    firsts = [tokenizer.encode(f" {label}").tokens[0] for label in CATEGORIES]
    if len(set(firsts)) < len(firsts):
        raise ValueError(f"task labels share their first token: {dict(zip(CATEGORIES, firsts, strict=True))}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, *, chat: bool) -> None:
    """Save it for `AutoTokenizer.from_pretrained(directory)`. With `chat`, the end of turn is EOS."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END if chat else END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT if chat else TURN_END, TURN_START],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    wrapped.save_pretrained(directory)
