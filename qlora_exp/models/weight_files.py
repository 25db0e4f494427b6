"""Finds the files of a folder that hold the weights which transformers loads, and files that would change these.

Only names and safetensors headers are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora_exp.errors import ModelError
from qlora_exp.models.prequantized import QUANTIZATION_FILES
from qlora_exp.models.prequantized import QUANTIZED_HINT as UNQUANTIZED
from qlora_exp.records.model_name import OWNER_AND_NAME

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LFS_POINTER_START = b"version https://git-lfs"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"^(?P<name>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors$")
VARIANT = re.compile(r"^model\.(?P<variant>[^.]+?)(-\d{5}-of-\d{5})?\.safetensors$")
RANK_SHARD = re.compile(r"^shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
"""Written by each process of a distributed training. transformers prefers these to all other files."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from ``folder``, in its order: ``model.safetensors``, else
    the shards that the index lists. Empty if there are none under these names.

    Raises:
        ModelError: the index can't be read, or the folder holds two sets of weights.
    """
    single, shards = folder / WEIGHTS, sorted(set(weight_map(folder).values()))
    if not single.is_file():
        return [folder / shard for shard in shards]
    others = [shard for shard in shards if shard != WEIGHTS and (folder / shard).is_file()]
    if others:
        what = f"the directory holds two sets of weights: {WEIGHTS}, and {len(others)} shards that its index lists"
        hint = f"move the set that isn't meant elsewhere ({WEIGHTS}, or {WEIGHTS_INDEX} and its shards)"
        raise ModelError(what, str(folder), hint)
    return [single]


def holds_weights(folder: Path) -> bool:
    """Return whether ``folder`` has weights of any kind, also ones that can't be loaded. Such a folder is more than a
    config.json to plan with."""
    endings = (".safetensors", ".gguf", *PICKLES, ADAPTER_CONFIG, WEIGHTS_INDEX)
    return any(path.name.endswith(endings) for path in folder.iterdir())


def weight_map(folder: Path) -> dict[str, str]:
    """Return the index's map from tensors to files; empty if there is no index."""
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return {}
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        shards: dict[str, str] = dict(listed["weight_map"])
        _ = listed["metadata"]  # transformers reads it
        elsewhere = [shard for shard in sorted(set(shards.values())) if Path(shard).name != shard]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the list of weight files can't be read: {error!r}", str(index), "restore it") from None
    if elsewhere:
        what = f"the list of weight files names one outside of the directory: {elsewhere[0]}"
        raise ModelError(what, str(index), "restore it")
    return shards


def check_weight_files(folder: Path) -> None:
    """Check names, headers, lengths and index of the weight files. Only safetensors are allowed: a pickle can run code.

    Raises:
        ModelError: a file is missing or damaged, or a tensor isn't where the index says.
    """
    files = weight_files(folder)
    if not files:
        raise _no_weights_error(folder)
    file_of: dict[str, str] = {}
    listed = weight_map(folder) if files != [folder / WEIGHTS] else {}
    for file in files:
        if not file.is_file():
            raise ModelError("a weight file is missing", str(file), f"{WEIGHTS_INDEX} lists it; restore it")
        for name in _tensor_names(file):
            is_duplicate, file_of[name] = name in file_of, file.name
            if is_duplicate and listed.get(name) != file.name:
                what = f"{name} is in two files, and transformers would load the one that the index doesn't name"
                raise ModelError(what, str(file), "restore the shards and their index from one source")
    for name, shard in listed.items():
        if name not in file_of:
            what = f"{name} is not in {shard}, where {WEIGHTS_INDEX} lists it"
            raise ModelError(what, str(folder / shard), "restore the shard and the index from one source")


def check_no_adapter(folder: Path) -> None:
    """Refuse an adapter in a model's folder: transformers would apply it while it loads the model.

    Raises:
        ModelError: ``folder`` holds an adapter, alone or next to a whole model.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return
    has_model = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if has_model or any(folder.glob("*.gguf")):
        what = f"{ADAPTER_CONFIG} lies next to a whole model: transformers would load the adapter on top of it"
        hint = "move the adapter_* files to another directory to train the model as it is, or merge the adapter first"
        raise ModelError(what, str(file), hint)
    base = _base_of_adapter(file)
    named = f"; its base is {base}" if base else ""
    is_on_hub = base is not None and OWNER_AND_NAME.fullmatch(base) and not Path(base).exists()
    model = f"model=hub model.id={base}" if is_on_hub else f"model=local model.path={base or 'BASE'}"
    hint = f"give the base, and the adapter as the start: {model} model.adapter={folder}"
    raise ModelError(f"the directory holds an adapter and no model{named}", str(folder), hint)


def check_hub_files(names: set[str], place: str) -> None:
    """Check a repository on the Hub by the names of its files, in the same way. Raises :class:`ModelError`."""
    loadable = names & {WEIGHTS, WEIGHTS_INDEX}
    if ADAPTER_CONFIG in names:
        what = "the repository holds an adapter and no model"
        hint = "give its base as the model, and: hf download OWNER/NAME --local-dir DIR, then model.adapter=DIR"
        if "config.json" in names and loadable:
            what = f"{ADAPTER_CONFIG} lies next to a whole model: transformers would load the adapter on top of it"
            hint = "give the base's repository, or download it without the adapter: model=local model.path=DIR"
        raise ModelError(what, place, hint)
    if not loadable:
        what = f"the repository has neither {WEIGHTS} nor {WEIGHTS_INDEX}"
        others = sorted(name for name in names if name.endswith((".safetensors", ".gguf", *PICKLES)))
        hint = f"it has {', '.join(others[:3])}" if others else "give a repository that holds weights"
        raise ModelError(what, place, f"{hint}; download one that can be read: model=local model.path=DIR_OR_GGUF")


def config_hint(folder: Path) -> str:
    """Return what to do if ``folder`` has no config.json: name the file or folder inside it that was probably meant."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"model.path={ggufs[0]}"
    inside = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if inside:
        return f"model.path={inside[0].parent}"
    if adapters := sorted(folder.glob(f"*/{ADAPTER_CONFIG}")):
        return f"{adapters[0].parent.name}/ holds an adapter: give its base, and model.adapter={adapters[0].parent}"
    if (folder / "params.json").is_file():
        return "this is the publisher's own format (params.json): download the one for transformers"
    return "a model directory holds config.json and *.safetensors"


def check_not_lfs_pointer(file: Path) -> None:
    """Raise :class:`ModelError` if ``file`` is a Git LFS pointer: a clone without LFS has it in place of a large
    file."""
    with file.open("rb") as stream:
        begin = stream.read(len(LFS_POINTER_START))
    if begin == LFS_POINTER_START:
        what = "the file is a Git LFS pointer: its content was never downloaded"
        raise ModelError(what, str(file), "git lfs pull in the clone, or: hf download REPOSITORY")


def _tensor_names(file: Path) -> list[str]:
    try:
        check_not_lfs_pointer(file)
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"the weight file is damaged: {line}", str(file), "copy or download it again") from None


def _base_of_adapter(file: Path) -> str | None:
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    base = settings.get("base_model_name_or_path") if isinstance(settings, Mapping) else None
    return base if isinstance(base, str) and base else None


def _no_weights_error(folder: Path) -> ModelError:
    """Return an error that says why transformers finds no weights in ``folder``, by the files there."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if methods := [QUANTIZATION_FILES[name] for name in names if name in QUANTIZATION_FILES]:
        return ModelError(f"the checkpoint is quantized already (by {methods[0]})", str(folder), UNQUANTIZED)
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors:
        return _unexpected_names_error(folder, safetensors)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return ModelError("the directory has no safetensors", str(folder), f"model.path={folder / ggufs[0]}")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        hint = (
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), "
            "and copy the tokenizer files"
        )
        what = f"{pickles[0]} is a pickle, which can run code: only safetensors are read"
        return ModelError(what, str(folder), hint)
    return ModelError("the directory has no weights", str(folder), f"{WEIGHTS} is missing")


def _unexpected_names_error(folder: Path, names: list[str]) -> ModelError:
    """Return an error for safetensors under names that transformers doesn't look for."""
    first, where = names[0], str(folder)
    if match := VARIANT.match(first):
        what = f"{first} is the variant {match['variant']}, and transformers loads {WEIGHTS}"
        return ModelError(what, where, _rename_hint(folder, names, f"model.{match['variant']}", match["variant"]))
    if RANK_SHARD.match(first):
        what = f"{first} is one process's part of a distributed training"
        return ModelError(what, where, f"save the model whole: save_pretrained writes {WEIGHTS}")
    shards = [match for name in names if (match := SHARD.match(name)) and match["name"] == "model"]
    if shards:
        present, parts = {int(match["part"]) for match in shards}, int(shards[0]["parts"])
        missing = [
            f"model-{part:05d}-of-{parts:05d}.safetensors" for part in range(1, parts + 1) if part not in present
        ]
        also = f"; {_first_three(missing)} {'are' if len(missing) > 1 else 'is'} missing, too" if missing else ""
        what = f"the directory has shards and no {WEIGHTS_INDEX}, which lists them{also}"
        return ModelError(what, where, f"copy or download {WEIGHTS_INDEX} from where the shards come from")
    if first.startswith("consolidated"):
        what = f"{first} is in the publisher's own format, whose tensors have other names"
        return ModelError(what, where, f"download the files for transformers: {WEIGHTS}, or its index and shards")
    if first.startswith("adapter"):
        what = f"{first} is an adapter, and the directory holds no model"
        return ModelError(what, where, "give the base, or merge the adapter into it first")
    return ModelError(
        f"transformers loads {WEIGHTS}, and the directory has {_first_three(names)}", where, _rename_hint(folder, names)
    )


def _rename_hint(folder: Path, names: list[str], stem: str | None = None, variant: str | None = None) -> str:
    if len(names) == 1:
        return f"mv '{folder / names[0]}' '{folder / WEIGHTS}'"
    if variant:
        index = f"model.safetensors.index.{variant}.json"
        return f"rename {stem}-*.safetensors to model-*.safetensors, {index} to {WEIGHTS_INDEX}, and the names in it"
    return f"name the file that is meant {WEIGHTS}"


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
