"""The tokenizer of a checkpoint, made ready for training: padding told from the end of a text, a chat template."""

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
from qlora_exp.models.sources import ModelSource, resolve_source, sibling_source

PAD_NAMES = re.compile(r"pad", re.IGNORECASE)
SPARE_NAMES = re.compile(r"reserved|unused|extra_id", re.IGNORECASE)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right with a token that is not EOS where the vocabulary has one.

    Its chat template is ``model.chat_template``'s file where one is given, else the tokenizer's own, else the instruct
    sibling's, else ``None``. Raises :class:`ModelError` for a missing or broken tokenizer or template.
    """
    source = resolve_source(model)
    tokenizer = _load(source)
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end-of-text token, so generation would never stop"
        raise ModelError(what, source.where, "set eos_token in its tokenizer_config.json")
    _set_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    # A clean-up takes the spaces before punctuation out of a right answer, and not out of the text it is compared with.
    tokenizer.clean_up_tokenization_spaces = False
    if model.chat_template or not tokenizer.chat_template:
        tokenizer.chat_template = _template(model)
    return tokenizer


def _load(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        metadata = check_gguf_tokenizer(Path(source.where)) if source.gguf_file else None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path_or_id, **source.arguments)
        if metadata is not None:
            complete_gguf_tokenizer(tokenizer, metadata)
        return tokenizer
    except ModelError:
        raise
    except Exception as error:  # tokenizers' Rust layer raises bare Exception for a damaged file
        if source.is_local and not source.gguf_file and (lacking := _lacking(Path(source.path_or_id))) is not None:
            raise ModelError(lacking[0], source.where, lacking[1]) from None
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        hint = "the directory must hold tokenizer.json (and tokenizer_config.json)"
        raise ModelError(f"the tokenizer can't be loaded: {line}", source.where, hint) from None


OTHER_FORMS = {
    "tokenizer.model": ("SentencePiece", ("sentencepiece", "protobuf")),
    "spiece.model": ("SentencePiece", ("sentencepiece", "protobuf")),
    "tekken.json": ("Mistral's Tekken", ("mistral_common",)),
    "qwen.tiktoken": ("tiktoken", ("tiktoken",)),
    "tokenizer.tiktoken": ("tiktoken", ("tiktoken",)),
}
"""File → its format, and the packages that transformers reads it with."""
MODULES = {"protobuf": "google.protobuf"}


def _lacking(folder: Path) -> tuple[str, str] | None:
    """What a directory without tokenizer.json lacks, and what to do; ``None``: something else is wrong."""
    if (folder / "tokenizer.json").is_file():
        return None
    copy = "copy tokenizer.json from where the model comes from"
    for name, (form, packages) in OTHER_FORMS.items():
        if not (folder / name).is_file():
            continue
        missing = [package for package in packages if not _is_installed(MODULES.get(package, package))]
        if missing:
            what = f"the tokenizer is there in {form} form alone ({name}), and {' and '.join(missing)} isn't installed"
            return what, f"pip install {' '.join(missing)}, or {copy}"
        return f"the tokenizer is there in {form} form alone ({name}), and transformers can't convert it", copy
    if not any((folder / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return "the directory has no tokenizer: tokenizer.json is missing", f"{copy}, and tokenizer_config.json"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent isn't
        return False


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding by EOS hides real ends from whatever masks padding by id; so prefer any other token made for it."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) not in taken]
    candidates = [
        *(token for token in special if PAD_NAMES.search(token)),
        *([str(tokenizer.unk_token)] if tokenizer.unk_token and tokenizer.unk_token not in taken else []),
        *(token for token in special if SPARE_NAMES.search(token)),
    ]
    tokenizer.pad_token = candidates[0] if candidates else tokenizer.eos_token


def _template(model: ModelConfig) -> str | None:
    if model.chat_template:
        return _template_file(Path(model.chat_template).expanduser())
    sibling = sibling_source(model)
    if sibling is None:
        return None
    try:
        template = _load(sibling).chat_template
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
            f"the chat template is no valid Jinja: {error.message}", f"{where}, line {error.lineno}"
        ) from None
    return text
