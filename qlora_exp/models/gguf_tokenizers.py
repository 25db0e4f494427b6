"""Completes the tokenizer that transformers builds from a GGUF file, and refuses one that it builds wrongly.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``). For an unknown name, transformers silently uses GPT-2's.
The model would then read other tokens than it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qlora_exp.errors import ModelError

GPT2_PRE_TOKENIZERS = {"gpt-2", "phi-2", "mpt", "olmo"}
"""transformers uses GPT-2's pre-tokenizer for unknown names. For these it is right."""
DIGIT_SPLITTING = {"smollm", "starcoder", "refact", "codeshell"}
"""Pre-tokenizers that split off each digit, then split as GPT-2 does."""
NFC_NORMALIZED = {"qwen2", "qwen35", "mpt", "olmo"}
"""Their tokenizers first normalize a text to Unicode NFC."""
IGNORE_MERGES = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
}
"""A word that is in the vocabulary becomes one token, even if the merges would not build it."""
ADD_BOS = {"llama3", "llama-v3", "llama-bpe", "pixtral", "lfm2", "tekken"}
"""They put BOS before a text unless the file says otherwise."""
METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def check_gguf_tokenizer(file: Path) -> Mapping[str, Any]:
    """Return the file's metadata. Raises :class:`ModelError` for a tokenizer that transformers would build wrongly."""
    metadata: dict[str, Any] = read_gguf_metadata(str(file))[0]
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    hint = "give the model as a folder: config.json, *.safetensors and its own tokenizer.json"
    if kind == "t5":
        what = "the file's tokenizer normalizes texts by a table that transformers doesn't read"
        raise ModelError(what, f"{file} (tokenizer.ggml.model = t5)", hint)
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_PRE_TOKENIZERS, *DIGIT_SPLITTING}
    if kind == "gpt2" and pre not in known and not (pre is None and metadata["general.architecture"] == "gpt2"):
        where = f"{file} (tokenizer.ggml.pre = {pre})" if pre else f"{file} (tokenizer.ggml.pre is missing)"
        what = (
            "transformers can't build this file's tokenizer: it would cut texts into other tokens than the model knows"
        )
        raise ModelError(
            what, where, f"{hint}; or a file whose tokenizer.ggml.pre is one of {', '.join(sorted(known))}"
        )
    return metadata


def complete_gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> None:
    """Add the steps that transformers leaves out when it builds the tokenizer from ``metadata``."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2":
        if pre in DIGIT_SPLITTING:
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if pre in NFC_NORMALIZED:
            backend.normalizer = normalizers.NFC()
        if pre in IGNORE_MERGES:
            backend.model.ignore_merges = True
        if pre in ADD_BOS and "tokenizer.ggml.add_bos_token" not in metadata and tokenizer.bos_token:
            tokenizer.add_bos_token = True
    spaced = isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
    if kind == "llama" and spaced and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme="never", split=False)
        decoding = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(decoding)
