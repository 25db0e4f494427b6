"""Small random folders of the shipped families, written as their publishers write them.

The files have the published keys and spelling: ``rope_theta`` at the top of config.json, a tokenizer class of
transformers 4, the special tokens and the chat template of the family. Only the sizes are small, and the vocabulary is
trained on a few definitions. The Hub can't be reached in tests; what is here was written down from its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_exp.paths import EMBEDDED

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCABULARY = 700
UNDERLINE = "\N{LOWER ONE EIGHTH BLOCK}"


def texts() -> Iterator[str]:
    """Definitions of the embedded task: enough words for a small vocabulary."""
    with (EMBEDDED / "task" / "train.jsonl").open(encoding="utf-8") as stream:
        for _, line in zip(range(400), stream, strict=False):
            yield json.loads(line)["definition"]


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def byte_level(pattern: str | None, digits: bool, first: list[str]) -> Tokenizer:
    """Byte-level BPE: cut by a regular expression (Llama 3, Qwen), or GPT-2's with single digits (SmolLM2)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None and r"{1,3}" in pattern))
    if pattern is None:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        whole = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        split = pre_tokenizers.Split(_regex(pattern), "isolated", invert=False)
        whole = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.pre_tokenizer = whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def byte_fallback(first: list[str]) -> Tokenizer:
    """SentencePiece's BPE, as tokenizer.json has it: spaces are underlines, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", UNDERLINE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(UNDERLINE, "merged_with_next")
    special = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY + 256, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    steps = [decoders.Replace(UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    # The bytes are ordinary tokens of the model in published files; only the trainer calls them special.
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in first]
    return Tokenizer.from_str(json.dumps(raw))


def begins_with(tokenizer: Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def llama3_tokenizer(variant: str) -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = byte_level(LETTERS + r"\p{N}{1,3}" + REST, False, [])
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(4)]
    names = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|finetune_right_pad_id|>", reserved[2]]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", reserved[3]]
    tokenizer.add_special_tokens(names)
    level = processors.ByteLevel(trim_offsets=True, add_prefix_space=True, use_regex=True)
    tokenizer.post_processor = processors.Sequence([level, begins_with(tokenizer, "<|begin_of_text|>")])
    return tokenizer, {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>" if variant == "instruct" else "<|end_of_text|>",
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def qwen3_tokenizer(variant: str) -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = byte_level(LETTERS + r"\p{N}" + REST, False, [])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>"])
    names = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, add_prefix_space=False, use_regex=False)
    return tokenizer, {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if variant == "instruct" else "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def gemma3_tokenizer(variant: str) -> tuple[Tokenizer, dict[str, Any]]:
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>", "<start_of_turn>"]
    tokenizer = byte_fallback([*first, "<end_of_turn>"])
    lines = [AddedToken("\n" * count, normalized=False) for count in (1, 2)]
    tokenizer.add_tokens([*lines, AddedToken("<table>", normalized=False), AddedToken("<strong>", normalized=False)])
    tokenizer.add_special_tokens(["<start_of_image>", "<end_of_image>", "<image_soft_token>"])
    tokenizer.post_processor = begins_with(tokenizer, "<bos>")
    return tokenizer, {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "sp_model_kwargs": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def mistral_tokenizer(variant: str) -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = byte_fallback(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]"])
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=UNDERLINE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = begins_with(tokenizer, "<s>")
    return tokenizer, {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def smollm2_tokenizer(variant: str) -> tuple[Tokenizer, dict[str, Any]]:
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"]
    tokenizer = byte_level(None, True, first)
    chat = variant == "instruct"
    settings = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>" if chat else "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if chat else "<|endoftext|>",
        "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
        "vocab_size": 49152,
    }
    return tokenizer, settings | ({"pad_token": "<|im_end|>"} if chat else {})


MISTRAL_TEMPLATE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, but the first message may be a system one") }}
    {%- endif %}
{%- endfor %}
"""
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def llama3_config(factor: float, tied: bool) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**scaling, "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        **SMALL,
    }


def qwen3_config(tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "head_dim": 32,
        "max_position_embeddings": 40960,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        **SMALL,
    }


def gemma3_text(window: int) -> dict[str, Any]:
    return {
        **SMALL,
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": window,
        "sliding_window_pattern": 6,
    }


def gemma3_config(window: int = 16) -> dict[str, Any]:
    return {"architectures": ["Gemma3ForCausalLM"], "cache_implementation": "hybrid", **gemma3_text(window)}


def gemma3_multimodal_config() -> dict[str, Any]:
    text = gemma3_text(16) | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "num_key_value_heads": 2}
    vision = {
        "hidden_size": 32,
        "image_size": 28,
        "intermediate_size": 48,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": text,
        "vision_config": vision,
    }


def mistral_config() -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **SMALL,
    }


def smollm2_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        **SMALL,
    }


@dataclass(frozen=True)
class Family:
    """What a publisher chose: the tokenizer, the configuration, the template and the settings of generation."""

    tokenizer: Callable[[str], tuple[Tokenizer, dict[str, Any]]]
    config: Callable[[], dict[str, Any]]
    template: Callable[[], str]
    ends: tuple[str, ...]
    """Tokens at which the instruct model stops, as generation_config.json has them."""
    base_end: str
    sampling: dict[str, Any] = field(default_factory=dict)
    base_has_template: bool = False
    spare_rows: int = 7
    """Rows of the embedding beyond the tokenizer's tokens, as Qwen and Gemma 3 4B have them."""


def _llama(factor: float, tied: bool, template: str) -> Family:
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return Family(
        llama3_tokenizer, lambda: llama3_config(factor, tied), lambda: trl_template(template), ends, "<|end_of_text|>",
        sampling, spare_rows=0,
    )  # fmt: skip


def _qwen(tied: bool) -> Family:
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    ends = ("<|im_end|>", "<|endoftext|>")
    return Family(
        qwen3_tokenizer, lambda: qwen3_config(tied), lambda: trl_template("qwen3"), ends, "<|endoftext|>", sampling,
        base_has_template=True,
    )  # fmt: skip


def _gemma(config: Callable[[], dict[str, Any]], spare_rows: int = 0) -> Family:
    sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"}
    return Family(
        gemma3_tokenizer, config, lambda: trl_template("gemma3"), ("<eos>", "<end_of_turn>"), "<eos>", sampling,
        spare_rows=spare_rows,
    )  # fmt: skip


SMOLLM2 = Family(
    smollm2_tokenizer, smollm2_config, lambda: SMOLLM2_TEMPLATE, ("<|im_end|>",), "<|endoftext|>", spare_rows=0
)
FAMILIES: dict[str, Family] = {
    "gemma3_1b": _gemma(gemma3_config),
    "gemma3_270m": _gemma(gemma3_config),
    "gemma3_4b": _gemma(gemma3_multimodal_config, spare_rows=63),
    "llama3_1_8b": _llama(8.0, False, "llama3_1"),
    "llama3_2_1b": _llama(32.0, True, "llama3_2"),
    "llama3_2_3b": _llama(32.0, True, "llama3_2"),
    "mistral_7b": Family(
        mistral_tokenizer, mistral_config, lambda: MISTRAL_TEMPLATE, ("</s>",), "</s>", spare_rows=0
    ),
    "qwen3_0_6b": _qwen(True),
    "qwen3_1_7b": _qwen(True),
    "qwen3_4b": _qwen(True),
    "qwen3_8b": _qwen(False),
    "smollm2_135m": SMOLLM2,
    "smollm2_360m": SMOLLM2,
    "smollm2_1_7b": SMOLLM2,
}  # fmt: skip
"""The families of conf/model, by their names there."""
KINDS = ("gemma3_1b", "gemma3_4b", "llama3_1_8b", "llama3_2_1b", "mistral_7b", "qwen3_0_6b", "smollm2_135m")
"""One of each tokenizer, template and architecture; the other families differ from one of these only in size."""


def write_tokenizer(name: str, variant: str, folder: Path) -> Tokenizer:
    """tokenizer.json, tokenizer_config.json and the chat template: in the latter file, as it was published."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, settings = family.tokenizer(variant)
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(number): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
            "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    if variant == "instruct" or family.base_has_template:
        settings = settings | {"chat_template": family.template()}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, **settings})
    return tokenizer


def write_family(name: str, variant: str, folder: Path, **changes: Any) -> Path:
    """The folder of one checkpoint, whole. ``changes``: other values of config.json."""
    family = FAMILIES[name]
    tokenizer = write_tokenizer(name, variant, folder)
    ends = [tokenizer.token_to_id(end) for end in family.ends]
    end: int | list[int] = tokenizer.token_to_id(family.base_end)
    if variant == "instruct":
        end = ends if len(ends) > 1 else ends[0]
    published = family.config() | changes
    text = published.get("text_config", published)
    text["vocab_size"] = tokenizer.get_vocab_size() + family.spare_rows
    published |= {"eos_token_id": end, "torch_dtype": "bfloat16", "transformers_version": "4.46.3"}
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.get("bos_token"):
        published["bos_token_id"] = tokenizer.token_to_id(settings["bos_token"])
    if "vision_config" in published:
        for key, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
            published[f"{key}_token_index"] = tokenizer.token_to_id(token)
    write_json(folder / "config.json", published)
    _write_weights(folder, multimodal="vision_config" in published)
    write_json(folder / "config.json", published)  # save_pretrained writes it in the spelling of transformers 5
    sampling = family.sampling if variant == "instruct" else {}
    write_json(folder / "generation_config.json", {"eos_token_id": end, "transformers_version": "4.46.3", **sampling})
    return folder


def _write_weights(folder: Path, multimodal: bool) -> None:
    torch.manual_seed(0)
    loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = loader.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As drawn (standard deviation 0.02), attention hardly matters and a mistake in it would not show.
            if parameter.ndim > 1 and "vision" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
