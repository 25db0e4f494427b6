"""Loads a run's model: the base in the run's quantization, with its adapter."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_exp.config.enums import DeviceChoice
from qlora_exp.errors import ConfigError, ModelError, nearest
from qlora_exp.export.compatibility import add_end_token, end_of_answers
from qlora_exp.models.base import load_base
from qlora_exp.models.kernels import with_kernels
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.models.tuning import load_tuned
from qlora_exp.paths import RunPaths
from qlora_exp.records.types import RunRecord
from qlora_exp.runs.entry_points import config_from_plain
from qlora_exp.runs.process import hide_other_gpus, set_threads
from qlora_exp.system import environment


def load_tuned_model(record: RunRecord, paths: RunPaths, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """See :meth:`qlora_exp.api.loaded_run.LoadedRun.model`."""
    devices = [choice.name for choice in DeviceChoice]
    if device not in devices:
        raise ConfigError(f"there is no device {device!r}", "device", nearest(device, devices))
    if not paths.weights.is_dir():
        hint = f"qlora-exp rerun {record.run_id}, or load another run"
        raise ModelError(f"the run has no adapter (its status is {record.status})", str(paths.weights), hint)
    choice = DeviceChoice[device]
    hide_other_gpus(choice)
    set_threads(None)
    config = config_from_plain(record.config)
    base = load_base(config, environment.probe(choice).device.kind)
    if record.model_fingerprint not in (None, base.fingerprint):
        what = "the base's files have changed since the run: the adapter belongs to other weights"
        raise ModelError(what, base.model.name_or_path, "restore them")
    model = load_tuned(base, config, paths.weights)
    tokenizer = load_tokenizer(config.model)
    if record.plan is not None:
        with_kernels(model, record.plan.kernels)
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_end_token(plain, end_of_answers(tokenizer, record.plan.format))
    return model, tokenizer
