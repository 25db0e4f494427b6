"""What a run's models answered, item by item: the right answer, the base model's and the tuned model's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.errors import RecordError
from qlora_exp.paths import RunPaths

SPLITS = ("test", "validation")
"""A run that was scored on both is read on test."""


@dataclass(frozen=True)
class ItemLoss:
    """Nats per token of an item's right answer and its end, by the base model and the tuned model."""

    item_id: str
    base: float
    tuned: float


def read_items(
    run_folder: Path | str, split: str | None = None, ids: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return one row per scored item, in the order in which they were scored. ``None`` is not known.

    ``split``: ``validation`` or ``test``; by default test if the run was scored on it, else validation. ``ids``: only
    these items. Each row has

    * ``id``: the data file and row, e.g. ``train.jsonl:17``; ``split``; ``group`` (the row's document or context)
    * ``prompt``: as the model reads it, cut if it is very long; ``None`` in runs of earlier versions and with
      ``evaluation.keep_texts=false``, which leaves out all texts of answers, too
    * ``expected``: the right answer
    * ``base_answer``, ``answer``: of the base model before tuning and of the tuned model. ``answer_kind`` says what
      they are: ``label``, the label with the largest likelihood (classification, which generates nothing for its
      accuracy), or ``generated``, the generated text. ``None``: no answer is known
    * ``base_correct``, ``correct``: whether the answer is right: the label is, or the texts match exactly
    * ``base_generated``, ``generated``: the generated texts, also of a classification
    * ``base_loss``, ``loss``: nats per token of the right answer and its end

    Example:
        >>> [row["prompt"] for row in read_items("outputs/runs/20261201-041236-…") if row["correct"] is False]

    Raises:
        RecordError: a file is damaged, or the run has no per-item files: it hasn't been scored.
    """
    paths = RunPaths(Path(run_folder))
    split = _scored_split(paths, split)
    after, before = (_by_id(paths.items(moment, split), ids) for moment in ("after", "before"))
    texts = _by_id(paths.texts(split), ids)
    rows = []
    for item_id in after or before:
        tuned, base, text = (table.get(item_id, {}) for table in (after, before, texts))
        known = tuned or base
        kind = _answer_kind(known, text)
        rows.append(
            {
                "id": item_id,
                "split": split,
                "group": known.get("group"),
                "prompt": text.get("prompt"),
                "expected": known.get("label" if kind == "label" else "answer"),
                "answer_kind": kind,
                "base_answer": _answer(base, text.get("base_generated"), kind),
                "answer": _answer(tuned, text.get("generated"), kind),
                "base_correct": _is_correct(base, kind),
                "correct": _is_correct(tuned, kind),
                "base_generated": _generated(base, text.get("base_generated")),
                "generated": _generated(tuned, text.get("generated")),
                "base_loss": _loss(base),
                "loss": _loss(tuned),
            }
        )
    return rows


def read_item_losses(run_folder: Path | str) -> list[ItemLoss]:
    """Return the losses of the items that both models were scored on, on test if the run was scored there. It reads no
    texts. Raises :class:`RecordError` as :func:`read_items` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = RunPaths(Path(run_folder))
    split, losses = _scored_split(paths, None), []
    for moment in ("before", "after"):
        file = paths.items(moment, split)
        if not file.is_file():
            return []
        try:
            table = pq.read_table(file, columns=["item_id", "loss_sum_nats", "tokens"]).to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise RecordError(f"the file can't be read: {error}", str(file), "restore it, or run again") from None
        figures = zip(table["item_id"], table["loss_sum_nats"], table["tokens"], strict=True)
        losses.append({name: nats / tokens for name, nats, tokens in figures if nats is not None and tokens})
    before, after = losses
    return [ItemLoss(name, before[name], value) for name, value in after.items() if name in before]


def _scored_split(paths: RunPaths, split: str | None) -> str:
    scored = [name for name in SPLITS if any(paths.items(moment, name).is_file() for moment in ("after", "before"))]
    split = split or next(iter(scored), None)
    if split not in scored:
        what = "the run has no items" if split is None else f"the run has no items of the {split} split"
        hint = f"it has those of {' and '.join(scored)}" if scored else "items are written when the models are scored"
        raise RecordError(what, str(paths.folder), hint)
    assert split is not None
    return split


def _by_id(file: Path, ids: Collection[str] | None) -> dict[str, dict[str, Any]]:
    """Return item id → row, of ``ids`` if given; empty if there is no file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not file.is_file():
        return {}
    try:
        table = pq.read_table(file)
        if ids is not None:
            table = table.filter(pc.is_in(table["item_id"], pa.array(ids, pa.string())))
        return {row["item_id"]: row for row in table.to_pylist()}
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RecordError(f"the file can't be read: {error}", str(file), "restore it, or run again") from None


def _answer_kind(row: dict[str, Any], text: dict[str, Any]) -> str | None:
    if row.get("correct") is not None or row.get("predicted") is not None:
        return "label"
    texts = (row.get("generated"), text.get("generated"), text.get("base_generated"))
    return "generated" if any(value is not None for value in texts) else None


def _answer(row: dict[str, Any], sample: str | None, kind: str | None) -> str | None:
    return row.get("predicted") if kind == "label" else _generated(row, sample)


def _generated(row: dict[str, Any], sample: str | None) -> str | None:
    """``sample``: generated after the scores, for a few items of a run that generates no answers for them."""
    generated: str | None = row.get("generated")
    return generated if generated is not None else sample


def _is_correct(row: dict[str, Any], kind: str | None) -> bool | None:
    correct: bool | None = row.get("correct" if kind == "label" else "exact")
    return correct


def _loss(row: dict[str, Any]) -> float | None:
    nats, tokens = row.get("loss_sum_nats"), row.get("tokens")
    return nats / tokens if nats is not None and tokens else None
