"""From a task's configuration to its three splits: read rows, validate, divide, check for leaks, and count."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_exp.config.enums import InvalidRows, TaskKind
from qlora_exp.config.schema import TaskConfig
from qlora_exp.data.contents import ending_of
from qlora_exp.data.files import DataFile, Unlabelled
from qlora_exp.data.items import DROP_HINT, SPLIT_NAMES, Item, RowProblem
from qlora_exp.data.layouts import Reading, label_note, recognise
from qlora_exp.data.rows import Example, read_examples
from qlora_exp.data.shared_context import check_groups, shared_context_warning
from qlora_exp.data.sources import read_sources
from qlora_exp.data.texts import comparable, normal_form, visible
from qlora_exp.errors import DataError, Problems, nearest

_DUPLICATE = "exact duplicate"
_MAX_SHOWN = 10
_REPORTED_ONCE = ("unknown label", "no answer")
"""Reasons that are reported once for each label or file, with the number of rows."""
_MISSING_WORDS = {"NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"}
_MIN_ROWS_FOR_LABEL_CHECK = 20
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


@dataclass(frozen=True)
class RawSplits:
    """Valid rows by split, before any tokenizer."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    options: dict[str, str]
    """For classification: the completion text by label, in the order of the options."""
    left_out: tuple[RowProblem, ...] = ()
    """The other rows: invalid ones (``task.invalid_rows=drop``) and exact duplicates."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reading: Reading | None = None
    """The task with its columns or templates, and what was recognised; ``None``: the rows were made by hand."""

    @property
    def examples(self) -> dict[str, tuple[Example, ...]]:
        """Return the rows by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def dropped(self) -> dict[str, int]:
        """Return how many rows were left out, by reason."""
        return count_reasons(self.left_out)


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
    reading = recognise(task, sources["train"])
    task = reading.task
    for split, raw in sources.items():
        splits[split], row_problems = read_examples(task, raw)
        problems += row_problems
        notes += raw.notes
    require_rows("train", splits["train"], problems)
    options = _find_options(task, splits["train"])  # before dividing: all rows of a rare label may get into one split
    if options and not task.labels:
        _check_no_label_dropped(task, sources["train"], options, problems)
    splits, duplicates = _add_missing_splits(splits, task)
    for split in splits:
        splits[split], unknown = _split_by_label(splits[split], options)
        problems += unknown
    labelled = splits["train"]
    splits, leaked = _without_leaks(splits)
    problems += leaked
    if task.invalid_rows is InvalidRows.error:
        raise_problems(problems)
    check_no_label_lost(labelled, splits["train"], problems)
    for split in ("train", "validation"):
        require_rows(split, splits[split], problems)
    limited = _limit_items(splits, task)
    notes += _missing_value_notes(example for split in SPLIT_NAMES for example in limited[split])
    note = label_note([example.completion for split in limited.values() for example in split], task)
    notes += [note] if note is not None else []
    if "task.columns.group" in reading.settings and _one_group(limited["test"] or limited["validation"]):
        limited = {split: [replace(example, group=None) for example in rows] for split, rows in limited.items()}
    train, validation, test = (tuple(limited[split]) for split in SPLIT_NAMES)
    scored = (test, "test") if test else (validation, "validation")
    check_groups(*scored)
    warning = shared_context_warning(*scored)
    warnings = (warning,) if warning is not None else ()
    left_out = (*problems, *duplicates)
    return RawSplits(train, validation, test, options, left_out, tuple(notes), warnings, reading)


def _one_group(scored: Sequence[Example]) -> bool:
    return len({example.group for example in scored}) == 1


def _check_numbers(task: TaskConfig) -> None:
    fractions = {"validation_fraction": task.validation_fraction, "test_fraction": task.test_fraction}
    for key, value in fractions.items():
        if not 0 <= value < 1:
            raise DataError(f"{key} is {value}", f"task.{key}", "a number from 0 to below 1, e.g. 0.1")
    if task.validation_fraction + task.test_fraction >= 1:
        both = "task.validation_fraction + task.test_fraction"
        raise DataError("nothing would be left to train on", both, "e.g. 0.1 and 0.1")
    for split in SPLIT_NAMES:
        limit = getattr(task, f"max_{split}_items")
        if limit is not None and limit < 1:
            raise DataError(f"max_{split}_items is {limit}", f"task.max_{split}_items", "at least 1; null: all")


def require_rows(split: str, rows: Sequence[Example | Item], problems: Sequence[RowProblem]) -> None:
    """Raise :class:`DataError` if the split has no row. If its rows were refused, the error gives the first reason."""
    if rows:
        return
    if problems:
        first = problems[0].error()
        what = f"no usable row is left for {split}: {len(problems)} rows were refused, the first because: {first.what}"
        raise DataError(what, first.where, first.hint)
    hint = f"give a {split} file, or a task.{split}_fraction above 0" if split != "train" else "give training rows"
    raise DataError(f"there is no row for {split}", f"task.{split}_fraction", hint)


def _find_options(task: TaskConfig, train: Sequence[Example]) -> dict[str, str]:
    """Return the completion by label, in the order of ``task.labels`` or else sorted; empty for generation tasks.

    A label in two Unicode normal forms is one label, written as in the first row that has it.

    Raises :class:`DataError` for options that can't be distinguished, or are too many for a classification.
    """
    if task.kind is not TaskKind.classification:
        return {}
    completions: dict[str, str] = {}
    spelling: dict[str, str] = {}
    for example in train:
        form = normal_form(str(example.label))
        completions.setdefault(form, example.completion)
        spelling.setdefault(form, str(example.label))
    if task.labels is None:
        labels = sorted(spelling.values())
        if len(train) >= _MIN_ROWS_FOR_LABEL_CHECK and len(labels) > len(train) / 2:
            raise DataError(
                f"{len(labels)} distinct labels in {len(train)} training rows: these are hardly options to choose from",
                "task.kind=classification",
                "task.kind=generation for free text, or task.labels=[…]",
            )
    else:
        labels = [str(label).strip() for label in task.labels]
        if any(not label for label in labels):
            raise DataError("a label is empty", "task.labels", "give every option a text")
        repeated = [form for form, count in sorted(Counter(map(normal_form, labels)).items()) if count > 1]
        if repeated:
            raise DataError(f"the label {repeated[0]!r} is named twice", "task.labels", "name every option once")
    _check_labels(labels, named=task.labels is not None)
    return {label: completions.get(normal_form(label), label) for label in labels}


def _check_labels(labels: Sequence[str], named: bool) -> None:
    if len(labels) < 2:
        raise DataError(
            f"there is one label only: {labels[0]!r}" if labels else "there are no labels",
            "task.labels, or the labels of the training rows",
            "a classification needs at least two; task.kind=generation for free text",
        )
    by_folded: dict[str, str] = {}
    for label in labels:
        seen_label = by_folded.setdefault(comparable(visible(label)), label)
        if seen_label != label and not named:
            cased = comparable(seen_label) == comparable(label)
            what = "upper and lower case only" if cased else "white space or invisible characters only"
            raise DataError(
                f"the labels {seen_label!r} and {label!r} differ in {what}",
                "the labels of the training rows",
                "use one spelling; or, if they mean different things, name all labels: task.labels=[…]",
            )
    by_number: dict[float, str] = {}
    for label in filter(_NUMBER.fullmatch, labels):
        seen_label = by_number.setdefault(float(label), label)
        if seen_label != label:
            what = f"the labels {seen_label!r} and {label!r} are one number written in two ways"
            raise DataError(what, "task.labels, or the labels of the training rows", "use one spelling")


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
            raise _lost_label_error(label, fault)


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
    """Draw whole sets of rows with the same prompt or group, so that neither is in two splits. File order is kept."""
    groups = _inseparable(examples)
    if len(groups) < len(fractions) + 1:
        rows = "distinct rows" if examples[0].group is None else "groups"
        raise DataError(
            f"{len(groups)} {rows} can't be divided into train, {' and '.join(fractions)}",
            examples[0].file,
            "give more rows, or a folder with train, validation and test files",
        )
    order = groups
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


def _inseparable(examples: Sequence[Example]) -> list[list[int]]:
    """Return sets of rows that share a prompt or a group, directly or through other rows; sets and rows in file order.

    Without groups these are the rows of each prompt."""
    first_with: dict[tuple[str, str], int] = {}
    parent = list(range(len(examples)))

    def first_of(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for index, example in enumerate(examples):
        keys = [("prompt", example.prompt_key)] + ([("group", example.group)] if example.group is not None else [])
        for key in keys:
            one, other = sorted((first_of(index), first_of(first_with.setdefault(key, index))))
            parent[other] = one
    sets: dict[int, list[int]] = {}
    for index in range(len(examples)):
        sets.setdefault(first_of(index), []).append(index)
    return list(sets.values())


def _without_leaks(splits: Mapping[str, list[Example]]) -> tuple[dict[str, list[Example]], list[RowProblem]]:
    """Return the splits without leaks, and the leaking rows: their prompt is in a later split, too.

    The order is train < validation < test, so that held-out rows stay."""
    held: dict[str, Example] = {}
    clean: dict[str, list[Example]] = {}
    problems: list[RowProblem] = []
    for split in reversed(SPLIT_NAMES):
        keyed = [(example.prompt_key, example) for example in splits[split]]
        clean[split] = [example for key, example in keyed if key not in held]
        for key, example in keyed:
            if key in held:
                held_example = held[key]
                detail = f"the same prompt is in {held_example.file}, row {held_example.row}"
                hint = "take it out of one of the two, or let task.invalid_rows=drop leave out this one"
                problems.append(RowProblem(example.file, example.row, None, "leak between splits", detail, hint))
        held = {**dict(reversed(keyed)), **held}
    return clean, problems


def _split_by_label(examples: Sequence[Example], options: Mapping[str, str]) -> tuple[list[Example], list[RowProblem]]:
    """Return the examples whose label is an option and whose completion is its text, and the others' problems."""
    if not options:
        return list(examples), []
    valid, problems = [], []
    written = {normal_form(label): label for label in options}
    for example in examples:
        label = written.get(normal_form(str(example.label)), str(example.label))
        if label not in options:
            detail = f"{label!r} is not one of the {len(options)} labels"
            hint = f"{nearest(label, options)}; or name it in task.labels"
            problems.append(RowProblem(example.file, example.row, None, "unknown label", detail, hint))
        elif normal_form(example.completion) != normal_form(options[label]):
            detail = f"{label!r} is answered by {example.completion!r} here and by {options[label]!r} elsewhere"
            hint = "give each label one completion, or learn the label: task.columns.completion=LABEL_COLUMN"
            problems.append(RowProblem(example.file, example.row, None, "ambiguous label", detail, hint))
        else:
            same = (example.label, example.completion) == (label, options[label])  # a copy of each row takes seconds
            valid.append(example if same else replace(example, label=label, completion=options[label]))
    return valid, problems


def check_no_label_lost(before: Sequence[Example], after: Sequence[Example], problems: Sequence[RowProblem]) -> None:
    """Raise :class:`DataError` if dropping the invalid rows leaves a label without training rows."""
    lost = {example.label for example in before if example.label is not None} - {example.label for example in after}
    if lost:
        train = {(example.file, example.row): str(example.label) for example in before}
        reasons = [problem for problem in problems if train.get((problem.file, problem.row)) in lost]
        raise _lost_label_error(train[reasons[0].file, reasons[0].row], reasons[0])


def _lost_label_error(label: str, problem: RowProblem) -> DataError:
    """Return the error for a label that loses all training rows; ``problem`` is that of one of them."""
    what = f"dropping the invalid rows leaves no training row of the label {label!r}; the first: {problem.reason}"
    hint = "mend these rows; or leave the label out by naming the others: task.labels=[…]"
    return DataError(f"{what}: {problem.detail}", f"{problem.file}, row {problem.row}", hint)


def raise_problems(problems: Sequence[RowProblem]) -> None:
    """Raise the first ten problems together, with the count of all; do nothing without problems."""
    if not problems:
        return
    reported: dict[tuple[object, ...], list[RowProblem]] = {}
    for number, problem in enumerate(problems):
        once = problem.of_template or problem.reason in _REPORTED_ONCE
        key = (problem.reason, problem.detail, problem.hint) if once else (number,)
        reported.setdefault(key, []).append(problem)
    errors = [equal[0].error(others=len(equal) - 1) for equal in list(reported.values())[:_MAX_SHOWN]]
    if len(reported) == 1:
        (only,) = errors
        hint = only.hint if only.hint == DROP_HINT or problems[0].of_template else f"{only.hint}; or {DROP_HINT}"
        raise DataError(only.what, only.where, hint)
    by_reason = ", ".join(f"{count} × {reason}" for reason, count in Counter(p.reason for p in problems).most_common())
    files = ", ".join(sorted({problem.file for problem in problems}))
    total = DataError(f"{len(problems)} rows can't be used: {by_reason}", files, DROP_HINT)
    raise Problems([*errors, total])


def count_reasons(problems: Iterable[RowProblem]) -> dict[str, int]:
    """Return the number of rows by reason."""
    return dict(sorted(Counter(problem.reason for problem in problems).items()))


def _limit_items(splits: Mapping[str, list[Example]], task: TaskConfig) -> dict[str, list[Example]]:
    """Draw at most ``task.max_*_items`` rows of each split by ``split_seed``. Larger draws contain smaller ones."""
    limited = {}
    for split in SPLIT_NAMES:
        order = list(range(len(splits[split])))
        random.Random(f"limit/{split}/{task.split_seed}").shuffle(order)
        kept = sorted(order[: getattr(task, f"max_{split}_items")])
        limited[split] = [splits[split][index] for index in kept]
    return limited


def _missing_value_notes(examples: Iterable[Example]) -> list[str]:
    """Return a note on a CSV file's answers that look like missing values. They are text: 'NA' may be Namibia."""
    answers = Counter(
        example.completion
        for example in examples
        if example.completion in _MISSING_WORDS and ending_of(Path(example.file)) in (".csv", ".tsv")
    )
    words = ", ".join(f"{word!r} ({count})" for word, count in answers.most_common())
    return [f"answers that are words for a missing value are learned as text: {words}"] if words else []
