"""Forgetting: the loss on general text before and after tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t
from torch.nn.functional import cross_entropy

from qlora_exp.config.schema import Config
from qlora_exp.evaluation.kv_cache import (
    LOGITS_PER_PASS,
    TOKENS_PER_PASS,
    CausalModel,
    batches,
    padded,
    scoring_mode,
    start_token,
)
from qlora_exp.evaluation.scoring import score_items
from qlora_exp.progress import report_progress
from qlora_exp.records.types import Forgetting

if TYPE_CHECKING:
    from qlora_exp.data.items import Item

# A window is one forward pass without a cache. Longer ones would only need more memory.
MAX_WINDOW_TOKENS = 2_048


class DocumentLoss(NamedTuple):
    """The model's loss on one document, with the document's UTF-8 bytes and scored tokens."""

    nats: float
    size_bytes: int
    tokens: int


def text_losses(model: Any, tokenizer: Any, documents: Sequence[str], config: Config) -> list[DocumentLoss]:
    """Return the loss on each of the first ``evaluation.forgetting_documents`` documents (none empty), untemplated.

    A document is cut into windows of the model's context (at most 2,048 tokens). A start token (BOS, else EOS) precedes
    each window, so that every token of the document is scored exactly once.
    """
    chosen = list(documents[: config.evaluation.forgetting_documents])
    if not chosen:
        return []
    start = start_token(tokenizer)
    # verbose=False: a document longer than the model's context is expected here, and cut.
    ids = tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"]
    with scoring_mode(model):
        causal = CausalModel(model)
        longest = min(causal.max_positions or MAX_WINDOW_TOKENS, MAX_WINDOW_TOKENS)
        windows = [
            (number, tokens[at : at + longest])
            for number, tokens in enumerate(ids)
            for at in range(0, len(tokens), longest)
        ]
        nats = [0.0] * len(chosen)
        max_tokens = min(TOKENS_PER_PASS, max(longest, LOGITS_PER_PASS // causal.vocabulary_size))
        scored = 0
        for batch in batches([len(window) for _, window in windows], config.evaluation.batch_size, max_tokens):
            values = _window_nats(causal, [windows[index][1] for index in batch], start)
            for index, value in zip(batch, values, strict=True):
                nats[windows[index][0]] += value
            scored += len(batch)
            report_progress(scored, len(windows), "passages of general text scored")
    return [
        DocumentLoss(value, len(document.encode()), len(tokens))
        for value, document, tokens in zip(nats, chosen, ids, strict=True)
    ]


def answer_losses(model: Any, tokenizer: Any, chats: Sequence[Item], config: Config) -> list[DocumentLoss]:
    """Return the loss on the answer of each of the first ``evaluation.forgetting_documents`` chats, in the model's
    chat template.

    Only the answer's tokens (without the end of turn) and bytes count, so that the template's own text doesn't matter.
    Chats longer than the model's context are left out, before and after tuning.
    """
    chosen = chats[: config.evaluation.forgetting_documents]
    with scoring_mode(model):
        causal = CausalModel(model)
        fitting = [chat for chat in chosen if causal.max_positions is None or len(chat.ids) <= causal.max_positions]
        unit = "general chats scored"
        results = score_items(causal, tokenizer, fitting, None, None, config.evaluation.batch_size, unit)
    return [
        DocumentLoss(result.completion.completion_nats, chat.completion_bytes, len(chat.completion_ids))
        for chat, result in zip(fitting, results, strict=True)
    ]


def _window_nats(model: CausalModel, windows: Sequence[Sequence[int]], start: int) -> list[float]:
    targets, mask = padded(windows, "right", model.device)
    inputs, _ = padded([[start, *window[:-1]] for window in windows], "right", model.device)
    logits, _ = model(inputs, mask, keep=inputs.shape[1], cache=None, use_cache=False)
    # Flattened, because on a transposed view of the logits this takes four times as long on a CPU.
    nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).double()
    return [float(value) for value in (nats * mask).sum(dim=1).tolist()]


def forgetting(before: Sequence[DocumentLoss], after: Sequence[DocumentLoss], text: str) -> Forgetting:
    """Return after − before in nats per byte over all documents, with a 95 % confidence interval over documents.

    The difference is the ratio Σ(after − before nats) / Σ bytes. Documents are paired. There is no interval for fewer
    than two documents.

    Raises:
        ValueError: the documents before and after differ, or there are none.
    """
    if not before or [loss[1:] for loss in before] != [loss[1:] for loss in after]:
        raise ValueError("forgetting needs the same documents before and after, and at least one")
    sizes = np.array([loss.size_bytes for loss in before], dtype=float)
    before_nats, after_nats = (np.array([loss.nats for loss in side]) for side in (before, after))
    difference = float((after_nats - before_nats).sum() / sizes.sum())
    low = high = None
    if len(sizes) > 1:
        half_width = ratio_half_width(difference, after_nats - before_nats, sizes, level=0.975)
        low, high = difference - half_width, difference + half_width
    return Forgetting(
        before_nats_per_byte=float(before_nats.sum() / sizes.sum()),
        after_nats_per_byte=float(after_nats.sum() / sizes.sum()),
        difference=difference,
        low=low,
        high=high,
        documents=len(sizes),
        text=text,
        tokens=sum(loss.tokens for loss in before),
    )


def ratio_half_width(ratio: float, numerators: np.ndarray, denominators: np.ndarray, level: float) -> float:
    """Return the distance from ``ratio`` = Σ numerators / Σ denominators to its one-sided bound at ``level``.

    It is t·se of the linearised ratio estimate with n − 1 degrees of freedom and
    se² = n/(n−1) · Σ(aᵢ − ratio·bᵢ)² / (Σb)² (Cochran, Sampling Techniques, §6.4).
    """
    n = len(numerators)
    residuals = numerators - ratio * denominators
    standard_error = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(denominators.sum())
    return float(student_t.ppf(level, n - 1)) * standard_error
