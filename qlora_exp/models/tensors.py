"""Checks by their headers alone that a checkpoint's files hold exactly the tensors of the model.

transformers initializes missing weights at random and drops unknown tensors, with a warning at most. So its own loading
runs here once on the meta device, where tensors have a name and a shape, and no memory.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from qlora_exp.errors import ModelError
from qlora_exp.models.prequantized import QUANTIZED_HINT as UNQUANTIZED
from qlora_exp.models.prequantized import quantization_method_of_tensors
from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.models.weight_files import weight_files

UNQUANTIZED_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of a safetensors header that hold unquantized weights."""
MASKS = re.compile(r"(^|\.)(attn|attention|self_attention)\.(bias|masked_bias|causal_mask)$")
"""Causal masks that older versions of transformers saved with GPT-2, GPT-J, GPT-Neo and GPT-NeoX."""
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.|rotary_pos_emb\.)?(inv_freq|position_ids|embed_positions\.weights)$")
"""Positions and frequencies that the model computes from its configuration."""
OTHER_MODALITIES = re.compile(
    r"^(model\.)?(vision_(model|tower|encoder|embed_tokens)|visual|audio_(model|tower|encoder)|multi_modal_projector"
    r"|mm_projector|image_newline|embed_vision|embed_audio)(\.|$)"
)
"""Encoders for images and audio, for which a text model has no input."""
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
}
ADAPTER_PATTERN = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\b")
LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
NUMBERED_EXPERT = re.compile(r"^(.*\.experts?\.)(\d+)(\..*)$")
TASK_HEADS = re.compile(r"(^|\.)(score|classifier|v_head|value_head|qa_outputs|reward_head)\.")
MISMATCH_HINT = "the files and config.json are not of one model; restore them"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it. ``dtype`` is safetensors' name: F32, BF16, F8_E4M3 …"""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class LoadReport:
    """What transformers would make of a checkpoint's tensors."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """(weight, its shape in the files, its shape by the configuration)."""
    unconverted: list[str] = field(default_factory=list)
    """Weights that can't be assembled from their parts in the files."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Weight → the tensors that it is assembled from."""
    duplicates: list[str] = field(default_factory=list)
    """Weights that two tensors claim."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors that transformers would load from ``folder``, by name."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_slice(name)
                tensors[name] = StoredTensor(tuple(tensor.get_shape()), str(tensor.get_dtype()))
    return tensors


def check_tensors(model: PreTrainedModel, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Check ``tensors`` against ``model``, which is on the meta device; the check changes it.

    Raises:
        ModelError: a weight is in no file, a tensor of the files belongs to no weight, or shape or dtype are wrong.
    """
    _check_dtypes(model, tensors, where)
    _check_names(tensors, model, where)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    report = dry_load(model, shapes, get_model_conversion_mapping(model))
    if report.duplicates:
        what = f"two tensors of the files claim the weight {report.duplicates[0]}"
        raise ModelError(what, where, "restore the files from the model's source")
    raise_missing(report, where, MISMATCH_HINT, _expected_names(report, shapes))
    raise_misshapen(report, where, MISMATCH_HINT)
    unexpected = [name for name in report.unexpected if not can_be_left_out(name, shapes.get(name))]
    if unexpected:
        raise _unexpected(unexpected, model, where)


def dry_load(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], conversions: list[WeightTransform]
) -> LoadReport:
    """Run transformers' loading of tensors with these names and shapes into ``model``, which is on the meta device."""
    weights = dict(model.state_dict())
    tensors = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    report = LoadReport()
    report.sources, report.duplicates = _sources(model, shapes, conversions, weights)
    settings = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.bfloat16, weight_mapping=conversions)
    with quiet_loading():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    report.unconverted = sorted(info.conversion_errors)
    report.misshapen = sorted((name, tuple(stored), tuple(built)) for name, stored, built in info.mismatched_keys)
    report.missing = sorted(info.missing_keys - set(report.unconverted))
    report.unexpected = sorted(info.unexpected_keys)
    return report


def raise_missing(report: LoadReport, where: str, hint: str, expected: Sequence[str] = ()) -> None:
    """Raise :class:`ModelError` if a weight is missing. ``expected``: names of tensors that the files should have, for
    weights that are assembled from several."""
    lacking = [*expected, *(name for name in report.missing if name not in expected)]
    if lacking:
        what = f"{len(lacking)} of the model's weights are not in its files: {first_three(lacking)}"
        others = [name for name in report.unexpected if not can_be_left_out(name, None)]
        if others:
            what = f"{what}; the files have tensors of other names: {first_three(others)}"
        raise ModelError(what, where, hint)
    if report.unconverted:
        name = report.unconverted[0]
        parts = first_three(report.sources.get(name, [])) or "none of its parts"
        raise ModelError(f"{name} can't be put together from what the files have of it: {parts}", where, hint)


def raise_misshapen(report: LoadReport, where: str, hint: str, maker: str = "config.json") -> None:
    """Raise :class:`ModelError` if a tensor's shape is wrong. ``maker`` is what gives the right one."""
    for name, stored, built in report.misshapen:
        what = f"{name} has the shape {stored} in its file, and {maker} makes it {built}"
        raise ModelError(what, where, hint)


def can_be_left_out(name: str, shape: tuple[int, ...] | None) -> bool:
    """Return whether a tensor that belongs to no weight can be left out: a mask or table that the model computes, or an
    encoder that it has no input for."""
    if COMPUTED.search(name) or OTHER_MODALITIES.search(name):
        return True
    return bool(MASKS.search(name)) and (shape is None or len(shape) in (0, 4))


def first_three(names: Sequence[str]) -> str:
    """Return the first three names as text, with … if there are more."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _sources(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    conversions: list[WeightTransform],
    weights: dict[str, torch.Tensor],
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the tensors of each weight, and the weights that two tensors claim: transformers takes one of the two."""
    copies = copy.deepcopy(conversions)  # a renaming keeps state
    renamings = [entry for entry in copies if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in copies if isinstance(entry, WeightConverter)]
    sources: dict[str, list[str]] = defaultdict(list)
    twice = []
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, weights)
        if renamed not in weights and name in weights:
            renamed, pattern = name, None
        if pattern is None and sources[renamed] and renamed in weights:
            twice.append(renamed)
        sources[renamed].append(name)
    return dict(sources), twice


def _expected_names(report: LoadReport, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the tensors that the files lack for weights assembled from many: experts' weights are numbered."""
    counts = {name: built[0] for name, _, built in report.misshapen if built}
    lacking = []
    for name in [*report.unconverted, *counts]:
        numbered: dict[str, set[int]] = defaultdict(set)
        for source in report.sources.get(name, []):
            if match := NUMBERED_EXPERT.match(source):
                numbered[f"{match[1]}*{match[3]}"].add(int(match[2]))
        all_numbers = set().union(*numbered.values()) if numbered else set()
        if len(report.sources.get(name, [])) > 1 or all_numbers:
            all_numbers |= set(range(counts.get(name, 0)))
        for pattern, numbers in numbered.items():
            lacking += [pattern.replace("*", str(number)) for number in sorted(all_numbers - numbers)]
    return [name for name in lacking if name not in shapes]


def _check_dtypes(model: PreTrainedModel, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Raise :class:`ModelError` for quantized values. Without a quantization_config, transformers would load fp8, int8
    or packed values as if they were the weights."""
    if method := quantization_method_of_tensors({name: tensor.dtype for name, tensor in tensors.items()}):
        what = f"the weights are quantized already (by {method}), and config.json doesn't say so"
        raise ModelError(what, where, UNQUANTIZED)
    weights = model.state_dict()
    for name, tensor in tensors.items():
        weight = weights.get(name)
        is_integer = weight is not None and not weight.is_floating_point()
        if tensor.dtype not in UNQUANTIZED_DTYPES and not is_integer and not can_be_left_out(name, tensor.shape):
            what = f"{name} holds {tensor.dtype} values, which can't be used as weights"
            raise ModelError(what, where, f"the files seem to be quantized: {UNQUANTIZED}")


def _check_names(tensors: Mapping[str, StoredTensor], model: PreTrainedModel, where: str) -> None:
    """Raise :class:`ModelError` for names that a wrapper of the model wrote: transformers would find none of them."""
    if adapters := [name for name in tensors if ADAPTER_PATTERN.search(name)]:
        what = f"{len(adapters)} tensors of the files are an adapter's: {first_three(adapters)}"
        hint = "merge the adapter before saving: PeftModel.merge_and_unload().save_pretrained(NEW_DIR)"
        raise ModelError(what, where, hint)
    for prefix, wrapper in WRAPPERS.items():
        named = [name for name in tensors if prefix in name]
        if len(named) > len(tensors) / 2 and not any(prefix in name for name in model.state_dict()):
            what = f"the tensors are named as {wrapper} names them: {first_three(named)}"
            hint = f"save the model inside the wrapper, or rename its tensors: name.replace({prefix!r}, '')"
            raise ModelError(what, where, hint)


def _unexpected(names: list[str], model: PreTrainedModel, where: str) -> ModelError:
    """Return an error that says what the tensors without a weight mean, as far as their names show it."""
    what = f"{len(names)} tensors of the files belong to no weight of the model: {first_three(names)}"
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)
    beyond = {int(match[1]) for name in names if (match := LAYER.search(name)) and int(match[1]) >= layers > 0}
    if beyond and len({LAYER.search(name) is not None for name in names}) == 1:
        what = f"{what}; config.json says num_hidden_layers = {layers}, and the files have layer {max(beyond)}"
    elif all(name.endswith(".bias") for name in names):
        what = f"{what}; config.json makes these layers without bias"
    elif any(TASK_HEADS.search(name) for name in names):
        what = f"{what}; this looks like a classifier or a reward model"
    return ModelError(
        what, where, "transformers would leave them out: restore the config.json that belongs to the files"
    )
