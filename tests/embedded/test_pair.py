"""The embedded pair loads offline, is small, stops where it should and has learned something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp.embedded.build.build import write_hashes
from qlora_exp.embedded.build.pretrain import Schedule
from qlora_exp.embedded.build.tokenizer import END_OF_TEXT, PAD, TURN_END
from qlora_exp.embedded.build.wordnet import split_gloss
from qlora_exp.paths import EMBEDDED

from .texts import rows

VARIANTS = ("base", "instruct")


def load(variant: str):
    folder = EMBEDDED / variant
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_both_models_together_are_at_most_24_megabytes() -> None:
    size = sum(file.stat().st_size for variant in VARIANTS for file in (EMBEDDED / variant).iterdir())
    assert size <= 24_000_000


def test_the_list_of_hashes_is_what_the_build_writes_for_these_files(tmp_path: Path) -> None:
    copy = shutil.copytree(EMBEDDED, tmp_path / "embedded")
    write_hashes(copy)
    assert (copy / "SHA256SUMS").read_text() == (EMBEDDED / "SHA256SUMS").read_text()


@pytest.mark.parametrize(("variant", "end"), [("base", END_OF_TEXT), ("instruct", TURN_END)])
def test_a_model_and_its_tokenizer_agree_on_the_end_and_the_padding(variant: str, end: str) -> None:
    model, tokenizer = load(variant)
    assert tokenizer.eos_token == end
    assert tokenizer.pad_token == PAD
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_matrix_is_made_of_whole_nf4_blocks() -> None:
    model, _ = load("base")
    assert [name for name, p in model.named_parameters() if p.dim() == 2 and any(n % 64 for n in p.shape)] == []
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_only_the_instruct_tokenizer_has_a_chat_template() -> None:
    assert load("base")[1].chat_template is None
    assert load("instruct")[1].chat_template is not None


def test_the_assistant_mask_covers_the_answer_and_its_end_and_nothing_else() -> None:
    _, tokenizer = load("instruct")
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does dog mean?"},
        {"role": "assistant", "content": "an animal"},
        {"role": "user", "content": "Use it."},
        {"role": "assistant", "content": "the dog barked"},
    ]
    coded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [t for t, mine in zip(coded["input_ids"], coded["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(said) == f"an animal{TURN_END}the dog barked{TURN_END}"
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)


def test_the_tokenizer_gives_back_any_text() -> None:
    _, tokenizer = load("base")
    text = "a genus of  Bœotian “quinces” – 1879;\n\tnaïve 漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_general_text_is_long_enough_in_documents_that_are() -> None:
    _, tokenizer = load("base")
    lengths = [len(ids) for ids in tokenizer([row["text"] for row in rows("general_text")])["input_ids"]]
    assert sum(lengths) >= 50_000
    assert min(lengths) >= 100
    assert len(rows("general_chat")) == 200


def test_the_base_has_learned_the_language_of_the_held_out_text() -> None:
    """Untrained it would be ln 4096 = 8.3 nats a token; 5.5 would be the frequencies of tokens alone or little more."""
    model, tokenizer = load("base")
    ids = [tokenizer(row["text"], truncation=True, max_length=180)["input_ids"] for row in rows("general_text")[:64]]
    batch = torch.tensor([row[:180] for row in ids if len(row) >= 180])
    with torch.no_grad():
        assert model(batch, labels=batch).loss.item() < 5.5


def test_the_instruct_model_ends_its_turn() -> None:
    model, tokenizer = load("instruct")
    ended = 0
    for question in ("Give a synonym for big.", "What does walk mean?", "What is the opposite of hot?"):
        coded = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        answer = model.generate(**coded, max_new_tokens=40, do_sample=False)[0, coded["input_ids"].shape[1] :]
        ended += int(answer[-1]) == tokenizer.eos_token_id
    assert ended >= 2


def test_the_build_file_tells_of_this_pair() -> None:
    facts = json.loads((EMBEDDED / "build.json").read_text("utf-8"))
    model, _ = load("base")
    assert facts["base"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["base"]["steps"] == facts["base"]["loss_curve"][-1][0]


def test_the_learning_rate_warms_up_and_falls_to_its_last_fraction() -> None:
    schedule = Schedule(steps=100, rows=1, learning_rate=1.0, warmup_steps=10)
    assert schedule.at(0) == pytest.approx(0.1)
    assert schedule.at(10) == pytest.approx(1.0)
    assert schedule.at(100) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("gloss", "definition", "examples"),
    [
        ("a thing", "a thing", ()),
        ('a thing; another; "it was a thing"; "two"', "a thing; another", ("it was a thing", "two")),
        ('close to:"long on brains"', "close to", ("long on brains",)),
    ],
)
def test_a_gloss_is_divided_into_definition_and_examples(gloss, definition, examples) -> None:
    assert split_gloss(gloss) == (definition, examples)
