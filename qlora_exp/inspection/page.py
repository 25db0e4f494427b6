"""An inspection as JSON and as an offline HTML page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qlora_exp.inspection.steps import GeneratedToken, OptionScore

SHADES = ((0.9, "sure"), (0.5, "likely"), (0.1, "unsure"))
"""Probability from which on a token has this colour; below all: ``unlikely``."""


@dataclass(frozen=True)
class Inspection:
    """What ``qlora-exp inspect`` shows. ``expected``: the right answer of an item. ``base_answer``: ``None`` if the
    base isn't known. ``file``: the GGUF file; ``None``: the run's own model."""

    run_id: str | None
    prompt: str
    prompt_tokens: tuple[tuple[int, str], ...]
    expected: str | None
    answer: str
    base_answer: str | None
    options: tuple[OptionScore, ...]
    steps: tuple[GeneratedToken, ...]
    file: str | None = None
    notes: tuple[str, ...] = ()
    """What a reader must know of the models."""

    @property
    def has_base(self) -> bool:
        return self.base_answer is not None

    @property
    def name(self) -> str:
        """What was inspected."""
        run = f"run {self.run_id}" if self.run_id is not None else None
        return ", ".join(part for part in (self.file, run) if part is not None)


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Return the inspection as JSON types."""
    return asdict(inspection)


def as_html(inspection: Inspection) -> str:
    """Return a page without scripts: click a token to see what else was likely there."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(inspection=inspection, shade=shade, shown=visible_token)


def shade(probability: float) -> str:
    """Return the name of the colour of a token with this probability."""
    return next((name for least, name in SHADES if probability >= least), "unlikely")


def visible_token(text: str) -> str:
    """Return a token's text with its white space made visible."""
    return printable("".join(_SIGNS.get(character, character) for character in text))


def printable(text: str) -> str:
    """Return a text of a file or a model without control characters, which a terminal would obey: ``�`` stands for
    them."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )


_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def option_line(options: Sequence[OptionScore], expected: str | None, shown: int) -> list[OptionScore]:
    """Return the first ``shown`` options, and the right one if it isn't among them."""
    first = list(options[:shown])
    return first + [option for option in options[shown:] if option.label == expected]
