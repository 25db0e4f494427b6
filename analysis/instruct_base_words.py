"""Instruct or base as one paragraph in plain words; a table of the section has each figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_exp.analysis.content import formatted_value
from qlora_exp.analysis.contrasts import INTERVAL, contrast_sentence
from qlora_exp.analysis.instruct_base import InstructBase, VariantCell, VariantContrast, baseline_note, verdict


def paragraph(comparison: InstructBase) -> str:
    """Return the sentence on the primary contrast, and what follows from the secondary contrasts."""
    return " ".join(
        [primary_sentence(comparison), *_more(comparison), "This says nothing about instruct models in general."]
    )


def settled(contrast: VariantContrast) -> bool:
    """Return whether the contrast holds after adjustment for all secondary contrasts."""
    return contrast.adjusted_p is not None and contrast.adjusted_p <= 1 - INTERVAL


def primary_lead(comparison: InstructBase) -> str:
    return f"Instruct beside base, tuned: {verdict(comparison.tuned, comparison.margin)}."


def primary_sentence(result: InstructBase) -> str:
    first = result.instruct.configuration.first
    task = first.data.task if first.data is not None else "this task"
    where = task if first.scores.test is not None else f"{task} (its validation split)"
    names = [cell.name for cell in (result.instruct, result.base)]
    if result.instruct.rank != result.base.rank:
        names = [f"{cell.name}, r = {cell.rank}" for cell in (result.instruct, result.base)]
    return (
        f"On {where}, for this pair of checkpoints ({names[0]} against {names[1]}, chosen {result.chosen_by}), by how"
        f" many bits per byte of the answer instruct is better: untouched {contrast_sentence(result.untouched)};"
        f" in what tuning gains {contrast_sentence(result.gain)}; after tuning {contrast_sentence(result.tuned)}:"
        f" {verdict(result.tuned, result.margin)}."
    )


def _more(comparison: InstructBase) -> Iterator[str]:
    by_name = {contrast.name: contrast for contrast in comparison.secondary}
    yield from _accuracy(by_name)
    for when in ("tuned", "untouched"):
        gains = [
            f"{variant} {contrast_sentence(contrast.difference)}"
            for variant in ("base", "instruct")
            if (contrast := by_name.get(f"chat over plain, {variant}, {when}")) is not None
        ]
        if gains:
            yield f"What the chat template is worth within each (below 0: it costs), {when}: {', '.join(gains)}."
    yield from _shown_examples(comparison.base)
    yield from _forgetting(by_name.get("instruct over base, general text kept"))
    yield from _stability(comparison)
    notes = baseline_note(comparison.instruct.configuration), baseline_note(comparison.base.configuration)
    yield from (
        f"{cell.name}: {note[0].lower()}{note[1:]}"
        for cell, note in zip((comparison.instruct, comparison.base), notes, strict=True)
        if note
    )
    yield comparison.tokens.sentence


def _accuracy(by_name: Mapping[str, VariantContrast]) -> Iterator[str]:
    """Yield the sentence on accuracy, which may disagree with bits per byte."""
    gains = [
        f"{when} {contrast_sentence(contrast.difference)}"
        for when in ("untouched", "tuned")
        if (contrast := by_name.get(f"instruct over base, {when}, by likelihood")) is not None
    ]
    if gains:
        yield f"By accuracy instruct is better by: {', '.join(gains)}."


def _shown_examples(base: VariantCell) -> Iterator[str]:
    if base.few_shot is None or base.few_shot.accuracy is None:
        return
    levels = [("untouched", base.untouched.accuracy), ("tuned", base.tuned.accuracy)]
    accuracies = ", ".join(f"{name} {value:.3f}" for name, value in levels if value is not None)
    accuracy = base.few_shot.accuracy
    yield f"With {base.shots} examples in the prompt the untouched base has accuracy {accuracy:.3f} ({accuracies})."


def _forgetting(contrast: VariantContrast | None) -> Iterator[str]:
    if contrast is None:
        return
    more = "base" if contrast.difference.value > 0 else "instruct"
    who = f"{more.capitalize()} forgets more" if settled(contrast) else "Who forgets more is not settled"
    if contrast.adjusted_p is not None:
        who += f", p = {formatted_value(contrast.adjusted_p, 'p')} after adjustment"
    yield f"{who} (base − instruct {contrast_sentence(contrast.difference)} nats per byte of general text)."


def _stability(comparison: InstructBase) -> Iterator[str]:
    spread = [
        f"{cell.variant} {cell.seed_sd:.2g} [90 % {cell.seed_sd_low:.2g}, {cell.seed_sd_high:.2g}]"
        for cell in (comparison.instruct, comparison.base)
        if cell.seed_sd is not None
    ]
    if spread:
        yield f"From seed to seed the tuned score varies by {', '.join(spread)} (sd)."
