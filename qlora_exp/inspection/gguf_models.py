"""A GGUF file as a model: in llama.cpp where it is installed, else dequantized to float32 in transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.config.compose import compose
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError
from qlora_exp.export.llama_cpp import LlamaCppModel, measure_runtime, why_not
from qlora_exp.models.base import load_base
from qlora_exp.models.inspect import build_meta, check_weights
from qlora_exp.models.sources import model_config, resolve_source

CONVERSATION_TOKENS = 4096
"""llama.cpp reserves memory for the longest text. A conversation's isn't known."""
SPARE_TOKENS = 16
TRIED_TOKENS = 8
"""Tokens with which another process tries whether llama.cpp can run the file here."""


def config_of_file(file: Path) -> Config:
    """Return the configuration of the file as a model, and check all of the file but its weights' values.

    Raises:
        ModelError: it is no model in GGUF, it is damaged, or its architecture or block types can't be read.
    """
    config = compose(["model=local", f"model.path={hydra_value(str(file))}", "quantization=fp32"])
    check_weights(resolve_source(config.model))
    return config


@dataclass(frozen=True)
class GgufEngine:
    """What computes the probabilities of a GGUF file."""

    is_llama_cpp: bool
    words: str


def engine_of(file: Path) -> GgufEngine:
    """Return llama.cpp if it is installed and can run the file here, else transformers.

    Another process tries first: machine code that doesn't suit this processor would end this one.
    """
    exact = "computed by transformers from the file's weights, dequantized to float32: the weights are those that ship"
    if (missing := why_not()) is not None:
        return GgufEngine(False, f"{exact}. Only llama.cpp also rounds as a phone does; {missing}")
    measured = measure_runtime(file, TRIED_TOKENS, 1)
    if measured.why is not None:
        return GgufEngine(False, f"{exact}. {measured.why}")
    return GgufEngine(True, f"computed by llama.cpp ({measured.name}), which computes on phones, too")


def load_gguf_model(config: Config, engine: GgufEngine, vocabulary: int, tokens: int | None, device_kind: str) -> Any:
    """Return the model of :func:`config_of_file`.

    Args:
        engine: of the file.
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
    if not engine.is_llama_cpp:
        return load_base(config, device_kind).model
    like = build_meta(copy.deepcopy(model_config(source)), source)
    positions = getattr(settings, "max_position_embeddings", None) or CONVERSATION_TOKENS
    longest = min(positions, tokens + SPARE_TOKENS if tokens is not None else CONVERSATION_TOKENS)
    like.config.get_text_config().max_position_embeddings = longest
    try:
        return LlamaCppModel(Path(source.where), like, longest)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        what = f"llama.cpp can't load the file: {error}"
        raise ModelError(
            what, source.where, "a newer llama-cpp-python may know its architecture or block types"
        ) from None
