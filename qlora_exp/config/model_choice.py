"""Completes the settings of a model: which variant its name means, its checkpoints, the folder of its adapter."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qlora_exp.config.allowed_values import config_error
from qlora_exp.config.choices import choices
from qlora_exp.config.enums import Variant
from qlora_exp.config.schema import ModelConfig, absolute_path
from qlora_exp.errors import ConfigError, RecordError, nearest
from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import LAST, find_run
from qlora_exp.records.model_name import OWNER_AND_NAME, name_of_path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:/.*|\.git)?")
INSTRUCT_WORDS = re.compile(r"(?:^|[-_. ])(?:instruct\w*|it|chat)(?=$|[-_. ])", re.IGNORECASE)
"""What the names of instruct models contain: Llama-3.2-1B-Instruct, gemma-3-1b-it, Qwen1.5-0.5B-Chat."""
ADAPTER_SETTINGS = "adapter_config.json"


def completed(model: ModelConfig, output_root: str) -> ModelConfig:
    """Return ``model`` with everything that its other settings imply.

    ``variant=auto`` becomes base or instruct, the ids of ``model=hub`` become checkpoints, and ``adapter`` becomes the
    absolute path of a folder, so that a record and a study mean the same adapter later.

    Raises:
        RecordError: ``adapter`` is neither a run under ``output_root`` nor a directory.
    """
    variant = variant_by_name(model) if model.variant is Variant.auto else model.variant
    checkpoints = model.checkpoints
    if model.family == "hub":
        pair = {"base": model.id, "instruct": model.instruct_id} if model.instruct_id else {variant.value: model.id}
        checkpoints = {name: checkpoint for name, checkpoint in pair.items() if checkpoint}
    adapter = adapter_folder(model.adapter, output_root) if model.adapter else None
    return replace(model, variant=variant, checkpoints=checkpoints, adapter=adapter)


def variant_by_name(model: ModelConfig) -> Variant:
    """Return the variant that ``model.variant=auto`` means.

    It is base for a pair and for a family. A single model is an instruct model if conf/model/ lists it as one, or if
    its name says so: a part of it is Instruct, it or Chat.
    """
    is_pair = model.instruct_id or model.instruct_path
    name = model.id or (name_of_path(model.path) if model.path else None)
    if is_pair or name is None:
        return Variant.base
    listed = listed_checkpoints().get(name.lower())
    if listed is not None:
        return Variant[listed[1]]
    return Variant.instruct if INSTRUCT_WORDS.search(name.rpartition("/")[2]) else Variant.base


@functools.cache
def listed_checkpoints() -> Mapping[str, tuple[str, str]]:
    """Return the Hub ids of conf/model/ in lower case → family and variant."""
    return {
        checkpoint.lower(): (choice.name, variant)
        for choice in choices("model")
        for variant, checkpoint in (choice.keys.get("checkpoints") or {}).items()
        if variant in ("base", "instruct")
    }


def adapter_folder(adapter: str, output_root: str) -> str:
    """Return the absolute path of the adapter's folder. ``adapter`` is a run's id, its beginning or end, ``last``, a
    run's folder, or a directory of PEFT.

    Raises:
        RecordError: there is no such run or directory.
    """
    place = Path(absolute_path(adapter) or "")
    if (place / ADAPTER_SETTINGS).is_file():
        return str(place)
    if (place / "record.json").is_file() or not (place.is_dir() or os.sep in adapter):
        try:
            return str(find_run(adapter, OutputPaths.of(output_root)).adapter)
        except RecordError as error:
            where = f"model.adapter = {adapter} ({error.where})"
            hint = f"a run (an id, a folder, last) or a directory of PEFT; {error.hint}"
            raise RecordError(error.what, where, hint) from None
    if place.is_dir():
        raise RecordError(f"the directory holds no adapter: {ADAPTER_SETTINGS} is missing", str(place), _inside(place))
    if os.path.isabs(os.path.expanduser(adapter)):  # of a record: only a command that loads the model needs it
        return str(place)
    hint = "a run (an id, a folder, last) or a directory of PEFT"
    if OWNER_AND_NAME.fullmatch(adapter):
        hint = f"hf download {adapter} --local-dir DIR, then model.adapter=DIR; or {hint}"
    raise RecordError(f"there is no adapter {adapter}", f"model.adapter = {adapter}", hint)


def teacher_run_id(teacher: str | None, output_root: str) -> str | None:
    """Return ``distillation.teacher``, with the run's id for ``last``: the run that learns is itself the last one
    later. Without any run it stays as it is; the check of the teacher explains that."""
    if teacher != LAST:
        return teacher
    try:
        return find_run(teacher, OutputPaths.of(output_root)).folder.name
    except RecordError:
        return teacher


def _inside(folder: Path) -> str:
    """Return the hint for a folder without an adapter: the adapters of the folders in it, or of a Trainer's
    checkpoints."""
    adapters = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_SETTINGS}"))
    return f"model.adapter={adapters[-1]}" if adapters else "a run (an id, a folder, last) or a directory of PEFT"


def hub_id_meant(path: str | None) -> str | None:
    """Return the Hub id that an absolute ``path`` was written as, e.g. ``Qwen/Qwen2.5-0.5B``; ``None`` if it may be a
    place on disk."""
    if not path or os.path.exists(path):
        return None
    written = os.path.relpath(path)
    return written if OWNER_AND_NAME.fullmatch(written) and not os.path.exists(os.path.dirname(path)) else None


def model_overrides(name: str) -> list[str]:
    """Return the overrides that choose the model ``name``: a family, a folder or file, or an id of the Hub.

    Example: ``Qwen/Qwen3-8B`` gives ``model=hub model.id=Qwen/Qwen3-8B``.
    """
    if Path(name).expanduser().exists():
        return ["model=local", f"model.path={name}"]
    return ["model=hub", f"model.id={name}"] if OWNER_AND_NAME.fullmatch(name) else [f"model={name}"]


def model_choice_hint(name: str, valid: list[str]) -> str:
    """Return what to write instead of ``model=NAME``, which is no family."""
    if Path(name).expanduser().exists():
        return f"model=local model.path={name}"
    address = HUB_ADDRESS.fullmatch(name)
    hub_id = address[1] if address else name
    if family := listed_checkpoints().get(hub_id.lower()):
        return f"model={family[0]} model.variant={family[1]}, or model=hub model.id={hub_id}"
    return f"model=hub model.id={hub_id}" if OWNER_AND_NAME.fullmatch(hub_id) else nearest(name, valid)


def place_problems(model: ModelConfig) -> Iterator[ConfigError]:
    """Yield what is wrong with the Hub ids and paths of ``model``."""
    for key, value in (("id", model.id), ("instruct_id", model.instruct_id)):
        if not value:
            continue
        if model.family != "hub":
            hint = f"model=hub model.{key}={value}" + ("" if key == "id" else " model.id=OWNER/NAME")
            yield config_error(f"model.{key} is only for model=hub", f"model.{key}", value, hint)
        elif address := HUB_ADDRESS.fullmatch(value):
            yield config_error("an id has no address", f"model.{key}", value, f"model.{key}={address[1]}")
        elif os.path.isdir(os.path.expanduser(value)) and not OWNER_AND_NAME.fullmatch(value):
            path_key = "path" if key == "id" else "instruct_path"
            hint = f"model=local model.{path_key}={value}"
            yield config_error("this is a directory, and no Hub id", f"model.{key}", value, hint)
        elif not HUB_ID.fullmatch(value):
            yield config_error("this is no Hub id", f"model.{key}", value, f"model.{key}=OWNER/NAME")
    for key, value in (("path", model.path), ("instruct_path", model.instruct_path)):
        if not value:
            continue
        meant = hub_id_meant(value)
        hub_hint = f"model=hub model.{'id' if key == 'path' else 'instruct_id'}={meant}"
        if model.family != "local":
            hint = hub_hint if meant else f"model=local model.{key}={value}"
            yield config_error(f"model.{key} is only for model=local", f"model.{key}", value, hint)
        elif meant:
            yield config_error("there is no such directory", f"model.{key}", value, f"{hub_hint}, or an existing path")
