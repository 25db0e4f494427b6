"""The sizes that a config.json has to give. transformers fills in a missing one with that of some model of the
architecture, and tells of an impossible one in words of its own arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from qlora_exp.errors import ModelError

ALWAYS = ("hidden_size", "num_hidden_layers")
"""Asked for even where the architecture's configuration has no such field, or is nested."""
CONFIG_KEY_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embed",),  # BLOOM's and Falcon's first files
    "num_hidden_layers": ("num_layers", "layers_block_type", "attn_layers", "num_decoder_layers"),
    "vocab_size": (),
    "num_attention_heads": (),
    "intermediate_size": ("ffn_dim", "dim_ff", "dff", "d_inner", "decoder_ffn_dim", "moe_intermediate_size"),
}
"""Size → what it is called beside its own name and that of the architecture's ``attribute_map``."""
POSITIVE = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads")
"""A feed-forward part may have no width: some hybrids have none."""
RESTORE_HINT = "restore it from the model's source"


def check_possible(file: Path, raw: Mapping[str, Any]) -> None:
    """``raw``: what ``file`` says, of an architecture that transformers has. Raises :class:`ModelError`: a size is 0 or
    less."""
    aliases = CONFIG_MAPPING[raw["model_type"]].attribute_map
    text = raw.get("text_config")
    parts = [(raw, {aliases.get(size, size) for size in POSITIVE} | set(POSITIVE))]
    parts += [(text, set(POSITIVE))] if isinstance(text, Mapping) else []
    wrong = [
        f"{name} is {part[name]}"
        for part, names in parts
        for name in sorted(names)
        if isinstance(part.get(name), int) and part[name] < 1
    ]
    if wrong:
        what = f"transformers can't build a {raw['model_type']} of such sizes: {', '.join(wrong)}"
        raise ModelError(what, str(file), f"at least 1; {RESTORE_HINT}")


def check_given(file: Path, config: PretrainedConfig) -> None:
    """``config``: what transformers made of ``file``. Raises :class:`ModelError`: a size would be guessed.

    Not asked for is what ``config`` derives from another size (GPT-2's ``n_inner``, the heads of JetMoE), and, of a
    configuration nested in another, all but :data:`ALWAYS`: published ones (Gemma 3 4B) leave out what is as by
    default.
    """
    raw = json.loads(file.read_text(encoding="utf-8"))
    text = config.get_text_config()
    given = {**raw, **(raw.get("text_config") or {})}
    defaults = {field.name: field.default for field in dataclasses.fields(text)}
    missing = []
    for size, others in CONFIG_KEY_ALIASES.items():
        names = (text.attribute_map.get(size, size), size, *others)
        guessed = [name for name in names if isinstance(defaults.get(name), int)]
        asked = size in ALWAYS or (guessed and text is config)
        if asked and all(given.get(name) is None for name in names):
            missing.append(guessed[0] if guessed else names[0])
    if missing:
        told = " and ".join(part for part in (", ".join(missing[:-1]), missing[-1]) if part)
        what = f"config.json doesn't say {told}"
        raise ModelError(what, str(file), RESTORE_HINT)
