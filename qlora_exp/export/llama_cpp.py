"""GGUF files in a real llama.cpp: measured in a process of their own, and asked like any other model.

llama.cpp comes with the optional package llama-cpp-python. transformers can read GGUF files too, but unpacks them to
fp32: it says nothing about memory or speed on a device.
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

MEASURE_SECONDS = 900.0
"""An 8B model in 4 bits reads 256 tokens on one slow core in about five minutes."""
MISSING = "llama.cpp isn't installed: pip install 'qlora-exp[phone]' (it is compiled: a C++ compiler and some minutes)"


def why_not() -> str | None:
    """``None`` where llama.cpp can be had; else what to do about it."""
    return None if importlib.util.find_spec("llama_cpp") is not None else MISSING


def measure_runtime(path: Path, context_tokens: int, generated_tokens: int) -> Runtime:
    """Memory and speed of ``path`` on one thread. What could not be measured is ``None``, and ``why`` says why."""
    unknown = Runtime(None, _processor(), 1, context_tokens)
    if (missing := why_not()) is not None:
        return replace(unknown, why=missing)
    script = Path(__file__).with_name("measure_llama_cpp.py")
    # -P: the script's own folder is no place to import from.
    command = [sys.executable, "-P", str(script), str(path), str(context_tokens), str(generated_tokens)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MEASURE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return replace(unknown, why=f"llama.cpp was not done after {MEASURE_SECONDS:.0f} seconds")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return replace(unknown, why=f"llama.cpp can't run the file: {last[:300]}")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    return Runtime(processor=_processor(), threads=1, context_tokens=context_tokens, **measured)


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


class LlamaCppModel(nn.Module):
    """A GGUF file behind the few things that evaluation asks of a transformers model. It has no cache to fork; what a
    text has in common with the one before it is not read again."""

    def __init__(self, path: Path, like: PreTrainedModel, longest: int) -> None:
        """``like``: the merged model, for its configuration; ``longest``: tokens of the longest sequence."""
        import llama_cpp

        super().__init__()
        self.config = like.config
        self.generation_config = like.generation_config
        self._embeddings = nn.Embedding(like.config.vocab_size, 1)  # its shape and device are what is asked for
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=longest, n_batch=longest, n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(), n_gpu_layers=0, logits_all=True, verbose=False,
        )  # fmt: skip

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embeddings

    def tokenize(self, text: str) -> list[int]:
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=True))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, use_cache: bool = False
    ) -> SimpleNamespace:
        """Logits (rows, logits_to_keep, vocabulary), zero where a row has padding."""
        columns = input_ids.shape[1]
        logits = torch.zeros(len(input_ids), logits_to_keep, self.config.vocab_size)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            places = mask.nonzero()[:, 0]
            self._read(ids[places].tolist())
            first = columns - logits_to_keep
            for position, place in enumerate(places.tolist()):
                if place >= first:
                    logits[row, place - first] = torch.from_numpy(self._llama.scores[position])
        return SimpleNamespace(logits=logits, past_key_values=None)

    def _read(self, ids: Sequence[int]) -> None:
        known = self._llama.input_ids[: self._llama.n_tokens].tolist()
        shared = next(
            (n for n, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids))
        )
        self._llama.n_tokens = shared
        if shared < len(ids):
            self._llama.eval(ids[shared:])
