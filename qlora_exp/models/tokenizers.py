"""Loads the tokenizer of a checkpoint and prepares it for training: a padding token that isn't EOS, a chat template."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_exp.config.schema import ModelConfig
from qlora_exp.data.chat_template import Generation
from qlora_exp.errors import ModelError
from qlora_exp.models.gguf_tokenizers import check_gguf_tokenizer, complete_gguf_tokenizer
from qlora_exp.models.sources import ModelSource, instruct_sibling, resolve_source

PAD_NAMES = re.compile(r"pad", re.IGNORECASE)
RESERVED_NAMES = re.compile(r"reserved|unused|extra_id", re.IGNORECASE)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer. It pads on the right, with a token that is not EOS if the vocabulary has one.

    Its chat template is ``model.chat_template``'s file if set, else the tokenizer's own, else that of the instruct
    sibling, else ``None``.

    Raises:
        ModelError: the tokenizer or the template is missing or broken.
    """
    source = resolve_source(model)
    tokenizer = _load_tokenizer(source)
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end-of-text token, so generation would never stop"
        raise ModelError(what, source.where, "set eos_token in its tokenizer_config.json")
    _set_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    # A clean-up removes spaces before punctuation from a correct answer, but not from the reference.
    tokenizer.clean_up_tokenization_spaces = False
    if model.chat_template or not tokenizer.chat_template:
        tokenizer.chat_template = _chat_template(model)
    return tokenizer


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        metadata = check_gguf_tokenizer(Path(source.where)) if source.gguf_file else None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path_or_id, **source.arguments)
        if metadata is not None:
            complete_gguf_tokenizer(tokenizer, metadata)
        return tokenizer
    except ModelError:
        raise
    except Exception as error:  # tokenizers' Rust layer raises bare Exception for a damaged file
        if (
            source.is_local
            and not source.gguf_file
            and (lacking := _missing_tokenizer(Path(source.path_or_id))) is not None
        ):
            raise ModelError(lacking[0], source.where, lacking[1]) from None
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        hint = "the directory must hold tokenizer.json (and tokenizer_config.json)"
        raise ModelError(f"the tokenizer can't be loaded: {line}", source.where, hint) from None


OTHER_FORMATS = {
    "tokenizer.model": ("SentencePiece", ("sentencepiece", "protobuf")),
    "spiece.model": ("SentencePiece", ("sentencepiece", "protobuf")),
    "tekken.json": ("Mistral's Tekken", ("mistral_common",)),
    "qwen.tiktoken": ("tiktoken", ("tiktoken",)),
    "tokenizer.tiktoken": ("tiktoken", ("tiktoken",)),
}
"""File → its format, and the packages with which transformers reads it."""
MODULES = {"protobuf": "google.protobuf"}


def _missing_tokenizer(folder: Path) -> tuple[str, str] | None:
    """Return what a directory without tokenizer.json lacks, and what to do; ``None`` if something else is wrong."""
    if (folder / "tokenizer.json").is_file():
        return None
    copy = "copy tokenizer.json from where the model comes from"
    for name, (form, packages) in OTHER_FORMATS.items():
        if not (folder / name).is_file():
            continue
        missing = [package for package in packages if not _is_installed(MODULES.get(package, package))]
        if missing:
            what = (
                f"the directory has the tokenizer only in {form} format ({name}), "
                f"and {' and '.join(missing)} isn't installed"
            )
            return what, f"pip install {' '.join(missing)}, or {copy}"
        return (
            f"the directory has the tokenizer only in {form} format ({name}), and transformers can't convert it",
            copy,
        )
    if not any((folder / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return "the directory has no tokenizer: tokenizer.json is missing", f"{copy}, and tokenizer_config.json"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent isn't
        return False


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prefer a padding token that isn't EOS: code that masks padding by its id would hide real ends of texts."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) not in taken]
    candidates = [
        *(token for token in special if PAD_NAMES.search(token)),
        *([str(tokenizer.unk_token)] if tokenizer.unk_token and tokenizer.unk_token not in taken else []),
        *(token for token in special if RESERVED_NAMES.search(token)),
    ]
    tokenizer.pad_token = candidates[0] if candidates else tokenizer.eos_token


def _chat_template(model: ModelConfig) -> str | None:
    if model.chat_template:
        return _template_file(Path(model.chat_template).expanduser())
    sibling = instruct_sibling(model)
    if sibling is None:
        return None
    try:
        template = _load_tokenizer(sibling).chat_template
    except ModelError:
        return None
    return template if isinstance(template, str) else None


def _template_file(path: Path) -> str:
    where = f"model.chat_template = {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template can't be read: {error}", where, "give a .jinja file") from None
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is not valid Jinja: {error.message}", f"{where}, line {error.lineno}"
        ) from None
    return text
