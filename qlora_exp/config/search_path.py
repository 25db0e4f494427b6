"""The folders in which Hydra looks for sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from qlora_exp.config.groups import choices_of_group
from qlora_exp.config.overrides import parse_all
from qlora_exp.errors import ConfigError
from qlora_exp.paths import SWEEPS

SEARCH_PATH = "hydra.searchpath"


def search_folders(overrides: Sequence[str]) -> list[Path]:
    """Return the folders whose ``sweeps/`` is searched: the package's, those of ``hydra.searchpath``, and the current
    one.

    If a folder of ``hydra.searchpath`` and the current one have a sweep of the same name, the current one isn't
    searched: a study from elsewhere is being resumed.

    Raises:
        ConfigError: two folders have a sweep of the same name.
    """
    values = [override.value() for override in parse_all(overrides) if override.key_or_group == SEARCH_PATH]
    entries = [str(entry).removeprefix("file://") for value in values if isinstance(value, list) for entry in value]
    listed_folders = [Path(entry).resolve() for entry in entries]
    folders = [SWEEPS.parent]
    for folder in (*listed_folders, Path.cwd()):
        if (folder / "sweeps").is_dir() and (folder / "sweeps").resolve() not in [f / "sweeps" for f in folders]:
            folders.append(folder.resolve())
    owners: dict[str, Path] = {}
    for folder in list(folders):
        for name in choices_of_group(folder / "sweeps"):
            if name in owners and folder not in listed_folders and owners[name] in listed_folders:
                folders.remove(folder)
                break
            if name in owners:
                where = " and ".join(str(owner / "sweeps" / f"{name}.yaml") for owner in (owners[name], folder))
                raise ConfigError(f"there are two sweeps {name!r}", where, "rename yours")
            owners[name] = folder
    return folders


def search_path(folders: Sequence[Path]) -> str:
    """Return the override ``hydra.searchpath=[…]`` with which Hydra finds ``sweeps=NAME`` in the ``sweeps/`` of
    ``folders``."""
    entries = [QuotedString(text=f"file://{folder}", quote=Quote.single).with_quotes() for folder in folders]
    return f"{SEARCH_PATH}=[{','.join(entries)}]"
