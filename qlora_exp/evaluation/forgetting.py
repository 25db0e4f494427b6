"""Loss on general text before and after tuning: what the tuning cost the model elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t
from torch.nn.functional import cross_entropy

from qlora_exp.config import Config
from qlora_exp.evaluation.context import (
    LOGITS_PER_PASS,
    TOKENS_PER_PASS,
    CausalModel,
    batches,
    padded,
    scoring_mode,
    start_token,
)
from qlora_exp.records import Forgetting

# A window is one forward pass without a cache; longer ones would only cost memory, before and after alike.
LONGEST_WINDOW = 2_048


def nats_per_byte_by_document(
    model: Any, tokenizer: Any, documents: Sequence[str], config: Config
) -> list[tuple[float, int]]:
    """(nats, UTF-8 bytes) of each of the first ``evaluation.forgetting_documents`` documents, without any template.

    A document is cut into windows of the model's length (at most 2,048 tokens); each window is read after a start
    token (BOS, else EOS), so that every token of the document is scored exactly once.
    """
    chosen = list(documents[: config.evaluation.forgetting_documents])
    start = start_token(tokenizer)
    with scoring_mode(model):
        causal = CausalModel(model)
        longest = min(causal.max_positions or LONGEST_WINDOW, LONGEST_WINDOW)
        windows: list[tuple[int, list[int]]] = []
        for number, document in enumerate(chosen):
            # verbose=False: a document longer than the model is expected here, and cut.
            ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            windows += [(number, ids[at : at + longest]) for at in range(0, len(ids), longest)]
        nats = [0.0] * len(chosen)
        tokens = min(TOKENS_PER_PASS, max(longest, LOGITS_PER_PASS // causal.vocabulary_size))
        for batch in batches([len(ids) for _, ids in windows], config.evaluation.batch_size, tokens):
            values = _window_nats(causal, [windows[index][1] for index in batch], start)
            for index, value in zip(batch, values, strict=True):
                nats[windows[index][0]] += value
    return [(value, len(document.encode())) for value, document in zip(nats, chosen, strict=True)]


def _window_nats(model: CausalModel, windows: Sequence[Sequence[int]], start: int) -> list[float]:
    targets, mask = padded(windows, "right", model.device)
    inputs, _ = padded([[start, *window[:-1]] for window in windows], "right", model.device)
    logits, _ = model(inputs, mask, keep=inputs.shape[1], cache=None, use_cache=False)
    nats = cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()
    return [float(value) for value in (nats * mask).sum(dim=1).tolist()]


def forgetting(
    before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]], text: str = "general text"
) -> Forgetting:
    """After − before in nats per byte, over all documents together, with a 95 % interval over documents.

    The difference is a ratio estimate d = Σ(after − before nats) / Σ bytes; its interval is d ± t·se with
    se² = n/(n−1) · Σ(Dᵢ − d·bᵢ)² / (Σb)² and n − 1 degrees of freedom (Cochran, Sampling Techniques, §6.4). Documents
    are paired. Fewer than two documents give no interval.

    Raises:
        ValueError: the two were not measured on the same documents.
    """
    if not before or [size for _, size in before] != [size for _, size in after]:
        raise ValueError("forgetting needs the same documents before and after, and at least one")
    sizes = np.array([size for _, size in before], dtype=float)
    first, second = (np.array([nats for nats, _ in side]) for side in (before, after))
    difference = float((second - first).sum() / sizes.sum())
    low = high = None
    if len(sizes) > 1:
        residuals = second - first - difference * sizes
        n = len(sizes)
        error = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(sizes.sum())
        half = float(student_t.ppf(0.975, n - 1)) * error
        low, high = difference - half, difference + half
    return Forgetting(
        before_nats_per_byte=float(first.sum() / sizes.sum()),
        after_nats_per_byte=float(second.sum() / sizes.sum()),
        difference=difference,
        low=low,
        high=high,
        documents=len(sizes),
        text=text,
    )
