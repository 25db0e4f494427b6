"""What a teacher answers: its scores, the rows that it writes for a student, and how close the student comes to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_exp.config.enums import DistillationMode, Divergence, InvalidRows
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.load import load_data
from qlora_exp.data.splits import RawSplits, load_rows
from qlora_exp.errors import ConfigError
from qlora_exp.evaluation.base_scores import cache_key, item_names
from qlora_exp.evaluation.generation import stop_rule
from qlora_exp.evaluation.kv_cache import CausalModel, scoring_mode
from qlora_exp.evaluation.likelihood import OptionTrie
from qlora_exp.evaluation.scoring import evaluate_splits, limit_items, score_items
from qlora_exp.evaluation.shared_scores import Wait, cached
from qlora_exp.records.files import write_json, write_text
from qlora_exp.records.schema import from_dict
from qlora_exp.records.teacher_run import StudentAgreement, TeacherRun, teacher_run
from qlora_exp.records.types import Scores
from qlora_exp.runs.ask_teacher import BATCH_ROWS, LoadedTeacher, Teacher, learned_logits, teacher_targets
from qlora_exp.training.distillation import TEACHER_LOG_PROBS, TEACHER_TOKENS, TeacherTargets, divergences

ANSWER_COLUMNS = ("predicted", "generated")
"""Per-item columns with a model's answer, the first that is known: the chosen label, else the generated text."""


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's scores (on test if it was scored there), and its answers by item of the student's split."""

    scores: Scores | None
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Consulted:
    """All that a student needs of its teacher. ``rows``: what it is trained on. ``targets``: the teacher's
    probabilities of the rows' learned tokens; ``None`` where it learns the teacher's texts. ``validated``: those of the
    validation items. ``dropped``: rows that are left out, as the teacher gave no answer that can be learned."""

    recorded: TeacherRun
    answers: Mapping[str, str]
    rows: tuple[Item, ...]
    targets: TeacherTargets | None
    validated: TeacherTargets
    dropped: int

    @property
    def warning(self) -> str | None:
        """Return what a reader must know of the rows, or ``None``."""
        if not self.dropped:
            return None
        return (
            f"the teacher gave no answer that can be learned to {self.dropped} of the training rows: they are left out"
        )


def consult(
    teacher: Teacher,
    config: Config,
    splits: Splits,
    tokenizer: Any,
    device_kind: str,
    cache: Path,
    wait: Wait | None = None,
    *,
    trains: bool = True,
) -> Consulted:
    """Ask the teacher everything that isn't in ``cache`` yet. It is loaded at most once, and its memory is free after.

    ``trains``: whether the student still is to be trained.
    """
    settings, loaded = config.distillation, LoadedTeacher(teacher, device_kind)
    data = (splits.record.fingerprint, str(config.training.max_length))
    rows, targets, dropped = splits.train, None, 0
    try:
        scored = teacher_scores(loaded, config, splits, tokenizer, cache, wait)
        if trains and settings.mode is DistillationMode.answers:
            written = written_answers(loaded, config, splits, tokenizer, data, cache, wait)
            rows = rewritten_rows(config, tokenizer, splits, written)
            dropped = len(splits.train) - len(rows)
        elif trains:
            targets = teacher_targets(loaded, rows, data, settings.top_k, settings.temperature, cache, wait)
        held_out, validation = limit_items(splits.validation, config), str(config.evaluation.max_items)
        place = (*data, "validation", validation)
        validated = teacher_targets(loaded, held_out, place, settings.top_k, 1.0, cache, wait)
    finally:
        loaded.close()
    return Consulted(_recorded(teacher, scored.scores), scored.answers, rows, targets, validated, dropped)


def _recorded(teacher: Teacher, scores: Scores | None) -> TeacherRun:
    record = teacher.record
    if record is None:
        return teacher_run(None, teacher.fingerprint, None, scores, teacher.name)
    parameters = record.plan.total_parameters if record.plan is not None else None
    mode = teacher.config.quantization.mode.value if teacher.requantized else None
    return teacher_run(record.run_id, teacher.fingerprint, parameters, scores, quantization=mode)


def teacher_scores(
    loaded: LoadedTeacher, config: Config, splits: Splits, tokenizer: Any, cache: Path, wait: Wait | None = None
) -> TeacherScores:
    """Return the teacher's scores: of a run from its record, of any other teacher on the student's items, cached."""
    teacher, split = loaded.teacher, config.evaluation.split.value
    if teacher.record is not None and teacher.paths is not None and not teacher.requantized:
        file, scores = teacher.paths.items("after", split), teacher.record.scores
        answers = answers_of(pq.read_table(file)) if file.is_file() else {}
        return TeacherScores(scores.test or scores.after, answers)
    evaluation = json.dumps(to_plain(config)["evaluation"], sort_keys=True, default=str)
    key = cache_key(teacher.fingerprint, splits.record.fingerprint, item_names(splits), evaluation)

    def load(path: Path) -> TeacherScores:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return TeacherScores(from_dict(Scores, raw["scores"], str(path)), raw["answers"])

    def compute() -> TeacherScores:
        validation, test = (limit_items(items, config) for items in (splits.validation, splits.test))
        after, on_test = evaluate_splits(loaded.model, tokenizer, validation, test, splits, config)
        scored = on_test if on_test is not None else after
        return TeacherScores(scored.scores, answers_of(scored.items) if config.evaluation.keep_texts else {})

    return cached(cache / "teacher", key, load, compute, lambda path, found: write_json(path, vars(found)), wait)


def answers_of(table: pa.Table) -> dict[str, str]:
    """Return each item's answer by its id; empty if a per-item table has none."""
    for name in ANSWER_COLUMNS:
        if name in table.column_names and table[name].null_count < table.num_rows:
            pairs = zip(table["item_id"].to_pylist(), table[name].to_pylist(), strict=True)
            return {item: answer for item, answer in pairs if answer is not None}
    return {}


def written_answers(
    loaded: LoadedTeacher,
    config: Config,
    splits: Splits,
    tokenizer: Any,
    data: Sequence[str],
    cache: Path,
    wait: Wait | None = None,
) -> dict[str, str]:
    """Return the teacher's answer to each training row by item id: the likeliest label, else its greedy text.

    They are written once for a teacher and data, as ``outputs/cache/teacher/KEY.jsonl``, a row per line.
    """
    limit = str(config.evaluation.max_new_tokens)
    key = cache_key(loaded.teacher.fingerprint, *data, item_names(splits), "answers", limit)
    prompts = {item.item_id: item for item in splits.train}

    def load(path: Path) -> dict[str, str]:
        lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        return {row["item_id"]: row["teacher"] for row in map(json.loads, lines)}

    def save(path: Path, written: dict[str, str]) -> None:
        rows = [
            {"item_id": name, "prompt": prompts[name].prompt, "answer": prompts[name].answer, "teacher": text}
            for name, text in written.items()
        ]
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_text(path.with_suffix(".jsonl"), lines)
        write_json(path, {"teacher": loaded.teacher.name, "items": len(rows)})

    def compute() -> dict[str, str]:
        trie = OptionTrie.of([splits.option_ids[label] for label in splits.labels]) if splits.labels else None
        with scoring_mode(loaded.model):
            causal = CausalModel(loaded.model)
            rule = stop_rule(splits, tokenizer, config, causal.base) if trie is None else None
            size, unit = config.evaluation.batch_size, "rows answered by the teacher"
            results = score_items(causal, tokenizer, splits.train, trie, rule, size, unit)
        texts = [
            splits.labels[int(result.options.argmax())] if result.options is not None else result.generated or ""
            for result in results
        ]
        return {item.item_id: text for item, text in zip(splits.train, texts, strict=True)}

    return cached(cache / "teacher", key, load, compute, save, wait)


def rewritten_rows(config: Config, tokenizer: Any, splits: Splits, written: Mapping[str, str]) -> tuple[Item, ...]:
    """Return the training rows with the teacher's answers, tokenized as the task's own; without those that can't be.

    Raises:
        ConfigError: none can be learned.
    """
    raw = load_rows(config.task)
    kept = {item.item_id for item in splits.train}
    examples = tuple(
        replace(example, completion=raw.options.get(text, text), label=text if raw.options else None, answer=None)
        for example in raw.train
        if example.item_id in kept and (text := written.get(example.item_id, "").strip())
    )
    if not examples:
        place = f"distillation.teacher = {config.distillation.teacher}"
        raise ConfigError(
            "the teacher gives no answer to any training row", place, "distillation.mode=offline, or another teacher"
        )
    dropping = replace(config, task=replace(config.task, invalid_rows=InvalidRows.drop))
    rows: RawSplits = replace(raw, train=examples)
    return load_data(dropping, tokenizer, config.training.max_length, rows).train


def agreement_of(model: Any, consulted: Consulted, items: pa.Table, splits: Splits, config: Config) -> StudentAgreement:
    """Return how close the trained student is to its teacher. ``items``: its per-item results on the scored split."""
    settings = replace(config.distillation, divergence=Divergence.forward, temperature=1.0)
    validation, total, tokens = limit_items(splits.validation, config), 0.0, 0
    order = sorted(range(len(validation)), key=lambda index: len(validation[index].ids))
    with scoring_mode(model):
        for begin in range(0, len(order), BATCH_ROWS):
            batch = order[begin : begin + BATCH_ROWS]
            for index, logits in zip(batch, learned_logits(model, [validation[i] for i in batch]), strict=True):
                targets = {name: value.to(logits.device) for name, value in consulted.validated.of([index]).items()}
                far = divergences(logits, targets[TEACHER_TOKENS], targets[TEACHER_LOG_PROBS], settings)
                total, tokens = total + float(far.double().sum()), tokens + len(far)
    own = answers_of(items)
    both = [name for name in own if name in consulted.answers]
    equal = sum(own[name].strip() == consulted.answers[name].strip() for name in both)
    return StudentAgreement(len(both), equal / len(both) if both else None, total / max(tokens, 1), tokens)
