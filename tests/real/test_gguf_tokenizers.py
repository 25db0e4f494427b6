"""A GGUF file's tokenizer gives the tokens of the model's own tokenizer.json, or the file is refused by name."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.models.tokenizers import load_tokenizer

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
CORPUS = ["The café has 12 chairs,  and 345 tables.", "x = 1\n    y  = 22", "crème brûlée  for 6 7 89"] * 6
TEXTS = ["a  1 and 12  345", "x = 12  34\n   y", unicodedata.normalize("NFD", "The café has crème"), "The  tables 6789"]
CONTROL = ["<unk>", "<s>", "</s>"]


def byte_level(*steps: Any, normalizer: Any = None, ignore_merges: bool = False, bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> list[Any]:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def digits() -> list[Any]:
    return [pre_tokenizers.Digits(individual_digits=True), gpt2()]


MODELS_OWN = {
    "gpt-2": lambda: byte_level(gpt2()),
    "smollm": lambda: byte_level(*digits()),
    "starcoder": lambda: byte_level(*digits()),
    "qwen2": lambda: byte_level(*split(QWEN2_SPLIT), normalizer=normalizers.NFC()),
    "olmo": lambda: byte_level(gpt2(), normalizer=normalizers.NFC()),
    "llama-bpe": lambda: byte_level(*split(LLAMA3_SPLIT), ignore_merges=True, bos=True),
}


def write_gguf(path: Path, tokenizer: Tokenizer, kind: str, pre: str | None, **flags: bool) -> Path:
    """A file with ``tokenizer``'s vocabulary and a llama model of one layer."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    types = gguf.TokenType
    writer.add_token_types([types.CONTROL if token in CONTROL else types.NORMAL for token in tokens])
    if kind == "llama":
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in merges_of(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for flag, value in flags.items():
        getattr(writer, f"add_{flag}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 16), dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((16, 16), dtype=np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(16, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def loaded(path: Path) -> Any:
    return load_tokenizer(compose(["model=local", f"model.path={path}"]).model)


@pytest.mark.parametrize("pre", MODELS_OWN)
def test_a_gguf_file_gives_the_tokens_of_the_models_own_tokenizer(pre: str, tmp_path: Path) -> None:
    own = MODELS_OWN[pre]()
    tokenizer = loaded(write_gguf(tmp_path / "model.gguf", own, "gpt2", pre))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == own.encode(text).ids


def test_a_word_that_is_a_token_stays_that_token_where_the_model_reads_it_so(tmp_path: Path) -> None:
    """Merges alone don't always lead to it."""
    raw = byte_level(*split(LLAMA3_SPLIT), bos=True)
    import json

    saved = json.loads(raw.to_str())
    saved["model"]["ignore_merges"] = True
    saved["model"]["vocab"]["chairs9"] = len(saved["model"]["vocab"])
    saved["model"]["vocab"]["Ġseven"] = len(saved["model"]["vocab"])
    own = Tokenizer.from_str(json.dumps(saved))
    tokenizer = loaded(write_gguf(tmp_path / "model.gguf", own, "gpt2", "llama-bpe"))
    assert own.encode("it is seven").ids[-1] == saved["model"]["vocab"]["Ġseven"]
    assert tokenizer("it is seven")["input_ids"] == own.encode("it is seven").ids


def test_the_files_own_word_on_bos_counts(tmp_path: Path) -> None:
    own = MODELS_OWN["llama-bpe"]()
    for name, value in (("yes", True), ("no", False)):
        tokenizer = loaded(write_gguf(tmp_path / f"{name}.gguf", own, "gpt2", "llama-bpe", add_bos_token=value))
        assert (tokenizer("a")["input_ids"][0] == 1) is value


def test_a_space_is_put_in_front_only_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=CONTROL))
    for value in (True, False):
        own = loaded(write_gguf(tmp_path / f"{value}.gguf", tokenizer, "llama", "default", add_space_prefix=value))
        ids = own("The tables", add_special_tokens=False)["input_ids"]
        assert own.convert_ids_to_tokens(ids)[0].startswith("▁") is value
        assert own.decode(ids) == "The tables"


@pytest.mark.parametrize("pre", ["deepseek-llm", "default", "made-up", None])
def test_a_tokenizer_that_cannot_be_built_rightly_is_refused_by_name_before_weights_are_read(
    pre: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "model.gguf", MODELS_OWN["gpt-2"](), "gpt2", pre)
    with pytest.raises(ModelError, match="other tokens than the model knows") as refused:
        loaded(path)
    assert (pre or "missing") in str(refused.value)
    assert main(["validate", "task=embedded", "model=local", f"model.path={path}"]) == 2
    assert "other tokens than the model knows" in capsys.readouterr().err
