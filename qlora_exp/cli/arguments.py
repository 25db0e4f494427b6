"""Arguments that several verbs share, each with the same words and the same completion."""

from __future__ import annotations

from typing import Annotated

import typer


def complete_overrides(incomplete: str) -> list[str]:
    """``model=…`` and the other groups' choices; then the keys of the schema."""
    from qlora_exp.catalogue import choices
    from qlora_exp.paths import CONF

    group, equals, _ = incomplete.partition("=")
    folders = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "model_training")
    if equals and group in folders:
        names = [f"{group}={choice.name}" for choice in choices(group)]
    else:
        names = [f"{folder}=" for folder in folders] + [
            f"{folder}.{key}=" for folder in folders for key in _keys_of(folder) if incomplete.startswith(f"{folder}.")
        ]
    return [name for name in names if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Run ids under the default output root, newest first."""
    from qlora_exp.catalogue import default_output_root
    from qlora_exp.history import LAST, run_folders
    from qlora_exp.paths import OutputPaths

    ids = [paths.folder.name for paths in run_folders(OutputPaths.of(default_output_root()))]
    return [name for name in [LAST, *reversed(ids)] if name.startswith(incomplete)]


def _keys_of(group: str) -> list[str]:
    from qlora_exp.paths import CONF

    import yaml  # isort: skip

    keys: set[str] = set()
    for path in (CONF / group).glob("*.yaml"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        keys.update(raw if isinstance(raw, dict) else {})
    return sorted(keys - {"defaults"})


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Hydra overrides: group=choice or key.path=value", autocompletion=complete_overrides
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="id, unique part of one, 'last', or a folder", autocompletion=complete_runs)
]
OutputRoot = Annotated[
    str | None, typer.Option("--output-root", metavar="DIR", help="where the runs are [default: output_root of conf/]")
]
OVERRIDE_CONTEXT = {"ignore_unknown_options": True}
"""``~key`` and ``+key=value`` are arguments, not options."""


def examples(*lines: str) -> str:
    """An epilog of commands; ``\\b`` keeps their line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def outputs_of(output_root: str | None):  # type: ignore[no-untyped-def]
    """The output paths that ``--output-root`` means."""
    from qlora_exp.catalogue import default_output_root
    from qlora_exp.paths import OutputPaths

    return OutputPaths.of(output_root if output_root is not None else default_output_root())
