"""A tokenizer read from its tokenizer.json: enough to count tokens, without transformers or torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers

from qlora_exp.config.schema import ModelConfig
from qlora_exp.data.chat_template import ChatTemplate
from qlora_exp.paths import EMBEDDED

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokenizer:
    """The part of a transformers tokenizer that :mod:`qlora_exp.data` uses to encode examples."""

    def __init__(self, folder: Path, chat_template: ChatTemplate | None = None) -> None:
        """Read the tokenizer from ``folder``, which has tokenizer.json. ``chat_template``: replaces its own.

        Raises:
            ValueError, OSError: a file can't be read.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers' Rust layer raises bare Exception
            raise ValueError(str(error)) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _settings(folder)
        self._named = {name: token for name in NAMED_TOKENS if (token := _token(settings.get(name))) is not None}
        self.eos_token = self._named.get("eos_token")
        self.unk_token = self._named.get("unk_token")
        self.chat_template = chat_template or _template(folder, settings)
        self.added_tokens_decoder: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        further_tokens = [_token(entry) for entry in (extra.values() if isinstance(extra, dict) else extra)]
        self.all_special_tokens = [*self._named.values(), *(text for text in further_tokens if text is not None)]

    def __call__(
        self, texts: str | Sequence[str], add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, Any]:
        self._tokenizer.encode_special_tokens = split_special_tokens
        if isinstance(texts, str):
            return {"input_ids": self._tokenizer.encode(texts, add_special_tokens=add_special_tokens).ids}
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """``bos_token``, ``eos_token`` …, as chat templates read them."""
        return dict(self._named)


def tokenizer_of(model: ModelConfig) -> FileTokenizer | None:
    """Return the tokenizer of ``model``'s checkpoint if its file is on this machine: in the package, in ``model.path``,
    or in the Hub's cache. ``None``: it isn't, or can't be read."""
    try:
        folder = _cached(model.checkpoint, model.revision)
        if model.path or model.family == "local":
            folder = Path(model.variant_path or "").expanduser()
        if folder is None or not (folder / "tokenizer.json").is_file():
            return None
        chat_template = (
            Path(model.chat_template).expanduser().read_text(encoding="utf-8") if model.chat_template else None
        )
        tokenizer = FileTokenizer(folder, chat_template)
        if not tokenizer.chat_template and model.variant.value == "base":
            sibling = (
                Path(model.instruct_path) if model.instruct_path else _cached(model.checkpoints.get("instruct"), None)
            )
            tokenizer.chat_template = _template(sibling, _settings(sibling)) if sibling is not None else None
        return tokenizer
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the user has no home folder
        return None


def _cached(checkpoint: str | None, revision: str | None) -> Path | None:
    if checkpoint is None:
        return None
    if checkpoint.startswith("embedded:"):
        return EMBEDDED / checkpoint.removeprefix("embedded:")
    file = huggingface_hub.try_to_load_from_cache(checkpoint, "tokenizer.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def _settings(folder: Path) -> dict[str, Any]:
    """Return the token settings of the tokenizer's files; tokenizer_config.json takes precedence over the older
    file."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        contents = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if isinstance(contents, dict):
            settings |= {key: value for key, value in contents.items() if value is not None}
    return settings


def _token(value: Any) -> str | None:
    """Return a token's text, which some files wrap in an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    file, named_templates = folder / "chat_template.jinja", folder / "additional_chat_templates"
    named = {entry.stem: entry.read_text(encoding="utf-8") for entry in sorted(named_templates.glob("*.jinja"))}
    if file.is_file():
        default = file.read_text(encoding="utf-8")
        return {"default": default, **named} if named else default
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {
            str(entry["name"]): entry["template"]
            for entry in template
            if isinstance(entry, dict) and {"name", "template"} <= set(entry)
        }
        return {name: text for name, text in named.items() if isinstance(text, str)} or None
    return template if isinstance(template, str) else None
