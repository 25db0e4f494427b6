"""``import``: the configuration of another tool as a file for ``--from``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qlora_exp.cli.arguments import examples


def add_to(app: typer.Typer) -> None:
    app.command(
        "import",
        epilog=examples(
            "qlora-exp import axolotl.yml                           # writes axolotl.qlora.yaml",
            "qlora-exp import training_args.json -o settings.yaml",
            "qlora-exp import llamafactory.yaml",
            "qlora-exp import ADAPTER/adapter_config.json && qlora-exp run --from adapter_config.qlora.yaml",
        ),
    )(import_settings)


def import_settings(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="YAML or JSON of Axolotl, LLaMA-Factory, a TRL script, TrainingArguments, or an adapter_config.json",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write; default: NAME.qlora.yaml; -: print it"),
    ] = None,
) -> int:
    """Convert another tool's configuration to a YAML file for --from.

    The command lists what has no counterpart here. It reads neither models nor data.
    """
    import sys

    from qlora_exp.config.imported_settings import as_yaml, converted, read_other
    from qlora_exp.errors import ConfigError

    tool, content = read_other(file)
    target = output or Path(f"{file.stem}.qlora.yaml")
    prints = str(target) == "-"
    if not prints and target.exists():
        raise ConfigError("the file to write exists", str(target), f"qlora-exp import {file} -o OTHER.yaml")
    imported = converted(tool, content)
    text = as_yaml(imported, file.name, "FILE.yaml" if prints else shlex.quote(str(target)))
    if prints:
        print(text, end="")
    else:
        target.write_text(text, encoding="utf-8")
    out = sys.stderr if prints else sys.stdout
    print(f"{file}: {tool}, {len(imported.settings)} settings from {len(content)} keys", file=out)
    if imported.without:
        print("without a counterpart:", file=out)
        for entry, reason in imported.without.items():
            print(_wrapped(f"{' '.join(entry.split())} ({reason})", "  "), file=out)
    if imported.unneeded:
        print(_wrapped(f"off, or the same here: {', '.join(imported.unneeded)}", ""), file=out)
    if not prints:
        place = shlex.quote(str(target))
        print(f"{target} written; next: qlora-exp validate --from {place}", file=out)
    return 0


def _wrapped(text: str, indent: str) -> str:
    """Return ``text`` in lines of the terminal's width."""
    import shutil
    import textwrap

    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=f"{indent}    ", break_long_words=False)
