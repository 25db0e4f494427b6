"""GGUF files in a real llama.cpp: measured in a separate process, and evaluated like any other model.

llama.cpp comes with the optional package llama-cpp-python. transformers can read GGUF files, too, but dequantizes them
to fp32. That says nothing about memory or speed on a device.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_exp.export.results import Runtime

MEASURE_TIMEOUT_SECONDS = 900.0
"""Time-out. An 8B model in 4 bits reads 256 tokens on one slow core in about five minutes."""
INSTALL_HINT = (
    "llama.cpp isn't installed: pip install 'qlora-exp[phone]' (pip compiles it: needs a C++ compiler and some minutes)"
)


def why_not() -> str | None:
    """Return ``None`` if llama.cpp is installed, else what to do about it."""
    return None if importlib.util.find_spec("llama_cpp") is not None else INSTALL_HINT


def measure_runtime(path: Path, context_tokens: int, generated_tokens: int) -> Runtime:
    """Measure memory and speed of ``path`` on one thread. Unknown values are ``None``, and ``why`` gives the reason."""
    unknown = Runtime(None, _processor(), 1, context_tokens)
    if (missing := why_not()) is not None:
        return replace(unknown, why=missing)
    script = Path(__file__).with_name("measure_llama_cpp.py")
    # -P: don't import from the script's own folder.
    command = [sys.executable, "-P", str(script), str(path), str(context_tokens), str(generated_tokens)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return replace(unknown, why=f"llama.cpp was not done after {MEASURE_TIMEOUT_SECONDS:.0f} seconds")
    if process.returncode != 0:
        last_line = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return replace(unknown, why=f"llama.cpp can't run the file: {last_line[:300]}")
    values = json.loads(process.stdout.strip().splitlines()[-1])
    return Runtime(processor=_processor(), threads=1, context_tokens=context_tokens, **values)


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


class LlamaCppModel(nn.Module):
    """A GGUF file with the interface that the evaluation needs of a transformers model. It has no KV cache to fork. It
    reuses the prefix that a text shares with the one before it."""

    def __init__(self, path: Path, like: PreTrainedModel, longest: int) -> None:
        """``like``: the merged model, for its configuration. ``longest``: tokens of the longest sequence."""
        import llama_cpp

        super().__init__()
        self.config = like.config
        self.generation_config = like.generation_config
        self._embeddings = nn.Embedding(like.config.vocab_size, 1)  # the evaluation reads only its shape and device
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=longest, n_batch=longest, n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(), n_gpu_layers=0, logits_all=True, verbose=False,
        )  # fmt: skip

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embeddings

    def tokenize(self, text: str) -> list[int]:
        """Return the ids that the file's own tokenizer gives, without BOS."""
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=True))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, use_cache: bool = False
    ) -> SimpleNamespace:
        """Logits (rows, logits_to_keep, vocabulary), zero where a row has padding."""
        columns = input_ids.shape[1]
        logits = torch.zeros(len(input_ids), logits_to_keep, self.config.vocab_size)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            positions = mask.nonzero()[:, 0]
            self._read(ids[positions].tolist())
            first_column = columns - logits_to_keep
            for index, column in enumerate(positions.tolist()):
                if column >= first_column:
                    logits[row, column - first_column] = torch.from_numpy(self._llama.scores[index])
        return SimpleNamespace(logits=logits, past_key_values=None)

    def _read(self, ids: Sequence[int]) -> None:
        previous = self._llama.input_ids[: self._llama.n_tokens].tolist()
        shared = next(
            (n for n, (a, b) in enumerate(zip(previous, ids, strict=False)) if a != b), min(len(previous), len(ids))
        )
        self._llama.n_tokens = shared
        if shared < len(ids):
            self._llama.eval(ids[shared:])
