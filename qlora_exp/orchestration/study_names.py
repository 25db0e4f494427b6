"""Which names a study may have: any script, but nothing that a terminal, a command or a database would misread."""

from __future__ import annotations

import unicodedata

from qlora_exp.errors import ConfigError, raise_all
from qlora_exp.records.find import LAST

MAX_CHARACTERS = 200
"""Optuna's databases store at most 512 bytes or characters, depending on their kind; a folder name has at most 255
bytes."""

FORBIDDEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, surrogates, line separators. Others are allowed, since emoji use them."""


def check_name(name: str) -> None:
    """Raise :class:`ConfigError` if a new study can't have this name."""
    hint = "sweep.name=NAME, or null for a name made from the command"
    problems = []
    if not name.strip():
        problems.append("a study's name can't be empty")
    if len(name) > MAX_CHARACTERS:
        problems.append(f"a study's name has at most {MAX_CHARACTERS} characters, not {len(name)}")
    if any(unicodedata.category(character) in FORBIDDEN_CATEGORIES for character in name):
        problems.append("a study's name can't hold control characters")
    if name.startswith("-"):
        problems.append("a study's name can't begin with -, which begins an option")
    if name == LAST:
        problems.append(f"a study can't be called {LAST}, which means the newest one")
    raise_all([ConfigError(what, f"sweep.name={name!a}", hint) for what in problems])
