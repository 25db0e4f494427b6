"""A completed run whose adapter and base are there and fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_exp.config.enums import Method
from qlora_exp.config.peft_kinds import in_peft_format
from qlora_exp.config.schema import Config
from qlora_exp.errors import ExportError, ModelError
from qlora_exp.export.compatibility import end_of_answers
from qlora_exp.export.gguf import check_convertible
from qlora_exp.models import sources
from qlora_exp.models.sources import ModelSource, model_config, resolve_source
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.entry_points import config_from_plain


@dataclass(frozen=True)
class FinishedRun:
    """A run that passed the checks, with its parts."""

    config: Config
    record: RunRecord
    paths: RunPaths
    model: ModelSource
    tokenizer: Any
    end_token: int | None
    """The token with which the run's answers end."""


def check_run(paths: RunPaths, to_gguf: bool = False) -> FinishedRun:
    """Check everything that can be wrong with a run before a weight is read, and return its parts.

    ``to_gguf``: its merged model must be convertible to GGUF.

    Raises:
        ExportError: the run isn't complete, or has no adapter.
        ModelError: the base is missing or has changed, or no GGUF file can be written of it.
    """
    record = read_record(paths.record)
    if record.status is not Status.COMPLETED:
        hint = f"qlora-exp show {record.run_id} says why; take a completed run"
        raise ExportError(f"the run is {record.status}: its training is not complete", record.run_id, hint)
    if record.synthetic:
        raise ExportError("the run trained no model (training.engine=sleep)", record.run_id, "take a trained run")
    config = config_from_plain(record.config)
    in_adapter = in_peft_format(config.method)
    file = paths.adapter / "adapter_model.safetensors" if in_adapter else paths.tuned / "tuned.safetensors"
    if not file.is_file():
        what = f"the run has no {'adapter' if in_adapter else 'tuned weights'}: {file.name} is missing"
        raise ExportError(what, str(file.parent), f"restore it, or qlora-exp rerun {record.run_id}")
    if config.method.kind is Method.bottleneck:
        what = "bottleneck adapters are layers of their network: they can't be merged, and GGUF has no place for them"
        hint = "qlora_exp.load_run(RUN).model() loads the run; method=lora trains what can be exported"
        raise ExportError(what, record.run_id, hint)
    model = resolve_source(config.model)
    if record.model_fingerprint not in (None, sources.fingerprint(model)):
        what = "the base's files have changed since the run: the adapter would be added to other weights"
        raise ModelError(what, model.where, "restore them")
    tokenizer = load_tokenizer(config.model)
    if to_gguf:
        check_convertible(model_config(model), tokenizer, model.where)
    end_token = end_of_answers(tokenizer, record.plan.format) if record.plan else None
    return FinishedRun(config, record, paths, model, tokenizer, end_token)
