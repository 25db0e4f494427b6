"""A GGUF file holds the model that was given, as llama.cpp reads it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora_exp.errors import ModelError
from qlora_exp.export.gguf import SPACE_MARK, check_convertible, write_gguf
from qlora_exp.paths import EMBEDDED

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python isn't installed"
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 18},
    "gemma3_text": {"head_dim": 18, "query_pre_attn_scalar": 18, "num_hidden_layers": 7, "sliding_window": 16},
}


def random_model(variant: str, hidden: int) -> PreTrainedModel:
    """Two layers, four query heads for two of keys and values, and the embedded pair's vocabulary."""
    family = variant.removesuffix("3") if variant == "llama3" else variant
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
    }
    config = AutoConfig.for_model(family, **(sizes | VARIANTS[variant]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As drawn (sd 0.02), attention hardly matters: a wrong order of rows would not be seen.
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3) + ("norm" in name))
    return model


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_file_read_back_is_within_the_quantization_error_of_the_weights(tmp_path: Path, kind: str) -> None:
    model = random_model("llama", 64)
    write_gguf(model, EMBEDDED / "base", tmp_path / "m.gguf", kind, "m")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    pairs = {
        "blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj.weight,
        "blk.0.attn_v.weight": model.model.layers[0].self_attn.v_proj.weight,
        "token_embd.weight": model.model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,
    }
    for name, weight in pairs.items():
        stored = kind if name.startswith("blk") else "q8_0"
        assert read[name].tensor_type.name == stored.upper()
        values = gguf.dequantize(read[name].data, read[name].tensor_type).reshape(weight.shape)
        wanted = weight.detach().numpy()
        steps = {"q8_0": 254, "q5_0": 31, "q5_1": 31, "q4_0": 15, "q4_1": 15}[stored]
        blocks = wanted.reshape(-1, 32)
        # _1 types span a block from its least to its greatest value, the others twice its greatest magnitude; one step
        # on the short side of which (the sign's odd one) can be lost, and the scale has 11 bits.
        span = np.ptp(blocks, axis=1) if stored.endswith("_1") else 2 * np.abs(blocks).max(axis=1)
        error = np.abs(values.reshape(-1, 32) - blocks).max(axis=1)
        assert (error <= span / steps * 1.02).all()
        assert error.max() > 0
    norm = read["output_norm.weight"]
    assert norm.tensor_type.name == "F32"
    assert np.array_equal(norm.data, model.model.norm.weight.detach().numpy())


def test_the_vocabulary_merges_and_template_are_the_tokenizers(tmp_path: Path) -> None:
    write_gguf(random_model("llama", 64), EMBEDDED / "instruct", tmp_path / "m.gguf", "q8_0", "m")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    raw = json.loads((EMBEDDED / "instruct" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [token for token, _ in sorted(raw["model"]["vocab"].items(), key=lambda entry: entry[1])]
    assert len(fields["tokenizer.ggml.merges"].contents()) == len(raw["model"]["merges"])
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [0, 1, 2, 3]
    template = fields["tokenizer.chat_template"].contents()
    assert "<|im_start|>" in template
    assert "generation %}" not in template


@needs_llama_cpp
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, variant: str) -> None:
    import llama_cpp

    model = random_model(variant, 72)  # rows that are no multiple of 32 are kept in fp16: nothing but order can differ
    write_gguf(model, EMBEDDED / "base", tmp_path / "m.gguf", "q8_0", "m")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    text = "Definition: a small (2-inch)  fruit\n\nthat isn't sweet — 1,234 of them, naïve. Category:"
    ids = tokenizer(text)["input_ids"] * 3
    runtime = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    assert runtime.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"]
    runtime.eval(ids)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    found = runtime.scores[: len(ids)]
    # Rounding to 16 bit, seven random layers deep: 0.007; a window one token too long, or half a rotation's base: 0.1
    assert np.abs(found - wanted).mean() < 0.02 * wanted.std()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.97


def sentencepiece_folder(folder: Path) -> Path:
    """A tokenizer as Gemma has it, of a small vocabulary, with every way to make each token among its merges."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", SPACE_MARK)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE_MARK, "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    trained.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    raw = json.loads(trained.to_str())
    vocabulary = raw["model"]["vocab"]
    order = dict.fromkeys("".join(merge) for merge in raw["model"]["merges"])
    splits = ((token[:place], token[place:]) for token in order for place in range(1, len(token)))
    merges = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([3 * SPACE_MARK, "<start_of_turn>"])
    tokenizer.save_pretrained(folder)
    return folder


@needs_llama_cpp
def test_llama_cpp_cuts_a_text_as_a_sentencepiece_tokenizer_does(tmp_path: Path) -> None:
    import llama_cpp

    folder = sentencepiece_folder(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = random_model("gemma3_text", 72)
    check_convertible(model.config, tokenizer, "here")
    write_gguf(model, folder, tmp_path / "m.gguf", "q8_0", "m")
    runtime = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, vocab_only=True, verbose=False)
    text = Path(__file__).read_text(encoding="utf-8")
    texts = [*text.splitlines(), text, " two  spaces, naïve — 12,345 ☃\n\n<start_of_turn>   x<0x41>", ""]
    for one in texts:
        wanted = tokenizer(one, add_special_tokens=False)["input_ids"]
        assert runtime.tokenize(one.encode(), add_bos=False, special=True) == wanted, one
    assert len({token for one in texts for token in tokenizer(one)["input_ids"]}) > 500


def test_what_llama_cpp_takes_for_granted_of_gemma_is_asked(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_folder(tmp_path))
    for wrong in ({"query_pre_attn_scalar": 7}, {"final_logit_softcapping": 30.0}, {"sliding_window_pattern": 2}):
        config = AutoConfig.for_model("gemma3_text", **({"query_pre_attn_scalar": 256} | wrong))
        with pytest.raises(ModelError, match="gemma3_text"):
            check_convertible(config, tokenizer, "here")
    check_convertible(AutoConfig.for_model("gemma3_text"), tokenizer, "here")
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ModelError, match="tokenizer"):
        check_convertible(AutoConfig.for_model("gemma3_text"), tokenizer, "here")


def test_other_architectures_tokenizers_and_rotations_are_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    with pytest.raises(ModelError, match="architecture gpt2") as told:
        check_convertible(AutoConfig.for_model("gpt2"), tokenizer, "here")
    assert "merged" in str(told.value)
    yarn = AutoConfig.for_model("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ModelError, match="yarn"):
        check_convertible(yarn, tokenizer, "here")
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="tokenizer"):
        check_convertible(AutoConfig.for_model("llama"), tokenizer, "here")
