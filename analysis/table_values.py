"""What the text of a table's cell means: a number, a rank, a duration, a size in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = frozenset(
    (
        *("", "-", "--", "–", "—", "?", "nan", "none", "null", "n/a", "na", "<na>", "nat", "inf", "+inf", "-inf"),
        *("infinity", "-infinity", "oom", "out of memory", "crashed", "failed", "diverged", "killed", "timeout"),
    )
)
"""Texts that tools and people write in place of a score. An infinite or undefined loss is one: the run diverged."""
WITHOUT_ADAPTER = re.compile(r"(full|base|none|no lora|frozen|zero.?shot|fft?|ft|pretrained)\b.*", re.IGNORECASE)
"""A rank column's text for a run that has no rank, e.g. ``full fine-tuning``."""
TRUTH_VALUES = {"true": 1.0, "false": 0.0}
"""Per-item correctness is often written as one of these."""

PRINTED_NUMBER = r"[-+]?(?:\d[\d.,]*|[.,]\d+)(?:[eE][-+]?\d+)?"
NUMBER = re.compile(
    rf"\(?(?P<value>{PRINTED_NUMBER})\s*%?\s*(?:(?:±|\+/-|\+-)\s*(?P<se>{PRINTED_NUMBER})\s*%?)?\)?\s*%?"
)
PLAIN = re.compile(r"-?\d+(?:\.\d+)?")
"""Almost all numbers: read without the steps for the others."""
DECORATION = re.compile(
    r"\*\*|`|\$|\\?[{}]|\\(?:textbf|underline|mathbf|textit|text|bm|,|;)|</?(?:b|u|i|strong|em)>|^_+|_+$"
)
RANK = re.compile(
    r"(?:(?:(?:q|do|rs)?lora|adapter)[\s_-]*)?(?:(?:rank|r)[\s_]*[=:_-]?\s*)?(?P<rank>\d+)(?:\.0+)?", re.IGNORECASE
)
RANK_IN_PATH = re.compile(r"(?<![a-z0-9])(?:rank|lora|r)[-_=]?(?P<number>\d+)(?![0-9a-z])", re.IGNORECASE)
SEED_IN_PATH = re.compile(r"(?<![a-z0-9])(?:seed|s)[-_=]?(?P<number>\d+)(?![0-9a-z])", re.IGNORECASE)

UNIT_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "mins": 60}
UNIT_SECONDS |= {"minute": 60, "minutes": 60, "h": 3600, "hr": 3600, "hrs": 3600, "hour": 3600, "hours": 3600}
UNIT_SECONDS |= {"d": 86400, "day": 86400, "days": 86400}
CLOCK_TEXT = re.compile(r"(?:(?P<days>\d+)\s*days?,?\s*)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d(?:\.\d+)?)")
UNIT_BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class TableNumber:
    """A number as a table writes it."""

    value: float
    se: float | None = None
    """What follows ``±``."""
    percent: bool = False
    decimals: int = 0
    """Digits after the decimal mark: the number is known to ± 0.5 · 10^-decimals."""
    mark: str = ""
    """The decimal mark, if there is one."""


def is_missing(text: str) -> bool:
    return text.strip().lower() in MISSING


def read_number(text: str, decimal_comma: bool = False) -> TableNumber | None:
    """Return what ``83.3``, ``83.3%``, ``83.3 ± 0.4``, ``**83.3**`` or ``True`` says; ``None`` if it is no number.

    Args:
        decimal_comma: a comma is the decimal mark even where it could separate thousands (``1,234``).
    """
    if PLAIN.fullmatch(text):
        return TableNumber(float(text), None, False, len(text.partition(".")[2]), "." if "." in text else "")
    if text.lower() in TRUTH_VALUES:
        return TableNumber(TRUTH_VALUES[text.lower()])
    plain = text.replace("\\pm", "±").replace("\\%", "%").replace("−", "-").replace("\u00a0", " ")
    plain = DECORATION.sub("", plain).strip()
    # MLflow's CSV export puts an apostrophe before a sign, so that spreadsheets don't run a formula.
    plain = plain[1:] if plain[:1] == "'" and plain[1:2] in ("-", "+") else plain
    match = NUMBER.fullmatch(plain)
    # "(83.3 ± 0.4)%" has both brackets or none, and "83.3 (0.4)" isn't matched: 0.4 could be anything.
    if match is None or plain.count("(") != plain.count(")") or ("(" in plain and match["se"] is None):
        return None
    value = _plain_number(match["value"], decimal_comma)
    se = _plain_number(match["se"], decimal_comma) if match["se"] else None
    if value is None or (match["se"] and se is None):
        return None
    return TableNumber(float(value), float(se) if se else None, "%" in plain, *_decimals(match["value"], value))


def read_rank(text: str) -> float | None:
    """Return the rank of ``8``, ``8.0``, ``r=8`` or ``LoRA rank 8``; ``None`` if the text is no number."""
    plain = text if text.isdigit() else DECORATION.sub("", text).strip()
    if match := RANK.fullmatch(plain):
        return float(match["rank"])
    number = read_number(text)
    return None if number is None or number.se is not None or number.percent else number.value


def numbers_in_paths(pattern: re.Pattern[str], paths: Sequence[str]) -> list[str] | None:
    """Return the number that each path names, e.g. 8 and 16 of ``r8/results.json`` and ``r16/results.json``.

    A number that is in all paths is ignored, e.g. that of ``DeepSeek-R1``, unless no path names another.

    Returns:
        ``None`` unless every path names exactly one.
    """
    found = [{match["number"] for match in pattern.finditer(path)} for path in paths]
    if len(found) > 1 and any(len(numbers) > 1 for numbers in found):
        shared = set.intersection(*found)
        found = [numbers - shared for numbers in found]
    return [numbers.pop() for numbers in found] if all(len(numbers) == 1 for numbers in found) else None


def read_seconds(text: str) -> float | None:
    """Return the seconds of ``348``, ``5.8min``, ``1h 2m 3s`` or ``0 days 00:05:48``; ``None`` if it is no duration."""
    if match := CLOCK_TEXT.fullmatch(text.strip()):
        days, hours, minutes = (int(match[part] or 0) for part in ("days", "hours", "minutes"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + float(match["seconds"])
    number = read_number(text)
    if number is not None:
        return number.value if math.isfinite(number.value) else None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.lower())
    if not parts or re.sub(r"[\d.a-z\s,]", "", text.lower()) or any(unit not in UNIT_SECONDS for _, unit in parts):
        return None
    return float(sum(float(amount) * UNIT_SECONDS[unit] for amount, unit in parts))


def read_bytes(text: str) -> float | None:
    """Return the bytes of ``21.3 GB`` (10^9), ``20 GiB`` (2^30) or ``22273851392``; ``None`` if it is no size."""
    match = re.fullmatch(r"(.*?)\s*([kmg]?i?b?)", text.strip().lower())
    number = read_number(match[1]) if match else None
    return number.value * UNIT_BYTES[match[2]] if match and number is not None and match[2] in UNIT_BYTES else None


def _plain_number(text: str, decimal_comma: bool) -> str | None:
    """Return the text as Python writes the number; ``None`` if it isn't one, or if its comma has two readings."""
    if "," in text and "." in text:
        if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+\.\d+", text):
            text = text.replace(",", "")
        elif re.fullmatch(r"[-+]?\d{1,3}(\.\d{3})+,\d+", text):
            text = text.replace(".", "").replace(",", ".")
        else:
            return None
    elif text.count(",") > 1:
        text = text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+", text) else ""
    elif "," in text:
        if not decimal_comma and re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", text):
            return None
        text = text.replace(",", ".")
    try:
        return text if math.isfinite(float(text)) else None
    except ValueError:
        return None


def _decimals(text: str, plain: str) -> tuple[int, str]:
    """Return the digits after the decimal mark, and the mark as the table has it."""
    mantissa, _, exponent = plain.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    mark = max(text.rfind(","), text.rfind("."))
    return decimals, text[mark] if mark >= 0 and "." in mantissa else ""
