"""Read a data set of the Hub. One request finds out whether it is available; then its splits are read one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from qlora_exp.config.schema import TaskConfig
from qlora_exp.data.files import DataFile, rows_and_problems, with_class_names
from qlora_exp.data.items import SPLIT_NAMES
from qlora_exp.errors import DataError, nearest

HUB_READ_SECONDS = 5.0
"""Time limit for the Hub's answer. After that the local cache is read, or the task is refused."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_hub(task: TaskConfig) -> dict[str, DataFile]:
    """Return the splits that ``task.splits`` names. Raises :class:`DataError` if one is not available."""
    if not task.hub_id or not _HUB_ID.fullmatch(task.hub_id) or Path(task.hub_id).exists():
        hint = "task.hub_id=OWNER/NAME; files on disk: task=local task.path=…"
        raise DataError(f"{task.hub_id!r} is not the name of a Hub data set", "task.hub_id", hint)
    for split in task.splits:
        if split not in SPLIT_NAMES:
            raise DataError(f"there is no split {split!r}", "task.splits", nearest(split, SPLIT_NAMES))
    if "train" not in task.splits:
        raise DataError("no training split is named", "task.splits", "task.splits.train=NAME_OF_THEIR_SPLIT")
    reachable = _is_reachable(task)
    with _offline_mode(not reachable):
        return {split: _load_hub_split(task, hub_split, reachable) for split, hub_split in task.splits.items()}


def _is_reachable(task: TaskConfig) -> bool:
    """Return whether the Hub answers. One request is enough; datasets would retry for minutes, six times a split."""
    try:
        HfApi().dataset_info(str(task.hub_id), revision=task.hub_revision, timeout=HUB_READ_SECONDS)
    except GatedRepoError:
        hint = f"ask for access at https://huggingface.co/datasets/{task.hub_id} and run: hf auth login"
        raise DataError(f"{task.hub_id} is gated", "task.hub_id", hint) from None
    except RepositoryNotFoundError:
        hint = "check its spelling; a private one needs: hf auth login"
        raise DataError(f"the Hub has no data set {task.hub_id}", "task.hub_id", hint) from None
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 404:
            return False
        what = f"{task.hub_id} has no revision {task.hub_revision}"
        raise DataError(what, "task.hub_revision", "task.hub_revision=null for the newest") from None
    except (HTTPError, OfflineModeIsEnabled, OSError):
        return False
    return True


@contextmanager
def _offline_mode(offline: bool) -> Iterator[None]:
    """Switch datasets to offline mode: it reads its cache or fails at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or before
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _load_hub_split(task: TaskConfig, hub_split: str, reachable: bool) -> DataFile:
    import datasets

    configuration = f" [{task.hub_config}]" if task.hub_config else ""
    where = f"hub data set {task.hub_id}{configuration}, split {hub_split}"
    try:
        loaded = datasets.load_dataset(task.hub_id, task.hub_config, revision=task.hub_revision, split=hub_split)
    except (OSError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        if not reachable:
            what = f"{task.hub_id} is not in the local cache, and the Hub can't be reached"
            hint = "run it once on a machine with a network and this cache (HF_HOME), or task=local task.path=FILE"
            raise DataError(what, where, hint) from None
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = (
            "check the id, task.hub_config, task.splits, your access (hf auth login) and the network; "
            "offline: task=local task.path=FILE"
        )
        raise DataError(f"the data set can't be loaded: {reason}", where, hint) from None
    return rows_of_dataset(loaded, f"{task.hub_id}/{hub_split}")


def rows_of_dataset(loaded: Any, name: str) -> DataFile:
    """Return the rows of a ``datasets.Dataset``, with class names for class numbers: numbers aren't answers."""
    names = {column: feature.names for column, feature in loaded.features.items() if hasattr(feature, "int2str")}
    rows, problems = rows_and_problems(name, enumerate(loaded, start=1), lambda row: with_class_names(row, names))
    if not rows:
        raise DataError("the split holds no row", name, "choose another split: task.splits.train=NAME")
    return DataFile(name, rows, tuple(map(str, loaded.column_names)), problems)
