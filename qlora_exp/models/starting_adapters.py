"""Adapters that a run starts from: found, checked by their headers, merged into the full-precision weights.

After merging, the model is a base like any other: it is quantized, scored before training, and a new adapter is trained
on it. Rank and target modules of the new adapter are free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from qlora_exp.errors import ModelError, RecordError
from qlora_exp.models.file_digests import model_file_digest
from qlora_exp.models.portable_adapters import SETTINGS_FILE, WEIGHTS_FILE
from qlora_exp.records.files import read_record
from qlora_exp.records.model_name import OWNER_AND_NAME
from qlora_exp.system.device_errors import is_device_error

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")
"""Values of PEFT's ``init_lora_weights`` with which a saved adapter can be loaded again without its training data."""
NEVER_SET = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config")
"""Settings of PEFT that change more than linear layers; such an adapter is refused."""
TENSOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?$"
)
MERGE_HINT = "merge it with PEFT (merge_and_unload, save_pretrained), then model=local model.path=DIR"


@dataclass(frozen=True)
class StartingAdapter:
    """``base`` is the name of its base model in PEFT's file. ``run`` is the id of the run that trained it, with its
    ``base_fingerprint`` and the overrides that choose its ``model``."""

    folder: Path
    base: str | None
    base_fingerprint: str | None
    run: str | None
    model: str | None


def adapter_chain(folder: Path) -> list[StartingAdapter]:
    """Return the adapter in ``folder`` after those that its run started from, in the order in which they are merged.

    Raises:
        ModelError: a folder has no adapter of a kind that can be merged.
    """
    chain: list[StartingAdapter] = []
    seen: set[Path] = set()
    following: Path | None = folder
    while following is not None and following not in seen:
        seen.add(following)
        settings = _settings(following)
        _check_settings(settings, following)
        fingerprint = run = chosen = earlier = None
        record_file = following.parent / "record.json"
        if record_file.is_file():
            try:
                record = read_record(record_file)
            except RecordError as error:
                raise ModelError(error.what, str(record_file), error.hint) from None
            fingerprint, run = record.model_fingerprint, record.run_id
            if isinstance(model := record.config.get("model"), Mapping):
                earlier, chosen = model.get("adapter"), _overrides(model)
        base = settings.get("base_model_name_or_path")
        chain.insert(0, StartingAdapter(following, str(base) if base else None, fingerprint, run, chosen))
        following = Path(str(earlier)) if earlier else None
    return chain


def _overrides(model: Mapping[str, Any]) -> str:
    """Return the overrides that choose a recorded model, without its adapter."""
    keys = ("id", "instruct_id", "path", "instruct_path", "variant")
    return " ".join([f"model={model.get('family')}", *(f"model.{key}={model[key]}" for key in keys if model.get(key))])


def check_base_of_adapter(adapter: StartingAdapter, base: str, is_local: bool, fingerprint: str) -> None:
    """Raise :class:`ModelError` if ``adapter`` was trained on another model than the one with this ``fingerprint``.

    ``base``: the Hub id or the folder of the model. What can't be compared (a copy on disk of a model of the Hub) is
    accepted: the shapes are compared later.
    """
    hint = f"the model of that run: {adapter.model}" if adapter.model else f"model=hub model.id={adapter.base}"
    trained = adapter.base_fingerprint
    if trained is not None and _kind(trained) == _kind(fingerprint):
        if trained != fingerprint:
            commit = trained.partition("@")[2].partition("+")[0]
            if commit and trained.partition("@")[0] == fingerprint.partition("@")[0]:
                hint = f"model.revision={commit}"
            what = f"the adapter of {adapter.run} was trained on another model, or on another state of it"
            raise ModelError(what, f"model.adapter = {adapter.folder}", hint)
    elif not is_local and OWNER_AND_NAME.fullmatch(adapter.base or "") and str(adapter.base).lower() != base.lower():
        what = f"the adapter was trained on {adapter.base}, and the model is {base}"
        raise ModelError(what, f"model.adapter = {adapter.folder}", hint)


def _kind(fingerprint: str) -> str:
    return fingerprint.partition(":")[0]


def adapter_digest(folder: str) -> str:
    """Return ``adapter:`` and SHA-256 over the settings and weights of the adapter in ``folder``."""
    files = (Path(folder) / SETTINGS_FILE, Path(folder) / WEIGHTS_FILE)
    total = hashlib.sha256("".join(f"{file.name}\0{model_file_digest(file)}\n" for file in files).encode())
    return f"adapter:{total.hexdigest()}"


def check_adapters(folders: tuple[str, ...], built: nn.Module) -> None:
    """Check by their headers that the adapters fit the model ``built`` (without weights).

    Raises:
        ModelError: a layer of an adapter isn't in the model, or has another shape there.
    """
    modules = dict(built.named_modules())
    for folder in folders:
        for name, shape in _tensors(Path(folder)):
            match = TENSOR.match(name)
            if match is None:
                what = f"the adapter holds more than LoRA matrices: {name}"
                raise ModelError(what, folder, MERGE_HINT)
            module = modules.get(match["module"])
            if module is None:
                what = f"the adapter doesn't fit the model, which has no layer {match['module']}"
                raise ModelError(what, folder, "give the model that it was trained on")
            _check_shape(match, shape, module, folder)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return ``model`` (unquantized) with the adapter in ``folder`` merged into its weights, in place.

    Raises:
        ModelError: the adapter doesn't fit the model, or the merged weights are not finite.
    """
    from peft import PeftModel  # only a run that loads the weights needs it

    tied = bool(model.config.tie_word_embeddings)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        if is_device_error(error):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"the adapter can't be merged: {line}", str(folder), MERGE_HINT) from None
    assert isinstance(merged, PreTrainedModel)
    if tied:
        retie_embeddings(merged)
    return merged


def retie_embeddings(merged: PreTrainedModel) -> None:
    """Tie head and embeddings again if they are equal: PiSSA works on separate copies of all weights. (An adapted head
    is another matrix, and PEFT has recorded that in the configuration.)"""
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and torch.equal(head.weight, embeddings.weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "a completed run, or a directory of PEFT (adapter_config.json, adapter_model.safetensors)"
        raise ModelError(f"there is no adapter: {SETTINGS_FILE} is missing", str(folder), hint) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter can't be read: {error}", str(file), "copy it again") from None
    if not isinstance(settings, dict):
        raise ModelError("the adapter's settings are not a JSON object", str(file), "copy it again")
    if not (folder / WEIGHTS_FILE).is_file():
        what = f"the adapter has no {WEIGHTS_FILE}"
        if (folder / "adapter_model.bin").is_file():
            what = "the adapter is a pickle, adapter_model.bin, and a pickle can run code"
        raise ModelError(what, str(folder), "save it with PEFT: save_pretrained(DIR, safe_serialization=True)")
    return settings


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    kind = str(settings.get("peft_type"))
    if kind != "LORA":
        raise ModelError(f"the adapter is {kind}, not LoRA", str(folder), "an adapter of LoRA or DoRA")
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        what = (
            f"the adapter needs what PEFT subtracted at its start (init_lora_weights={settings['init_lora_weights']})"
        )
        raise ModelError(what, str(folder), MERGE_HINT)
    changed = [name for name in NEVER_SET if settings.get(name)]
    if settings.get("bias", "none") != "none":
        changed.append("bias")
    if changed:
        raise ModelError(f"the adapter holds more than LoRA matrices: {', '.join(changed)}", str(folder), MERGE_HINT)


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tuple(opened.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter can't be read: {error}", str(file), "copy it again") from None


def _check_shape(match: re.Match[str], shape: tuple[int, ...], module: nn.Module, folder: str) -> None:
    """Raise :class:`ModelError` if A (r × in) or B (out × r) has another width than the layer."""
    weight = getattr(module, "weight", None)
    if match["part"] not in ("A", "B") or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return
    width = shape[1] if match["part"] == "A" else shape[0]
    inputs, outputs = weight.shape[1], weight.shape[0]
    if type(module).__name__ == "Conv1D":  # GPT-2 stores the transpose
        inputs, outputs = outputs, inputs
    expected = inputs if match["part"] == "A" else outputs
    if width != expected:
        what = f"the adapter doesn't fit the model: {match['module']} has {expected} features there, and {width} here"
        raise ModelError(what, folder, "give the model that it was trained on")
