"""What can be typed: commands with their arguments, options, defaults and choices; configuration keys and groups."""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from tests.contracts.calling import call, start
from tests.contracts.golden_files import ROOT, plain

Command = Any
"""A command of click, or of the copy of click that typer brings."""
WORDS = "help"
"""The folder of the texts of --help: they may change, and are kept for whoever reads a change."""


def commands() -> dict[str, Any]:
    """``"data preview"`` → its parameters."""
    return {" ".join(path): described(command) for path, command in walk()}


def walk() -> Iterator[tuple[tuple[str, ...], Command]]:
    """Every command with its name, the program itself first."""
    from qlora_exp.cli import app

    yield from _walk(("qlora-exp",), typer.main.get_command(app))


def _walk(path: tuple[str, ...], command: Command) -> Iterator[tuple[tuple[str, ...], Command]]:
    yield path, command
    context = typer.Context(command, info_name=path[-1])
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        found = command.get_command(context, name)
        if found is not None:
            yield from _walk((*path, name), found)


def described(command: Command) -> dict[str, Any]:
    """What a script can rely on; how a function calls its parameters isn't part of it."""
    parameters = [_parameter(parameter) for parameter in command.params]
    arguments = [one for one in parameters if one["kind"] == "argument"]
    options = {one["names"][0]: one for one in parameters if one["kind"] == "option"}
    for one in parameters:
        del one["kind"]
    return {"arguments": arguments, "options": options, "hidden": bool(command.hidden)}


def _parameter(parameter: Any) -> dict[str, Any]:
    option = parameter.param_type_name == "option"
    names = sorted([*parameter.opts, *parameter.secondary_opts], key=lambda name: (-len(name), name))
    kind, choices = _type(parameter)
    return {
        "kind": parameter.param_type_name,
        "names": names if option else [],
        "off": list(parameter.secondary_opts),
        "type": kind,
        "choices": choices,
        "least": parameter.min,
        "most": parameter.max,
        "default": "<computed>" if callable(parameter.default) else plain(parameter.default),
        "required": bool(parameter.required),
        "values": "many" if parameter.nargs == -1 or parameter.multiple else parameter.nargs,
        "flag": bool(getattr(parameter, "is_flag", False)),
        "variable": parameter.envvar,
        "completed": parameter._custom_shell_complete is not None,
    }


def _type(parameter: Any) -> tuple[str, list[str] | None]:
    """What a value is parsed to, and what it may be where that is a closed list. (Of click's own parameters, such as
    those of shell completion, ``type``.)"""
    if not hasattr(parameter, "type_descriptor"):
        return parameter.type.name, list(getattr(parameter.type, "choices", [])) or None
    annotation = parameter.type_descriptor.annotation
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "choice", [str(member.value) for member in annotation]
    if typing.get_origin(annotation) is typing.Literal:
        return "choice", [str(value) for value in typing.get_args(annotation)]
    return annotation.__name__ if isinstance(annotation, type) else str(annotation), None


def help_texts() -> dict[str, str]:
    """``qlora-exp run --help`` and the others as they are printed."""
    texts = {}
    for path, _ in walk():
        called = call(*path[1:], "--help")
        assert called.code == 0, called.err
        texts["-".join(path)] = called.out.strip() + "\n"
    return texts


def choices() -> dict[str, list[str]]:
    """Configuration group → what it offers; and the sweeps that come with the package."""
    folders = [ROOT / "sweeps", *sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir())]
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_"))
        for folder in folders
    }


def configuration(folder: Path) -> dict[str, Any]:
    """Every key of a run's configuration with its default, as Hydra's application prints it; and what each choice of
    a group sets."""
    done = start(folder, "--cfg", "job", program=("-m", "qlora_exp"))
    assert done.code == 0, done.err
    return {"choices": choices(), "keys": yaml.safe_load(done.out), "files": files()}


def files() -> dict[str, Any]:
    """File of conf/ and sweeps/ → its content. Prices of machines aren't settings."""
    groups, sweeps = sorted(ROOT.glob("conf/*/*.yaml")), sorted(ROOT.glob("sweeps/*.yaml"))
    return {
        file.relative_to(ROOT).as_posix(): yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in (*groups, ROOT / "conf" / "export.yaml", *sweeps)
    }
