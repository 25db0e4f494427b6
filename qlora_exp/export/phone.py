"""Answers the startup case from measurements: does the model run on a phone, offline, for at most one dollar?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_exp.export.export_config import ExportConfig
from qlora_exp.export.results import Artefact, Criterion, PhoneAnswer
from qlora_exp.system.cards import Price

ANSWER_ORDER = ("no", "not shown", "yes")
"""From worst to best: a case is as good as its worst criterion."""


def answer_phone(
    artefacts: Sequence[Artefact],
    cost_usd: float | None,
    training_seconds: float | None,
    settings: ExportConfig,
    price: Price | None = None,
) -> PhoneAnswer:
    """Return the answer and its criteria. ``price`` is the one by which ``cost_usd`` was computed.

    *yes* if one GGUF file meets every criterion, *no* if each file misses one, else *not shown*.
    """
    question = f"runs on a phone, offline, for at most {settings.phone_usd:g} USD"
    files = [artefact for artefact in artefacts if artefact.path.endswith(".gguf")]
    cost = _cost(cost_usd, training_seconds, settings.phone_usd, price)
    if not files:
        no_file = Criterion("file", "not shown", "no GGUF file was exported")
        return PhoneAnswer(question, "not shown", None, (no_file, cost))
    candidates = [(file, (*_file_criteria(file, settings), cost)) for file in files]
    best, criteria = max(
        candidates, key=lambda candidate: (ANSWER_ORDER.index(_worst(candidate[1])), -candidate[0].size_bytes)
    )
    return PhoneAnswer(question, _worst(criteria), best.path, criteria)


def _worst(criteria: Sequence[Criterion]) -> str:
    return min((criterion.answer for criterion in criteria), key=ANSWER_ORDER.index)


def _file_criteria(file: Artefact, settings: ExportConfig) -> Iterator[Criterion]:
    runtime, check = file.runtime, file.check
    limit = settings.phone_file_bytes
    detail = f"{_megabytes(file.size_bytes)}, limit {_megabytes(limit)}"
    yield Criterion("file size", "yes" if file.size_bytes <= limit else "no", detail)

    why = runtime.why if runtime else None
    if runtime is None or runtime.peak_resident_bytes is None:
        yield Criterion("memory", "not shown", why or "this system doesn't say a process's peak memory")
    else:
        peak, limit = runtime.peak_resident_bytes, settings.phone_memory_bytes
        detail = (
            f"{_megabytes(peak)} resident at {runtime.context_tokens} tokens of context, limit {_megabytes(limit)}; "
            "measured in llama.cpp on this machine"
        )
        yield Criterion("memory", "yes" if peak <= limit else "no", detail)

    if runtime is None or runtime.generated_tokens_per_second is None:
        yield Criterion("runs offline", "not shown", why or "not run in llama.cpp")
    else:
        detail = (
            "llama.cpp generated from the one file, in a process in which Python refuses every socket: "
            f"{runtime.generated_tokens_per_second:,.1f} tokens/s on one thread of {runtime.processor or 'this CPU'}"
        )
        yield Criterion("runs offline", "yes", detail)

    if check is None or check.metric is None or check.run is None or check.exported is None:
        yield Criterion("answers the task", "not shown", (check.why if check else None) or "not checked")
    else:
        detail = (
            f"{check.metric.replace('_', ' ')} {check.exported:.3f}, the run's own {check.run:.3f} on the same "
            f"{check.items} items; tolerance {check.tolerance:g}, loss at most {check.high:.3f} (95 %)"
        )
        answer = check.answer
        if check.tokenization_note is not None:
            answer = min(answer, "not shown", key=ANSWER_ORDER.index)
            detail += f"; {check.tokenization_note}"
        yield Criterion("answers the task", answer, detail)


def _cost(cost_usd: float | None, seconds: float | None, limit: float, price: Price | None) -> Criterion:
    if cost_usd is None:
        what = "the price of the machine is unknown (conf/prices.yaml doesn't have it): --usd-per-hour"
        if seconds:
            what += f"; up to {limit * 3600 / seconds:.3g} USD an hour its {seconds:.0f} s cost at most {limit:g} USD"
        return Criterion("training cost", "not shown", what)
    at = f" at {price.usd_per_hour:g} USD an hour, by {price.source}" if price is not None else ""
    detail = f"{cost_usd:.2g} USD for this run alone ({seconds or 0:.0f} seconds{at}), limit {limit:g} USD"
    return Criterion("training cost", "yes" if cost_usd <= limit else "no", detail)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
