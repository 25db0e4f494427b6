"""Writes a merged model as one GGUF file, which llama.cpp runs on phones and elsewhere without Python.

It uses llama.cpp's own ``gguf`` package. llama.cpp's converter is a script of its repository and not on PyPI. So this
module does what the converter does for the Llama family, Qwen and Gemma 3: names, the order of query and key rows,
hyperparameters, byte-level BPE and SentencePiece vocabularies.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_exp.errors import ModelError

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3_text": "GEMMA3"}
"""transformers' model_type → the name of gguf's architecture."""
PERMUTED = ("LLAMA",)
"""Architectures in which llama.cpp rotates neighbouring pairs, and transformers halves."""
ROPE_TYPES = ("default", "linear", "llama3")
FULL_ATTENTION_EVERY = 6
"""llama.cpp assumes that every sixth layer of Gemma 3 has full attention; the others have a sliding window."""
GGUF_BLOCK = 32
"""Weights of a row that share a scale. The K types (Q4_K …) share one over 256, so they don't fit rows of 192."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Tags that mark the assistant's words for training in transformers; other programs can't parse them."""
PRE_TOKENIZERS: dict[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", CONTRACTIONS + r"\p{N}{1,3}" + SPACES), ("ByteLevel", False)): "llama-bpe",
    (("Split", CONTRACTIONS + r"\p{N}" + SPACES), ("ByteLevel", False)): "qwen2",
}
"""Pre-tokenizer in tokenizer.json → llama.cpp's name for it. Others are refused: a text split differently gives other
tokens than those of the training."""
SENTENCEPIECE = "default"
"""llama.cpp's name for a SentencePiece vocabulary with byte fallback, as in Gemma."""
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
GEMMA_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
"""The only normalization in Gemma's tokenizer."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def check_convertible(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise :class:`ModelError` for a model that can't be written as GGUF, before a weight is read."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("writing GGUF files needs the gguf package", where, "pip install 'qlora-exp[gguf]'")
    hint = "--formats adapter,merged, and llama.cpp's convert_hf_to_gguf.py on the merged folder"
    if config.model_type not in ARCHITECTURES:
        what = f"no GGUF file can be written of the architecture {config.model_type}"
        raise ModelError(what, where, f"GGUF is for {', '.join(ARCHITECTURES)}; for others: {hint}")
    rope = _rope(config).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ModelError(f"no GGUF file can be written of rotary embeddings scaled by {rope}", where, hint)
    if (unlike := _difference_from_llama_cpp(config)) is not None:
        raise ModelError(f"no GGUF file can be written of this {config.model_type}: {unlike}", where, hint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or _pre_tokenizer_of(json.loads(backend.to_str())) is None:
        what = "only byte-level BPE as GPT-2, SmolLM, Llama 3 and Qwen have it, and SentencePiece as Gemma has it"
        raise ModelError(f"no GGUF file can be written of this tokenizer: {what}", where, hint)


def write_gguf(
    model: PreTrainedModel, tokenizer: Path, path: Path, kind: str, name: str, end_of_turn: int | None = None
) -> None:
    """Write ``model`` (fp32) and the tokenizer in the folder ``tokenizer`` to ``path``.

    Args:
        kind: the block type of the matrices: ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1`` or ``q4_0``. Embeddings and head
            take 8 bits in all of them. Vectors stay in fp32, matrices with rows that are no multiple of 32 in fp16.
        end_of_turn: a token at which llama.cpp stops in addition to EOS.
    """
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type].lower())
    try:
        writer.add_name(name)
        writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_hyperparameters(writer, model.config)
        _add_vocabulary(writer, tokenizer, model.config.vocab_size)
        if end_of_turn is not None:
            writer.add_eot_token_id(end_of_turn)
        for tensor_name, values in _tensors(model):
            stored = _tensor_type(tensor_name, values, kind)
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _rope(config: PretrainedConfig, attention: str = "full_attention") -> dict[str, Any]:
    """Return the rotary embedding's settings; those for ``attention`` if each kind of layer has its own."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get(attention) or {}) if "full_attention" in rope else rope


def _difference_from_llama_cpp(config: PretrainedConfig) -> str | None:
    """Return the first setting of a Gemma 3 for which llama.cpp assumes another value, in words; ``None`` if there is
    none."""
    if ARCHITECTURES[config.model_type] != "GEMMA3":
        return None
    full = [(layer + 1) % FULL_ATTENTION_EVERY == 0 for layer in range(config.num_hidden_layers)]
    if [kind == "full_attention" for kind in config.layer_types] != full:
        return f"not every sixth layer attends to everything: {', '.join(config.layer_types)}"
    if config.query_pre_attn_scalar != _head_width(config):
        return f"its attention scores are scaled by {config.query_pre_attn_scalar}, not by the width of a head"
    if _rope(config, "sliding_attention").get("rope_type", "default") != "default":
        return "rotary embeddings are scaled in layers with a sliding window"
    if config.use_bidirectional_attention or config.attn_logit_softcapping or config.final_logit_softcapping:
        return "bidirectional attention, or a cap on scores or logits"
    return None


def _head_width(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tensor_type(name: str, values: np.ndarray, kind: str) -> Any:
    """Return the GGUF type of a tensor, see :func:`write_gguf`."""
    import gguf

    types = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return types.F32
    if values.shape[-1] % GGUF_BLOCK:
        return types.F16
    return types.Q8_0 if name in ("token_embd.weight", "output.weight") else types[kind.upper()]


def _add_hyperparameters(writer: Any, config: PretrainedConfig) -> None:
    import gguf

    rope = _rope(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if ARCHITECTURES[config.model_type] == "GEMMA3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(_rope(config, "sliding_attention")["rope_theta"])


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each weight under llama.cpp's name, with its rows in llama.cpp's order, in fp32."""
    import gguf

    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), config.num_hidden_layers)
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_rope_factors(config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"GGUF has no place for the weight {name}", config.model_type, "--formats adapter,merged")
        values: np.ndarray = tensor.detach().to(torch.float32).cpu().numpy()
        if architecture in PERMUTED and ".q_proj." in name:
            values = _interleave_halves(values, config.num_attention_heads)
        elif architecture in PERMUTED and ".k_proj." in name:
            values = _interleave_halves(values, config.num_key_value_heads)
        elif architecture == "GEMMA3" and name.endswith("norm.weight"):
            values = values + 1  # transformers' Gemma3RMSNorm multiplies by 1 + weight
        yield str(gguf_name), values


def _interleave_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from halves (transformers' rotate_half: i and i + d/2) to neighbours (llama.cpp)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _llama3_rope_factors(config: PretrainedConfig) -> np.ndarray:
    """Return the divisor of each frequency in Llama 3.1 and later: ``factor`` for long waves, 1 for short ones, and
    smooth in between (transformers' modeling_rope_utils). llama.cpp reads the divisors from the file."""
    rope, width = _rope(config), _head_width(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / width)
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(float(factor))
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def _pre_tokenizer_of(raw: dict[str, Any]) -> str | None:
    model, cut = raw.get("model") or {}, raw.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):  # splitting at spaces has no effect: the normalizer replaced them
        at_spaces = not cut or cut.get("pattern") == {"String": " "}
        return SENTENCEPIECE if raw.get("normalizer") == GEMMA_NORMALIZER and at_spaces else None
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    return PRE_TOKENIZERS.get(tuple((str(step.get("type")), _split_setting(step)) for step in steps))


def _split_setting(step: dict[str, Any]) -> Any:
    """Return the one setting of a step that decides how it splits; ``None`` for a setting that llama.cpp doesn't
    have."""
    match step.get("type"):
        case "ByteLevel":
            return None if step.get("add_prefix_space") else step.get("use_regex", True)
        case "Digits":
            return step.get("individual_digits")
        case "Split" if step.get("behavior") == "Isolated" and not step.get("invert"):
            return (step.get("pattern") or {}).get("Regex")
    return None


def _add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Write tokens as tokenizer.json spells them, their types, merges or scores, special tokens and the chat
    template."""
    import gguf

    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pre = _pre_tokenizer_of(raw)
    spelled = {number: token for token, number in raw["model"]["vocab"].items()}
    added = {token["id"]: token for token in raw["added_tokens"]}
    tokens = [added[number]["content"] if number in added else spelled.get(number) for number in range(size)]
    types = [_token_type(raw, added.get(number), token) for number, token in enumerate(tokens)]
    if pre == SENTENCEPIECE:  # added tokens are matched before spaces are replaced
        tokens = [
            token.replace(SPACE_MARK, " ") if token and kind == gguf.TokenType.USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ]
        writer.add_token_scores(_token_scores(raw, tokens))
        writer.add_add_space_prefix(False)
    writer.add_tokenizer_model("llama" if pre == SENTENCEPIECE else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)])
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=pre != SENTENCEPIECE, n_vocab=size)
    if isinstance(special.chat_template, str):
        special.chat_template = GENERATION_TAGS.sub("", special.chat_template)
    special.add_to_gguf(writer, quiet=True)


def _token_type(raw: dict[str, Any], added: dict[str, Any] | None, token: str | None) -> Any:
    import gguf

    types, model = gguf.TokenType, raw["model"]
    if token is None:
        return types.UNUSED
    if model.get("byte_fallback") and token == model.get("unk_token"):
        return types.UNKNOWN
    if added is not None:
        return types.CONTROL if added["special"] else types.USER_DEFINED
    return types.BYTE if model.get("byte_fallback") and BYTE_TOKEN.fullmatch(token) else types.NORMAL


def _token_scores(raw: dict[str, Any], tokens: Sequence[str | None]) -> list[float]:
    """Return SentencePiece's scores, higher for a token whose merge comes earlier. transformers orders the merges in
    tokenizer.json by SentencePiece's own scores."""
    merges = raw["model"]["merges"]
    first_merge: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first_merge.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(first_merge.get(token or "", len(merges))) for token in tokens]
