"""Pushes one format of an export to a repository on the Hub: the adapter, the merged model, or a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from qlora_exp.errors import ConfigError, ExportError, RecordError
from qlora_exp.paths import RunPaths
from qlora_exp.records.items import read_items

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME_HINT = "--push OWNER/NAME, with letters, digits, - _ and ."
MODEL_FILES = re.compile(
    r"README\.md|LICENSE[\w.]*|Modelfile|adapter_config\.json|config\.json|generation_config\.json|chat_template\.jinja"
    r"|tokenizer[\w.]*|(spiece|sentencepiece\.bpe)\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt"
    r"|(adapter_)?model[\w.-]*\.(safetensors|safetensors\.index\.json|gguf)"
)
"""The files of a model. Any other is not pushed: it may hold texts of the data."""
LONG_TEXT_CHARACTERS = 40
"""A shorter text of an item, e.g. a label, may stand in a card by chance."""


@dataclass(frozen=True)
class Push:
    """Where an export goes."""

    repository: str
    private: bool
    again: bool
    """Add a commit to a repository that exists."""


def check_push(push: Push) -> None:
    """Check name, token, network and repository, before an export takes time.

    Raises:
        ConfigError: the name is no OWNER/NAME.
        ExportError: there is no valid token, the Hub can't be reached, or it has the repository already.
    """
    name = push.repository
    if not REPOSITORY.fullmatch(name):
        raise ConfigError(f"{name!r} is not the name of a repository", "--push", NAME_HINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ExportError(
            "the Hub isn't used offline (HF_HUB_OFFLINE is set)", f"--push {name}", "unset HF_HUB_OFFLINE"
        )
    if huggingface_hub.get_token() is None:
        hint = "hf auth login, or set HF_TOKEN to a token that may write"
        raise ExportError("there is no token for the Hub", f"--push {name}", hint)
    api = HfApi()
    try:
        api.whoami()
        api.model_info(name)
    except RepositoryNotFoundError:
        return
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise _error(error, name) from None
    if not push.again:
        hint = "another name, or --push-again adds a commit to it"
        raise ExportError(f"the Hub has a model {name} already", f"--push {name}", hint)


def push_files(files: dict[str, Path], texts: dict[str, str], push: Push, run: RunPaths) -> str:
    """Make the repository if needed, add all files in one commit, and return its address.

    Args:
        files: name in the repository → file.
        texts: name in the repository → content that replaces the file's.

    Raises:
        ExportError: a file isn't one of a model's, a text of the data set is in it, or the Hub refuses.
    """
    strange = sorted(name for name in files if not MODEL_FILES.fullmatch(name))
    if strange:
        what = "only the files of a model are pushed: others may hold texts of the data set"
        raise ExportError(what, ", ".join(strange), "delete them from the export's folder, or push with hf upload")
    card = texts["README.md"]
    if (text := next((text for text in _long_texts(run) if text in card), None)) is not None:
        what = f"the model card holds a text of the data set: {text[:LONG_TEXT_CHARACTERS]!r} …"
        raise ExportError(what, "README.md", "remove it from the task's settings or the card")
    api, name = HfApi(), push.repository
    operations = [CommitOperationAdd(path, file) for path, file in files.items() if path not in texts]
    operations += [CommitOperationAdd(path, text.encode()) for path, text in texts.items()]
    try:
        address = api.create_repo(name, private=push.private, exist_ok=push.again)
        api.create_commit(name, operations, commit_message="qlora-exp export")
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise _error(error, name) from None
    return str(address)


def without_folders(text: str, base: str) -> str:
    """Return a text with the path of a local base replaced by its last part: others have no such folder."""
    return text.replace(base, Path(base).name) if Path(base).is_absolute() else text


def portable_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, content) of the adapter's settings if they name a folder of this machine."""
    file = folder / "adapter_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        named = settings.get("base_model_name_or_path")
        if isinstance(named, str) and Path(named).is_absolute():
            settings["base_model_name_or_path"] = Path(named).name
            yield file.name, json.dumps(settings, indent=2, sort_keys=True) + "\n"


def _long_texts(run: RunPaths) -> Iterator[str]:
    """Yield the run's prompts, right answers and generated answers, those that are long enough to be recognised."""
    for split in ("validation", "test"):
        try:
            items = read_items(run.folder, split)
        except RecordError:
            continue
        for item in items:
            for name in ("prompt", "expected", "answer", "generated", "base_generated"):
                text = item.get(name)
                if isinstance(text, str) and len(text) >= LONG_TEXT_CHARACTERS:
                    yield text


def _error(error: Exception, name: str) -> ExportError:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    where = f"--push {name}"
    if response is None:
        endpoint = huggingface_hub.constants.ENDPOINT
        return ExportError(
            f"the Hub can't be reached at {endpoint}", where, "try again with a network; the export stays"
        )
    if response.status_code == 401:
        return ExportError("the Hub doesn't know this token", where, "hf auth login, or set HF_TOKEN to a valid one")
    if response.status_code == 403:
        return ExportError("this token may not write there", where, "a token with write access, or your own OWNER")
    if response.status_code == 409:
        return ExportError(f"the Hub has a model {name} already", where, "another name, or --push-again")
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ExportError(f"the Hub refuses: {line[:300]}", where, "see the Hub's status, then repeat the command")
