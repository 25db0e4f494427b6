"""Instruct or base as one paragraph in plain words; a table of the section has each figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_exp.analysis.contrasts import INTERVAL, contrast_sentence
from qlora_exp.analysis.instruct_base import (
    AFTER,
    BEFORE,
    InstructBase,
    VariantCell,
    VariantContrast,
    baseline_note,
    verdict,
)
from qlora_exp.analysis.report_content import formatted_value


def paragraph(comparison: InstructBase) -> str:
    """Return the sentences on the primary contrast, and what follows from the secondary contrasts."""
    return " ".join(
        [
            primary_lead(comparison),
            primary_sentence(comparison),
            *_more(comparison),
            "This says nothing about instruct models in general.",
        ]
    )


def settled(contrast: VariantContrast) -> bool:
    """Return whether the contrast holds after adjustment for all secondary contrasts."""
    return contrast.adjusted_p is not None and contrast.adjusted_p <= 1 - INTERVAL


def primary_lead(comparison: InstructBase) -> str:
    """Return the answer in one sentence: which model is better after tuning, and by how much."""
    tuned = comparison.tuned
    answer = verdict(tuned, comparison.margin)
    if tuned is not None and tuned.low is not None and tuned.high is not None and answer in ("better", "worse"):
        model = "instruct" if answer == "better" else "base"
        low, high = sorted((abs(tuned.low), abs(tuned.high)))
        return (
            f"After tuning, the {model} model is better: {abs(tuned.value):.3g} bits per byte"
            f" (90 % CI {low:.3g}–{high:.3g}, {tuned.over})."
        )
    if answer == "not settled":
        return "After tuning, it is not settled which model is better."
    return f"After tuning, both models are {answer} bits per byte."


def primary_sentence(comparison: InstructBase) -> str:
    first = comparison.instruct.configuration.first
    task = first.data.task if first.data is not None else "this task"
    where = task if first.scores.test is not None else f"{task} (its validation split)"
    cells = (comparison.instruct, comparison.base)
    names = [f"({cell.name})" for cell in cells]
    if comparison.instruct.rank != comparison.base.rank:
        names = [f"({cell.name}, r = {cell.rank})" for cell in cells]
    return (
        f"On {where}, this pair of checkpoints is compared: {names[0]} with {names[1]}, chosen {comparison.chosen_by}."
        " In bits per byte of the answer (above 0: instruct is better), the difference is"
        f" {contrast_sentence(comparison.before_tuning)} before tuning and {contrast_sentence(comparison.tuned)} after"
        f" tuning. Tuning changes it by {contrast_sentence(comparison.gain)}."
    )


def _more(comparison: InstructBase) -> Iterator[str]:
    by_name = {contrast.name: contrast for contrast in comparison.secondary}
    yield from _accuracy(by_name)
    for when in (AFTER, BEFORE):
        gains = [
            f"{variant} {contrast_sentence(contrast.difference)}"
            for variant in ("base", "instruct")
            if (contrast := by_name.get(f"chat over plain, {variant}, {when}")) is not None
        ]
        if gains:
            yield (
                f"Gain of the chat format over the plain one {when}, in bits per byte (below 0: a loss):"
                f" {', '.join(gains)}."
            )
    yield from _shown_examples(comparison.base)
    yield from _forgetting(by_name.get("instruct over base, general text kept"))
    yield from _stability(comparison)
    notes = baseline_note(comparison.instruct.configuration), baseline_note(comparison.base.configuration)
    yield from (
        f"{cell.name.capitalize()}: {note[0].lower()}{note[1:]}"
        for cell, note in zip((comparison.instruct, comparison.base), notes, strict=True)
        if note
    )
    yield comparison.tokens.sentence


def _accuracy(by_name: Mapping[str, VariantContrast]) -> Iterator[str]:
    """Yield the sentence on accuracy, which may disagree with bits per byte."""
    gains = [
        f"{contrast_sentence(contrast.difference)} {when}"
        for when in (BEFORE, AFTER)
        if (contrast := by_name.get(f"instruct over base, {when}, by likelihood")) is not None
    ]
    if gains:
        yield f"In accuracy (above 0: instruct is better), the difference is {' and '.join(gains)}."


def _shown_examples(base: VariantCell) -> Iterator[str]:
    if base.few_shot is None or base.few_shot.accuracy is None:
        return
    levels = [("without", base.before_tuning.accuracy), ("tuned", base.tuned.accuracy)]
    accuracies = ", ".join(f"{name} {value:.3f}" for name, value in levels if value is not None)
    accuracy = base.few_shot.accuracy
    yield f"With {base.shots} examples in the prompt, base has accuracy {accuracy:.3f} before tuning ({accuracies})."


def _forgetting(contrast: VariantContrast | None) -> Iterator[str]:
    if contrast is None:
        return
    more = "base" if contrast.difference.value > 0 else "instruct"
    who = f"{more.capitalize()} forgets more" if settled(contrast) else "Which model forgets more is not settled"
    if contrast.adjusted_p is not None:
        who += f", adjusted p = {formatted_value(contrast.adjusted_p, 'p')}"
    yield f"{who}. Base − instruct, in nats per byte of general text: {contrast_sentence(contrast.difference)}."


def _stability(comparison: InstructBase) -> Iterator[str]:
    spread = [
        f"{cell.variant} {cell.seed_sd:.2g} (90 % CI {cell.seed_sd_low:.2g}–{cell.seed_sd_high:.2g})"
        for cell in (comparison.instruct, comparison.base)
        if cell.seed_sd is not None
    ]
    if spread:
        yield f"Standard deviation of the tuned score over seeds, in bits per byte: {', '.join(spread)}."
