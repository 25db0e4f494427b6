"""Commands, options, defaults, choices and configuration keys are those of the golden files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import commands
from tests.contracts.golden_files import GOLDEN, check, differences, read, report

PATHS = sorted(read("commands.json"))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return commands.commands()


def test_the_commands_are_those_there_were(found: dict[str, Any]) -> None:
    lines = differences(PATHS, sorted(found))
    assert not lines, report("commands.json", lines)


@pytest.mark.parametrize("path", PATHS)
def test_a_command_takes_the_same_arguments_and_options(found: dict[str, Any], path: str) -> None:
    check("commands.json", found.get(path), key=path)


NAMED = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def test_help_names_every_option_and_command_that_it_named() -> None:
    """Words and their order may change; what can be typed is still said."""
    lines, texts = [], commands.help_texts()
    for file in sorted((GOLDEN / commands.WORDS).glob("*.txt")):
        path = file.stem
        old = file.read_text(encoding="utf-8")
        new = texts.get(path, "")
        typed = set(NAMED.findall(options_of(old))) | set(commands_of(old))
        lines += [f"  gone     {path}: {name}" for name in sorted(typed) if name not in said(new)]
    assert not lines, report(f"{commands.WORDS}/", lines)


def said(text: str) -> set[str]:
    """Options and words of a text."""
    return {*NAMED.findall(text), *re.findall(r"\w[\w-]*", text)}


def options_of(text: str) -> str:
    """The lines of a help text that explain an option."""
    return "\n".join(line for line in text.splitlines() if line.lstrip().startswith("-"))


def commands_of(text: str) -> list[str]:
    """The first words of the lines below ``Commands:``."""
    _, _, below = text.partition("\nCommands:\n")
    return re.findall(r"^  (\w[\w-]*)", below, re.MULTILINE)


def test_configuration_has_the_same_keys_defaults_and_choices(tmp_path: Path) -> None:
    check("configuration.json", commands.configuration(tmp_path))
