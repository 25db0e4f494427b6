"""Instruct or base in one paragraph of plain words, each of which follows from a figure beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_exp.analysis.content import formatted_value
from qlora_exp.analysis.contrasts import INTERVAL, contrast_sentence
from qlora_exp.analysis.instruct_base import InstructBase, VariantCell, VariantContrast, baseline_note, verdict


def paragraph(found: InstructBase) -> str:
    """science.md's sentence, and what follows from the secondary contrasts."""
    return " ".join([primary_sentence(found), *_more(found), "This says nothing about instruct models in general."])


def settled(contrast: VariantContrast) -> bool:
    """Whether it holds among all secondary contrasts."""
    return contrast.adjusted_p is not None and contrast.adjusted_p <= 1 - INTERVAL


def primary_lead(found: InstructBase) -> str:
    return f"Instruct beside base, tuned: {verdict(found.tuned, found.margin)}."


def primary_sentence(found: InstructBase) -> str:
    first = found.instruct.configuration.first
    task = first.data.task if first.data is not None else "this task"
    where = task if first.scores.test is not None else f"{task} (its validation split)"
    names = [cell.name for cell in (found.instruct, found.base)]
    if found.instruct.rank != found.base.rank:
        names = [f"{cell.name}, r = {cell.rank}" for cell in (found.instruct, found.base)]
    return (
        f"On {where}, for this pair of checkpoints ({names[0]} against {names[1]}, chosen {found.chosen_by}), by how"
        f" many bits per byte of the answer instruct is better: untouched {contrast_sentence(found.untouched)};"
        f" in what tuning gains {contrast_sentence(found.gain)}; after tuning {contrast_sentence(found.tuned)}:"
        f" {verdict(found.tuned, found.margin)}."
    )


def _more(found: InstructBase) -> Iterator[str]:
    by_name = {contrast.name: contrast for contrast in found.secondary}
    yield from _accuracy(by_name)
    for when in ("tuned", "untouched"):
        worth = [
            f"{variant} {contrast_sentence(contrast.difference)}"
            for variant in ("base", "instruct")
            if (contrast := by_name.get(f"chat over plain, {variant}, {when}")) is not None
        ]
        if worth:
            yield f"What the chat template is worth within each (below 0: it costs), {when}: {', '.join(worth)}."
    yield from _shown_examples(found.base)
    yield from _forgetting(by_name.get("instruct over base, general text kept"))
    yield from _stability(found)
    note = baseline_note(found.instruct.configuration), baseline_note(found.base.configuration)
    yield from (
        f"{cell.name}: {said[0].lower()}{said[1:]}"
        for cell, said in zip((found.instruct, found.base), note, strict=True)
        if said
    )
    yield found.tokens.sentence


def _accuracy(by_name: Mapping[str, VariantContrast]) -> Iterator[str]:
    """The other way to score: it need not agree with bits per byte."""
    known = [
        f"{when} {contrast_sentence(contrast.difference)}"
        for when in ("untouched", "tuned")
        if (contrast := by_name.get(f"instruct over base, {when}, by likelihood")) is not None
    ]
    if known:
        yield f"By accuracy instruct is better by: {', '.join(known)}."


def _shown_examples(base: VariantCell) -> Iterator[str]:
    if base.few_shot is None or base.few_shot.accuracy is None:
        return
    told_of = [("untouched", base.untouched.accuracy), ("tuned", base.tuned.accuracy)]
    beside = ", ".join(f"{name} {value:.3f}" for name, value in told_of if value is not None)
    accuracy = base.few_shot.accuracy
    yield f"With {base.shots} examples in the prompt the untouched base has accuracy {accuracy:.3f} ({beside})."


def _forgetting(contrast: VariantContrast | None) -> Iterator[str]:
    if contrast is None:
        return
    more = "base" if contrast.difference.value > 0 else "instruct"
    who = f"{more.capitalize()} forgets more" if settled(contrast) else "Who forgets more is not settled"
    if contrast.adjusted_p is not None:
        who += f", p = {formatted_value(contrast.adjusted_p, 'p')} after adjustment"
    yield f"{who} (base − instruct {contrast_sentence(contrast.difference)} nats per byte of general text)."


def _stability(found: InstructBase) -> Iterator[str]:
    spread = [
        f"{cell.variant} {cell.seed_sd:.2g} [90 % {cell.seed_sd_low:.2g}, {cell.seed_sd_high:.2g}]"
        for cell in (found.instruct, found.base)
        if cell.seed_sd is not None
    ]
    if spread:
        yield f"From seed to seed the tuned score varies by {', '.join(spread)} (sd)."
