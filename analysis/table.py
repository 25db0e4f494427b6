"""Any table with a rank and a score, of any tool (CSV, TSV, JSON, JSON lines, Parquet): the rank question answered.

A table without replicates is not refused: it is told what can't be concluded from it.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.analysis.rank import (
    Answer,
    Comparison,
    Decision,
    answer,
    as_object,
    decide_published,
    unreplicated,
    walk,
)
from qlora_exp.analysis.rule import Rule, make_rule
from qlora_exp.errors import AnalysisError, Problems, nearest, raise_all

ALIASES: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "r", "lora_r", "lora_rank", "lora.r", "lora.rank", "config.lora.r", "params.lora.r", "peft.r"),
    "seed": ("seed", "random_seed", "config.seed", "params.seed", "training.seed"),
    "item": ("item", "item_id", "example", "example_id", "sample_id", "question_id"),
    "memory": ("memory", "memory_bytes", "peak_memory", "peak_memory_bytes", "peak_train_bytes", "vram", "max_memory"),
    "seconds": ("seconds", "train_seconds", "runtime", "_runtime", "train_runtime", "train_time", "duration", "time"),
    "std": ("std", "sd", "stdev", "stddev"),
    "se": ("se", "sem", "stderr", "std_err", "standard_error"),
    "count": ("n", "n_seeds", "num_seeds", "seeds", "runs", "n_runs"),
}
"""Column names by meaning, in lower case, the likeliest first."""

CONFIGURATION = ("configuration", "config", "model", "variant", "quantization", "targets", "task", "dataset", "method")
"""Columns that tell configurations apart; all that are there count."""

LOWER_IS_BETTER = (
    *(
        "loss_per_item",
        "eval_loss",
        "eval/loss",
        "test_loss",
        "val_loss",
        "validation_loss",
        "loss",
        "nll",
        "perplexity",
    ),
    *("ppl", "bits_per_byte", "error", "error_rate", "wer", "cer", "mae", "mse", "rmse"),
)
HIGHER_IS_BETTER = (
    *("accuracy", "acc", "eval_accuracy", "eval/accuracy", "test_accuracy", "test/accuracy", "exact_match", "macro_f1"),
    *("f1", "rouge_l", "rougel", "rouge", "bleu", "auc", "mcc", "win_rate", "pass@1", "em", "score"),
)
"""Names of scores whose direction is known; ``score`` as scikit-learn has it."""

ASSUMED_MARGIN_SHARE = 0.01
"""Of the smallest rank's mean score, where no margin is given: said in every answer that rests on it."""


@dataclass(frozen=True)
class Options:
    """How a table is to be read; ``None`` is to be found out."""

    rank_column: str | None = None
    score_column: str | None = None
    configuration_column: str | None = None
    higher_is_better: bool | None = None
    margin: float | None = None
    se: float | None = None
    """A published standard error of every score, in its units."""


@dataclass(frozen=True)
class Result:
    """One row. ``where`` says which, for a message."""

    where: str
    rank: int
    score: float
    seed: str | None
    item: str | None
    se: float | None
    memory: float | None
    seconds: float | None
    others: dict[str, str]
    """The columns that have no meaning here, as text."""


@dataclass(frozen=True)
class TableAnswer:
    """One configuration's answer, with what was assumed in reading it."""

    configuration: str | None
    answer: Answer
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Meaning → the name that the file has for it."""

    named: dict[str, str]
    score: str
    configuration: tuple[str, ...]
    higher_is_better: bool
    notes: tuple[str, ...]


def analyze_table(file: Path, options: Options) -> list[TableAnswer]:
    """One answer a configuration, in the file's order.

    Raises:
        AnalysisError, Problems: the file, a column, a row or a number that no answer can be drawn from.
    """
    rows = read_rows(file)
    columns = find_columns(rows, options, file)
    by_configuration = _results(rows, columns, options, file)
    return [_answer(name, results, columns, options, file) for name, results in by_configuration.items()]


def read_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, column → value) of every row, nested JSON flattened to dotted names.

    Raises:
        AnalysisError: no such file, an unknown kind of file, one that isn't what its name says, or no row.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    readers[".parquet"] = _parquet_rows
    suffix = file.suffix.lower()
    if suffix not in readers:
        raise AnalysisError(f"{suffix or 'no ending'!r} is no table's", str(file), f"valid: {', '.join(readers)}")
    try:
        rows = list(readers[suffix](file))
    except FileNotFoundError:
        raise AnalysisError("there is no such file", str(file), "give the path of a table") from None
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        text = str(error).splitlines()[0]
        raise AnalysisError(f"this can't be read as {suffix}: {text}", str(file), "export the table again") from None
    if not rows:
        raise AnalysisError("the table has no row", str(file), "columns rank and score, and a row for each result")
    return rows


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        delimiter = max("\t;,", key=head.count)
        reader = csv.DictReader(stream, delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} doesn't have the {len(reader.fieldnames or ())} columns")
            yield f"line {reader.line_num}", {str(name).strip(): value for name, value in row.items()}


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        if len(lists) == len(found) and len({len(value) for value in lists}) == 1:
            found = [dict(zip(found, values, strict=True)) for values in zip(*lists, strict=True)]
        else:
            found = next((v for v in lists if v and all(isinstance(entry, dict) for entry in v)), None)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("a list of objects is wanted, or an object of lists of one length")
    yield from ((f"row {number}", dict(_flat(row))) for number, row in enumerate(found, start=1))


def _jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield f"line {number}", dict(_flat(row))


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    yield from ((f"row {number}", dict(_flat(row))) for number, row in enumerate(rows, start=1))


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_columns(rows: Sequence[tuple[str, dict[str, Any]]], options: Options, file: Path) -> Columns:
    """Which column means what. Names are compared without regard to case.

    Raises:
        AnalysisError: no rank or score column, or a score whose better direction isn't known.
    """
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    by_lower = {name.lower(): name for name in reversed(names)}
    named = {
        meaning: by_lower[next(alias for alias in aliases if alias in by_lower)]
        for meaning, aliases in ALIASES.items()
        if any(alias in by_lower for alias in aliases)
    }
    given = {"rank": options.rank_column, "configuration": options.configuration_column}
    for meaning, name in given.items():
        if name is not None:
            named[meaning] = _chosen(name, by_lower, meaning, file)
    if "rank" not in named:
        raise AnalysisError(
            "there is no column with the rank", f"{file}: {', '.join(names)}", "name it with --rank-column"
        )
    score = _score_column(options.score_column, by_lower, names, file)
    if "configuration" in named:
        configuration: tuple[str, ...] = (named.pop("configuration"),)
    else:
        taken = {score, *named.values()}
        configuration = tuple(by_lower[n] for n in CONFIGURATION if n in by_lower and by_lower[n] not in taken)
    higher, note = _direction(score, options.higher_is_better, file)
    return Columns(named, score, configuration, higher, (note,) if note else ())


def _chosen(name: str, by_lower: Mapping[str, str], meaning: str, file: Path) -> str:
    if name.lower() not in by_lower:
        raise AnalysisError(
            f"there is no column {name!r}", f"{file} (--{meaning}-column)", nearest(name, by_lower.values())
        )
    return by_lower[name.lower()]


def _score_column(chosen: str | None, by_lower: Mapping[str, str], names: Sequence[str], file: Path) -> str:
    if chosen is not None:
        return _chosen(chosen, by_lower, "score", file)
    if "score" in by_lower:
        return by_lower["score"]
    found = [name for name in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER) if name in by_lower]
    if not found:
        raise AnalysisError(
            "there is no column with the score", f"{file}: {', '.join(names)}", "name it with --score-column"
        )
    if len(found) > 1:
        raise AnalysisError(
            f"several columns could be the score: {', '.join(by_lower[name] for name in found)}",
            str(file),
            "name one with --score-column",
        )
    return by_lower[found[0]]


def _direction(score: str, given: bool | None, file: Path) -> tuple[bool, str | None]:
    if given is not None:
        return given, None
    name = score.lower()
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    for names, higher in ((LOWER_IS_BETTER, False), (HIGHER_IS_BETTER, True)):
        if name in names or last in names:
            return higher, f"{'Higher' if higher else 'Lower'} is taken to be better, by the name {score!r}."
    raise AnalysisError(
        f"whether a higher {score!r} is better can't be told from its name",
        f"{file}, column {score}",
        "add --higher-is-better or --lower-is-better",
    )


def _results(
    rows: Sequence[tuple[str, dict[str, Any]]], columns: Columns, options: Options, file: Path
) -> dict[str | None, list[Result]]:
    """Results by configuration; every wrong number is told, the first ten of them."""
    by_configuration: dict[str | None, list[Result]] = defaultdict(list)
    errors: list[AnalysisError] = []
    for where, row in rows:
        try:
            result = _result(where, row, columns, options, file)
        except AnalysisError as error:
            errors.append(error)
            continue
        values = [_text(row.get(name)) for name in columns.configuration]
        by_configuration[", ".join(values) if columns.configuration else None].append(result)
    if len(errors) > 10:
        raise Problems([*errors[:10], AnalysisError(f"{len(errors) - 10} more rows are wrong", str(file))])
    raise_all(errors)
    return by_configuration


def _result(where: str, row: Mapping[str, Any], columns: Columns, options: Options, file: Path) -> Result:
    def number(meaning: str) -> float | None:
        name = columns.named.get(meaning)
        return None if name is None or _text(row.get(name)) == "" else _number(row.get(name), f"{file}, {where}", name)

    def text(meaning: str) -> str | None:
        return _text(row.get(columns.named[meaning])) if meaning in columns.named else None

    rank_name = columns.named["rank"]
    rank = _number(row.get(rank_name), f"{file}, {where}", rank_name)
    if rank < 1 or rank != int(rank):
        raise AnalysisError(f"{rank:g} is no rank", f"{file}, {where}, column {rank_name}", "a whole number from 1 on")
    known = {columns.score, *columns.named.values(), *columns.configuration}
    return Result(
        where=where,
        rank=int(rank),
        score=_number(row.get(columns.score), f"{file}, {where}", columns.score),
        seed=text("seed"),
        item=text("item"),
        se=_standard_error(number("se"), number("std"), number("count"), options.se, f"{file}, {where}"),
        memory=number("memory"),
        seconds=number("seconds"),
        others={name: _text(value) for name, value in row.items() if name not in known},
    )


def _standard_error(
    se: float | None, std: float | None, count: float | None, given: float | None, where: str
) -> float | None:
    """``--se``, else the se column, else std over the root of the number of runs, else std itself."""
    found = given if given is not None else se
    if found is None and std is not None:
        found = std / math.sqrt(count) if count is not None and count >= 1 else std
    if found is not None and found <= 0:
        raise AnalysisError(f"a standard error of {found:g} is none", where, "above 0, or leave it out")
    return found


def _number(value: Any, where: str, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        told = "is missing" if _text(value) == "" else f"is {_text(value)!r}, no number"
        raise AnalysisError(
            f"column {column} {told}", where, "mend the row, or leave out the runs without a result"
        ) from None
    if not math.isfinite(number):
        raise AnalysisError(f"column {column} is {number}", where, "leave out the runs without a result") from None
    return number


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _answer(name: str | None, results: Sequence[Result], columns: Columns, options: Options, file: Path) -> TableAnswer:
    where = f"{file}, configuration {name}" if name is not None else str(file)
    ranks = sorted({result.rank for result in results})
    if len(ranks) < 2:
        raise AnalysisError(
            f"r = {ranks[0]} is the only rank, and one rank can't be compared", where, "add rows of another rank"
        )
    _refuse_repeated(results, where)
    margin, margin_notes = _margin(results, ranks[0], options.margin)
    rule = make_rule(margin, len(ranks) - 1)
    found, notes = _decided(results, ranks, rule, columns, where)
    notes = [*columns.notes, *margin_notes, *_step_notes(ranks), *notes, *_saved(found, results)]
    return TableAnswer(name, found, tuple(notes))


def _refuse_repeated(results: Sequence[Result], where: str) -> None:
    """Two scores for one rank, seed and item: a row given twice, or configurations that nothing tells apart."""
    first: dict[tuple[int, str | None, str | None], Result] = {}
    for result in results:
        key = (result.rank, result.seed, result.item)
        other = first.setdefault(key, result)
        if other is result:
            continue
        named = f"r = {result.rank}" + "".join(
            f", {what} {value}" for what, value in (("seed", result.seed), ("item", result.item)) if value is not None
        )
        differing = [name for name, value in result.others.items() if other.others.get(name) != value]
        hint = "leave each result in once"
        if differing:
            hint = (
                f"these rows differ in {', '.join(differing[:3])}: if that is a configuration, --configuration-column"
            )
        elif result.seed is None:
            hint = "if these are repetitions, add a column seed; if configurations, a column configuration"
        raise AnalysisError(f"{named} has two scores ({other.where} and {result.where})", where, hint)


def _margin(results: Sequence[Result], smallest: int, given: float | None) -> tuple[float, list[str]]:
    if given is not None:
        return given, []
    level = abs(float(np.mean([result.score for result in results if result.rank == smallest])))
    margin = float(f"{ASSUMED_MARGIN_SHARE * level:.2g}")
    if margin <= 0:
        raise AnalysisError(
            f"no margin can be assumed from a score of {level:g}",
            "--margin",
            "say how much a step must gain to be worth paying for",
        )
    note = (
        f"No margin was given: {margin:g} is assumed, {ASSUMED_MARGIN_SHARE:.0%} of the score at r = {smallest}. Fix"
        " beforehand what a step must gain to be worth paying for, and give it with --margin."
    )
    return margin, [note]


def _step_notes(ranks: Sequence[int]) -> list[str]:
    others = [f"{a} → {b}" for a, b in pairwise(ranks) if b != 2 * a]
    return [f"Not every step is a doubling ({', '.join(others)}): each is held to the same margin."] if others else []


def _decided(
    results: Sequence[Result], ranks: Sequence[int], rule: Rule, columns: Columns, where: str
) -> tuple[Answer, list[str]]:
    sign = -1.0 if columns.higher_is_better else 1.0
    losses = [replace(result, score=sign * result.score) for result in results]
    seeds = sorted({result.seed for result in results if result.seed is not None})
    items = sorted({result.item for result in results if result.item is not None})
    if len(seeds) > 1:
        ladder = _cube(losses, ranks, seeds, items, where)
        notes = [] if items else ["Scores without items: the answer is for these test items, not for others."]
        if any(result.se is not None for result in results):
            notes.append("The standard errors are not used: the seeds themselves tell more.")
        return walk(ladder, rule, complete=True, unit=f"in {columns.score}"), notes
    steps = [
        Comparison(a, b, _step([x for x in losses if x.rank == a], [x for x in losses if x.rank == b], items))
        if any(result.se is None for result in results) or items
        else Comparison(a, b, _published(losses, a, b, rule))
        for a, b in pairwise(ranks)
    ]
    replicated = steps[0].decision.se is not None
    return answer(steps, rule, f"in {columns.score}"), [_PUBLISHED if replicated else _SINGLE]


_PUBLISHED = (
    "The standard errors are taken as known, and two ranks' scores as independent: with the same seeds and items at"
    " every rank, paired results would tell more."
)
_SINGLE = (
    "One run a rank: the gains are those of these runs. Nothing in the table tells how much of them is the seed's, so"
    " they neither show that returns continue nor that they have diminished."
)


def _step(smaller: Sequence[Result], larger: Sequence[Result], items: Sequence[str]) -> Decision:
    gain = float(np.mean([x.score for x in smaller]) - np.mean([x.score for x in larger]))
    return unreplicated(gain, len(items) or None)


def _published(losses: Sequence[Result], smaller: int, larger: int, rule: Rule) -> Decision:
    by_rank = {result.rank: result for result in losses}
    a, b = by_rank[smaller], by_rank[larger]
    return decide_published(a.score - b.score, math.hypot(a.se or 0.0, b.se or 0.0), rule)


def _cube(
    losses: Sequence[Result], ranks: Sequence[int], seeds: Sequence[str], items: Sequence[str], where: str
) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
    """Rank → (seeds, items) or (seeds,), NaN for a run that isn't there.

    Raises:
        AnalysisError: neighbouring ranks without a common seed, or runs scored on different items.
    """
    seed_of, item_of = ({name: number for number, name in enumerate(names)} for names in (seeds, items))
    ladder = {rank: np.full((len(seeds), max(len(items), 1)), np.nan) for rank in ranks}
    for result in losses:
        if result.seed is None or (items and result.item is None):
            raise AnalysisError("a row has no seed or no item", f"{where}, {result.where}", "mend the row")
        ladder[result.rank][seed_of[result.seed], item_of[result.item] if result.item is not None else 0] = result.score
    for rank, values in ladder.items():
        counts = (~np.isnan(values)).sum(axis=1)
        short = [seed for seed, count in zip(seeds, counts, strict=True) if 0 < count < values.shape[1]]
        if short:
            raise AnalysisError(
                f"r = {rank}, seed {short[0]} lacks some of the {len(items)} items",
                where,
                "score every run on the same items",
            )
    for a, b in pairwise(ranks):
        if np.isnan(ladder[a] + ladder[b]).all():
            raise AnalysisError(f"r = {a} and r = {b} share no seed", where, "run both with the same seeds")
    return ladder if items else {rank: values[:, 0] for rank, values in ladder.items()}


def _saved(found: Answer, results: Sequence[Result]) -> Iterable[str]:
    """What the recommended rank saves against the largest one in the table."""
    largest = max(result.rank for result in results)
    if found.recommended_rank in (None, largest):
        return
    for what in ("memory", "seconds"):
        known = Counter(result.rank for result in results if getattr(result, what) is not None)
        if not (known[found.recommended_rank or 0] and known[largest]):
            continue
        here, there = (
            float(np.mean([getattr(r, what) for r in results if r.rank == rank and getattr(r, what) is not None]))
            for rank in (found.recommended_rank, largest)
        )
        if there > 0:
            word = "less" if here <= there else "more"
            yield f"r = {found.recommended_rank} takes {abs(1 - here / there):.0%} {word} {what} than r = {largest}."


def as_json(found: Sequence[TableAnswer]) -> dict[str, Any]:
    """The object that ``--json`` prints: one answer, or ``configurations`` with one each."""
    objects = [{"configuration": x.configuration, **as_object(x.answer), "notes": list(x.notes)} for x in found]
    return objects[0] if len(objects) == 1 else {"configurations": objects}
