"""Checks that a model is causal: the logits of a position must not depend on later tokens."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qlora_exp.errors import ModelError
from qlora_exp.system.device_errors import is_device_error

DECODER_SWITCH = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *(
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
    }
)
"""Model types that are encoders unless ``is_decoder`` is true in config.json."""
BIDIRECTIONAL = "use_bidirectional_attention"
"""A key of Gemma's configurations."""
CAUSAL_LANGUAGE_MODELS = "give a causal language model: Llama, Qwen, Gemma, GPT-2 …"
PROBE_TOKENS = 16
NOISE_SHARE = 0.05
"""Share of the logits' standard deviation. It decides only if no gradient can be computed."""


def check_configured_causal(config: PretrainedConfig, where: str) -> None:
    """Raise :class:`ModelError` for a model whose configuration alone shows that it isn't causal."""
    text = config.get_text_config()
    model_type = str(config.model_type)
    what = f"this {model_type} is not causal: each position sees later tokens, the answer among them"
    if model_type == "cpmant":
        raise ModelError(what, where, CAUSAL_LANGUAGE_MODELS)
    switch = next((candidate for candidate in _non_causal_settings(config, text) if candidate is not None), None)
    if switch is not None:
        key, causal = switch
        value = getattr(text, key, None)
        hint = f"if its weights were trained causally, write {json.dumps(key)}: {json.dumps(causal)} into config.json"
        raise ModelError(f"{what} ({key} is {json.dumps(value)})", where, f"{CAUSAL_LANGUAGE_MODELS}; {hint}")


def _non_causal_settings(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[tuple[str, object] | None]:
    """Yield the keys of config.json that let the model see later tokens, each with the value that makes it causal;
    ``None`` for a key that is right."""
    model_type = str(config.model_type)
    yield ("is_decoder", True) if model_type in DECODER_SWITCH and not getattr(config, "is_decoder", False) else None
    yield ("causal", True) if model_type == "xlm" and not getattr(config, "causal", False) else None
    yield ("attn_type", "uni") if model_type == "xlnet" and getattr(config, "attn_type", "bi") != "uni" else None
    bidirectional = getattr(text, BIDIRECTIONAL, None) in (True, "all") and hasattr(type(text), BIDIRECTIONAL)
    yield (BIDIRECTIONAL, None if text.model_type.startswith("gemma4") else False) if bidirectional else None
    yield ("is_causal", True) if getattr(text, "is_causal", True) is False else None


def check_causal(model: PreTrainedModel, where: str, copied: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    """Raise :class:`ModelError` if a later token changes an earlier position's logits.

    Two inputs that differ only in their last token must have equal logits before it. Where they differ, the gradient of
    the earlier logits with respect to the last token's embedding decides: it is exactly zero in a causal model. So
    rounding doesn't count as a leak. In mixtures of experts and LLM.int8(), rounding depends on the other tokens.

    ``copied`` returns a copy of the model that shares its weights.
    """
    first, second = _probe_inputs(model)
    logits = [_logits(model, tokens)[:, :-1] for tokens in (first, second)]
    difference = float((logits[0] - logits[1]).abs().max())
    if difference == 0 or math.isnan(difference):  # the evaluation reports a model that computes NaN
        return
    try:
        depends = _gradient_by_last_token(copied(model), first) != 0
    except RuntimeError as error:  # an operation without a gradient
        if is_device_error(error):
            raise
        depends = difference > NOISE_SHARE * float(logits[0].std())
    if depends:
        what = f"this {model.config.model_type} is not causal: each position sees later tokens, the answer among them"
        raise ModelError(what, where, CAUSAL_LANGUAGE_MODELS)


def _probe_inputs(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two inputs of one row that differ in their last token, without special tokens if the vocabulary allows
    it."""
    text, ids = model.config.get_text_config(), _ordinary_ids(model, PROBE_TOKENS + 1)
    positions = getattr(text, "max_position_embeddings", None)
    length = min(len(ids) - 1, positions) if isinstance(positions, int) and positions > 1 else len(ids) - 1
    first = torch.tensor([ids[:length]], device=model.device)
    second = first.clone()
    second[0, -1] = ids[length]
    return first, second


def _ordinary_ids(model: PreTrainedModel, count: int) -> list[int]:
    """Return up to ``count`` token ids that aren't special, or all ids of a vocabulary that hardly has any."""
    text = model.config.get_text_config()
    embeddings: Any = model.get_input_embeddings()
    size = int(getattr(embeddings, "num_embeddings", 0) or getattr(text, "vocab_size", 0))
    special = {value for config in (model.config, text) for key, value in vars(config).items() if "token" in key
               and isinstance(value, int)}  # fmt: skip
    ids = [number for number in range(min(size, 1000)) if number not in special][:count]
    return ids if len(ids) > 2 else list(range(size))


def ordinary_tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Return ``count`` token ids on the model's device, without special tokens if the vocabulary allows it."""
    ids = itertools.cycle(_ordinary_ids(model, count))
    return torch.tensor(list(itertools.islice(ids, count)), device=model.device)


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return logits.float()


def _gradient_by_last_token(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the largest gradient of the earlier logits with respect to the last token's embedding."""
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(_embedding_hook(embedded))
    with torch.enable_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, :-1].float().pow(2).sum(), embedded[-1])
    return float(gradient[:, -1].abs().max())


def _embedding_hook(embedded: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a forward hook that makes the embeddings a leaf with a gradient, and appends them to ``embedded``."""

    def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models change their embeddings in place

    return hook
