"""A config.json that leaves a size out is not planned with another model's, and none that says all is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_exp.errors import ModelError
from qlora_exp.models.config_sizes import check_no_missing_sizes, check_positive_sizes
from qlora_exp.models.inspect import describe_file
from qlora_exp.models.sources import IGNORES_ATTENTION_MASK

NOT_PLANNED = IGNORES_ATTENTION_MASK | {"blt"}
"""BLT is four models in one; it has no hidden size that a plan could count with."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
GEMMA3_4B = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "model_type": "gemma3_text"}

AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 256},
    "gptj": {"n_embd": 64, "n_head": 4, "n_inner": None, "n_layer": 2, "rotary_dim": 8, "vocab_size": 256},
    "gpt_neo": {
        "hidden_size": 64,
        "intermediate_size": None,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 256,
        "attention_types": [[["global", "local"], 1]],
    },
    "bloom": {"n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 256},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 256},
    "opt": {
        "ffn_dim": 96,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 256,
        "word_embed_proj_dim": 64,
    },
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 256},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256},
    "gemma3": {"text_config": GEMMA3_4B},
}


def written(folder: Path, **settings: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(settings))
    return file


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_PLANNED))
def test_what_transformers_writes_is_never_refused(model_type: str, tmp_path: Path) -> None:
    try:
        CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        config.get_text_config()
    except (ValueError, StrictDataclassError):
        pytest.skip("transformers has no default for it, or no single text model in it")
    check_positive_sizes(tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()))
    check_no_missing_sizes(tmp_path / "config.json", config)


@pytest.mark.parametrize("family", AS_PUBLISHED)
def test_sizes_count_by_the_names_that_published_files_give_them(family: str, tmp_path: Path) -> None:
    described = describe_file(written(tmp_path, model_type=family, **AS_PUBLISHED[family]))
    assert described.layers == 2
    assert described.hidden_size == 64


@pytest.mark.parametrize("left_out", [key for key in LLAMA if key != "model_type"])
def test_a_size_that_is_left_out_is_asked_for(left_out: str, tmp_path: Path) -> None:
    settings = {key: value for key, value in LLAMA.items() if key != left_out}
    with pytest.raises(ModelError, match=f"doesn't say {left_out}\n"):
        describe_file(written(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32},
            "vocab_size, num_attention_heads and intermediate_size",
        ),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2}, "vocab_size and n_head"),
        ({"model_type": "opt", **{k: v for k, v in AS_PUBLISHED["opt"].items() if k != "ffn_dim"}}, "ffn_dim"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 64}}, "num_hidden_layers"),
    ],
)
def test_all_that_is_missing_is_told_in_one_message_by_the_architectures_own_names(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    file = written(tmp_path, **settings)
    with pytest.raises(ModelError) as caught:
        describe_file(file)
    assert caught.value.what == f"config.json doesn't say {told}"
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "The hidden size (100) is not a multiple of"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 0, "vocab_size": -1}, "num_hidden_layers is 0, vocab_size is -1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' expected int, got str"),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 0, "n_head": 0}, "n_head is 0, n_layer is 0"),
        ({"model_type": "gemma3", "text_config": GEMMA3_4B | {"num_hidden_layers": 0}}, "num_hidden_layers is 0"),
    ],
)
def test_an_impossible_size_is_told_with_its_field(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = written(tmp_path, **(LLAMA | changes))
    with pytest.raises(ModelError) as caught:
        describe_file(file)
    assert told in caught.value.what
    assert caught.value.where == str(file)
    assert caught.value.hint
