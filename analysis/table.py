"""Answer the rank question for any tool's table with a rank and a score (CSV, TSV, JSON, JSON lines, Parquet).

A table without replicates is accepted; the answer says what can't be concluded from it.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.analysis.rank import (
    Comparison,
    Decision,
    RankAnswer,
    answer,
    as_object,
    decide_from_summary,
    decide_ladder,
)
from qlora_exp.analysis.rank_rule import Rule, make_rule
from qlora_exp.analysis.variance import Array
from qlora_exp.errors import AnalysisError, Problems, nearest, raise_all
from qlora_exp.formatting import flatten

ASSUMED_MARGIN_SHARE = 0.01
"""Default margin as a share of the smallest rank's mean score; every answer that uses it says so."""
MAX_ERRORS_NAMED = 10

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

TRUTH_VALUES = {"true": "1", "false": "0"}
"""Per-item correctness is often written as one of these."""

TableRow = tuple[str, dict[str, str]]
"""Position for messages (``line 3``), and column → text; empty if there is no value."""


@dataclass(frozen=True)
class Options:
    """How to read a table; ``None``: inferred from the table."""

    rank_column: str | None = None
    score_column: str | None = None
    configuration_column: str | None = None
    higher_is_better: bool | None = None
    margin: float | None = None
    se: float | None = None
    """A published standard error of every score, in the score's units."""


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


@dataclass(frozen=True)
class Result:
    """One row; ``where`` is its position, for messages."""

    where: str
    rank: int
    score: float
    seed: str | None
    item: str | None
    se: float | None
    df: float
    """Degrees of freedom of ``se`` if it comes from a known number of runs; else infinite: ``se`` counts as exact."""
    memory: float | None
    seconds: float | None
    others: dict[str, str]
    """All other columns, as text."""


@dataclass(frozen=True)
class TableAnswer:
    """One configuration's answer, and the assumptions made in reading the table."""

    configuration: str | None
    answer: RankAnswer
    notes: tuple[str, ...]


def analyze_table(file: Path, options: Options) -> list[TableAnswer]:
    """Return one answer per configuration, in the file's order.

    Raises:
        AnalysisError, Problems: the file, a column, a row or a number can't be used.
    """
    if options.se is not None and not (math.isfinite(options.se) and options.se > 0):
        raise AnalysisError(f"invalid standard error {options.se:g}", "--se", "use a number above 0")
    rows = read_table_rows(file)
    columns = find_columns(rows, options, file)
    by_configuration: dict[str | None, list[Result]] = defaultdict(list)
    errors: list[AnalysisError] = []
    for where, row in rows:
        name = ", ".join(row.get(column, "") for column in columns.configuration) if columns.configuration else None
        try:
            by_configuration[name].append(_result(where, row, columns, options, file))
        except AnalysisError as error:
            errors.append(error)
    if len(errors) > MAX_ERRORS_NAMED:
        more = AnalysisError(f"{len(errors) - MAX_ERRORS_NAMED} more rows are wrong", str(file))
        raise Problems([*errors[:MAX_ERRORS_NAMED], more])
    raise_all(errors)
    return [_answer(name, results, columns, options, file) for name, results in by_configuration.items()]


def table_as_json(answers: Sequence[TableAnswer]) -> dict[str, Any]:
    """Return the object that ``--json`` prints: one answer, or ``configurations`` with one answer each."""
    objects = [{"configuration": a.configuration, **as_object(a.answer), "notes": list(a.notes)} for a in answers]
    return objects[0] if len(objects) == 1 else {"configurations": objects}


def read_table_rows(file: Path) -> list[TableRow]:
    """Return every row of a table file; nested JSON becomes dotted names.

    Raises:
        AnalysisError: no such file, an unknown kind of file, one that isn't what its name says, or no row.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    readers[".parquet"] = _parquet_rows
    suffix = file.suffix.lower()
    if suffix not in readers:
        raise AnalysisError(
            f"{suffix or 'no suffix'!r} is not a table format", str(file), f"valid: {', '.join(readers)}"
        )
    try:
        rows = [(where, _texts(row)) for where, row in readers[suffix](file)]
    except FileNotFoundError:
        raise AnalysisError("there is no such file", str(file), "give the path of a table") from None
    except UnicodeDecodeError as error:
        raise AnalysisError(f"not valid UTF-8: {error.reason}", str(file), "export the table as UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        text = str(error).splitlines()[0]
        raise AnalysisError(f"not readable as {suffix}: {text}", str(file), "export the table again") from None
    if not rows:
        raise AnalysisError("the table has no rows", str(file), "columns rank and score, and a row for each result")
    return rows


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    named = ((name.strip(), value) for name, value in flatten(row) if value != {})
    return {name: "" if value is None else str(value).strip() for name, value in named}


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        reader = csv.DictReader(stream, delimiter=max("\t;,", key=head.count), skipinitialspace=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} doesn't have the {len(reader.fieldnames or ())} columns")
            yield f"line {reader.line_num}", row


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value]
        objects = next((value for value in lists if all(isinstance(entry, dict) for entry in value)), None)
        if objects is not None:
            content = objects
        elif len(lists) == len(content) and len({len(value) for value in lists}) == 1:
            content = [dict(zip(content, values, strict=True)) for values in zip(*lists, strict=True)]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("expected a list of objects, or an object of lists of equal length")
    yield from ((f"row {number}", row) for number, row in enumerate(content, start=1))


def _jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield f"line {number}", row


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def find_columns(rows: Sequence[TableRow], options: Options, file: Path) -> Columns:
    """Return which column means what. Names are compared case-insensitively.

    Raises:
        AnalysisError: no rank or score column, or a score whose direction is unknown.
    """
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    named = {meaning: matches[0] for meaning, aliases in ALIASES.items() if (matches := _matching(names, aliases))}
    by_lower = {name.lower(): name for name in reversed(names)}
    chosen = {"rank": options.rank_column, "score": options.score_column, "configuration": options.configuration_column}
    for meaning, name in chosen.items():
        if name is not None and name.lower() not in by_lower:
            where = f"{file} (--{meaning}-column)"
            raise AnalysisError(f"there is no column {name!r}", where, nearest(name, by_lower.values()))
        if name is not None:
            named[meaning] = by_lower[name.lower()]
    all_names = f"{file}: {', '.join(names)}"
    if "rank" not in named:
        raise AnalysisError("there is no column with the rank", all_names, "name it with --rank-column")
    if "score" not in named:
        candidates = _matching(names, ("score",)) or _matching(names, (*LOWER_IS_BETTER, *HIGHER_IS_BETTER))
        if not candidates:
            raise AnalysisError("there is no column with the score", all_names, "name it with --score-column")
        if len(candidates) > 1:
            several = f"several columns could be the score: {', '.join(candidates)}"
            raise AnalysisError(several, str(file), "name one with --score-column")
        named["score"] = candidates[0]
    score = named.pop("score")
    if "configuration" in named:
        configuration: tuple[str, ...] = (named.pop("configuration"),)
    else:
        used = {score, *named.values()}
        configuration = tuple(name for name in _matching(names, CONFIGURATION) if name not in used)
    protocol = tuple(name for name in _matching(names, PROTOCOL) if name not in configuration)
    if options.higher_is_better is not None:
        return Columns(named, score, configuration, protocol, options.higher_is_better, ())
    for known, higher in ((LOWER_IS_BETTER, False), (HIGHER_IS_BETTER, True)):
        if _bare(score) in known or _bare(score).rsplit(".", 1)[-1] in known:
            note = f"{'Higher' if higher else 'Lower'} counts as better, inferred from the name {score!r}."
            return Columns(named, score, configuration, protocol, higher, (note,))
    raise AnalysisError(
        f"whether a higher {score!r} is better can't be inferred from its name",
        f"{file}, column {score}",
        "add --higher-is-better or --lower-is-better",
    )


def _matching(names: Sequence[str], aliases: Sequence[str]) -> list[str]:
    """Return the names that match an alias, in the aliases' order; a plain name comes before a prefixed one."""
    matches = [(aliases.index(bare), name.count("."), name) for name in names if (bare := _bare(name)) in aliases]
    return [name for _, _, name in sorted(matches)]


def _bare(name: str) -> str:
    """Return the name as :data:`ALIASES` writes it, without prefixes: ``config/LoRA-r`` gives ``lora_r``."""
    parts = name.strip().lower().replace("/", ".").replace(" ", "_").replace("-", "_").split(".")
    while len(parts) > 1 and parts[0] in EXPORTED:
        parts = parts[1:]
    return ".".join(parts)


def _result(position: str, row: dict[str, str], columns: Columns, options: Options, file: Path) -> Result:
    where, rank_column = f"{file}, {position}", columns.named["rank"]

    def number(meaning: str) -> float | None:
        name = columns.named.get(meaning, "")
        return _number(row[name], where, name) if row.get(name) else None

    rank = _number(row.get(rank_column, ""), where, rank_column)
    if rank < 1 or rank != int(rank):
        hint = "use a whole number, at least 1"
        raise AnalysisError(f"invalid rank {rank:g}", f"{where}, column {rank_column}", hint)
    se, std, count = number("se"), number("std"), number("count")
    if options.se is not None:
        se = options.se
    elif se is None and std is not None:
        se = std / math.sqrt(count) if count is not None and count >= 1 else std
    if se is not None and not se > 0:
        raise AnalysisError(f"invalid standard error {se:g}", where, "use a number above 0, or leave it out")
    known = {columns.score, *columns.named.values(), *columns.configuration}
    return Result(
        where=position,
        rank=int(rank),
        score=_number(row.get(columns.score, ""), where, columns.score),
        seed=row.get(columns.named["seed"], "") if "seed" in columns.named else None,
        item=row.get(columns.named["item"], "") if "item" in columns.named else None,
        se=se,
        df=count - 1 if options.se is None and count is not None and count > 1 else math.inf,
        memory=number("memory"),
        seconds=number("seconds"),
        others={name: text for name, text in row.items() if name not in known},
    )


def _number(text: str, where: str, column: str) -> float:
    try:
        number = float(TRUTH_VALUES.get(text.lower(), text))
    except ValueError:
        fixes = {"%": "remove the %", "±": "put what follows ± into a column se", ",": "use a decimal point, no comma"}
        hint = ", and ".join(fix for mark, fix in fixes.items() if mark in text)
        problem = f"is {text!r}, not a number" if text else "is missing"
        raise AnalysisError(
            f"column {column} {problem}", where, hint or "fix the row, or leave out the runs without a result"
        ) from None
    if not math.isfinite(number):
        raise AnalysisError(f"column {column} is {number}", where, "leave out the runs without a result")
    return number


def _answer(name: str | None, results: Sequence[Result], columns: Columns, options: Options, file: Path) -> TableAnswer:
    where = f"{file}, configuration {name}" if name is not None else str(file)
    ranks = sorted({result.rank for result in results})
    if len(ranks) < 2:
        raise AnalysisError(
            f"r = {ranks[0]} is the only rank, and one rank can't be compared", where, "add rows of another rank"
        )
    _check_unique(results, where)
    for column in columns.protocol:
        values = list(dict.fromkeys(result.others[column] for result in results if column in result.others))
        # A gain could come from the steps, not from the rank.
        if len(values) > 1:
            raise AnalysisError(
                f"these runs aren't comparable: {column} is {', '.join(values[:4])}",
                where,
                f"--configuration-column {column} answers for each apart",
            )
    notes = [*columns.notes]
    margin = options.margin
    if margin is None:
        level = abs(float(np.mean([result.score for result in results if result.rank == ranks[0]])))
        # Two digits, so that the note and the decision name the same margin.
        margin = float(f"{ASSUMED_MARGIN_SHARE * level:.2g}")
        if margin <= 0:
            raise AnalysisError(
                f"no margin can be assumed from a score of {level:g}",
                "--margin",
                "say how much a step must gain to be worth its cost",
            )
        notes.append(
            f"No margin was given: {margin:g} is assumed, {ASSUMED_MARGIN_SHARE:.0%} of the score at r = {ranks[0]}."
            " Decide beforehand how much a step must gain to be worth its cost, and give it with --margin."
        )
    other_steps = [f"{a} → {b}" for a, b in pairwise(ranks) if b != 2 * a]
    if other_steps:
        notes.append(f"Not every step is a doubling ({', '.join(other_steps)}): the same margin applies to each.")
    result, decision_notes = _decide(results, ranks, make_rule(margin, len(ranks) - 1), columns, where)
    return TableAnswer(name, result, (*notes, *decision_notes, *_savings(result, results)))


def _check_unique(results: Sequence[Result], where: str) -> None:
    """Refuse two scores for one rank, seed and item: a repeated row, or configurations that no column distinguishes."""
    first: dict[tuple[int, str | None, str | None], Result] = {}
    for result in results:
        earlier = first.setdefault((result.rank, result.seed, result.item), result)
        if earlier is result:
            continue
        run = f"r = {result.rank}" + "".join(
            f", {what} {value}" for what, value in (("seed", result.seed), ("item", result.item)) if value is not None
        )
        differing = [name for name, value in result.others.items() if earlier.others.get(name) != value]
        hint = "leave each result in once"
        if differing:
            columns = ", ".join(differing[:3])
            hint = f"these rows differ in {columns}: if that is a configuration, --configuration-column"
        if result.seed is None:
            hint += "; if these are repetitions, add a column seed"
        raise AnalysisError(f"{run} has two scores ({earlier.where} and {result.where})", where, hint)


def _decide(
    results: Sequence[Result], ranks: Sequence[int], rule: Rule, columns: Columns, where: str
) -> tuple[RankAnswer, list[str]]:
    """Return the answer, and notes on what it rests on."""
    sign = -1.0 if columns.higher_is_better else 1.0
    losses = [replace(result, score=sign * result.score) for result in results]
    seeds = sorted({result.seed or "" for result in results})
    items = sorted({result.item for result in results if result.item is not None})
    with_se = [result for result in results if result.se is not None]
    if len(seeds) == 1 and not items and len(with_se) == len(results):
        by_rank = {result.rank: result for result in losses}
        steps = [Comparison(a, b, _decide_published(by_rank[a], by_rank[b], rule)) for a, b in pairwise(ranks)]
        known = "come from the runs of each score (Welch's degrees of freedom), and two ranks' scores count as"
        if all(math.isinf(result.df) for result in results):
            known = "count as exact, and two ranks' scores as"
        paired = "Paired results (the same seeds and items at every rank) would be more precise."
        return answer(steps, rule, f"in {columns.score}"), [f"The standard errors {known} independent. {paired}"]
    notes = []
    if len(seeds) == 1:
        notes.append(
            "One run per rank: the gains are those of these runs. How much of a gain is due to the seed is unknown, so"
            " the table shows neither that returns continue nor that they have diminished."
        )
    elif not items:
        notes.append("Scores without items: the answer is for these test items, not for others.")
    if with_se:
        notes.append("The standard errors are not used: only some rows have one, or seeds and items are more precise.")
    ladder = _loss_arrays(losses, ranks, seeds, items, where)
    result = decide_ladder(ladder, rule, complete=True, unit=f"in {columns.score}")
    if any(step.decision.se is not None and step.decision.se < 1e-12 for step in result.comparisons):
        notes.append(
            "At some step every seed gave exactly the same gain: the seed changed nothing, or the scores are rounded."
            " The interval may be too narrow."
        )
    return result, notes


def _decide_published(smaller: Result, larger: Result, rule: Rule) -> Decision:
    se = math.hypot(smaller.se or 0.0, larger.se or 0.0)
    spread = sum((result.se or 0.0) ** 4 / result.df for result in (smaller, larger))
    return decide_from_summary(smaller.score - larger.score, se, rule, se**4 / spread if spread else math.inf)


def _loss_arrays(
    losses: Sequence[Result], ranks: Sequence[int], seeds: Sequence[str], items: Sequence[str], where: str
) -> dict[int, Array]:
    """Return rank → (seeds, items) or (seeds,), NaN for a missing run.

    Raises:
        AnalysisError: neighbouring ranks without a common seed, or runs scored on different items.
    """
    seed_of, item_of = ({name: number for number, name in enumerate(names)} for names in (seeds, items))
    ladder = {rank: np.full((len(seeds), max(len(items), 1)), np.nan) for rank in ranks}
    for result in losses:
        item = 0 if result.item is None else item_of[result.item]
        ladder[result.rank][seed_of[result.seed or ""], item] = result.score
    for rank, values in ladder.items():
        missing = np.isnan(values)
        incomplete = np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1))
        if incomplete.size:
            lacks = f"r = {rank}, seed {seeds[incomplete[0]]} lacks some of the {len(items)} items"
            raise AnalysisError(lacks, where, "score every run on the same items")
    for a, b in pairwise(ranks):
        if np.isnan(ladder[a] + ladder[b]).all():
            raise AnalysisError(f"r = {a} and r = {b} share no seed", where, "run both with the same seeds")
    return ladder if items else {rank: values[:, 0] for rank, values in ladder.items()}


def _savings(result: RankAnswer, results: Sequence[Result]) -> Iterable[str]:
    """Yield what the recommended rank saves against the largest one in the table."""
    recommended, largest = result.recommended_rank, max(row.rank for row in results)
    if recommended is None or recommended == largest:
        return
    for what, word in (("memory", "memory"), ("seconds", "time")):
        values: dict[int, list[float]] = defaultdict(list)
        for row in results:
            if (value := getattr(row, what)) is not None:
                values[row.rank].append(value)
        if values[recommended] and values[largest] and np.mean(values[largest]) > 0:
            share = float(np.mean(values[recommended]) / np.mean(values[largest]))
            difference = f"{abs(1 - share):.0%} {'less' if share <= 1 else 'more'}"
            yield f"r = {recommended} takes {difference} {word} than r = {largest}."
