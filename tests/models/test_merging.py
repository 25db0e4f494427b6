"""A merged model computes what base and adapter computed together, and needs no adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.compose import compose
from qlora_exp.models.adapters import adapter_parameters, attach_adapters, save_adapter
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.models.inspect import describe
from qlora_exp.models.merging import merged_model

TOKENS = torch.tensor([[5, 17, 260, 33, 900, 12, 7]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("lora", ["lora.rslora=false", "lora.rslora=true", "lora.dora=true", "lora.init=pissa"])
def test_the_merged_model_is_base_and_adapter(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, lora: str
) -> None:
    trained_in = "bf16" if lora == "lora.init=pissa" else "nf4"  # PiSSA over nf4 is refused
    given = ["model=local", f"model.path={tiny_models[family]}", "targets=all_linear", "lora.r=4", lora]
    config = compose([*given, "quantization=fp32", "training.device=cpu"])
    base = load_base(config, "cpu")
    modules = resolve_targets(describe(config.model), config.targets)
    adapted = attach_adapters(clone_sharing_weights(base), config, modules)
    torch.manual_seed(0)
    with torch.no_grad():
        untouched = base.model(input_ids=TOKENS).logits
        for name, parameter in adapter_parameters(adapted):
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
        wanted = adapted(input_ids=TOKENS).logits
    save_adapter(adapted, tmp_path)
    merged, fingerprint = merged_model(compose([*given, f"quantization={trained_in}"]), tmp_path)
    with torch.no_grad():
        found = merged(input_ids=TOKENS).logits
    assert fingerprint == base.fingerprint
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
    assert bool(merged.config.tie_word_embeddings) is tied
    assert not list(adapter_parameters(merged))
    assert (wanted - untouched).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
