"""What the documents say exists: links, verbs, options, make targets, configuration choices."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

from qlora_exp.cli import app
from qlora_exp.config.choices import group_names, groups
from qlora_exp.config.override_errors import problems_of
from qlora_exp.paths import Child, OutputPaths, RunPaths, StudyPaths

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "qlora_exp" / "cli" / "starter").rglob("*.md")),
    *sorted((ROOT / "qlora_exp" / "embedded").glob("*.md")),
]
PLACEHOLDERS = ("RUN", "DIR", "FILE", "OVERRIDES", "STUDY", "OWNER", "…")
"""In capitals, for the reader to fill in."""

LINK = re.compile(r"\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
INLINE = re.compile(r"`(?P<code>[^`\n]+)`")
FENCE = re.compile(r"```[a-z]*\n(?P<code>.*?)```", re.DOTALL)

commands = typer.main.get_command(app)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(text: str) -> Iterator[str]:
    for block in FENCE.finditer(text):
        yield from re.sub(r"\\\n\s*", "", block["code"]).splitlines()
    yield from (match["code"] for match in INLINE.finditer(FENCE.sub("", text)))


def qlora_commands(text: str) -> Iterator[list[str]]:
    """Words of each ``qlora-exp …`` command, without comments and what a shell does with its output."""
    for line in code_lines(text):
        for part in re.split(r"\s(?:&&|\|)\s", line.removeprefix("$ ").partition("  #")[0]):
            if part.strip().startswith("qlora-exp "):
                yield shlex.split(part)[1:]


def resolve(words: list[str]) -> tuple[object, list[str]]:
    """The command that ``words`` begin with, and what is left of them. An unknown verb is an assertion error."""
    command: object = commands
    while hasattr(command, "commands"):
        verbs = command.commands
        assert words, "no verb"
        if words[0].startswith("-"):
            return command, words
        assert words[0] in verbs, f"there is no verb {words[0]!r} ({', '.join(verbs)})"
        command, words = verbs[words[0]], words[1:]
    return command, words


def check_command(words: list[str]) -> None:
    command, rest = resolve(words)
    options = {name for parameter in command.params for name in getattr(parameter, "opts", ())}  # type: ignore[attr-defined]
    options |= {name for p in command.params for name in getattr(p, "secondary_opts", ())} | {"--help", "-h"}  # type: ignore[attr-defined]
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{' '.join(words)}: there is no option {word}"
    # What follows these options is no setting of a run, though it may look like one.
    conditions = {follower for word, follower in pairwise(rest) if word in ("--where", "--sample", "--branch")}
    overrides = [word for word in rest if re.match(r"[+~]*[a-z_.]+=", word) and word not in conditions]
    complete = [word for word in overrides if not any(mark in word for mark in PLACEHOLDERS)]
    assert problems_of(complete, multirun=True) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_relative_link_leads_to_something(document: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(document.read_text(encoding="utf-8"))]
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in relative if not (document.parent / target).exists()] == []


MISTAKES_SHOWN = ("lora.rank=8", "quantization=nf5", "lora_r=16")
"""The documents show what a mistake is answered with."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_command_in_a_document_can_be_typed(document: Path) -> None:
    for words in qlora_commands(document.read_text(encoding="utf-8")):
        if not any(word in MISTAKES_SHOWN for word in words) and not words[0].isupper():
            check_command([word for word in words if word != "…"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_make_target_in_a_document_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named_targets = {
        word
        for line in code_lines(document.read_text(encoding="utf-8"))
        for word in re.findall(r"(?:^|[\s$])make ([a-z-]+)", line)
    }
    assert named_targets <= targets


def all_commands() -> dict[str, object]:
    found: dict[str, object] = {}
    for name, command in commands.commands.items():  # type: ignore[attr-defined]
        for verb, inner in getattr(command, "commands", {"": command}).items():
            found[f"{name} {verb}".strip()] = inner
    return found


@pytest.mark.parametrize("verb", all_commands())
def test_each_verb_has_help_with_examples_that_can_be_typed(verb: str) -> None:
    command = all_commands()[verb]
    examples = list(qlora_commands(f"```\n{command.epilog}\n```".replace("\n  ", "\n")))  # type: ignore[attr-defined]
    assert command.help  # type: ignore[attr-defined]
    assert any(" ".join(words).startswith(verb) for words in examples)
    for words in examples:
        check_command(words)


@pytest.mark.parametrize("group", group_names())
def test_each_choice_in_conf_begins_with_its_meaning_and_a_command_that_composes(group: str) -> None:
    for choice in groups()[group]:
        header = (ROOT / "conf" / group / f"{choice}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        assert header.startswith("# "), f"{group}/{choice}.yaml"
        for words in qlora_commands(f"```\n{header.rpartition('  ')[2]}\n```"):
            check_command(words)


def test_the_page_on_commands_names_every_verb() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    missing = [verb for verb in all_commands() if not re.search(rf"`{verb}\b|qlora-exp {verb}\b", page)]
    assert missing == []


def file_names(paths: RunPaths | StudyPaths) -> list[str]:
    """The file or folder that each attribute of ``paths`` names."""
    return [member.name for member in vars(type(paths)).values() if isinstance(member, Child)]


@pytest.mark.parametrize("kind", ["run", "study"])
def test_the_page_on_structure_names_each_file_of_a_run_and_a_study(kind: str) -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    names = file_names(getattr(OutputPaths.of("outputs"), kind)("NAME"))
    assert len(names) > 8
    assert [name for name in names if f"`{name}" not in page and f"/{name}`" not in page] == []
