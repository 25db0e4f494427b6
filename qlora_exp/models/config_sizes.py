"""Checks the sizes in a config.json. transformers replaces a missing size by that of some model of the architecture,
and reports an impossible one as an arithmetic error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from qlora_exp.errors import ModelError

REQUIRED_SIZES = ("hidden_size", "num_hidden_layers")
"""Required even if the architecture's configuration has no such field, or is nested."""
CONFIG_KEY_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embed",),  # BLOOM's and Falcon's first files
    "num_hidden_layers": ("num_layers", "layers_block_type", "attn_layers", "num_decoder_layers"),
    "vocab_size": (),
    "num_attention_heads": (),
    "intermediate_size": ("ffn_dim", "dim_ff", "dff", "d_inner", "decoder_ffn_dim", "moe_intermediate_size"),
}
"""Size → other keys for it, apart from its own name and the one in the architecture's ``attribute_map``."""
POSITIVE_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads")
"""Sizes that must be at least 1. A feed-forward width may be 0: some hybrids have no feed-forward part."""
RESTORE_HINT = "restore it from the model's source"


def check_positive_sizes(file: Path, raw: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` if a size is 0 or less. ``raw`` is the content of ``file``, for an architecture that
    transformers has."""
    aliases = CONFIG_MAPPING[raw["model_type"]].attribute_map
    text = raw.get("text_config")
    parts = [(raw, {aliases.get(size, size) for size in POSITIVE_SIZES} | set(POSITIVE_SIZES))]
    parts += [(text, set(POSITIVE_SIZES))] if isinstance(text, Mapping) else []
    wrong = [
        f"{name} is {part[name]}"
        for part, names in parts
        for name in sorted(names)
        if isinstance(part.get(name), int) and part[name] < 1
    ]
    if wrong:
        what = f"transformers can't build a {raw['model_type']} of such sizes: {', '.join(wrong)}"
        raise ModelError(what, str(file), f"at least 1; {RESTORE_HINT}")


def check_no_missing_sizes(file: Path, config: PretrainedConfig) -> None:
    """Raise :class:`ModelError` if transformers guessed a size. ``config`` is what it made of ``file``.

    A size may be missing if ``config`` derives it from another one (GPT-2's ``n_inner``, the heads of JetMoE). A nested
    configuration needs only :data:`REQUIRED_SIZES`: published ones (Gemma 3 4B) leave out sizes that equal the default.
    """
    raw = json.loads(file.read_text(encoding="utf-8"))
    text = config.get_text_config()
    file_values = {**raw, **(raw.get("text_config") or {})}
    defaults = {field.name: field.default for field in dataclasses.fields(text)}
    missing = []
    for size, aliases in CONFIG_KEY_ALIASES.items():
        names = (text.attribute_map.get(size, size), size, *aliases)
        defaulted = [name for name in names if isinstance(defaults.get(name), int)]
        required = size in REQUIRED_SIZES or (defaulted and text is config)
        if required and all(file_values.get(name) is None for name in names):
            missing.append(defaulted[0] if defaulted else names[0])
    if missing:
        missing_text = " and ".join(part for part in (", ".join(missing[:-1]), missing[-1]) if part)
        what = f"config.json doesn't say {missing_text}"
        raise ModelError(what, str(file), RESTORE_HINT)
