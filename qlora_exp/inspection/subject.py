"""What is inspected: a run's model, or a GGUF file, with or without the run that it was exported from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.config.enums import DeviceChoice
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError, QloraExpError, RecordError, nearest
from qlora_exp.export.results import Export
from qlora_exp.export.tuned_model import load_tuned_model
from qlora_exp.inspection.gguf_models import GgufEngine, config_of_file, engine_of, load_gguf_model
from qlora_exp.inspection.model_pair import ModelPair
from qlora_exp.inspection.prompts import prompt_format
from qlora_exp.models.base import load_base
from qlora_exp.models.sources import fingerprint, resolve_source
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_or_none, read_record
from qlora_exp.records.find import find_run
from qlora_exp.records.types import RunRecord
from qlora_exp.runs.entry_points import config_from_plain
from qlora_exp.runs.process import hide_other_gpus, set_threads
from qlora_exp.system import environment

GGUF = ".gguf"
ONLY_EXPORTED = "exported"
"""``--gguf exported``: the GGUF file in the run's export folder."""


@dataclass(frozen=True)
class Subject:
    """``record``, ``paths``: of the run, if it is known. ``file_config``: of a GGUF file; ``None``: the run's own
    model."""

    config: Config
    tokenizer: Any
    record: RunRecord | None
    paths: RunPaths | None
    file_config: Config | None = None
    engine: GgufEngine | None = None
    """What computes the GGUF file."""
    notes: tuple[str, ...] = ()
    """What a reader must know: what computes, and why there is no base."""

    @property
    def file(self) -> str | None:
        """The GGUF file; ``None``: the run's own model is inspected."""
        return self.file_config.model.variant_path if self.file_config is not None else None

    @property
    def name(self) -> str:
        """What is inspected, as a reader knows it."""
        run = f"run {self.record.run_id}" if self.record is not None else None
        return ", ".join(part for part in (self.file, run) if part is not None)

    @property
    def format(self) -> str:
        """``chat`` or ``plain``."""
        return prompt_format(self.record, self.tokenizer)

    def models(self, tokens: int | None) -> ModelPair:
        """Load the models. ``tokens``: of the longest text, if it is known: llama.cpp reserves memory for it.

        Raises:
            ModelError: a model can't be loaded.
        """
        if self.file_config is None:
            assert self.record is not None
            assert self.paths is not None
            model, _ = load_tuned_model(self.record, self.paths, "auto")
            return ModelPair(model, model)
        assert self.engine is not None
        hide_other_gpus(DeviceChoice.auto)
        set_threads(None)
        kind = environment.probe(DeviceChoice.auto).device.kind
        tuned = load_gguf_model(self.file_config, self.engine, len(self.tokenizer), tokens, kind)
        if self.record is None:
            return ModelPair(tuned, None)
        return ModelPair(tuned, load_base(self.config, kind).model)


def find_subject(run: str, gguf: str | None, outputs: OutputPaths) -> Subject:
    """Return what a command names: a run, a run with one of its GGUF files, or a GGUF file.

    A file in a run's export folder is of that run; the others are of the run that ``export.json`` next to them names.

    Raises:
        RecordError: there is no such run or file. ModelError, ConfigError: what it needs can't be read.
    """
    if gguf is not None:
        paths = find_run(run, outputs)
        return _of_file(_gguf_of_run(gguf, paths), paths)
    if not run.lower().endswith(GGUF):
        return _of_run(find_run(run, outputs))
    file = Path(run).expanduser()
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path()
        known = [str(path) for path in sorted(folder.glob(f"*{GGUF}")) if path.is_file()]
        raise RecordError("there is no such GGUF file", run, nearest(run, known) if known else "qlora-exp export RUN")
    return _of_file(file.absolute(), _run_of_file(file.absolute(), outputs))


def _of_run(paths: RunPaths) -> Subject:
    record = read_record(paths.record)
    if record.synthetic:
        raise ModelError("the run trained no model (training.engine=sleep)", record.run_id, "take a trained run")
    config = config_from_plain(record.config)
    shipped = record.shipped
    notes: tuple[str, ...] = ()
    if shipped is not None and shipped.format is not None and config.training.qat.format is None:
        notes = (
            f"the model as it was trained; the run's scores are of the one that ships, rounded to {shipped.format}",
        )
    return Subject(config, load_tokenizer(config.model), record, paths, notes=notes)


def _of_file(file: Path, paths: RunPaths | None) -> Subject:
    alone = config_of_file(file)
    engine = engine_of(file)
    if paths is None:
        return _of_file_alone(alone, engine, "its run isn't known: RUN --gguf FILE shows both as in the run")
    record = read_record(paths.record)
    config = config_from_plain(record.config)
    try:
        if record.model_fingerprint not in (None, fingerprint(resolve_source(config.model))):
            return _of_file_alone(alone, engine, "the base's files have changed since the run")
        tokenizer = load_tokenizer(config.model)
    except QloraExpError as error:
        return _of_file_alone(alone, engine, error.what)
    return Subject(config, tokenizer, record, paths, alone, engine, (engine.words,))


def _of_file_alone(alone: Config, engine: GgufEngine, why: str) -> Subject:
    """``why``: why the base isn't shown."""
    tokenizer = load_tokenizer(alone.model)
    prompts = "the file's chat template writes the prompt" if tokenizer.chat_template else "the prompt is plain text"
    return Subject(
        alone, tokenizer, None, None, alone, engine, (engine.words, f"{prompts}, and there is no base, because {why}")
    )


def _gguf_of_run(name: str, paths: RunPaths) -> Path:
    """Return the file that ``--gguf`` names: a path, ``exported``, or a block type as ``q8_0``."""
    file = Path(name).expanduser()
    if file.is_file():
        export = read_or_none(Export, file.absolute().parent / "export.json")
        if export is not None and export.run_id != read_record(paths.record).run_id:
            what = f"the file was exported from another run: {export.run_id}"
            raise RecordError(what, f"--gguf {name}", f"qlora-exp inspect {name}")
        return file.absolute()
    files = sorted(paths.export.glob(f"*{GGUF}"))
    chosen = files if name == ONLY_EXPORTED else [f for f in files if name in (f.stem, f.stem.removeprefix("model-"))]
    if len(chosen) == 1:
        return chosen[0]
    kinds = ", ".join(file.stem.removeprefix("model-") for file in files)
    if not files:
        what, hint = f"there is no file {name}, and the run has no export with a GGUF file", "qlora-exp export RUN"
    elif name == ONLY_EXPORTED:
        what, hint = (
            f"the run has {len(files)} exported GGUF files",
            f"name one: --gguf {kinds.split(', ')[0]} ({kinds})",
        )
    else:
        what, hint = f"there is no GGUF file {name!r}", f"a path, or one of the run's exported ones: {kinds}"
    raise RecordError(what, f"--gguf {name}", hint)


def _run_of_file(file: Path, outputs: OutputPaths) -> RunPaths | None:
    """Return the run that the file was exported from; ``None`` if it isn't known here."""
    above = RunPaths(file.parent.parent)
    if above.export == file.parent and above.record.is_file():
        return above
    export = read_or_none(Export, file.parent / "export.json")
    if export is None:
        return None
    try:
        return find_run(export.run_id, outputs)
    except RecordError:
        return None
