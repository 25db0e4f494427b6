"""Writes the tables of :mod:`qlora_exp.architecture.families` from the families' published sizes.

python -m qlora_exp.architecture.shipped.build

The sizes are those of each checkpoint's config.json, and so is the sliding window, which decides where rows need
padding. Its other settings change no tensor. Parameter counts are checked against the totals on the Hub.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoConfig

from qlora_exp.architecture.families import FOLDER, to_table
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.errors import ModelError
from qlora_exp.models.inspect import architecture_of, build_meta
from qlora_exp.models.sources import ModelSource
from qlora_exp.paths import EMBEDDED

LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
}


def sized(hidden: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Return the four sizes that every configuration has, and ``more``."""
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama3_1_8b": (8_030_261_248, LLAMA_3 | sized(4096, 14336, 32, 32, tie_word_embeddings=False)),
    "llama3_2_1b": (1_235_814_400, LLAMA_3 | sized(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True)),
    "llama3_2_3b": (3_212_749_824, LLAMA_3 | sized(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True)),
    "mistral_7b": (
        7_248_023_552,
        {"model_type": "mistral", "vocab_size": 32768, "num_key_value_heads": 8, "max_position_embeddings": 32768}
        | sized(4096, 14336, 32, 32, tie_word_embeddings=False, sliding_window=None),
    ),
    "qwen3_0_6b": (596_049_920, QWEN3 | sized(1024, 3072, 28, 16, tie_word_embeddings=True)),
    "qwen3_1_7b": (1_720_574_976, QWEN3 | sized(2048, 6144, 28, 16, tie_word_embeddings=True)),
    "qwen3_4b": (4_022_468_096, QWEN3 | sized(2560, 9728, 36, 32, tie_word_embeddings=True)),
    "qwen3_8b": (8_190_735_360, QWEN3 | sized(4096, 12288, 36, 32, tie_word_embeddings=False)),
    "smollm2_135m": (134_515_008, SMOLLM2 | sized(576, 1536, 30, 9, num_key_value_heads=3)),
    "smollm2_360m": (361_821_120, SMOLLM2 | sized(960, 2560, 32, 15, num_key_value_heads=5)),
    "smollm2_1_7b": (1_711_376_384, SMOLLM2 | sized(2048, 8192, 24, 32, num_key_value_heads=32)),
    "gemma3_270m": (268_098_176, GEMMA3 | sized(640, 2048, 18, 4, sliding_window=512)),
    "gemma3_1b": (999_885_952, GEMMA3 | sized(1152, 6912, 26, 4, sliding_window=512)),
    "gemma3_4b": (
        4_300_079_472,
        {
            "model_type": "gemma3",
            "mm_tokens_per_image": 256,
            "text_config": GEMMA3
            | sized(2560, 10240, 34, 8, num_key_value_heads=4, vocab_size=262208, max_position_embeddings=131072)
            | {"sliding_window": 1024},
            "vision_config": sized(1152, 4304, 27, 16, model_type="siglip_vision_model", image_size=896, patch_size=14)
            | {"vision_use_head": False},
        },
    ),
}
"""Family → (published number of parameters, sizes)."""

POSITIONS = {f"Qwen/Qwen3-{size}": 40960 for size in ("0.6B", "1.7B", "4B", "8B")}
"""Longest sequence in tokens of checkpoints that take longer ones than the rest of their family."""


def architecture_table(family: str) -> Architecture:
    """Return the architecture of a family of :data:`CONFIGS`, built on the meta device.

    Raises:
        ModelError: its number of parameters differs from the published one.
    """
    published, sizes = CONFIGS[family]
    return _described(family, sizes, published)


def _described(name: str, sizes: dict[str, Any], published: int | None = None) -> Architecture:
    config = AutoConfig.for_model(**sizes)
    source = ModelSource(name, name, None, None, is_local=True)
    architecture = architecture_of(build_meta(config, source))
    if published is not None and architecture.total_parameters != published:
        what = f"{name} has {architecture.total_parameters:,} parameters, and {published:,} are published"
        raise ModelError(what, "qlora_exp/architecture/shipped/build.py", "correct its sizes")
    return architecture


def _embedded() -> Architecture:
    return _described("embedded", json.loads((EMBEDDED / "base" / "config.json").read_text(encoding="utf-8")))


def main() -> int:
    """Write every table."""
    from qlora_exp.config.choices import choices

    FOLDER.mkdir(exist_ok=True)
    for choice in choices("model"):
        checkpoints = (choice.keys.get("checkpoints") or {}).values()
        if choice.name not in CONFIGS and choice.name != "embedded":
            continue
        architecture = _embedded() if choice.name == "embedded" else architecture_table(choice.name)
        positions = {checkpoint: POSITIONS.get(checkpoint, architecture.positions) for checkpoint in checkpoints}
        text = json.dumps(to_table(architecture, positions), indent=1)
        (FOLDER / f"{choice.name}.json").write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
