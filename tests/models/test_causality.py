"""A later token changes no earlier logit, in any base that trains: what sees its answer is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.models.base import load_base
from qlora_exp.models.causality import DECODER_SWITCH
from qlora_exp.models.inspect import describe_file
from qlora_exp.paths import EMBEDDED

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 200,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "default_language": "en_XX",  # of X-MOD
}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "vocab_size": 200}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 200}
NOT_CAUSAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((name, SIZES, {"is_decoder": False}) for name in sorted(DECODER_SWITCH)),
    ("big_bird", SIZES, {"attention_type": "original_full"}),
    ("xlm", XLM, {}),
    ("xlnet", XLNET, {}),
    ("cpmant", SIZES | {"dim_head": 8, "dim_ff": 64}, {}),
    *((name, SIZES, {"use_bidirectional_attention": True}) for name in ("gemma", "gemma3_text")),
    ("gemma4_unified_text", SIZES, {"use_bidirectional_attention": "all"}),
    *((name, SIZES, {"is_causal": False}) for name in ("llama", "mistral", "qwen3", "gpt_neox", "olmo2")),
]
"""Model type, sizes, and what makes it see later tokens."""


def saved(folder: Path, model_type: str, sizes: dict[str, Any], **settings: Any) -> Path:
    """A random model of a few layers, with the embedded pair's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(sizes | {"vocab_size": len(tokenizer)} | settings))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, mode: str = "fp32") -> None:
    load_base(compose(["model=local", f"model.path={folder}", f"quantization={mode}"]), "cpu")


@pytest.mark.parametrize(("model_type", "sizes", "settings"), NOT_CAUSAL)
def test_a_configuration_that_sees_later_tokens_is_refused_without_weights(
    model_type: str, sizes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type, **(sizes | settings)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not causal") as raised:
        describe_file(tmp_path / "config.json")
    assert "Llama" in (raised.value.hint or "")


@pytest.mark.parametrize(("model_type", "sizes", "settings"), NOT_CAUSAL)
def test_a_base_that_sees_later_tokens_is_refused_at_load_whatever_its_configuration_says(
    model_type: str, sizes: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_exp.models.sources.check_configured_causal", lambda config, where: None)
    folder = saved(tmp_path, model_type, sizes, **settings)
    with pytest.raises(ModelError, match="is not causal"):
        load(folder)


@pytest.mark.parametrize("model_type", sorted(DECODER_SWITCH))
def test_an_encoder_that_config_json_makes_a_decoder_is_causal(model_type: str, tmp_path: Path) -> None:
    load(saved(tmp_path, model_type, SIZES, is_decoder=True))


@pytest.mark.parametrize(
    ("model_type", "sizes", "settings"), [("xlm", XLM, {"causal": True}), ("xlnet", XLNET, {"attn_type": "uni"})]
)
def test_a_language_model_of_both_kinds_is_causal_where_config_json_says_so(
    model_type: str, sizes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    load(saved(tmp_path, model_type, sizes, **settings))


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_rounding_is_not_taken_for_a_leak(model_type: str, mode: str, tmp_path: Path) -> None:
    """Experts group the tokens, and LLM.int8() takes its outlier columns from all of them."""
    folder = saved(tmp_path, model_type, SIZES, num_local_experts=4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    model.save_pretrained(folder)
    load(folder, mode)


def test_validate_and_run_refuse_an_encoder_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model", "bert", SIZES)
    for verb in ("validate", "run"):
        assert main([verb, "model=local", f"model.path={folder}", f"output_root={tmp_path / 'outputs'}"]) == 2
        told = capsys.readouterr().err
        assert "not causal" in told
        assert '"is_decoder": true' in told
    assert not list(tmp_path.glob("outputs/runs/*/record.json"))
