"""A configuration over its seeds: its settings, its score with an interval, its cost, and what uses its memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores, finite_score
from qlora_exp.formatting import flatten
from qlora_exp.records.method_name import LORA, adapter_name, is_lora, method_name
from qlora_exp.records.types import Memory, RunRecord, Scores
from qlora_exp.records.unread_settings import said_in_a_word, unread_prefixes

INTERVAL_CONFIDENCE = 0.95
"""Level of the two-sided intervals over seeds."""

IGNORED_KEYS = frozenset(
    (
        *("seed", "name", "output_root", "tracking", "evaluation", "budget", "task", "workers", "sweep"),
        *("training.resume", "training.threads", "training.logging_steps", "training.save_every_steps"),
    )
)
"""Keys in which two runs of one configuration may differ. The task is one: the protocol holds it equal."""

TUNING = "tuning"
"""Key of a configuration's settings: its tuning method, unless it is LoRA on all layers."""

SAID = ("ships", "qat", "teacher", "kept")
"""Keys of what :func:`said_in_a_word` says; they are absent if they are off."""

LABEL_KEYS = ("model.variant", "format", "quantization.mode", "lora.r", "targets.set")
"""Keys that every label shows (the format only where it differs)."""

MEASURES = {
    "loss_per_item": False,
    "bits_per_byte": False,
    "accuracy": True,
    "exact_match": True,
    "rouge_l": True,
    "loss": False,
}
"""Score → whether higher is better, the most telling first."""

OF_LORA = "lora."
PATTERNS = ("lora.rank_pattern.", "lora.alpha_pattern.")
"""Settings by module: without one, a configuration has no such key."""
"""Keys that runs of other methods don't have."""
PEAK_PARTS = ("weights", "quantization state", "adapters", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Measure:
    """The score that is compared, and whether higher is better."""

    name: str
    higher_is_better: bool

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")

    @property
    def label(self) -> str:
        units = {"loss_per_item": "nats per item", "loss": "nats per token", "bits_per_byte": "of the answer"}
        return f"{self.words}, {units[self.name]}" if self.name in units else self.words

    @property
    def unit(self) -> str:
        """Unit of a single value, e.g. ``nats per item``; the score's name if it has none."""
        units = {"loss_per_item": "nats per item", "loss": "nats per token", "bits_per_byte": "bits per byte"}
        return units.get(self.name, self.words)

    @property
    def is_loss(self) -> bool:
        return not self.higher_is_better

    @property
    def sign(self) -> float:
        """Factor after which a higher score is better."""
        return 1.0 if self.higher_is_better else -1.0

    def of(self, scores: Scores | None) -> float | None:
        return finite_score(scores, self.name)

    def shows_better(self, first: Estimate, second: Estimate | None) -> bool:
        """Return whether ``first`` is shown (95 %, over seeds) to be better than ``second``."""
        half, other_half = first.half_width(), second.half_width() if second is not None else None
        if second is None or half is None or other_half is None:
            return False
        return self.sign * (first.mean - second.mean) > math.hypot(half, other_half)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. ``se`` and ``df`` are ``None`` if no configuration has a second seed."""

    mean: float
    seeds: int
    se: float | None
    df: float | None

    def half_width(self) -> float | None:
        if self.se is None or self.df is None:
            return None
        return float(stats.t.ppf((1 + INTERVAL_CONFIDENCE) / 2, self.df)) * self.se

    @property
    def low(self) -> float | None:
        half = self.half_width()
        return None if half is None else self.mean - half

    @property
    def high(self) -> float | None:
        half = self.half_width()
        return None if half is None else self.mean + half


@dataclass(frozen=True)
class Configuration:
    """One configuration's finished runs, one per seed. Figures are means over seeds; ``None`` is unknown."""

    label: str
    settings: dict[str, Any]
    """Key → value, for the keys in which the compared configurations differ."""
    runs: tuple[RunRecord, ...]
    quality: Estimate | None
    memory_bytes: float | None
    """Peak of training if it was measured on a GPU, else weights + quantization state + adapter + gradients +
    optimizer."""
    tokens_per_second: float | None
    train_seconds: float | None
    cost_usd: float | None

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def rank(self) -> int:
        """Of its LoRA adapters; 0 for other methods."""
        return int(self.first.config["lora"]["r"]) if is_lora(self.first.config) else 0


def measure_of(records: Sequence[RunRecord]) -> Measure | None:
    """Return the first score that every run has, else the first that any run has; ``None`` if there is none.

    The order is that of :data:`MEASURES`. Loss per item is skipped if the runs differ in format or model family: it
    counts end tokens, which depend on both.
    """
    kinds = {
        (record.plan.format if record.plan is not None else None, tokenizer_family(record.config.get("model") or {}))
        for record in records
    }
    comparable = [name for name in MEASURES if name != "loss_per_item" or len(kinds) < 2]
    measures = [Measure(name, MEASURES[name]) for name in comparable]
    for enough in (all, any):
        for measure in measures:
            if records and enough(measure.of(answering_scores(record)) is not None for record in records):
                return measure
    return None


def tokenizer_family(model: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what runs with the same tokenizer share: the family, or the ids of a model of the Hub."""
    return tuple(model.get(key) for key in ("family", "id", "instruct_id"))


def configurations(records: Sequence[RunRecord], measure: Measure) -> list[Configuration]:
    """Group the runs into configurations, in the order in which they were first run.

    The variance over seeds is pooled over all of them, with Σ(seeds − 1) degrees of freedom. If a seed was run twice,
    its last run counts.
    """
    settings = [configuration_settings(record) for record in records]
    keys = dict.fromkeys(key for flat in settings for key in flat)
    varying = [key for key in keys if len({str(flat.get(key)) for flat in settings}) > 1]
    read = {key: {str(flat[key]) for flat in settings if key in flat} for key in varying}
    labelled = [key for key in varying if len(read[key]) > 1 or not key.startswith(OF_LORA) or key.startswith(PATTERNS)]
    groups: dict[tuple[str, ...], dict[int | None, RunRecord]] = defaultdict(dict)
    settings_of: dict[tuple[str, ...], dict[str, Any]] = {}
    for record, flat in zip(records, settings, strict=True):
        group = tuple(str(flat.get(key)) for key in varying)
        groups[group][record.seed] = record
        settings_of.setdefault(group, flat)
    values = {
        group: [value for run in runs.values() if (value := measure.of(answering_scores(run))) is not None]
        for group, runs in groups.items()
    }
    sd, df = pooled_sd(values.values())
    peak_is_known = all(
        record.memory.source == "cuda_allocated" and record.memory.peak_train_bytes is not None for record in records
    )
    made = []
    for group, by_seed in groups.items():
        runs, flat, scores = tuple(by_seed.values()), settings_of[group], values[group]
        quality = None
        if scores:
            se = None if sd is None else sd / math.sqrt(len(scores))
            quality = Estimate(float(np.mean(scores)), len(scores), se, df or None)
        memory = [run.memory.peak_train_bytes if peak_is_known else run.memory.model_state_bytes for run in runs]
        configuration = Configuration(
            label=_label(flat, labelled),
            settings={key: flat.get(key) for key in varying},
            runs=runs,
            quality=quality,
            memory_bytes=mean(memory),
            tokens_per_second=mean(run.speed.train_tokens_per_second for run in runs),
            train_seconds=mean(run.speed.train_seconds for run in runs),
            cost_usd=mean(run.speed.cost_usd for run in runs),
        )
        made.append(configuration)
    return made


def best_on_validation(candidates: Sequence[Configuration], measure: Measure) -> Configuration | None:
    """Return the configuration that is best on validation, to be scored on test; ``None`` if none has a score."""

    def on_validation(configuration: Configuration) -> float:
        value = known_mean(measure.of(run.scores.after) for run in configuration.runs)
        return -math.inf if value is None else measure.sign * value

    return max((c for c in candidates if c.quality is not None), key=on_validation, default=None)


def configuration_settings(record: RunRecord) -> dict[str, Any]:
    """Return dotted key → value of the settings that define a configuration; ``format`` as it was resolved."""
    compared = {group: values for group, values in record.config.items() if group not in IGNORED_KEYS}
    settings = {key: value for key, value in flatten(compared) if key not in IGNORED_KEYS and value != {}}
    unread = unread_prefixes(record.config)
    settings = {key: value for key, value in settings.items() if not key.startswith(unread)}
    if (name := method_name(record.config)) != LORA:
        settings[TUNING] = name
    settings |= said_in_a_word(record.config)
    return {**settings, "format": record.plan.format if record.plan is not None else None}


def pooled_sd(samples: Iterable[Sequence[float]]) -> tuple[float | None, int]:
    """Return the standard deviation over seeds, pooled over the samples, and its degrees of freedom.

    ``(None, 0)`` without a second seed.
    """
    several = [sample for sample in samples if len(sample) > 1]
    df = sum(len(sample) - 1 for sample in several)
    return (math.sqrt(sum(float(np.var(s) * len(s)) for s in several) / df), df) if df else (None, 0)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; ``None`` if any value is unknown, or there is none."""
    listed = list(values)
    return None if None in listed else known_mean(listed)


def known_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; ``None`` if there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mode_of(record: RunRecord) -> str:
    """Return the quantization mode, e.g. ``nf4``."""
    return str((record.config.get("quantization") or {}).get("mode"))


def variant_of(configuration: Configuration) -> str:
    """Return the checkpoint's variant, e.g. ``base``."""
    return str((configuration.first.config.get("model") or {}).get("variant"))


def targets_of(record: RunRecord) -> str:
    """Return the names of the target modules joined by ``+``, or the target set's name."""
    targets = record.config.get("targets") or {}
    modules = targets.get("modules")
    return "+".join(map(str, modules)) if modules else str(targets.get("set"))


def display_setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, list) else "unset" if value is None else str(value)


def memory_by_part(configurations: Sequence[Configuration]) -> dict[str, dict[str, float | None]]:
    """Return label → part (:data:`PEAK_PARTS`) → bytes, for each variant, quantization, rank and target set.

    Bytes are means over the runs that know the part; ``None`` if none does.
    """
    parts: dict[str, list[dict[str, float | None]]] = defaultdict(list)
    for configuration in configurations:
        for run in configuration.runs:
            parts[_memory_label(run)].append(_parts(run.memory))
    return {
        label: {part: known_mean(of_run[part] for of_run in runs) for part in PEAK_PARTS}
        for label, runs in parts.items()
    }


def memory_spread(configurations: Sequence[Configuration]) -> dict[str, float]:
    """Return label, as in :func:`memory_by_part`, → half of the 95 % interval of all known parts together, in bytes.

    A label with a single run has none.
    """
    by_label: dict[str, list[dict[str, float | None]]] = defaultdict(list)
    for configuration in configurations:
        for run in configuration.runs:
            by_label[_memory_label(run)].append(_parts(run.memory))
    spread = {}
    for label, of_runs in by_label.items():
        if len(of_runs) > 1:
            # A part that some runs don't know would make their totals differ.
            parts = [part for part in PEAK_PARTS if all(run[part] is not None for run in of_runs)]
            totals = [sum(run[part] or 0.0 for part in parts) for run in of_runs]
            t = float(stats.t.ppf((1 + INTERVAL_CONFIDENCE) / 2, len(totals) - 1))
            spread[label] = t * float(np.std(totals, ddof=1)) / math.sqrt(len(totals))
    return spread


def _memory_label(run: RunRecord) -> str:
    variant = (run.config.get("model") or {}).get("variant")
    return f"{variant} · {mode_of(run)} · {adapter_name(run.config, targets_of(run))}"


def _parts(memory: Memory) -> dict[str, float | None]:
    """Return bytes by part; activations are the peak of training minus the other parts that it counts.

    A GPU's peak counts all parts. A CPU's peak is what training adds to the weights and adapters held at its start.
    """
    held = {
        "weights": memory.base_weight_bytes,
        "quantization state": memory.quantization_state_bytes,
        "adapters": memory.adapter_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes,
    }
    counted = list(held.values()) if memory.source == "cuda_allocated" else [held["gradients"], held["optimizer"]]
    activations = None
    if memory.peak_train_bytes is not None and None not in counted:
        activations = max(0, memory.peak_train_bytes - sum(part for part in counted if part is not None))
    return {**held, "activations": activations}


def _label(flat: Mapping[str, Any], varying: Sequence[str]) -> str:
    adapters = []
    if "lora.r" in flat:
        adapters = [f"r {flat['lora.r']}", display_setting(flat.get("targets.modules") or flat.get("targets.set"))]
    parts = [
        str(flat.get("model.variant")),
        *([str(flat.get("format"))] if "format" in varying else []),
        str(flat.get("quantization.mode")),
        *([str(flat[TUNING])] if TUNING in flat else []),
        *adapters,
    ]
    implied = ("model.template_tokens_trained", "quantization.", "targets.", "method.", TUNING)
    names = {"training.learning_rate": "lr", "lora.alpha": "alpha"}
    for key in varying:
        unread = key.startswith(OF_LORA) and key not in flat
        if key in SAID:
            parts += [flat[key]] if key in flat else []
        elif key not in LABEL_KEYS and not key.startswith(implied) and not unread:
            short = key.removeprefix(OF_LORA) if key.startswith(PATTERNS) else key.rsplit(".", 1)[-1]
            parts.append(f"{names.get(key, short)} {display_setting(flat.get(key))}")
    return " · ".join(parts)
