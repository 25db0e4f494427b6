"""From a task's configuration to its three splits: read rows, validate, divide, check for leaks, and count."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_exp.config.schema import InvalidRows, TaskConfig
from qlora_exp.data.files import DataFile, Unlabelled
from qlora_exp.data.labels import check_no_label_lost, find_options, lost_label_error, split_by_label
from qlora_exp.data.row_problems import RowProblem, add_counts, raise_or_count
from qlora_exp.data.rows import Example, read_examples
from qlora_exp.data.rows_report import missing_value_notes
from qlora_exp.data.sources import read_sources
from qlora_exp.data.split_names import SPLIT_NAMES
from qlora_exp.data.texts import normal_form
from qlora_exp.errors import DataError

_DUPLICATE = "exact duplicate"


@dataclass(frozen=True)
class RawSplits:
    """Valid rows by split, before any tokenizer; ``dropped`` counts the other rows by reason."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    options: dict[str, str]
    """For classification: the completion text by label, in the order of the options."""
    dropped: dict[str, int]
    left_out: tuple[RowProblem, ...] = ()
    """The rows that ``dropped`` counts."""
    notes: tuple[str, ...] = ()


def load_rows(task: TaskConfig) -> RawSplits:
    """Read and validate every row of a task; no tokenizer, no model.

    ``task.invalid_rows`` says whether bad rows are dropped and counted, or raise :class:`Problems` together (the first
    ten and the count). A problem of the whole source raises :class:`DataError`.
    """
    _check_numbers(task)
    splits: dict[str, list[Example]] = {}
    problems: list[RowProblem] = []
    notes: list[str] = []
    sources = read_sources(task)
    for split, raw in sources.items():
        splits[split], row_problems = read_examples(task, raw)
        problems += row_problems
        notes += raw.notes
    _require_rows("train", splits["train"], problems)
    options = find_options(task, splits["train"])  # before dividing: all rows of a rare label may get into one split
    if options and not task.labels:
        _check_no_label_dropped(task, sources["train"], options, problems)
    splits, duplicates = _add_missing_splits(splits, task)
    for split in splits:
        splits[split], unknown = split_by_label(splits[split], options)
        problems += unknown
    labelled = splits["train"]
    splits, leaked = _without_leaks(splits)
    problems += leaked
    dropped = raise_or_count(problems, task.invalid_rows)
    check_no_label_lost(labelled, splits["train"], problems)
    for split in ("train", "validation"):
        _require_rows(split, splits[split], problems)
    limited = _limit_items(splits, task)
    counts = add_counts(dropped, {_DUPLICATE: len(duplicates)} if duplicates else {})
    train, validation, test = (tuple(limited[split]) for split in SPLIT_NAMES)
    return RawSplits(
        train, validation, test, options, counts, (*problems, *duplicates), (*notes, *missing_value_notes(limited))
    )


def _check_no_label_dropped(
    task: TaskConfig, raw: DataFile, options: Mapping[str, str], problems: Sequence[RowProblem]
) -> None:
    """Raise :class:`DataError` if ``drop`` would remove all rows of a label: it would no longer be an option."""
    column = task.columns.label
    faults = {(problem.file, problem.row): problem for problem in problems}
    if column is None or task.invalid_rows is not InvalidRows.drop:
        return
    known = {normal_form(label) for label in options}
    for row in raw.rows:
        value = row.values.get(column)
        is_label = isinstance(value, str | int) and not isinstance(value, bool | Unlabelled)
        label = str(value).strip() if is_label else ""
        fault = faults.get((row.file, row.number))
        if fault is not None and label and normal_form(label) not in known:
            raise lost_label_error(label, fault)


def _check_numbers(task: TaskConfig) -> None:
    fractions = {"validation_fraction": task.validation_fraction, "test_fraction": task.test_fraction}
    for key, value in fractions.items():
        if not 0 <= value < 1:
            raise DataError(f"{key} is {value}", f"task.{key}", "a number from 0 to below 1, e.g. 0.1")
    if task.validation_fraction + task.test_fraction >= 1:
        both = "task.validation_fraction + task.test_fraction"
        raise DataError("nothing would be left to train on", both, "e.g. 0.1 and 0.1")
    for split, limit in _limits(task).items():
        if limit is not None and limit < 1:
            raise DataError(f"max_{split}_items is {limit}", f"task.max_{split}_items", "at least 1; null: all")


def _limits(task: TaskConfig) -> dict[str, int | None]:
    limits = (task.max_train_items, task.max_validation_items, task.max_test_items)
    return dict(zip(SPLIT_NAMES, limits, strict=True))


def _require_rows(split: str, examples: Sequence[Example], problems: Sequence[RowProblem]) -> None:
    """Raise :class:`DataError` if the split has no row. If its rows were refused, the error gives the first reason."""
    if examples:
        return
    if problems:
        first = problems[0].error()
        raise DataError(
            f"no usable row is left for {split}: {len(problems)} rows were refused, the first because: {first.what}",
            first.where,
            first.hint,
        )
    hint = f"give a {split} file, or a task.{split}_fraction above 0" if split != "train" else "give training rows"
    raise DataError(f"there is no row for {split}", f"task.{split}_fraction", hint)


def _add_missing_splits(
    splits: Mapping[str, list[Example]], task: TaskConfig
) -> tuple[dict[str, list[Example]], list[RowProblem]]:
    """Return all three splits, and the exact duplicates left out. Splits that the source lacks are drawn from train."""
    fractions = {"validation": task.validation_fraction, "test": task.test_fraction}
    missing = {split: fraction for split, fraction in fractions.items() if split not in splits and fraction > 0}
    complete = {split: list(splits.get(split, [])) for split in SPLIT_NAMES}
    if not missing:
        return complete, []
    firsts: dict[tuple[str, str, str | None], Example] = {}
    duplicates: list[RowProblem] = []
    for example in splits["train"]:
        first = firsts.setdefault((example.prompt_key, example.answer_key, example.label), example)
        if first is not example:
            detail = f"the same as {first.file}, row {first.row}"
            duplicates.append(RowProblem(example.file, example.row, None, _DUPLICATE, detail))
    complete |= _divide(list(firsts.values()), missing, task.split_seed)
    return complete, duplicates


def _divide(examples: Sequence[Example], fractions: Mapping[str, float], seed: int) -> dict[str, list[Example]]:
    """Draw whole groups of rows with the same prompt, so that no prompt is in two splits. File order is kept."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.prompt_key, []).append(index)
    if len(groups) < len(fractions) + 1:
        raise DataError(
            f"{len(groups)} distinct rows can't be divided into train, {' and '.join(fractions)}",
            examples[0].file,
            "give more rows, or a folder with train, validation and test files",
        )
    order = list(groups.values())
    random.Random(f"split/{seed}").shuffle(order)
    owner = dict.fromkeys(range(len(examples)), "train")
    for split, fraction in fractions.items():
        target, taken = max(1, round(fraction * len(examples))), 0
        while taken < target and len(order) > 1:
            group = order.pop()
            owner.update(dict.fromkeys(group, split))
            taken += len(group)
    names = ("train", *fractions)
    return {name: [e for index, e in enumerate(examples) if owner[index] == name] for name in names}


def _without_leaks(splits: Mapping[str, list[Example]]) -> tuple[dict[str, list[Example]], list[RowProblem]]:
    """Return the splits without leaks, and the leaking rows: their prompt is in a later split, too.

    The order is train < validation < test, so that held-out rows stay."""
    held: dict[str, Example] = {}
    clean: dict[str, list[Example]] = {}
    problems: list[RowProblem] = []
    for split in reversed(SPLIT_NAMES):
        clean[split] = [example for example in splits[split] if example.prompt_key not in held]
        for example in splits[split]:
            if example.prompt_key in held:
                held_example = held[example.prompt_key]
                detail = f"the same prompt is in {held_example.file}, row {held_example.row}"
                hint = "take it out of one of the two, or let task.invalid_rows=drop leave out this one"
                problems.append(RowProblem(example.file, example.row, None, "leak between splits", detail, hint))
        held.update({example.prompt_key: example for example in reversed(clean[split])})
    return clean, problems


def _limit_items(splits: Mapping[str, list[Example]], task: TaskConfig) -> dict[str, list[Example]]:
    """Draw at most ``task.max_*_items`` rows of each split by ``split_seed``. Larger draws contain smaller ones."""
    limited = {}
    for split, limit in _limits(task).items():
        order = list(range(len(splits[split])))
        random.Random(f"limit/{split}/{task.split_seed}").shuffle(order)
        limited[split] = [splits[split][index] for index in sorted(order[:limit])]
    return limited
