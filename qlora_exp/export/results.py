"""The content of ``export.json``: what an export holds and what was measured. ``None`` means unknown or not
measured."""

from __future__ import annotations

from dataclasses import dataclass

RESULTS_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Runtime:
    """One GGUF file in llama.cpp, in a separate process with one thread. ``why``: the reason if it could not run."""

    name: str | None
    """Package and version."""
    processor: str | None
    threads: int
    context_tokens: int
    load_seconds: float | None = None
    peak_resident_bytes: int | None = None
    """The whole process: file, keys and values, buffers, and the Python around llama.cpp."""
    resident_before_bytes: int | None = None
    """The part of it that the process held before it opened the file."""
    prompt_tokens_per_second: float | None = None
    generated_tokens_per_second: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class TaskCheck:
    """The exported file's answers and the run's own on the same items. ``why``: the reason if there was no check."""

    tolerance: float
    answer: str
    """Is the loss of ``metric`` within the tolerance? ``yes``, ``no`` or ``not shown``."""
    engine: str | None = None
    """What computed the exported file's answers: ``transformers`` or ``llama.cpp``."""
    metric: str | None = None
    """``accuracy`` or ``exact_match``."""
    split: str | None = None
    items: int = 0
    run: float | None = None
    exported: float | None = None
    lost_items: int | None = None
    """Items that are right in the run and wrong now."""
    won_items: int | None = None
    """Items that are wrong in the run and right now."""
    low: float | None = None
    """One-sided 95 % bounds (each) of run − exported."""
    high: float | None = None
    run_loss_per_item: float | None = None
    exported_loss_per_item: float | None = None
    same_tokens: float | None = None
    """GGUF: share of the prompts that llama.cpp's tokenizer splits as the run's own does."""
    why: str | None = None

    @property
    def tokenization_note(self) -> str | None:
        """GGUF: a note if its own tokenizer may split prompts differently from the run's, else ``None``. The check
        itself uses the run's tokens."""
        if self.engine != "llama.cpp" or self.same_tokens == 1.0:
            return None
        if self.same_tokens is None:
            return "it is unknown whether llama.cpp's own tokenizer splits prompts as the run's does"
        same = f"{round(self.same_tokens * self.items)} of {self.items} prompts ({100 * self.same_tokens:.3g} %)"
        return (
            f"llama.cpp's own tokenizer splits only {same} as the run's does: text typed on a phone gives other tokens"
        )


@dataclass(frozen=True)
class Artefact:
    """One exported file, or a folder with a trailing slash. ``size_bytes`` excludes its model card."""

    format: str
    path: str
    size_bytes: int
    check: TaskCheck | None = None
    """``None`` for the adapter: it is the run's own file, and answers only with its base."""
    runtime: Runtime | None = None
    """GGUF only."""


@dataclass(frozen=True)
class Criterion:
    """One condition of the phone case: ``yes``, ``no`` or ``not shown``, with the numbers in words."""

    name: str
    answer: str
    detail: str


@dataclass(frozen=True)
class PhoneAnswer:
    """Does it run on a phone, offline, for at most so many dollars? The answer for the GGUF file that comes closest."""

    question: str
    answer: str
    artefact: str | None
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Export:
    """All results of one export, written as ``export.json``."""

    schema_version: int
    run_id: str
    created_at: str
    base: str
    base_fingerprint: str
    trained_against: str
    """The quantization of the base during training."""
    merged_dtype: str
    training_seconds: float | None
    cost_usd: float | None
    """Cost of this run alone, without the search that found it."""
    usd_per_hour: float | None
    usd_per_hour_from: str | None
    """Source of the price: ``--usd-per-hour``, ``budget.usd_per_hour``, or ``conf/prices.yaml`` with the device."""
    artefacts: tuple[Artefact, ...]
    phone: PhoneAnswer
