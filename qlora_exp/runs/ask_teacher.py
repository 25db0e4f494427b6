"""The teacher of a distillation: a finished run, and what it says of each learned token of the training rows."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.evaluation.shared_scores import Wait, cached
from qlora_exp.models.base import load_base
from qlora_exp.models.file_digests import model_file_digest
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.models.tuning import load_tuned
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.progress import report_progress
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.find import find_run
from qlora_exp.records.teacher_run import TeacherRun, teacher_run
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.training.distillation import TeacherTargets, top_log_probs

BATCH_ROWS = 8
"""Rows of a forward pass of the teacher: all logits of a batch exist at once."""


@dataclass(frozen=True)
class Teacher:
    """A finished run that was checked. ``config``: its configuration."""

    record: RunRecord
    config: Config
    paths: RunPaths

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its base and of the files that it trained."""
        total = hashlib.sha256(str(self.record.model_fingerprint).encode())
        for file in sorted(self.paths.weights.glob("*.safetensors")):
            total.update(model_file_digest(file).encode())
        return f"sha256:{total.hexdigest()}"

    def recorded(self) -> TeacherRun:
        """Return what the student's record keeps of it: its scores on test if it has them."""
        scores, plan = self.record.scores, self.record.plan
        parameters = plan.total_parameters if plan is not None else None
        return teacher_run(self.record.run_id, self.fingerprint, parameters, scores.test or scores.after)


def find_teacher(config: Config, format: str, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """Return the run of ``distillation.teacher``; ``None``: there is none.

    Raises:
        ConfigError: it isn't a completed run, or reads text as other tokens than the student.
    """
    from qlora_exp.runs.entry_points import config_from_plain

    name = config.distillation.teacher
    if name is None:
        return None
    where = f"distillation.teacher = {name}"
    try:
        paths = find_run(name, OutputPaths.of(config.output_root))
        record = read_record(paths.record)
    except QloraExpError as error:
        raise ConfigError(f"the teacher isn't found: {error.what}", where, error.hint or "qlora-exp ls runs") from None
    if record.status is not Status.COMPLETED or record.synthetic:
        hint = "a completed run that trained a model: qlora-exp ls runs"
        raise ConfigError(f"the teacher is {record.status.value}", where, hint)
    own = config_from_plain(record.config)
    other = load_tokenizer(own.model)
    if other.get_vocab() != tokenizer.get_vocab():
        what = "the teacher has other tokens than the student: their probabilities can't be compared"
        raise ConfigError(what, where, "a teacher of the student's model family")
    if record.plan is not None and record.plan.format != format:
        what = f"the teacher was trained in the {record.plan.format} format, and the student's is {format}"
        raise ConfigError(what, where, f"task.format={record.plan.format}")
    if format == "chat" and other.chat_template != tokenizer.chat_template:
        raise ConfigError("the teacher has another chat template", where, "model.chat_template=FILE of the teacher")
    return Teacher(record, own, paths)


def teacher_targets(
    teacher: Teacher,
    config: Config,
    items: Sequence[Item],
    data_fingerprint: str,
    device_kind: str,
    cache: Path,
    wait: Wait | None = None,
) -> TeacherTargets:
    """Return the teacher's likely tokens and their log-probabilities for each learned token of ``items``.

    They are computed once for a teacher, data, top_k and temperature, and kept in ``cache``: a sweep asks once.
    """
    settings = config.distillation
    parts = (teacher.fingerprint, data_fingerprint, config.training.max_length, settings.top_k, settings.temperature)
    key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]

    def load(path: Path) -> TeacherTargets:
        with np.load(path.with_suffix(".npz")) as file:
            return TeacherTargets(*(torch.from_numpy(file[name]) for name in ("starts", "tokens", "log_probs")))

    def save(path: Path, targets: TeacherTargets) -> None:
        arrays = {name: getattr(targets, name).numpy() for name in ("starts", "tokens", "log_probs")}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path.with_suffix(".npz"))
        write_json(path, {"teacher": teacher.record.run_id, "items": len(items), "top_k": settings.top_k})

    def compute() -> TeacherTargets:
        return _asked(teacher, items, device_kind, settings.top_k, settings.temperature)

    return cached(cache / "teacher", key, load, compute, save, wait)


def _asked(teacher: Teacher, items: Sequence[Item], device_kind: str, k: int, temperature: float) -> TeacherTargets:
    base = load_base(teacher.config, device_kind)
    model = load_tuned(base, teacher.config, teacher.paths.weights)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    order = sorted(range(len(items)), key=lambda index: len(items[index].ids))
    for begin in range(0, len(order), BATCH_ROWS):
        batch = order[begin : begin + BATCH_ROWS]
        for index, logits in zip(batch, _learned_logits(model, [items[i] for i in batch], base.device), strict=True):
            tokens, log_probs = top_log_probs(logits, k, temperature)
            found[index] = tokens.to("cpu", torch.int32), log_probs.cpu()
        report_progress(begin + len(batch), len(order), "rows read by the teacher")
    del model, base
    gc.collect()
    if device_kind == "cuda":
        torch.cuda.empty_cache()
    counts = torch.tensor([0, *(len(found[index][0]) for index in range(len(items)))])
    tokens, log_probs = (torch.cat([found[index][part] for index in range(len(items))]) for part in (0, 1))
    return TeacherTargets(counts.cumsum(0), tokens, log_probs)


@torch.no_grad()
def _learned_logits(model: Any, items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
    """Return the logits before each learned token of each item, (learned tokens, vocabulary). A row's first token has
    nothing before it."""
    longest = max(len(item.ids) for item in items)
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
