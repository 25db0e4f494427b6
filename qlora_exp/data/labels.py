"""The options of a classification task: its labels, and the completion text of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlora_exp.config.schema import TaskConfig, TaskKind
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.data.rows import Example
from qlora_exp.data.texts import comparable, normal_form, visible
from qlora_exp.errors import DataError, nearest

_MIN_ROWS_FOR_LABEL_CHECK = 20
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


def find_options(task: TaskConfig, train: Sequence[Example]) -> dict[str, str]:
    """Return the completion by label, in the order of ``task.labels`` or else sorted; empty for generation tasks.

    A label in two Unicode normal forms is one label, written as in the first row that has it.

    Raises :class:`DataError` for options that can't be distinguished, or are too many for a classification.
    """
    if task.kind is not TaskKind.classification:
        return {}
    seen: dict[str, Example] = {}
    for example in train:
        assert example.label is not None
        seen.setdefault(normal_form(example.label), example)
    if task.labels is None:
        labels = sorted(str(example.label) for example in seen.values())
        if len(train) >= _MIN_ROWS_FOR_LABEL_CHECK and len(labels) > len(train) / 2:
            raise DataError(
                f"{len(labels)} distinct labels in {len(train)} training rows: these are hardly options to choose from",
                "task.kind=classification",
                "task.kind=generation for free text, or task.labels=[…]",
            )
    else:
        labels = _configured_labels(task.labels)
    _check(labels, named=task.labels is not None)
    return {label: _completion(seen.get(normal_form(label)), label) for label in labels}


def _completion(example: Example | None, label: str) -> str:
    return label if example is None else example.completion


def _configured_labels(names: Sequence[str]) -> list[str]:
    labels = [str(label).strip() for label in names]
    if any(not label for label in labels):
        raise DataError("a label is empty", "task.labels", "give every option a text")
    forms = [normal_form(label) for label in labels]
    repeated = sorted({label for label in forms if forms.count(label) > 1})
    if repeated:
        raise DataError(f"the label {repeated[0]!r} is named twice", "task.labels", "name every option once")
    return labels


def _check(labels: Sequence[str], named: bool) -> None:
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


def split_by_label(examples: Sequence[Example], options: Mapping[str, str]) -> tuple[list[Example], list[RowProblem]]:
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
            hint = "give each label one completion, or none: task.completion=null task.columns.completion=null"
            problems.append(RowProblem(example.file, example.row, None, "ambiguous label", detail, hint))
        else:
            valid.append(replace(example, label=label, completion=options[label]))
    return valid, problems


def check_no_label_lost(before: Sequence[Example], after: Sequence[Example], problems: Sequence[RowProblem]) -> None:
    """Raise :class:`DataError` if dropping the invalid rows leaves a label without training rows."""
    lost = {example.label for example in before if example.label is not None} - {example.label for example in after}
    if lost:
        train = {(example.file, example.row): str(example.label) for example in before}
        reasons = [problem for problem in problems if train.get((problem.file, problem.row)) in lost]
        raise lost_label_error(train[reasons[0].file, reasons[0].row], reasons[0])


def lost_label_error(label: str, problem: RowProblem) -> DataError:
    """Return the error for a label that loses all training rows; ``problem`` is that of one of them."""
    what = f"dropping the invalid rows leaves no training row of the label {label!r}; the first: {problem.reason}"
    hint = "mend these rows; or leave the label out by naming the others: task.labels=[…]"
    return DataError(f"{what}: {problem.detail}", f"{problem.file}, row {problem.row}", hint)
