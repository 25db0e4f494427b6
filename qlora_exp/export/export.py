"""The pipeline of an export: check, merge, write, check the task again, answer the phone case. The folder appears when
it is complete."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.enums import ComputeDtype, Method
from qlora_exp.config.peft_kinds import in_peft_format
from qlora_exp.errors import ConfigError, ExportError, QloraExpError, nearest
from qlora_exp.export.card import export_card
from qlora_exp.export.compatibility import add_end_token, write_for_version_4
from qlora_exp.export.export_config import ExportConfig
from qlora_exp.export.finished_run import FinishedRun, check_run
from qlora_exp.export.gguf import write_gguf
from qlora_exp.export.llama_cpp import measure_runtime
from qlora_exp.export.modelfile import modelfile
from qlora_exp.export.phone import answer_phone
from qlora_exp.export.push import Push, portable_texts, push_files, without_folders
from qlora_exp.export.results import RESULTS_SCHEMA_VERSION, Artefact, Export
from qlora_exp.export.task_check import CheckItems, check_exported_gguf, check_merged, items_to_check, not_checked
from qlora_exp.export.usage import usage_chapter, usage_of
from qlora_exp.models import sources
from qlora_exp.models.adapters import write_portable
from qlora_exp.models.base import load_base
from qlora_exp.models.combined_adapters import write_combined
from qlora_exp.models.inspect import describe
from qlora_exp.models.portable_adapters import is_portable
from qlora_exp.models.tuning import merged_tuned
from qlora_exp.paths import CONF, EMBEDDED, RunPaths
from qlora_exp.records.files import read_or_none, read_record, write_json, write_text
from qlora_exp.records.types import RunRecord
from qlora_exp.system.cards import Price, price_of

BYTES_PER_WEIGHT = {
    "adapter": 0.0,
    "merged": 2.0,
    "q8_0": 1.07,
    "q5_1": 0.76,
    "q5_0": 0.7,
    "q4_1": 0.64,
    "q4_0": 0.57,
    "tq2_0": 0.3,
    "tq1_0": 0.25,
}
"""Format → bytes per weight of the merged model or of a GGUF file: a block of 32 weights has a scale (the _1 types also
a minimum) in 16 bits."""
BLOCK_TYPES = tuple(name for name in BYTES_PER_WEIGHT if name not in ("adapter", "merged"))
TERNARY_TYPES = ("tq1_0", "tq2_0")
TERNARY_BLOCK = 256
SIZE_MARGIN = 1.2
"""Safety factor of the estimate, for embeddings in 8 bits, the tokenizer and the adapter."""


def load_settings(changes: Mapping[str, Any]) -> ExportConfig:
    """Return conf/export.yaml, overridden by ``changes`` (``None`` keeps a default).

    Raises:
        ConfigError: a key or format is unknown, or a number is out of range.
    """
    overrides = {key: value for key, value in changes.items() if value is not None}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), OmegaConf.load(CONF / "export.yaml"), overrides)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], "export", "qlora-exp export --help") from None
    assert isinstance(settings, ExportConfig)
    for name in settings.formats:
        if name not in BYTES_PER_WEIGHT:
            raise ConfigError(f"there is no format {name!r}", "--formats", nearest(name, BYTES_PER_WEIGHT))
    if not settings.formats:
        raise ConfigError("there is nothing to export", "--formats", f"some of {', '.join(BYTES_PER_WEIGHT)}")
    if settings.dtype not in (ComputeDtype.bfloat16, ComputeDtype.float16):
        what = f"a merged model is written in 16 bits, not as {settings.dtype.value}"
        raise ConfigError(what, "--dtype", "bfloat16 or float16")
    if not 0 <= settings.tolerance < 1:
        raise ConfigError(f"the tolerance is {settings.tolerance:g}", "--tolerance", "a share: 0.03 is 3 points")
    for name in ("context_tokens", "generated_tokens", "phone_file_bytes", "phone_memory_bytes"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}", "conf/export.yaml", "at least 1")
    for name in ("check_items", "phone_usd", "usd_per_hour"):
        if (getattr(settings, name) or 0) < 0:
            raise ConfigError(f"{name} is {getattr(settings, name)}", "qlora-exp export", "0 or more")
    return settings


def export_run(
    paths: RunPaths, to: Path | None, settings: ExportConfig, on_step: Callable[[str], None] = lambda _: None
) -> tuple[Export, Path]:
    """Export the run in ``paths`` to ``to`` (default: the run's own ``export/``); return the results and the folder.

    ``on_step`` is called with each step's name as the step begins.

    Raises:
        ExportError: the run has nothing to export, or the folder can't be written.
        ModelError: the base is missing or has changed, the adapter doesn't fit, or no GGUF file can be written of it.
    """
    source = check_run(paths, _to_gguf(settings))
    settings = _without_adapter(source, settings)
    _check_ternary(source, settings)
    target = export_folder(paths, to)
    _check_target(target, source.record, settings)
    with _staging_folder(target) as folder:
        export = _export(source, folder, settings, on_step)
    return export, target


def _check_target(target: Path, record: RunRecord, settings: ExportConfig) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "the folder isn't empty" if target.is_dir() else "there is a file of this name"
        raise ExportError(what, str(target), "--to another folder, or delete this one first")
    existing_parent = next(folder for folder in target.parents if folder.is_dir())
    parameters = record.plan.total_parameters if record.plan else 0
    needed = int(SIZE_MARGIN * parameters * sum(BYTES_PER_WEIGHT[name] for name in settings.formats))
    free = shutil.disk_usage(existing_parent).free
    if needed > free:
        what = f"the export takes about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise ExportError(what, str(existing_parent), "--to a folder on another disk, or fewer --formats")


@contextlib.contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """Yield a folder next to ``target`` that becomes ``target`` on success and is deleted on failure."""
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        folder.chmod(0o755)
        yield folder
        folder.replace(target)
    except QloraExpError:
        raise
    except (OSError, SafetensorError) as error:
        what = f"the export can't be written: {getattr(error, 'strerror', None) or error}"
        raise ExportError(what, str(target), "make room, or --to a folder that you may write to") from None
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _export(source: FinishedRun, folder: Path, settings: ExportConfig, on_step: Callable[[str], None]) -> Export:
    # Everything is made from the merged model. If it isn't one of the formats, it goes to a folder that is deleted.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as work:
        merged_folder = folder / "merged" if "merged" in settings.formats else Path(work)
        source.tokenizer.save_pretrained(merged_folder)
        questions = items_to_check(
            source.config,
            source.record,
            source.paths,
            source.tokenizer,
            settings.check_items,
            settings.tolerance,
        )
        artefacts = [_export_adapter(source, folder / "adapter")] if "adapter" in settings.formats else []
        fingerprint = source.record.model_fingerprint or ""
        if settings.formats != ["adapter"]:
            on_step("merge")
            merged, fingerprint = merged_tuned(source.config, source.paths.weights)
            add_end_token(merged, source.end_token)
            files = []
            for kind in (name for name in settings.formats if name in BLOCK_TYPES):
                on_step(f"write and check {kind}")
                path = folder / f"model-{kind}.gguf"
                write_gguf(merged, merged_folder, path, kind, source.record.name, source.end_token)
                positions = getattr(merged.config, "max_position_embeddings", None) or settings.context_tokens
                runtime = measure_runtime(path, min(settings.context_tokens, positions), settings.generated_tokens)
                if runtime.why:  # a file that crashes llama.cpp would end this process, too
                    check = not_checked(runtime.why, settings.tolerance)
                elif isinstance(questions, CheckItems):
                    check = check_exported_gguf(path, merged, questions)
                else:
                    check = questions
                files.append(Artefact(kind, path.name, path.stat().st_size, check, runtime))
            if "merged" in settings.formats:  # last: it is rounded in place
                on_step("write and check the merged model")
                merged.to(getattr(torch, settings.dtype.value)).save_pretrained(merged_folder)
                write_for_version_4(merged_folder)
                check = check_merged(merged_folder, questions) if isinstance(questions, CheckItems) else questions
                artefacts.append(Artefact("merged", "merged/", _folder_bytes(merged_folder), check))
            artefacts += files
    export = _results(source, artefacts, fingerprint or sources.fingerprint(source.model), settings)
    _write_cards(source, folder, export, settings)
    if source.model.name.startswith("embedded:"):
        shutil.copyfile(EMBEDDED / "LICENSE.wordnet", folder / "LICENSE.wordnet")
    write_json(folder / "export.json", export)
    return export


def _write_cards(source: FinishedRun, folder: Path, export: Export, settings: ExportConfig) -> None:
    """Write a model card for the export and for each of its folders, which may be copied alone; and the Modelfile."""
    places = {artefact.format: artefact.path.rstrip("/") for artefact in export.artefacts}
    cards: dict[str, dict[str, str]] = {
        "": places,
        **{name: {name: "."} for name in ("adapter", "merged") if name in places},
    }
    for name, found in cards.items():
        write_text(folder / name / "README.md", _card(source, export, found, settings))
    files = [file for name, file in places.items() if name in BLOCK_TYPES]
    if files:
        data, task = source.record.data, source.config.task
        chat = source.record.plan is not None and source.record.plan.format == "chat"
        prefix = data.answer_prefix if data is not None else None
        text = modelfile(files[0], source.tokenizer, chat, source.end_token, prefix, task.system)
        write_text(folder / "Modelfile", text)


def _card(source: FinishedRun, export: Export, places: Mapping[str, str], settings: ExportConfig) -> str:
    file = source.paths.adapter / "adapter_config.json"
    adapter = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    usage = usage_of(source.record, source.model, source.end_token, adapter)
    library = "peft" if "adapter" in places else "transformers"
    return export_card(source.record, export, library, usage_chapter(usage, places), settings.phone)


def push_export(paths: RunPaths, to: Path | None, settings: ExportConfig, push: Push) -> str:
    """Push the first of the formats of a run's export to the Hub, with its card, and return the address.

    Raises:
        ExportError: the folder has no such export, or the push is refused (:func:`~qlora_exp.export.push.push_files`).
    """
    source, folder = check_run(paths, _to_gguf(settings)), export_folder(paths, to)
    settings = _without_adapter(source, settings)
    export, name = exported_before(paths, to), settings.formats[0]
    artefact = next((one for one in export.artefacts if one.format == name), None) if export else None
    if export is None or artefact is None:
        hint = f"delete {folder} and repeat the command, or --to another folder"
        raise ExportError(f"the export has no format {name}", str(folder), hint)
    place = folder / artefact.path
    files = {file.name: file for file in (place.iterdir() if place.is_dir() else [place, folder / "Modelfile"])}
    if (licence := folder / "LICENSE.wordnet").is_file():
        files[licence.name] = licence
    base = source.model.where
    there = {name: push.repository if place.is_dir() else place.name}
    card = _card(source, export, there, settings)
    model = source.config.model
    for place_named in (base, model.adapter, model.path, model.instruct_path, source.model.path_or_id):
        card = without_folders(card, place_named) if place_named else card
    texts = {**dict(portable_texts(place)), "README.md": card}
    if place.is_file():  # the export's Modelfile is of its first GGUF file
        modelfile_text = (folder / "Modelfile").read_text(encoding="utf-8")
        texts["Modelfile"] = re.sub(r"^FROM .*", f"FROM ./{place.name}", modelfile_text, count=1, flags=re.MULTILINE)
    return push_files(files, texts, push, paths)


def _without_adapter(source: FinishedRun, settings: ExportConfig) -> ExportConfig:
    """Return ``settings`` without the format ``adapter`` for a run that tuned weights of the base itself."""
    if in_peft_format(source.config.method):
        if "adapter" in settings.formats and source.model.adapters and source.config.method.kind is not Method.lora:
            what = "only LoRA adapters can be combined with the adapters that the run started from"
            raise ExportError(what, "--formats adapter", "--formats merged")
        return settings
    formats = [name for name in settings.formats if name != "adapter"]
    if not formats:
        what = f"method={source.config.method.kind.value} trained no adapter"
        raise ExportError(what, "--formats adapter", "--formats merged, or a GGUF type such as q8_0")
    return replace(settings, formats=formats)


def _check_ternary(source: FinishedRun, settings: ExportConfig) -> None:
    """Refuse GGUF's ternary types for weights that aren't ternary, or that don't fill their blocks."""
    asked = [name for name in settings.formats if name in TERNARY_TYPES]
    if not asked:
        return
    if source.config.training.qat.format != "ternary":
        hint = "--formats q4_0; or train it: method=full training.qat.format=ternary"
        raise ExportError("the run's weights aren't ternary", f"--formats {asked[0]}", hint)
    widths = {shape.in_features for shape in describe(source.config.model).weights}
    if odd := sorted(width for width in widths if width % TERNARY_BLOCK):
        what = f"{asked[0]} stores rows in blocks of {TERNARY_BLOCK}, and the model has layers with {odd[0]} inputs"
        raise ExportError(what, f"--formats {asked[0]}", "--formats merged, or a wider model")


def _to_gguf(settings: ExportConfig) -> bool:
    return any(name in BLOCK_TYPES for name in settings.formats)


def export_folder(paths: RunPaths, to: Path | None) -> Path:
    """Return the folder of an export: ``to``, or ``export/`` in the run's own folder."""
    return (to or paths.export).expanduser().absolute()


def exported_before(paths: RunPaths, to: Path | None) -> Export | None:
    """Return the results of this run's export in the folder; ``None``: there is none."""
    export = read_or_none(Export, export_folder(paths, to) / "export.json")
    return export if export is not None and export.run_id == read_record(paths.record).run_id else None


def _export_adapter(source: FinishedRun, target: Path) -> Artefact:
    config, adapter = source.config, source.paths.adapter
    if source.model.adapters:
        write_combined([*map(Path, source.model.adapters), adapter], target)
        return Artefact("adapter", "adapter/", _folder_bytes(target))
    target.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if is_portable(settings):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(adapter / name, target / name)
    else:  # an adapter of an earlier version
        modules = resolve_targets(describe(config.model), config.targets)
        write_portable(load_base(config, "cpu"), config, modules, adapter, target)
    return Artefact("adapter", "adapter/", _folder_bytes(target))


def _results(source: FinishedRun, artefacts: list[Artefact], fingerprint: str, settings: ExportConfig) -> Export:
    """Return the export's results, with its cost and the answer to the phone case."""
    record = source.record
    seconds, price = record.speed.total_seconds, _price(record, settings)
    cost = seconds / 3600 * price.usd_per_hour if seconds is not None and price is not None else None
    return Export(
        schema_version=RESULTS_SCHEMA_VERSION,
        run_id=record.run_id,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base=source.model.name,
        base_fingerprint=fingerprint,
        trained_against=source.config.quantization.mode.value,
        merged_dtype=settings.dtype.value,
        training_seconds=seconds,
        cost_usd=cost,
        usd_per_hour=price.usd_per_hour if price else None,
        usd_per_hour_from=price.source if price else None,
        artefacts=tuple(artefacts),
        phone=answer_phone(artefacts, cost, seconds, settings, price),
    )


def _price(record: RunRecord, settings: ExportConfig) -> Price | None:
    """Return the caller's price, else the one that the record's costs use, else the price for a run started now."""
    if settings.usd_per_hour is not None:
        return Price(settings.usd_per_hour, "--usd-per-hour")
    if record.plan is not None and record.plan.usd_per_hour is not None:
        return Price(record.plan.usd_per_hour, record.plan.usd_per_hour_from or "the run's record")
    device = record.environment.device
    return price_of((record.config.get("budget") or {}).get("usd_per_hour"), device.kind, device.name)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
