"""Writes the README.md of an export: the run's model card, with what was exported, checked and measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qlora_exp.config.allowed_values import QUANTIZED
from qlora_exp.export.results import Artefact, Export
from qlora_exp.records.method_name import saves_adapter
from qlora_exp.records.model_card import model_card
from qlora_exp.records.types import RunRecord

QUANTIZED_NAMES = tuple(mode.value for mode in QUANTIZED)
FOUR_BIT_NOTE = (
    "GGUF files were quantized from the merged fp32 weights in blocks of 32 (embeddings and output head in 8 bits in "
    "all of them; the Q4_K types need rows of 256)."
)


def export_card(
    record: RunRecord, export: Export, library: str = "peft", usage: Iterable[str] = (), criteria: bool = False
) -> str:
    """Return Markdown: the model card of the run, with chapters on its use and on the export.

    Args:
        library: the library that loads the model.
        usage: the lines of :func:`~qlora_exp.export.usage.usage_chapter`.
        criteria: list every criterion of the phone case.
    """
    return model_card(
        record, library, "\n".join([*usage, *_export_chapter(export, criteria, saves_adapter(record.config))])
    )


def _export_chapter(export: Export, criteria: bool, adapter: bool) -> Iterator[str]:
    yield "## What was exported"
    yield ""
    added = "The adapter was added to the weights of" if adapter else "The tuned weights replaced those of"
    yield f"Run `{export.run_id}`. {added} `{export.base}` in fp32, unquantized, then"
    yield f"stored as {export.merged_dtype}."
    if export.trained_against in QUANTIZED_NAMES:
        yield (
            f"It was trained against the same base quantized to {export.trained_against}: its updates also compensate "
            "for that rounding, which the merged model doesn't have. The two are different models; the table shows "
            "how their scores differ."
        )
    yield ""
    yield "| artefact | MB | measured in | run | exported | within the tolerance | RAM, MB | tokens/s, one thread |"
    yield "|---|---:|---|---:|---:|---|---:|---:|"
    yield from (_row(artefact) for artefact in export.artefacts)
    yield ""
    for artefact in export.artefacts:
        check, runtime = artefact.check, artefact.runtime
        if check is not None and check.why is not None:
            yield f"{artefact.path}: not checked: {check.why}."
        if runtime is not None and runtime.why is not None:
            yield f"{artefact.path}: not measured: {runtime.why}."
        if check is not None and check.tokenization_note is not None:
            yield f"{artefact.path}: {check.tokenization_note}."
    if any(artefact.runtime for artefact in export.artefacts):
        yield FOUR_BIT_NOTE
    yield ""
    phone = export.phone
    file_name = f" (`{phone.artefact}`)" if phone.artefact else ""
    yield f"{phone.question[0].upper()}{phone.question[1:]}: {phone.answer}{file_name}."
    if criteria:
        yield ""
        for criterion in phone.criteria:
            yield f"* {criterion.name}: {criterion.answer} – {criterion.detail}"


def _row(artefact: Artefact) -> str:
    check, runtime = artefact.check, artefact.runtime
    cells = [
        f"`{artefact.path}`",
        f"{artefact.size_bytes / 1e6:.2f}",
        (check.engine if check else None) or "–",
        f"{check.run:.3f}" if check and check.run is not None else "–",
        f"{check.exported:.3f} ({check.metric})" if check and check.exported is not None else "–",
        f"{check.answer} (±{check.tolerance:g}, {check.items} items)" if check and check.metric else "–",
        f"{runtime.peak_resident_bytes / 1e6:.0f}" if runtime and runtime.peak_resident_bytes is not None else "–",
        f"{runtime.generated_tokens_per_second:,.1f}"
        if runtime and runtime.generated_tokens_per_second is not None
        else "–",
    ]
    return f"| {' | '.join(cells)} |"
