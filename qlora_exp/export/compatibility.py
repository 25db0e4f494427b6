"""Adjusts the files of an exported model, so that other programs load it and end its answers as the run did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = "qwxz"
"""An answer that no template contains by itself."""
DEFAULT_ROPE = "default"


def end_of_answers(tokenizer: PreTrainedTokenizerBase, format: str) -> int | None:
    """Return the token that ends an answer in training: EOS in the plain format, the template's end of turn in chats.

    ``None`` if a template ends a turn with ordinary text: no single token can stop a generation there.
    """
    if format == "plain":
        return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (jinja2.TemplateError, ValueError, TypeError):
        return None
    _, answer, rest = rendered.rpartition(PROBE)
    ids = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"] if answer else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return int(ids[0]) if ids and ids[0] in special else None


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens at which ``generate`` stops according to the model's own files."""
    for source in (model.generation_config, model.config):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def add_end_token(model: PreTrainedModel, end: int | None) -> None:
    """Add ``end`` to the tokens at which ``generate`` and vLLM stop.

    A base that was trained on chats ends its answers with the template's end of turn. Its generation_config.json lists
    only the end of a text: the exported model would continue after each answer.
    """
    ends = end_tokens(model)
    if end is None or end in ends or model.generation_config is None:
        return
    model.generation_config.eos_token_id = [*ends, end] if ends else end


def write_for_version_4(folder: Path) -> None:
    """Make a folder of transformers 5 readable for transformers 4 and for programs built on it (vLLM, MLX …)."""
    _rewrite(folder / "config.json", _add_version_4_names)
    _rewrite(folder / "tokenizer_config.json", _rename_tokenizer_settings)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_version_4_names(config: dict[str, Any]) -> None:
    """Add the keys that transformers 4 and programs built on it read to a config.json of transformers 5.

    Version 5 keeps the rotary embeddings' base in ``rope_parameters``. Version 4 doesn't know that key and computes
    with a base of 10,000, without a warning.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if "dtype" in part:
            part.setdefault("torch_dtype", part["dtype"])
        rope = part.get("rope_parameters") or {}
        full, sliding = rope.get("full_attention") or rope, rope.get("sliding_attention")
        if "rope_theta" in full:
            part.setdefault("rope_theta", full["rope_theta"])
            scaling = {key: value for key, value in full.items() if key != "rope_theta"}
            is_scaled = scaling.get("rope_type", DEFAULT_ROPE) != DEFAULT_ROPE
            part.setdefault("rope_scaling", scaling if is_scaled else None)
            if isinstance(sliding, dict) and "rope_theta" in sliding:
                part.setdefault("rope_local_base_freq", sliding["rope_theta"])


def _rename_tokenizer_settings(settings: dict[str, Any]) -> None:
    """Rename what version 4 doesn't know: the class TokenizersBackend, and the key for a list of extra special
    tokens."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # they describe the folder that it was loaded from
        settings.pop(name, None)
