"""Find which column of a table means what, and whether a higher score is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.analysis.table_files import TableRow
from qlora_exp.errors import AnalysisError, nearest

ALIASES: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "r", "lora_r", "lora_rank", "lora.r", "lora.rank", "peft.r", "peft_config.r", "lora_config.r"),
    "seed": ("seed", "random_seed", "training.seed"),
    "item": ("item", "item_id", "example", "example_id", "sample_id", "question_id"),
    "memory": ("memory", "memory_bytes", "peak_memory", "peak_memory_bytes", "peak_train_bytes", "vram", "max_memory"),
    "seconds": ("seconds", "train_seconds", "runtime", "_runtime", "train_runtime", "train_time", "duration", "time"),
    "std": ("std", "sd", "stdev", "stddev", "std_dev"),
    "se": ("se", "sem", "stderr", "std_err", "standard_error"),
    "count": ("n", "n_seeds", "num_seeds", "seeds", "runs", "n_runs"),
}
"""Meaning → column names as :func:`_bare` writes them, the most likely first."""

EXPORTED = ("config", "params", "hparams", "summary", "metrics", "tags", "run_info", "train_info")
"""Prefixes of trackers: ``params.lora.r`` of MLflow, ``config.lora_r`` and ``summary.loss`` of W&B."""

CONFIGURATION = ("configuration", "config", "model", "variant", "quantization", "targets", "task", "dataset", "method")
"""Columns that distinguish configurations; a table's configuration is all of them that it has."""

PROTOCOL = (
    *("steps", "max_steps", "train_steps", "epochs", "num_epochs", "num_train_epochs", "max_tokens", "batch_size"),
    *("split", "data_fingerprint", "fingerprint", "adapter_dtype", "dtype", "max_length", "max_items"),
)
"""Columns that must be equal before two scores are comparable."""

LOWER_IS_BETTER = (
    *("loss_per_item", "eval_loss", "eval.loss", "test_loss", "val_loss", "validation_loss", "loss", "nll", "ppl"),
    *("perplexity", "bits_per_byte", "error", "error_rate", "wer", "cer", "mae", "mse", "rmse"),
)
HIGHER_IS_BETTER = (
    *("accuracy", "acc", "eval_accuracy", "eval.accuracy", "test_accuracy", "test.accuracy", "exact_match", "macro_f1"),
    *("f1", "correct", "rouge_l", "rougel", "rouge", "bleu", "auc", "mcc", "win_rate", "pass@1", "em", "score"),
)
"""Scores with a known direction; a higher ``score`` is better, as in scikit-learn."""


@dataclass(frozen=True)
class Columns:
    """The columns of one file by their meaning."""

    named: dict[str, str]
    """Meaning → column."""
    score: str
    configuration: tuple[str, ...]
    protocol: tuple[str, ...]
    """Columns in which a configuration must have a single value."""
    higher_is_better: bool
    notes: tuple[str, ...]


def find_columns(
    rows: Sequence[TableRow], chosen: Mapping[str, str], higher_is_better: bool | None, file: Path
) -> Columns:
    """Return which column means what. Names are compared case-insensitively.

    Args:
        chosen: ``rank``, ``score`` or ``configuration`` → the column that the user named.
        higher_is_better: as the user set it; ``None``: inferred from the score's name.

    Raises:
        AnalysisError: no rank or score column, or a score whose direction is unknown.
    """
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    by_lower = {name.lower(): name for name in reversed(names)}
    named = {meaning: matches[0] for meaning, aliases in ALIASES.items() if (matches := _known(names, aliases))}
    named |= {meaning: _chosen(name, by_lower, meaning, file) for meaning, name in chosen.items()}
    if "rank" not in named:
        raise AnalysisError(
            "there is no column with the rank", f"{file}: {', '.join(names)}", "name it with --rank-column"
        )
    score = named.pop("score", None) or _score_column(names, file)
    if "configuration" in named:
        configuration: tuple[str, ...] = (named.pop("configuration"),)
    else:
        used = {score, *named.values()}
        configuration = tuple(name for name in _known(names, CONFIGURATION) if name not in used)
    higher, note = _direction(score, higher_is_better, file)
    protocol = tuple(name for name in _known(names, PROTOCOL) if name not in configuration)
    return Columns(named, score, configuration, protocol, higher, (note,) if note else ())


def _known(names: Sequence[str], aliases: Sequence[str]) -> list[str]:
    """Return the names that match an alias, in the aliases' order; a plain name comes before a prefixed one."""
    matches = [(aliases.index(bare), name.count("."), name) for name in names if (bare := _bare(name)) in aliases]
    return [name for _, _, name in sorted(matches)]


def _bare(name: str) -> str:
    """Return the name as :data:`ALIASES` writes it, without prefixes: ``config/LoRA-r`` gives ``lora_r``."""
    parts = name.strip().lower().replace("/", ".").replace(" ", "_").replace("-", "_").split(".")
    while len(parts) > 1 and parts[0] in EXPORTED:
        parts = parts[1:]
    return ".".join(parts)


def _chosen(name: str, by_lower: Mapping[str, str], meaning: str, file: Path) -> str:
    if name.lower() not in by_lower:
        raise AnalysisError(
            f"there is no column {name!r}", f"{file} (--{meaning}-column)", nearest(name, by_lower.values())
        )
    return by_lower[name.lower()]


def _score_column(names: Sequence[str], file: Path) -> str:
    candidates = _known(names, ("score",)) or _known(names, (*LOWER_IS_BETTER, *HIGHER_IS_BETTER))
    if not candidates:
        raise AnalysisError(
            "there is no column with the score", f"{file}: {', '.join(names)}", "name it with --score-column"
        )
    if len(candidates) > 1:
        raise AnalysisError(
            f"several columns could be the score: {', '.join(candidates)}", str(file), "name one with --score-column"
        )
    return candidates[0]


def _direction(score: str, higher_is_better: bool | None, file: Path) -> tuple[bool, str | None]:
    if higher_is_better is not None:
        return higher_is_better, None
    name = _bare(score)
    last = name.rsplit(".", 1)[-1]
    for names, higher in ((LOWER_IS_BETTER, False), (HIGHER_IS_BETTER, True)):
        if name in names or last in names:
            return higher, f"{'Higher' if higher else 'Lower'} counts as better, inferred from the name {score!r}."
    raise AnalysisError(
        f"whether a higher {score!r} is better can't be inferred from its name",
        f"{file}, column {score}",
        "add --higher-is-better or --lower-is-better",
    )
