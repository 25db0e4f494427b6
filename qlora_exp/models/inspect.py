"""Describes a model from its configuration alone: built on the meta device, where tensors take no memory."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_exp.architecture.pruned import pruned
from qlora_exp.architecture.shapes import (
    DTYPES,
    MODEL_DTYPE,
    Architecture,
    ElementBytes,
    Experts,
    OtherTensor,
    WeightShape,
)
from qlora_exp.config.schema import ModelConfig
from qlora_exp.errors import ModelError
from qlora_exp.models.config_sizes import check_no_missing_sizes
from qlora_exp.models.gguf_header import gguf_parts
from qlora_exp.models.gguf_tensors import check_gguf
from qlora_exp.models.quantized_checkpoints import unpacked_tensors
from qlora_exp.models.sources import (
    ModelSource,
    check_config,
    first_error_line,
    model_config,
    quantized_source,
    resolve_source,
)
from qlora_exp.models.starting_adapters import check_adapters
from qlora_exp.models.tensors import check_tensors, stored_tensors
from qlora_exp.models.weight_files import weight_files

ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)
ATTENTION_CLASS = re.compile(r"(Attention|Attn)(\d+D)?$")
"""Matches class names at their end only: ``JambaAttentionDecoderLayer`` holds a feed-forward network too."""
FEED_FORWARD_NAME = re.compile(r"mlp|ffn|feed_?forward|expert|moe", re.IGNORECASE)
FEED_FORWARD_CLASS = re.compile(r"(MLP|Mlp|FFN|FeedForward|FeedForwardNetwork|Experts?|MoE)$")
NEITHER_NAME = re.compile(r"mamba|ssm|conv|recurrent|temporal|mixer|router|lstm|altup|laurel|indexer", re.IGNORECASE)
NEITHER_CLASS = re.compile(r"(Mamba\d?|MambaLayer|Mixer|Conv|RecurrentBlock|Router|Gating|Indexer|mLSTMLayer)$")
"""Neither attention nor feed-forward: state-space, recurrent and convolutional mixers, routers of expert layers."""
NEITHER_LEAF = re.compile(r"^(gate|router|shared_expert_gate|classifier|modality_router|per_layer_\w+)$")
LAYERS_REFUSED_BY_PEFT = frozenset({"out_proj", "conv1d"})
MAMBA_MODEL_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which PEFT refuses the layers of :data:`LAYERS_REFUSED_BY_PEFT`."""
OTHER_MODALITY_MODULES = re.compile(r"vision|visual|image|img|audio|speech|multi_modal", re.IGNORECASE)
"""Encoders and projections for images and audio: no part of the language model, so never a target."""


def describe(model: ModelConfig, to_load: bool = True) -> Architecture:
    """Return the architecture of ``model``. Raises :class:`ModelError` if it can't be found or built.

    ``to_load``: the run needs the weights. A plan works without weights that aren't downloaded.
    """
    source = resolve_source(model)
    if to_load and source.cached:
        _check_cached(source)
    built = build_meta(model_config(source), source)
    _check_attention(built, model.attention)
    described = pruned(architecture_of(built), model)
    if (packed := quantized_source(source)) is not None:
        described = replace(described, unpacked_from=packed.method)
    check_adapters(source.adapters, built)
    check_weights(source, built)
    return described


def check_weights(source: ModelSource, built: PreTrainedModel | None = None) -> None:
    """Check, by their headers, that the files hold exactly the model's weights; once for each state of the files.

    For a checkpoint on the Hub, only files in the local cache are checked. ``built`` is the model without weights; the
    check changes it. If it isn't given, it is built here.

    Raises:
        ModelError: a weight is in no file, or a file holds something that the model doesn't have.
    """
    folder = source.cached_folder
    state = _state_of_files(source, folder)
    if state is None or state in _checked_states:
        return
    if built is None:
        built = build_meta(model_config(source), source)
    if source.gguf_file:
        check_gguf(built, Path(source.where))
    elif folder is not None:
        tensors, packed = stored_tensors(folder), quantized_source(source)
        if packed is not None:
            tensors = unpacked_tensors(tensors, packed, folder)
        check_tensors(built, tensors, source.where)
    _checked_states.add(state)


def _check_cached(source: ModelSource) -> None:
    """Raise :class:`ModelError` if the local cache lacks weights, for a Hub that can't be reached."""
    folder = source.cached_folder
    if folder is None or not all(file.is_file() for file in weight_files(folder)):
        what = f"the weights of {source.name} are not all in the local cache, and the Hub can't be reached"
        raise ModelError(what, f"Hub id {source.name}", f"on a machine with a network: hf download {source.name}")


_checked_states: set[Hashable] = set()
"""States of files that passed the check."""


def _state_of_files(source: ModelSource, folder: Path | None) -> Hashable:
    """Return names, sizes and modification times; ``None`` if files are still missing."""
    if folder is None:
        return None
    files = gguf_parts(Path(source.where)) if source.gguf_file else [*weight_files(folder), folder / "config.json"]
    if not all(file.is_file() for file in files):
        return None
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def describe_file(file: Path) -> Architecture:
    """Return the architecture that a config.json describes by itself, without weights or a tokenizer.

    Raises:
        ModelError: the file can't be read, or doesn't say how large the model is.
    """
    if not file.is_file():
        raise ModelError("there is no such configuration file", str(file), "model.path=FOLDER/config.json")
    check_config(file)
    source = ModelSource(file.parent.name or file.stem, str(file), None, None, is_local=True)
    config = model_config(source)
    check_no_missing_sizes(file, config)
    return architecture_of(build_meta(config, source))


def _check_attention(model: PreTrainedModel, attention: str) -> None:
    """Raise :class:`ModelError` if the architecture doesn't support ``attention``, or its package isn't installed.
    Called before a weight is read."""
    if attention == "sdpa" and not model._supports_sdpa:
        what = f"transformers has no scaled_dot_product_attention for {model.config.model_type}"
        raise ModelError(what, "model.attention = sdpa", "model.attention=auto, which takes eager here")
    if not attention.startswith("flash"):
        return
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        what = f"{attention} is not available: {str(error).splitlines()[0]}"
        raise ModelError(what, f"model.attention = {attention}", "model.attention=auto") from None


def build_meta(config: PretrainedConfig, source: ModelSource) -> PreTrainedModel:
    """Return the model without weights: all modules and shapes, no memory."""
    try:
        with torch.device("meta"):
            # In bfloat16 a buffer shows whether it takes the model's dtype or keeps its own.
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=torch.bfloat16
            )
    except Exception as error:  # an invalid configuration can make a constructor raise anything
        what = f"transformers can't build this {config.model_type}: {first_error_line(error)}"
        raise ModelError(what, source.where, "check the sizes in its config.json") from None
    return built


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Describe a built model (unquantized, without adapters). Expert weights that are bare three-dimensional parameters
    count in the total. They are not linear layers and can't be targets."""
    text = model.config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", 0) or 0)
    return Architecture(
        model_type=model.config.model_type,
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=tuple(_weights(model)),
        output_head=output_head(model),
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        vocabulary_size=int(getattr(text, "vocab_size", 0) or 0),
        positions=positions if positions > 0 else None,
        heads=int(getattr(text, "num_attention_heads", 0) or 0) or None,
        eager_alone=not model._supports_sdpa,
        window=_window(text),
        others=tuple(_others(model)),
        experts=tuple(_experts(model, int(getattr(text, "hidden_size", 0) or 0))),
    )


def _window(text: PretrainedConfig) -> int | None:
    """Return the sliding window of the layers that have one, in tokens; ``None`` if no layer has."""
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    unused = getattr(text, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds)
    return window if isinstance(window, int) and window > 0 and not unused else None


def output_head(model: PreTrainedModel) -> str | None:
    """Return the full name of the layer that gives the logits, tied to the embedding or not; ``None`` if there is
    none."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _weights(model: PreTrainedModel) -> Iterator[WeightShape]:
    prefix = _language_model_prefix(model)
    unquantized = _not_quantized(model)
    widths = _ElementBytes(model)
    left_out = _names_without_adapters(model)
    for name, module in _linear_layers(model):
        conv = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        counted = (
            name.startswith(prefix) and not OTHER_MODALITY_MODULES.search(name) and (conv or _is_plain_linear(module))
        )
        adaptable = counted and name.rpartition(".")[2] not in left_out
        yield WeightShape(
            name=name,
            kind=("conv1d" if conv else "linear") if adaptable else "other",
            in_features=rows if conv else columns,
            out_features=columns if conv else rows,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            role=_role(model, name) if counted else "other",
            quantizable=(conv or type(module) is nn.Linear) and should_convert_module(name, unquantized),
            element_bytes=widths.of(f"{name}.weight", module.weight),
        )


def quantizable_linears(model: PreTrainedModel) -> set[str]:
    """Return the names of the linear layers that a quantized mode replaces: all but the output head and experts."""
    return {weight.name for weight in _weights(model) if weight.quantizable}


def _names_without_adapters(model: PreTrainedModel) -> frozenset[str]:
    """Return the last parts of names that PEFT doesn't adapt in this architecture.

    Mamba's kernels read the weight past the layer (``tuners_utils._check_lora_target_modules_mamba``). Other names
    belonged to experts' layers in an earlier transformers
    (``transformers_weight_conversion._convert_peft_config_moe``): for a shared expert's ``gate_proj``, PEFT adapts all
    experts and not the shared one.
    """
    model_type = str(model.config.model_type)
    if model_type in MAMBA_MODEL_TYPES:
        return LAYERS_REFUSED_BY_PEFT
    from peft.utils import transformers_weight_conversion as conversion

    pattern = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    return frozenset(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(pattern, ()))


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    head = output_head(model)
    for name, module in model.named_modules():
        if name != head and isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _others(model: PreTrainedModel) -> Iterator[OtherTensor]:
    """Yield parameters outside linear layers (a tied one once), and buffers."""
    counted = {id(parameter) for _, module in _linear_layers(model) for parameter in module.parameters()}
    widths = _ElementBytes(model)
    for name, parameter in model.named_parameters():
        if id(parameter) not in counted:
            yield OtherTensor(name, parameter.numel(), widths.of(name, parameter))
    for name, buffer in model.named_buffers():
        if buffer.numel():
            yield OtherTensor(name, buffer.numel(), widths.of(name, buffer), buffer=True)


def _experts(model: PreTrainedModel, hidden: int) -> Iterator[Experts]:
    """Yield modules that hold all of a layer's experts as three-dimensional parameters, in either order of the axes."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        weights = dict(module.named_parameters(recurse=False))
        down, up = weights.get("down_proj"), weights.get("gate_up_proj", weights.get("up_proj"))
        if down is None or up is None or down.ndim != 3 or not hidden:
            continue
        count = down.shape[0]
        routed = len(inspect.signature(module.forward).parameters) > 1  # Llama 4's compute all tokens, mostly zeros
        per_token = _experts_per_token(model, modules[name.rpartition(".")[0]]) if routed else None
        yield Experts(
            name=name,
            count=count,
            per_token=per_token or count,  # unknown: an upper bound
            intermediate=_intermediate_size(down, hidden),
            gated=up.numel() >= 2 * down.numel(),
        )


def _intermediate_size(down: nn.Parameter, hidden: int) -> int:
    """Return the experts' intermediate width, from (experts, hidden, intermediate) or (experts, intermediate, hidden).
    For experts with an input narrower than the hidden state, return the width that gives the right number of
    operations."""
    _, rows, columns = down.shape
    return columns if rows == hidden else rows if columns == hidden else rows * columns // hidden


def _experts_per_token(model: PreTrainedModel, block: nn.Module) -> int | None:
    """Return the number of experts per token from the router, else from the configuration; ``None`` if neither has
    it."""
    candidates = [getattr(module, "top_k", None) for module in block.modules()]
    text = model.config.get_text_config()
    candidates += [getattr(text, key, None) for key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")]
    return next((number for number in candidates if isinstance(number, int) and number > 0), None)


def _not_quantized(model: PreTrainedModel) -> list[str]:
    """Return names and patterns of modules that transformers doesn't quantize (head, tied weights, float32 modules)."""
    patterns: list[str] = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return patterns


class _ElementBytes:
    """Bytes per element of a model's tensors, for each dtype that the model can be loaded in."""

    def __init__(self, model: PreTrainedModel) -> None:
        plans = (model._get_dtype_plan(getattr(torch, dtype)) for dtype in DTYPES)
        self._float32 = [build_glob_alternation(list(plan))[0] if plan else None for plan in plans]

    def of(self, name: str, tensor: torch.Tensor) -> ElementBytes:
        if tensor.dtype is not torch.bfloat16:
            return (tensor.itemsize,) * 3
        keeps_float32 = (pattern is not None and bool(pattern.search(name)) for pattern in self._float32)
        float32, bfloat16, float16 = (
            4 if keep else width for keep, width in zip(keeps_float32, MODEL_DTYPE, strict=True)
        )
        return float32, bfloat16, float16


def _language_model_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of the language model's names: empty for a text model, ``model.language_model.`` or similar for
    one with image or audio input."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def _is_plain_linear(module: nn.Module) -> bool:
    """Return whether the layer computes y = Wx + b and nothing else. Subclasses of Linear with such a name (Falcon's)
    do. Routers return more than y, and grouped layers split their input."""
    name = type(module).__name__
    return type(module) is nn.Linear or (name.endswith("Linear") and "Group" not in name)


def _role(model: PreTrainedModel, name: str) -> str:
    """Return ``attention``, ``mlp`` or ``other``, from the nearest ancestor inside the decoder layer whose class or
    name shows it. A layer directly in the decoder layer is feed-forward (OPT's fc1, fc2)."""
    *parents, leaf = name.split(".")
    indices = [position for position, part in enumerate(parents) if part.isdigit()]
    if not indices or NEITHER_LEAF.search(leaf):
        return "other"
    for depth in range(len(parents), indices[0], -1):
        holder = type(model.get_submodule(".".join(parents[:depth]))).__name__
        role = _role_of_class(holder) or _role_of_name(parents[depth - 1])
        if role:
            return role
    return "mlp"


def _role_of_class(holder: str) -> str | None:
    if ATTENTION_CLASS.search(holder):
        return "attention"
    if FEED_FORWARD_CLASS.search(holder):
        return "mlp"
    return "other" if NEITHER_CLASS.search(holder) else None


def _role_of_name(label: str) -> str | None:
    if NEITHER_NAME.search(label):
        return "other"
    if FEED_FORWARD_NAME.search(label):
        return "mlp"
    return "attention" if ATTENTION_NAME.search(label) else None
