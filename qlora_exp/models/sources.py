"""Finds a base model (in the package, a directory, a GGUF file, on the Hub) and checks whether it can be used.

Nothing here reads a weight into memory: errors are found before anything expensive.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_exp.architecture.pruned import kept_layers
from qlora_exp.config.schema import ModelConfig
from qlora_exp.errors import ModelError, nearest
from qlora_exp.models.causality import check_configured_causal
from qlora_exp.models.config_sizes import check_positive_sizes
from qlora_exp.models.file_digests import model_file_digest
from qlora_exp.models.gguf_header import gguf_parts, is_tied, read_header
from qlora_exp.models.gguf_rope import with_llama3_rope
from qlora_exp.models.quantized_checkpoints import QuantizedCheckpoint, quantized_checkpoint, without_quantization
from qlora_exp.models.starting_adapters import adapter_chain, adapter_digest, check_base_of_adapter
from qlora_exp.models.weight_files import (
    WEIGHTS,
    WEIGHTS_INDEX,
    check_hub_files,
    check_no_adapter,
    check_not_lfs_pointer,
    check_weight_files,
    config_hint,
)
from qlora_exp.paths import EMBEDDED

HUB_TIMEOUT_SECONDS = 5.0
"""Longest wait for the Hub's answer. Without a network, the local cache is used or the run is refused at once."""


@dataclass(frozen=True)
class ModelSource:
    """One checkpoint. ``path_or_id`` is a folder or a Hub id, ``gguf_file`` a file's name in that folder, ``revision``
    a Hub commit (so that the files checked are the files loaded)."""

    name: str
    path_or_id: str
    revision: str | None
    gguf_file: str | None
    is_local: bool
    cached: bool = False
    """The Hub doesn't answer: only files in its local cache are used."""
    layers: tuple[int, ...] = ()
    """Numbers of the decoder layers that are kept; empty: all."""
    adapters: tuple[str, ...] = ()
    """Folders of adapters that are merged into the weights, in this order."""

    @property
    def where(self) -> str:
        """The place, as messages show it."""
        if self.gguf_file:
            return str(Path(self.path_or_id) / self.gguf_file)
        return self.path_or_id

    @property
    def cached_folder(self) -> Path | None:
        """The folder with the files: the local one, or the Hub's cache if it has the weights."""
        if self.is_local:
            return Path(self.path_or_id)
        for name in (WEIGHTS, WEIGHTS_INDEX):
            file = huggingface_hub.try_to_load_from_cache(self.path_or_id, name, revision=self.revision)
            if isinstance(file, str):
                return Path(file).parent
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained``. Remote code never runs."""
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.is_local:
            arguments["local_files_only"] = True
        else:
            arguments["revision"] = self.revision
            arguments["local_files_only"] = self.cached
        return arguments


WHOLE_MODEL_HINT = "give the GGUF file of the whole model"
IGNORES_ATTENTION_MASK = {"rwkv"}
"""Recurrent architectures whose code in transformers ignores the attention mask."""


def resolve_source(model: ModelConfig) -> ModelSource:
    """Find ``model``'s checkpoint and check everything that can be checked without loading it.

    Raises:
        ModelError: nothing is there, config.json is missing or broken, the architecture is unknown or needs remote
            code, the weights are pickled or damaged, the ``gguf`` package is missing, the Hub can't be reached, or
            ``model.adapter`` belongs to another model.
    """
    if model.family == "local" or model.path:
        source = _local_source(Path(model.variant_path or "").expanduser())
    else:
        checkpoint = model.checkpoint
        if checkpoint is None:
            known = nearest(model.variant.value, model.checkpoints)
            raise ModelError(f"{model.family} has no {model.variant.value} checkpoint", "model.variant", known)
        source = _checkpoint_source(checkpoint, model.revision, _key_of_id(model))
    if model.adapter:
        source = _with_adapters(source, Path(model.adapter))
    if model.layers is None:
        return source
    config = model_config(source)
    return replace(source, layers=kept_layers(model.layers, config.num_hidden_layers, config.model_type))


def instruct_sibling(model: ModelConfig) -> ModelSource | None:
    """Return the instruct model of a base's family or pair, or ``None`` if there is none or it can't be reached."""
    checkpoint = model.checkpoints.get("instruct")
    if model.variant.value == "instruct":
        return None
    try:
        if model.instruct_path:
            return _local_source(Path(model.instruct_path).expanduser())
        return _checkpoint_source(checkpoint, None) if checkpoint is not None else None
    except ModelError:
        return None


def _key_of_id(model: ModelConfig) -> str:
    """Return the setting that names the variant's checkpoint, as messages show it."""
    if model.family != "hub":
        return "model.checkpoints"
    key = "model.instruct_id" if model.instruct_id and model.variant.value == "instruct" else "model.id"
    return f"{key} = {model.checkpoint}"


def _with_adapters(source: ModelSource, folder: Path) -> ModelSource:
    """Return ``source`` with the adapter in ``folder``, after those that the run of that adapter started from.

    Raises:
        ModelError: there is no adapter, or it was trained on another model.
    """
    for adapter in adapter_chain(folder):
        check_base_of_adapter(adapter, source.path_or_id, source.is_local, fingerprint(source))
        source = replace(source, adapters=(*source.adapters, str(adapter.folder)))
    return source


def model_config(source: ModelSource) -> PretrainedConfig:
    """Return transformers' configuration of a resolved source, without the settings of an earlier quantization."""
    try:
        config = _read_config(source)
    except Exception as error:  # every architecture validates in its own way, and GGUF readers unpack raw bytes
        what = f"the model's configuration can't be read: {first_error_line(error)}"
        raise ModelError(what, source.where, "is it a complete model that transformers can build?") from None
    if source.gguf_file is None:
        quantized_checkpoint(vars(config), source.where)
    if redirected := getattr(config, "transformers_weights", None):
        what = f"config.json names other weights than the directory's own: transformers_weights = {redirected}"
        raise ModelError(what, source.where, "remove the key, or give the directory of those weights")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = f"{config.model_type} is not an architecture that generates text left to right"
        raise ModelError(what, source.where, "give a causal language model: Llama, Qwen, GPT-2 …")
    if config.model_type in IGNORES_ATTENTION_MASK:
        what = f"{config.model_type} reads padding as text in transformers: rows of a batch would get wrong scores"
        raise ModelError(what, source.where, "give a model that takes an attention mask: Llama, Qwen, Mamba …")
    check_configured_causal(config, source.where)
    return without_quantization(config)


def quantized_source(source: ModelSource) -> QuantizedCheckpoint | None:
    """Return how the weights of a resolved source are packed; ``None``: they aren't quantized, or are GGUF."""
    return None if source.gguf_file else quantized_checkpoint(vars(_read_config(source)), source.where)


def _read_config(source: ModelSource) -> PretrainedConfig:
    if not source.gguf_file:
        return AutoConfig.from_pretrained(source.path_or_id, **source.arguments)
    state = Path(source.where).stat()
    return copy.deepcopy(_read_gguf_config(source, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _read_gguf_config(source: ModelSource, size: int, modified: int) -> PretrainedConfig:
    """Read the configuration once: it takes seconds for a large vocabulary, and every step of a run needs it. A changed
    file is read again."""
    config: PretrainedConfig = AutoConfig.from_pretrained(source.path_or_id, **source.arguments)
    parts = gguf_parts(Path(source.where))
    if len(parts) > 1:  # transformers looks for the head in the first part only
        config.tie_word_embeddings = is_tied(parts)
    return with_llama3_rope(config, [read_header(part) for part in parts])


def fingerprint(source: ModelSource) -> str:
    """Return SHA-256 over names and contents of the files on disk; for the Hub, its id and commit. The digests of
    merged adapters follow."""
    if source.layers:
        return f"{fingerprint(replace(source, layers=()))}+layers:{','.join(map(str, source.layers))}"
    if source.adapters:
        return "+".join([fingerprint(replace(source, adapters=())), *(adapter_digest(f) for f in source.adapters)])
    if not source.is_local:
        return f"hub:{source.path_or_id}@{source.revision}"
    folder = Path(source.path_or_id)
    files = gguf_parts(folder / source.gguf_file) if source.gguf_file else sorted(_model_files(folder))
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{model_file_digest(file)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _model_files(folder: Path) -> list[Path]:
    """Return the files that a loaded model and tokenizer depend on. READMEs and adapters in the folder don't count."""
    suffixes = (".json", ".safetensors", ".jinja", ".model", ".txt")
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes]
    return [*files, *folder.glob("additional_chat_templates/*.jinja")]


def _checkpoint_source(checkpoint: str, revision: str | None, key: str = "model.checkpoints") -> ModelSource:
    if checkpoint.startswith("embedded:"):
        folder = EMBEDDED / checkpoint.removeprefix("embedded:")
        if not folder.is_dir():
            shipped = [path.parent.name for path in EMBEDDED.glob("*/config.json")]
            raise ModelError(f"the package ships no {checkpoint}", str(folder), nearest(folder.name, shipped))
        source = _local_source(folder)
        return ModelSource(checkpoint, source.path_or_id, None, None, True)
    return _hub_source(checkpoint, revision, key)


def _local_source(path: Path) -> ModelSource:
    if not str(path) or str(path) == ".":
        raise ModelError("a local model needs a path", "model.path", "model.path=DIRECTORY_OR_FILE.gguf")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError("there is no such model directory or GGUF file", str(path), nearest(path.name, siblings))
    path = path.absolute()
    if path.is_file():
        return _gguf_source(path)
    check_no_adapter(path)
    if not (path / "config.json").is_file():
        raise ModelError("the directory has no config.json", str(path), config_hint(path))
    source = ModelSource(path.name, str(path), None, None, True)
    check_config(path / "config.json")
    check_weight_files(path)
    model_config(source)
    return source


def _gguf_source(path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        if ".gguf" in path.name:  # model.gguf.part1of2, model.gguf-split-a
            full_name = path.name[: path.name.index(".gguf") + len(".gguf")]
            what = "this looks like a piece of a GGUF file"
            raise ModelError(what, str(path), f"join the pieces first: cat {full_name}?* > {full_name}")
        what = "a model file must be GGUF; safetensors are given as their directory"
        raise ModelError(what, str(path), f"model.path={path.parent}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF files needs the gguf package", str(path), "pip install 'qlora-exp[gguf]'")
    check_not_lfs_pointer(path)
    check_no_adapter(path.parent)
    path = gguf_parts(path)[0]  # the first part has the metadata of all
    kind = read_header(path).metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"the GGUF file holds no model: it says that it is a file of the type {kind}", str(path), WHOLE_MODEL_HINT
        )
    source = ModelSource(path.stem, str(path.parent), None, path.name, True)
    model_config(source)
    return source


def check_config(file: Path) -> None:
    """Raise :class:`ModelError` if config.json is invalid, names an architecture that transformers lacks, or has a size
    of 0 or less."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"config.json can't be read: {error}", str(file), "restore it from the model's source"
        ) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError("config.json names no model_type", str(file), 'e.g. "model_type": "llama"')
    model_type = raw["model_type"]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if raw.get("auto_map"):
            what = f"{model_type} needs code that comes with the checkpoint, and qlora-exp never runs such code"
            hint = "use a checkpoint of an architecture that transformers itself has"
            raise ModelError(what, str(file), hint)
        what = f"transformers has no causal language model called {model_type}"
        raise ModelError(what, str(file), nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    check_positive_sizes(file, raw)


def _hub_source(repository: str, revision: str | None, key: str) -> ModelSource:
    commit, cached = _hub_commit(repository, revision, key)
    source = ModelSource(repository, repository, commit, None, False, cached)
    model_config(source)
    return source


@functools.lru_cache(maxsize=256)
def _hub_commit(repository: str, revision: str | None, key: str) -> tuple[str, bool]:
    """Return the commit that ``revision`` (default: main) means, and whether it comes from the local cache. The Hub is
    asked once. ``key``: the setting that names the repository, for messages."""
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        if info.sha is not None:
            if info.siblings:
                check_hub_files({file.rfilename for file in info.siblings}, f"Hub id {repository}")
            _touch_hub_cache(repository, revision)
            return str(info.sha), False
    except GatedRepoError:
        hint = f"accept its licence at https://huggingface.co/{repository} and run: hf auth login"
        raise ModelError(f"{repository} is gated", key, hint) from None
    except RepositoryNotFoundError:
        hint = "check its spelling; a private one needs: hf auth login"
        raise ModelError(f"the Hub has no model {repository}", key, hint) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            what = f"{repository} has no revision {revision}"
            raise ModelError(what, "model.revision", "model.revision=null for the newest") from None
    except (HTTPError, OfflineModeIsEnabled, OSError):
        pass  # no network: the local cache may have it
    return _cached_commit(repository, revision), True


def _touch_hub_cache(repository: str, revision: str | None) -> None:
    """Download config.json by its revision's name, so that the local cache knows the commit of that name. Loading by
    commit doesn't record it, and without a network the commit would not be found again."""
    with contextlib.suppress(HfHubHTTPError, HTTPError, OSError):
        huggingface_hub.hf_hub_download(repository, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT_SECONDS)


def _cached_commit(repository: str, revision: str | None) -> str:
    try:
        file = huggingface_hub.hf_hub_download(repository, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        what = f"{repository} is not in the local cache, and the Hub can't be reached"
        hint = (
            f"on a machine with a network: hf download {repository}; or model=local model.path=DIR, or model=embedded"
        )
        raise ModelError(what, f"Hub id {repository}", hint) from None
    return Path(os.path.normpath(file)).parent.name


def first_error_line(error: BaseException) -> str:
    """Return an error's first line, or the second if the first only introduces it; at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1 if lines[0].endswith(":") and len(lines) > 1 else 0][:300]
