"""The folders in which Hydra looks for sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from qlora_exp.config.groups import choices_of_group
from qlora_exp.config.overrides import parsed
from qlora_exp.errors import ConfigError
from qlora_exp.paths import SWEEPS

SEARCH_PATH = "hydra.searchpath"


def search_folders(overrides: Sequence[str]) -> list[Path]:
    """The folders whose ``sweeps/`` is searched: ours, those of ``hydra.searchpath``, the current one where it has any.
    Where one of ``hydra.searchpath`` has a name of the current folder's, as when a study of elsewhere is gone on with,
    the current one isn't searched.

    Raises:
        ConfigError: two of them have a sweep of the same name.
    """
    given = [override.value() for override in parsed(overrides) if override.key_or_group == SEARCH_PATH]
    entries = [str(entry).removeprefix("file://") for value in given if isinstance(value, list) for entry in value]
    given_folders = [Path(entry).resolve() for entry in entries]
    folders = [SWEEPS.parent]
    for folder in (*given_folders, Path.cwd()):
        if (folder / "sweeps").is_dir() and (folder / "sweeps").resolve() not in [f / "sweeps" for f in folders]:
            folders.append(folder.resolve())
    owners: dict[str, Path] = {}
    for folder in list(folders):
        for name in choices_of_group(folder / "sweeps"):
            if name in owners and folder not in given_folders and owners[name] in given_folders:
                folders.remove(folder)
                break
            if name in owners:
                where = " and ".join(str(place / "sweeps" / f"{name}.yaml") for place in (owners[name], folder))
                raise ConfigError(f"there are two sweeps {name!r}", where, "rename yours")
            owners[name] = folder
    return folders


def search_path(folders: Sequence[Path]) -> str:
    """``hydra.searchpath=[…]`` under which Hydra finds ``sweeps=NAME`` in the ``sweeps/`` of ``folders``."""
    entries = [QuotedString(text=f"file://{folder}", quote=Quote.single).with_quotes() for folder in folders]
    return f"{SEARCH_PATH}=[{','.join(entries)}]"
