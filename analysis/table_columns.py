"""Which column of a table means what, by its name: rank, score, seed, item, standard error, configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from qlora_exp.analysis.table_files import RANK_FROM_PATH, SEED_FROM_PATH, TableRow
from qlora_exp.analysis.table_values import WITHOUT_ADAPTER, is_missing, read_number, read_rank
from qlora_exp.errors import AnalysisError, nearest

ALIASES: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "r", "lora_r", "lora_rank", "lora.r", "lora.rank", "peft.r", "peft_config.r", "lora_config.r"),
    "seed": ("seed", "random_seed", "training.seed", "train_config.seed", "run_seed", "train_seed", "replicate"),
    "item": ("item", "item_id", "example", "example_id", "sample_id", "question_id", "doc_id"),
    "memory": (
        *("memory", "memory_bytes", "peak_memory", "peak_memory_bytes", "peak_train_bytes", "vram", "max_memory"),
        "cuda_memory_max",
    ),
    "seconds": (
        *("seconds", "train_seconds", "training", "runtime", "_runtime", "train_runtime", "train_time", "duration"),
        "time",
    ),
    "std": ("std", "sd", "stdev", "stddev", "std_dev"),
    "se": ("se", "sem", "stderr", "std_err", "standard_error"),
    "count": ("n", "n_seeds", "num_seeds", "seeds", "runs", "n_runs", "count"),
    "status": ("status", "state", "run_status"),
    "split": ("split", "evaluation.split", "eval_split"),
    "pilot": ("pilot", "is_pilot"),
}
"""Meaning → column names as :func:`bare_name` writes them, the most likely first."""

EXPORTED = ("config", "params", "hparams", "summary", "metrics", "tags", "run_info", "train_info", "user_attrs")
"""Prefixes of trackers: ``params.lora.r`` of MLflow, ``config.lora_r`` and ``summary.loss`` of W&B."""

CONFIGURATION = (
    *("configuration", "config", "model", "variant", "format", "quantization", "targets", "task", "dataset", "method"),
    *("weight_type", "model.family", "model.variant", "quantization.mode", "task.format", "targets.set"),
)
"""Columns that distinguish configurations; a table's configuration is all of them that it has."""

PROTOCOL = (
    *("steps", "max_steps", "train_steps", "epochs", "num_epochs", "num_train_epochs", "max_tokens", "batch_size"),
    *(
        "split",
        "data_fingerprint",
        "fingerprint",
        "adapter_dtype",
        "dtype",
        "max_length",
        "max_items",
        "max_seq_length",
    ),
    *("model_id", "base_model", "model_name_or_path", "base_model_name_or_path", "pretrained"),
    *("peft_type", "use_dora", "use_rslora", "target_modules", "n_shot", "limit", "lr_scheduler", "optimizer_type"),
)
"""Columns that must be equal before two scores are comparable."""

LOWER_IS_BETTER = frozenset(
    (
        *("loss", "nll", "ppl", "perplexity", "error", "errors", "err", "wer", "cer", "ter", "mae", "mse", "rmse"),
        *("bpb", "bpc", "logloss", "crossentropy"),
    )
)
HIGHER_IS_BETTER = frozenset(
    (
        *("accuracy", "acc", "em", "f1", "correct", "rouge", "bleu", "sacrebleu", "chrf", "meteor", "bertscore", "auc"),
        *("auroc", "mcc", "score", "pass@1", "pass1", "recall", "mrr", "spearman", "pearson", "exact", "rougel"),
    )
)
"""Words of scores with a known direction; a higher ``score`` is better, as in scikit-learn."""
PHRASES = {
    "lower": (("bits", "per", "byte"), ("bits", "byte"), ("error", "rate"), ("cross", "entropy")),
    "higher": (("exact", "match"), ("win", "rate"), ("pass", "at")),
}
NOT_SCORES = frozenset(
    (
        *(
            "train",
            "training",
            "lr",
            "learning",
            "type",
            "fn",
            "function",
            "weight",
            "weights",
            "scale",
            "coef",
            "name",
        ),
        *("stderr", "se", "std", "sd", "sem", "stdev", "stddev", "var", "count", "step", "steps", "epoch", "time"),
        *("seconds", "runtime", "memory", "base", "baseline", "before", "aux", "threshold", "balance", "delta"),
        *("dropout", "samples", "patience", "greater", "alias", "forgetting"),
    )
)
"""Words of columns that no one asks a rank question about."""
NOT_RANKS = frozenset(
    (
        *("local", "global", "world", "node", "process", "pattern", "reciprocal", "mean", "percentile", "correlation"),
        *("spearman", "order", "loss", "dropout", "alpha", "stabilized", "ddp", "dist", "mrr", "position"),
    )
)
TEST_WORDS, VALIDATION_WORDS = frozenset(("test",)), frozenset(("eval", "val", "valid", "validation", "dev"))
ERROR_WORDS = {
    "se": ("stderr", "se", "sem", "std_err", "standard_error"),
    "std": ("std", "sd", "stdev", "stddev", "std_dev"),
    "count": ("count", "n", "n_seeds"),
}
FILLERS = frozenset(("mean", "avg", "average"))


@dataclass(frozen=True)
class Options:
    """How to read a table; ``None``: inferred from the table."""

    rank_column: str | None = None
    score_column: str | None = None
    configuration_columns: tuple[str, ...] = ()
    higher_is_better: bool | None = None
    margin: tuple[str, ...] = ()
    """As written, of one doubling; a number is in the score's units. Empty: the default for the score."""
    se: float | None = None
    """A published standard error of every score, in the score's units."""
    group_column: str | None = None
    """Items with the same value are one observation, e.g. the questions on one text."""
    best_over: tuple[str, ...] = ()
    """At each rank only the value of these columns with the best mean score is used, e.g. of the learning rate."""


@dataclass(frozen=True)
class Columns:
    """The columns of one table by their meaning."""

    named: dict[str, str]
    """Meaning → column."""
    score: str
    configuration: tuple[str, ...]
    protocol: tuple[str, ...]
    """Columns in which a configuration must have a single value."""
    higher_is_better: bool
    notes: tuple[str, ...]
    best_over: tuple[str, ...] = ()
    items_only: bool = False
    """The standard errors are those of the test items, as lm-eval computes ``acc_stderr``, not of several seeds."""


@dataclass
class _Table:
    rows: Sequence[TableRow]
    where: str
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = list(dict.fromkeys(name for row in self.rows for name in row.cells))

    def values(self, name: str) -> Iterable[str]:
        return (text for row in self.rows if not is_missing(text := row.cells.get(name, "")))

    def chosen(self, name: str, option: str) -> str:
        """Return the column that an option names; case doesn't matter."""
        by_lower = {column.lower(): column for column in reversed(self.names)}
        if name in self.names or name.lower() in by_lower:
            return name if name in self.names else by_lower[name.lower()]
        raise AnalysisError(
            f"there is no column {name!r}", f"{self.where} ({option})", nearest(name, by_lower.values())
        )


def find_columns(rows: Sequence[TableRow], options: Options, where: str, more: Sequence[str] = ()) -> Columns:
    """Return which column means what. Names are compared case-insensitively.

    Args:
        where: the table's name for messages.
        more: columns that distinguish configurations by the table's layout.

    Raises:
        AnalysisError: no rank or score column, or a score whose direction is unknown.
    """
    table = _Table(rows, where)
    names = table.names
    named = {meaning: matches[0] for meaning, aliases in ALIASES.items() if (matches := _matching(names, aliases))}
    notes: list[str] = []
    named["rank"] = _rank_column(table, options, notes)
    nested_seeds = [name for name in names if _last_part(name) == "seed"]
    if "seed" not in named and len(nested_seeds) == 1:
        named["seed"] = nested_seeds[0]
    if "seed" not in named and SEED_FROM_PATH in names:
        named["seed"] = SEED_FROM_PATH
        notes.append("No column has the seed: it is read from the files' paths.")
    if options.group_column is not None:
        named["group"] = table.chosen(options.group_column, "--group-column")
        if "item" not in named:
            raise AnalysisError(
                f"the groups in {named['group']!r} need items, and there is no column with the item",
                where,
                "add a column item, with a row for each run and item",
            )
    best_over = tuple(table.chosen(name, "--best-over") for name in options.best_over)
    configuration = tuple(table.chosen(name, "--configuration-column") for name in options.configuration_columns)
    score = _score_column(table, options, {*named.values(), *configuration, *best_over}, notes)
    if not configuration:
        used = {score, *best_over, *(column for meaning, column in named.items() if meaning != "split")}
        matching = [*_matching(names, CONFIGURATION), *more]
        configuration = tuple(name for name in dict.fromkeys(matching) if name not in used)
    protocol = tuple(name for name in names if _is_protocol(name) and name not in {*configuration, *best_over})
    items_only = _find_errors_of(score, names, named)
    higher = options.higher_is_better
    if higher is None:
        higher = direction(score)
        if higher is None:
            raise AnalysisError(
                f"whether a higher {score!r} is better can't be inferred from its name",
                f"{where}, column {score}",
                "add --higher-is-better or --lower-is-better",
            )
        notes.insert(0, f"{'Higher' if higher else 'Lower'} counts as better, inferred from the name {score!r}.")
    return Columns(named, score, configuration, protocol, higher, tuple(notes), best_over, items_only)


def _rank_column(table: _Table, options: Options, notes: list[str]) -> str:
    if options.rank_column is not None:
        return table.chosen(options.rank_column, "--rank-column")
    names = [name for name in table.names if name not in (RANK_FROM_PATH, SEED_FROM_PATH)]
    if matches := _matching(names, ALIASES["rank"]):
        return matches[0]
    # Another name with the word rank, or a nested one that ends like an alias, if its values can be ranks.
    named = [name for name in names if names_a_rank(name) and _has_ranks(table.values(name))]
    if len(named) > 1:
        several = f"several columns could be the rank: {', '.join(named)}"
        raise AnalysisError(several, table.where, "name one with --rank-column")
    if named:
        return named[0]
    if RANK_FROM_PATH in table.names:
        notes.append("No column has the rank: it is read from the paths of the files or of their adapters.")
        return RANK_FROM_PATH
    hint = "name it with --rank-column"
    if any("stderr," in name for name in names):
        hint += "; lm-eval's files don't have it: give several, with paths such as r8/results.json and r16/results.json"
    raise AnalysisError("there is no column with the rank", f"{table.where}: {', '.join(names)}", hint)


def names_a_rank(name: str) -> bool:
    """Return whether a name that is no alias can be the rank's, e.g. ``Adapter rank`` or ``run.lora.r``."""
    words = name_words(name)
    return ("rank" in words and not NOT_RANKS & set(words)) or _last_part(name) in ("r", "lora_r", "lora_rank")


def _has_ranks(texts: Iterable[str]) -> bool:
    ranks = [read_rank(text) for text in texts if not WITHOUT_ADAPTER.fullmatch(text)]
    return bool(ranks) and all(rank is not None and rank >= 1 for rank in ranks)


def _score_column(table: _Table, options: Options, used: Collection[str], notes: list[str]) -> str:
    if options.score_column is not None:
        return table.chosen(options.score_column, "--score-column")
    if plain := _matching(table.names, ("score",)):
        return plain[0]
    named = [
        name
        for name in table.names
        if name not in used and direction(name) is not None and not NOT_SCORES & set(_unprefixed_words(name))
    ]
    # A column of texts is a candidate only if no column has numbers, so that the error names its first text.
    candidates = [name for name in named if any(read_number(text, True) for text in table.values(name))] or named
    if not candidates:
        if "value" in table.names:
            return "value"
        listed = f"{table.where}: {', '.join(table.names)}"
        raise AnalysisError("there is no column with the score", listed, "name it with --score-column")
    # This package's own tables: its rank decisions use this score.
    own = sorted((name for name in candidates if _last_part(name) == "loss_per_item"), key=_split_order)
    others = [name for name in candidates if name not in own[:1]]
    if own and others:
        notes.append(f"The score is {own[0]}; {', '.join(others)} can be named with --score-column.")
        return own[0]
    if len(candidates) > 1 and len({_measure(name) for name in candidates}) == 1:
        first, *rest = sorted(candidates, key=_split_order)
        if _split_order(first) < _split_order(rest[0]):
            notes.append(f"The score is {first!r}, not {', '.join(rest)}: another can be named with --score-column.")
            return first
    if len(candidates) > 1:
        several = f"several columns could be the score: {', '.join(candidates)}"
        raise AnalysisError(several, table.where, "name one with --score-column")
    return candidates[0]


def _split_order(name: str) -> int:
    words = set(_unprefixed_words(name))
    return 0 if words & TEST_WORDS else 1 if words & VALIDATION_WORDS else 2


def _measure(name: str) -> tuple[str, ...]:
    ignored = TEST_WORDS | VALIDATION_WORDS | FILLERS
    return tuple(word for word in _unprefixed_words(name) if word not in ignored)


def _find_errors_of(score: str, names: Sequence[str], named: dict[str, str]) -> bool:
    """Add the score's own columns of standard errors, standard deviations and run counts to ``named``.

    Returns:
        Whether the standard errors are called as lm-eval calls those of its test items.
    """
    measure = tuple(word for word in _unprefixed_words(score) if word not in FILLERS)
    for meaning, endings in ERROR_WORDS.items():
        for name in names:
            words = "_".join(word for word in _unprefixed_words(name) if word not in FILLERS)
            for ending in endings:
                rest = re.sub(rf"(^|_){ending}(_|$)", "_", words, count=1).strip("_")
                if rest != words and rest and rest == "_".join(measure) and name != score:
                    named[meaning] = name
    return "se" in named and "stderr" in name_words(bare_name(named["se"]))[1:]


def direction(name: str) -> bool | None:
    """Return whether a higher score of this name is better; ``None`` if the name doesn't say it."""
    if "↑" in name or "↓" in name:
        return "↑" in name
    words = _unprefixed_words(name)
    higher: bool | None = None
    for position, word in enumerate(words):
        for known, phrases in PHRASES.items():
            if any(tuple(words[position : position + len(phrase)]) == phrase for phrase in phrases):
                return known == "higher"
        if word in LOWER_IS_BETTER:
            higher = False
        elif word in HIGHER_IS_BETTER or re.fullmatch(r"rouge(_?l|\d|lsum)|f1|mc[12]", word):
            higher = True if word != "score" or higher is None else higher
        elif word == "likelihood":
            higher = not {"negative", "neg"} & set(words)
    return higher


def name_words(name: str) -> list[str]:
    """Return the words of a column's name in lower case: ``Test NLL`` and ``test/nll`` give ``test``, ``nll``."""
    apart = re.sub(r"(?i)(q|do|rs)?lora", lambda match: match[0].lower(), name)
    apart = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", apart)
    return re.findall(r"[a-z0-9@]+", apart.lower())


def _unprefixed_words(name: str) -> list[str]:
    """Return the words of a name without trackers' prefixes: ``train_info`` isn't about training data."""
    parts = re.split(r"[./]", name)
    while len(parts) > 1 and parts[0].strip().lower() in EXPORTED:
        parts = parts[1:]
    return name_words(" ".join(parts))


def _matching(names: Sequence[str], aliases: Sequence[str]) -> list[str]:
    """Return the names that match an alias, in the aliases' order; a plain name comes before a prefixed one."""
    matches = [(aliases.index(bare), name.count("."), name) for name in names if (bare := bare_name(name)) in aliases]
    return [name for _, _, name in sorted(matches)]


def _is_protocol(name: str) -> bool:
    return bare_name(name) in PROTOCOL or _last_part(name) in PROTOCOL


def _last_part(name: str) -> str:
    return bare_name(name).rsplit(".", 1)[-1]


@lru_cache(maxsize=10_000)
def bare_name(name: str) -> str:
    """Return the name as :data:`ALIASES` writes it, without prefixes: ``config/LoRA-r`` gives ``lora_r``."""
    plain = re.sub(r"\(.*?\)|\[.*?\]|[$%↑↓]", "", name).strip().lower() or name.strip().lower()
    plain = re.sub(r"^(params|user_attrs)_(?=.)", "", plain)
    parts = plain.replace("/", ".").replace(" ", "_").replace("-", "_").split(".")
    while len(parts) > 1 and parts[0] in EXPORTED:
        parts = parts[1:]
    # W&B's config files have {"value": …} for each key.
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)
