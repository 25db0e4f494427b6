"""Arguments that several commands share, each with the same help and the same completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qlora_exp.paths import OutputPaths


def complete_overrides(incomplete: str) -> list[str]:
    """Complete ``model=…`` and the other groups' choices; after ``lora.``, the keys of that group."""
    from qlora_exp.config.choices import choices, group_keys, group_names

    names = group_names()
    group, equals, _ = incomplete.partition("=")
    prefix, dot, _ = group.partition(".")
    if equals and group in names:
        candidates = [f"{group}={choice.name}" for choice in choices(group)]
    elif dot and prefix in names:
        candidates = [f"{prefix}.{key}=" for key in group_keys(prefix)]
    else:
        candidates = [f"{name}=" for name in names]
    return [text for text in candidates if text.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Complete ``last``, then run ids under the default output root, newest first."""
    from qlora_exp.records.find import run_folders

    return _newest_first([paths.folder.name for paths in run_folders(outputs_of(None))], incomplete)


def complete_studies(incomplete: str) -> list[str]:
    """Complete ``last``, then the studies under the default output root, newest first."""
    from qlora_exp.records.find import study_names

    return _newest_first(study_names(outputs_of(None)), incomplete)


def _newest_first(names: list[str], incomplete: str) -> list[str]:
    from qlora_exp.records.find import LAST

    return [name for name in [LAST, *reversed(names)] if name.startswith(incomplete)]


def complete_sweeps(incomplete: str) -> list[str]:
    from qlora_exp.config.choices import sweeps

    return [choice.name for choice in sweeps() if choice.name.startswith(incomplete)]


def outputs_of(output_root: str | None) -> OutputPaths:
    """Return the paths under ``--output-root``, or under the output root of conf/config.yaml."""
    from qlora_exp.config.choices import default_output_root
    from qlora_exp.paths import OutputPaths

    return OutputPaths.of(output_root if output_root is not None else default_output_root())


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Hydra overrides: group=choice or key.path=value",
        autocompletion=complete_overrides,
        show_default=False,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's id, a unique beginning or end of it, 'last', or the run's folder",
        autocompletion=complete_runs,
        show_default=False,
    ),
]
Study = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="A study's name, a unique beginning of it, or 'last'",
        autocompletion=complete_studies,
        show_default=False,
    ),
]
OutputRoot = Annotated[
    str | None,
    typer.Option(
        "--output-root", metavar="DIR", help="Folder of the runs and studies; default: output_root of the configuration"
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="URL of the study's database, if it has a password (study.json keeps none); or set QLORA_EXP_STORAGE",
    ),
]
Source = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="YAML file with settings; the sweep's axes and the overrides typed here take precedence",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts (docs/json.md)")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values for other tools")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="FIELD=VALUE", help="Only rows that match; also !=, <, >, <=, >=; may be repeated: all count"
    ),
]
Sort = Annotated[
    str | None, typer.Option("--sort", metavar="FIELD", help="Sort by a field; -FIELD: from the largest down")
]
ColumnNames = Annotated[
    str | None, typer.Option("--columns", metavar="A,B,…", help="Fields to show, e.g. lora.r,accuracy (docs/json.md)")
]

Force = Annotated[
    bool, typer.Option("--force", help="Start a run even if it is predicted not to fit into memory (budget.force=true)")
]
AcceptPrediction = Annotated[
    bool,
    typer.Option("--force", help="Accept a run that is predicted not to fit into memory (budget.force=true)"),
]
"""``--force`` of a command that starts nothing."""


def forced(force: bool) -> list[str]:
    """Return the override that ``--force`` stands for."""
    return ["budget.force=true"] if force else []


def examples(*lines: str) -> str:
    """Return a help page's examples; click keeps the line breaks of a paragraph that begins with ``\\b``."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
