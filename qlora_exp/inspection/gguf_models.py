"""A GGUF file as a model: in llama.cpp where it is installed, else dequantized to float32 in transformers."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_exp.config.compose import compose
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError
from qlora_exp.export.llama_cpp import LlamaCppModel, why_not
from qlora_exp.models.base import load_base
from qlora_exp.models.inspect import build_meta, check_weights
from qlora_exp.models.sources import model_config, resolve_source

CONVERSATION_TOKENS = 4096
"""llama.cpp reserves memory for the longest text. A conversation's isn't known."""
SPARE_TOKENS = 16


def config_of_file(file: Path) -> Config:
    """Return the configuration of the file as a model, and check all of the file but its weights' values.

    Raises:
        ModelError: it is no model in GGUF, it is damaged, or its architecture or block types can't be read.
    """
    config = compose(["model=local", f"model.path={hydra_value(str(file))}", "quantization=fp32"])
    check_weights(resolve_source(config.model))
    return config


def engine_words() -> str:
    """Return what computes the probabilities of a GGUF file."""
    if why_not() is None:
        return f"computed by llama.cpp (llama-cpp-python {version('llama-cpp-python')}), as on the phone"
    exact = "computed by transformers with the file's weights, dequantized to float32: exactly the weights that ship"
    return f"{exact}. llama.cpp, which isn't installed, rounds activations, too: the last digits may differ"


def load_gguf_model(config: Config, vocabulary: int, tokens: int | None, device_kind: str) -> Any:
    """Return the model of :func:`config_of_file`.

    Args:
        vocabulary: tokens that the tokenizer knows: the model must have at least as many.
        tokens: of the longest text; ``None``: not known.

    Raises:
        ModelError: it can't be loaded, or it has another vocabulary.
    """
    source = resolve_source(config.model)
    settings = model_config(source).get_text_config()
    if settings.vocab_size < vocabulary:
        what = f"the file has {settings.vocab_size} tokens, and the tokenizer {vocabulary}: they are of two models"
        raise ModelError(what, source.where, "give the run that the file was exported from, or the file alone")
    if why_not() is not None:
        return load_base(config, device_kind).model
    like = build_meta(copy.deepcopy(model_config(source)), source)
    positions = getattr(settings, "max_position_embeddings", None) or CONVERSATION_TOKENS
    longest = min(positions, tokens + SPARE_TOKENS if tokens is not None else CONVERSATION_TOKENS)
    like.config.get_text_config().max_position_embeddings = longest
    try:
        return LlamaCppModel(Path(source.where), like, longest)
    except (ValueError, OSError, RuntimeError) as error:
        what = f"llama.cpp can't load the file: {error}"
        raise ModelError(
            what, source.where, "a newer llama-cpp-python may know its architecture or block types"
        ) from None
