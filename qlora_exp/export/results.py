"""What an export holds and what was measured of it: ``export.json``. ``None`` means unknown or not measured."""

from __future__ import annotations

from dataclasses import dataclass

RESULTS_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Runtime:
    """One GGUF file in llama.cpp, in a process of its own with one thread. Where it could not be run: ``why``."""

    name: str | None
    """Package and version."""
    processor: str | None
    threads: int
    context_tokens: int
    load_seconds: float | None = None
    peak_resident_bytes: int | None = None
    """The whole process: file, keys and values, buffers, and the Python around llama.cpp."""
    resident_before_bytes: int | None = None
    """Of these, what the process held before it opened the file."""
    prompt_tokens_per_second: float | None = None
    generated_tokens_per_second: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class TaskCheck:
    """The exported file's answers beside the run's own, on the same items. Where it could not be done: ``why``."""

    tolerance: float
    answer: str
    """Is the loss of ``metric`` within the tolerance? ``yes``, ``no`` or ``not shown``."""
    engine: str | None = None
    """What computed the exported file's answers."""
    metric: str | None = None
    """``accuracy`` or ``exact_match``."""
    split: str | None = None
    items: int = 0
    run: float | None = None
    exported: float | None = None
    lost_items: int | None = None
    """Right in the run, wrong now."""
    won_items: int | None = None
    low: float | None = None
    """One-sided 95 % bounds (each) of run − exported."""
    high: float | None = None
    run_loss_per_item: float | None = None
    exported_loss_per_item: float | None = None
    same_tokens: float | None = None
    """GGUF: share of the prompts that llama.cpp's tokenizer cuts as the run's own does."""
    why: str | None = None

    @property
    def cut_otherwise(self) -> str | None:
        """GGUF: that its own tokenizer isn't known to cut every prompt as the run's does, in words. The check feeds it
        the run's tokens."""
        if self.engine != "llama.cpp" or self.same_tokens == 1.0:
            return None
        if self.same_tokens is None:
            return "whether llama.cpp's own tokenizer cuts prompts as the run's does is unknown"
        same = f"{round(self.same_tokens * self.items)} of {self.items} prompts ({100 * self.same_tokens:.3g} %)"
        return f"llama.cpp's own tokenizer cuts {same} as the run's does: text typed on a phone is read otherwise"


@dataclass(frozen=True)
class Artefact:
    """One exported thing: a file, or a folder with a trailing slash; ``size_bytes`` without its model card."""

    format: str
    path: str
    size_bytes: int
    check: TaskCheck | None = None
    """``None`` for the adapter: it is the run's own file, and answers only together with its base."""
    runtime: Runtime | None = None
    """GGUF only."""


@dataclass(frozen=True)
class Criterion:
    """One condition of the phone case: ``yes``, ``no`` or ``not shown``, and the numbers in words."""

    name: str
    answer: str
    detail: str


@dataclass(frozen=True)
class PhoneAnswer:
    """Does it run on a phone, offline, for at most so many dollars? For the GGUF file that comes closest."""

    question: str
    answer: str
    artefact: str | None
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Export:
    schema_version: int
    run_id: str
    created_at: str
    base: str
    base_fingerprint: str
    trained_against: str
    """The quantization that the base was held in while the adapter was trained."""
    merged_dtype: str
    training_seconds: float | None
    cost_usd: float | None
    """Of this run alone, not of the search that found it."""
    usd_per_hour: float | None
    usd_per_hour_from: str | None
    """Who says so: ``--usd-per-hour``, ``budget.usd_per_hour``, or ``conf/prices.yaml`` with the device."""
    artefacts: tuple[Artefact, ...]
    phone: PhoneAnswer
