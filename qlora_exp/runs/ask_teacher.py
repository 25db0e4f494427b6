"""The teacher of a distillation: a finished run or an untuned model, and what it says of each learned token."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Variant
from qlora_exp.config.model_choice import model_overrides
from qlora_exp.config.schema import Config
from qlora_exp.data.encoding import resolve_format
from qlora_exp.data.items import Item
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.evaluation.shared_scores import Wait, cached
from qlora_exp.models.base import load_base
from qlora_exp.models.file_digests import model_file_digest
from qlora_exp.models.sources import fingerprint, resolve_source
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.models.tuning import load_tuned
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.progress import report_progress
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.find import find_run
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.training.distillation import TeacherTargets, top_log_probs

BATCH_ROWS = 8
"""Rows of a forward pass: all logits of a batch exist at once."""
MODEL = "model:"
"""``distillation.teacher=model:NAME`` is an untuned model."""


@dataclass(frozen=True)
class Teacher:
    """A teacher that was checked. ``config``: how it is loaded. ``record``, ``paths``: of the run that tuned it;
    ``None`` for an untuned model. ``requantized``: its base isn't quantized as in its training."""

    name: str
    config: Config
    record: RunRecord | None = None
    paths: RunPaths | None = None
    requantized: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its base and of the files that it trained; and of a quantization that isn't its training's."""
        if self.record is None:
            total = hashlib.sha256(fingerprint(resolve_source(self.config.model)).encode())
        else:
            total = hashlib.sha256(str(self.record.model_fingerprint).encode())
        for file in sorted(self.paths.weights.glob("*.safetensors")) if self.paths is not None else ():
            total.update(model_file_digest(file).encode())
        if self.record is None or self.requantized:
            total.update(repr(self.config.quantization).encode())
        return f"sha256:{total.hexdigest()}"


class LoadedTeacher:
    """The teacher's model, loaded when it is first asked; :meth:`close` frees its memory."""

    def __init__(self, teacher: Teacher, device_kind: str) -> None:
        self.teacher, self.device_kind = teacher, device_kind
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            base = load_base(self.teacher.config, self.device_kind)
            paths = self.teacher.paths
            self._model = base.model if paths is None else load_tuned(base, self.teacher.config, paths.weights)
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model = None
            gc.collect()
            if self.device_kind == "cuda":
                torch.cuda.empty_cache()


def find_teacher(config: Config, format: str, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """Return the teacher of ``distillation.teacher``; ``None``: there is none.

    Raises:
        ConfigError: it isn't a completed run or a model, can't be quantized as asked, or reads text as other tokens
            than the student.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    where = f"distillation.teacher = {name}"
    teacher = _model(config, name.removeprefix(MODEL), where) if name.startswith(MODEL) else _run(config, name, where)
    other = load_tokenizer(teacher.config.model)
    if other.get_vocab() != tokenizer.get_vocab():
        what = "the teacher has other tokens than the student: their probabilities can't be compared"
        raise ConfigError(what, where, "a teacher of the student's model family")
    plan = teacher.record.plan if teacher.record is not None else None
    own = plan.format if plan is not None else resolve_format(teacher.config)
    if own != format and teacher.record is not None:
        what = f"the teacher was trained in the {own} format, and the student's is {format}"
        raise ConfigError(what, where, f"task.format={own}")
    if format == "chat" and other.chat_template != tokenizer.chat_template:
        raise ConfigError("the teacher has another chat template", where, "model.chat_template=FILE of the teacher")
    return teacher


def _run(config: Config, name: str, where: str) -> Teacher:
    from qlora_exp.runs.entry_points import config_from_plain

    try:
        paths = find_run(name, OutputPaths.of(config.output_root))
        record = read_record(paths.record)
    except QloraExpError as error:
        hint = f"{error.hint or 'qlora-exp ls runs'}; an untuned model: distillation.teacher=model:NAME"
        raise ConfigError(f"the teacher isn't found: {error.what}", where, hint) from None
    if record.status is not Status.COMPLETED or record.synthetic:
        hint = "a completed run that trained a model: qlora-exp ls runs"
        raise ConfigError(f"the teacher is {record.status.value}", where, hint)
    own, mode = config_from_plain(record.config), config.distillation.teacher_quantization
    if mode is None or mode is own.quantization.mode:
        return Teacher(name, own, record, paths)
    if own.method.kind in TUNES_WEIGHTS:
        what = f"the teacher was tuned with method={own.method.kind.value}: its weights are its own, and stay exact"
        place = f"distillation.teacher_quantization = {mode.value}"
        raise ConfigError(what, place, "distillation.teacher_quantization=null, or a teacher with LoRA")
    chosen = compose([f"quantization={mode.value}", f"training.device={own.training.device.value}"]).quantization
    return Teacher(name, replace(own, quantization=chosen), record, paths, requantized=True)


def _model(config: Config, name: str, where: str) -> Teacher:
    if not name:
        hint = "distillation.teacher=model:NAME, a family, OWNER/NAME or a folder"
        raise ConfigError("the teacher has no name", where, hint)
    mode = config.distillation.teacher_quantization or config.quantization.mode
    variant = f"model.variant={config.model.variant.value}"
    given = [*model_overrides(name), f"quantization={mode.value}", f"training.device={config.training.device.value}"]
    given += [variant] if config.model.variant is not Variant.base else []
    try:
        chosen = compose(given)
        resolve_source(chosen.model)
    except QloraExpError as error:
        first = getattr(error, "errors", (error,))[0]
        raise ConfigError(
            f"the teacher isn't found: {first.what}", where, first.hint or "qlora-exp ls models"
        ) from None
    return Teacher(name, replace(config, model=chosen.model, quantization=chosen.quantization))


def teacher_targets(
    loaded: LoadedTeacher,
    items: Sequence[Item],
    key_parts: Sequence[str],
    top_k: int,
    temperature: float,
    cache: Path,
    wait: Wait | None = None,
) -> TeacherTargets:
    """Return the teacher's likely tokens and their log-probabilities for each learned token of ``items``.

    They are computed once for a teacher, ``key_parts`` (the data), top_k and temperature, and kept in ``cache``: a
    sweep asks once.
    """
    teacher = loaded.teacher
    parts = (teacher.fingerprint, *key_parts, top_k, temperature)
    key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]

    def load(path: Path) -> TeacherTargets:
        with np.load(path.with_suffix(".npz")) as file:
            return TeacherTargets(*(torch.from_numpy(file[name]) for name in ("starts", "tokens", "log_probs")))

    def save(path: Path, targets: TeacherTargets) -> None:
        arrays = {name: getattr(targets, name).numpy() for name in ("starts", "tokens", "log_probs")}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path.with_suffix(".npz"))
        write_json(path, {"teacher": teacher.name, "items": len(items), "top_k": top_k})

    def compute() -> TeacherTargets:
        return asked(loaded, items, top_k, temperature)

    return cached(cache / "teacher", key, load, compute, save, wait)


def asked(loaded: LoadedTeacher, items: Sequence[Item], k: int, temperature: float) -> TeacherTargets:
    """Return the same without a cache."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    order = sorted(range(len(items)), key=lambda index: len(items[index].ids))
    for begin in range(0, len(order), BATCH_ROWS):
        batch = order[begin : begin + BATCH_ROWS]
        for index, logits in zip(batch, learned_logits(loaded.model, [items[i] for i in batch]), strict=True):
            tokens, log_probs = top_log_probs(logits, k, temperature)
            found[index] = tokens.to("cpu", torch.int32), log_probs.cpu()
        report_progress(begin + len(batch), len(order), "rows read by the teacher")
    counts = torch.tensor([0, *(len(found[index][0]) for index in range(len(items)))])
    tokens, log_probs = (torch.cat([found[index][part] for index in range(len(items))]) for part in (0, 1))
    return TeacherTargets(counts.cumsum(0), tokens, log_probs)


@torch.no_grad()
def learned_logits(model: Any, items: Sequence[Item]) -> list[torch.Tensor]:
    """Return the logits before each learned token of each item, (learned tokens, vocabulary). A row's first token has
    nothing before it."""
    longest, device = max(len(item.ids) for item in items), model.get_input_embeddings().weight.device
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.ids)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return [
        logits[row, [place - 1 for place, learned in enumerate(item.completion_mask) if learned and place > 0]]
        for row, item in enumerate(items)
    ]
