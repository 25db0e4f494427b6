"""Log-likelihoods of completions and label options after one prefill of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from qlora_exp.evaluation.baselines import common_prefix
from qlora_exp.evaluation.kv_cache import LOGITS_PER_PASS, TOKENS_PER_PASS, CausalModel, PrefilledBatch, padded, prefill

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class CompletionScore:
    """Nats of the completion's tokens and of its end tokens; completion tokens that the teacher-forced argmax gets
    right."""

    completion_nats: float
    end_nats: float
    tokens_correct: int


def completion_scores(
    next_logits: Tensor, context: PrefilledBatch, completions: Sequence[Tokens], ends: Sequence[Tokens]
) -> list[CompletionScore]:
    """Return teacher-forced scores of each row's completion followed by its end tokens.

    ``next_logits`` (rows, vocabulary) and ``context`` come from :func:`~qlora_exp.evaluation.kv_cache.prefill`.
    """
    results: list[CompletionScore] = []
    longest = max((len(a) + len(b) for a, b in zip(completions, ends, strict=True)), default=0)
    step = max(1, LOGITS_PER_PASS // (max(longest, 1) * context.model.vocabulary_size))
    for start in range(0, len(completions), step):
        rows = range(start, min(start + step, len(completions)))
        targets = [completions[row] + ends[row] for row in rows]
        nats, hits = _teacher_forced(next_logits[rows.start : rows.stop], context.select(rows), targets)
        for row, row_nats, row_hits in zip(rows, nats.tolist(), hits.tolist(), strict=True):
            border, end = len(completions[row]), len(completions[row]) + len(ends[row])
            results.append(CompletionScore(sum(row_nats[:border]), sum(row_nats[border:end]), sum(row_hits[:border])))
    return results


def _teacher_forced(next_logits: Tensor, context: PrefilledBatch, targets: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Return nats (float64) and argmax hits of target tokens, both (rows, longest); undefined after a row's end.

    A completion of thousands of tokens with a large vocabulary has gigabytes of logits: it is read in pieces.
    """
    ids, mask = padded(targets, "right", context.model.device)
    width = max(1, LOGITS_PER_PASS // (len(targets) * context.model.vocabulary_size))
    if ids.shape[1] > width and context.cache is not None:  # without a cache, each piece would read the text again
        return _in_pieces(next_logits, context, ids, mask, width)
    logits = next_logits[:, None]
    if ids.shape[1] > 1:
        logits = torch.cat([logits, context.extend(ids[:, :-1], mask[:, :-1])[0]], dim=1)
    logits = logits[:, : ids.shape[1]]
    nats = cross_entropy(logits.transpose(1, 2), ids, reduction="none").double()
    return nats, logits.argmax(dim=-1) == ids


def _in_pieces(
    next_logits: Tensor, context: PrefilledBatch, ids: Tensor, mask: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Return the same as :func:`_teacher_forced`, with the logits of at most ``width`` tokens a row at a time."""
    logits = next_logits[:, None]
    nats, hits = [], []
    for start in range(0, ids.shape[1], width):
        if start:
            read = slice(start - 1, min(start - 1 + width, ids.shape[1] - 1))
            logits, context = context.extend(ids[:, read], mask[:, read])
        elif width > 1:
            read = slice(0, min(width, ids.shape[1]) - 1)
            following, context = context.extend(ids[:, read], mask[:, read])
            logits = torch.cat([logits, following], dim=1)
        piece = ids[:, start : start + width]
        nats.append(cross_entropy(logits.transpose(1, 2), piece, reduction="none").double())
        hits.append(logits.argmax(dim=-1) == piece)
    return torch.cat(nats, dim=1), torch.cat(hits, dim=1)


@dataclass(frozen=True)
class OptionTrie:
    """Options as token paths. The model must read ``paths`` to score every token after an option's first."""

    options: tuple[Tokens, ...]
    paths: tuple[Tokens, ...]
    """Options without their last token, except those that are the beginning of another."""
    readers: tuple[int | None, ...]
    """By option: the index of the path that contains it; ``None`` for an option of one token."""

    @classmethod
    def of(cls, options: Sequence[Tokens]) -> OptionTrie:
        inner = sorted({option[:-1] for option in options if len(option) > 1})
        # In sorted order, a path that is the beginning of others stands directly before one of them.
        paths = [a for a, b in zip(inner, [*inner[1:], ()], strict=False) if b[: len(a)] != a]
        reader = {path[:length]: number for number, path in enumerate(paths) for length in range(1, len(path) + 1)}
        return cls(tuple(options), tuple(paths), tuple(reader.get(option[:-1]) for option in options))


def option_log_likelihoods(next_logits: Tensor, context: PrefilledBatch, trie: OptionTrie) -> Tensor:
    """Return log p(option | prompt), summed over the option's tokens: float64, (rows, options), on the CPU.

    First tokens are scored from ``next_logits``. The rest is a trie: the model reads each of its distinct inner paths
    once per prompt, with the prompt's cached keys and values. The result equals one full pass per prompt and option.
    """
    scores = log_softmax(next_logits, dim=-1)[:, [option[0] for option in trie.options]].double()
    rows = len(next_logits)
    for chunk in _chunks(trie.paths, rows, context):
        following = [
            log_softmax(logits, dim=-1) for logits in context.score_continuations(trie.paths[chunk.start : chunk.stop])
        ]
        for column, (option, reader) in enumerate(zip(trie.options, trie.readers, strict=True)):
            if reader is not None and reader in chunk:
                for depth, token in enumerate(option[1:]):
                    scores[:, column] += following[reader - chunk.start][:, depth, token].double()
    return scores.cpu()


def _chunks(paths: Sequence[Tokens], rows: int, context: PrefilledBatch) -> list[range]:
    """Return ranges of paths for each pass, as many as the limits on cached tokens and logits allow, at least one."""
    longest = max((len(path) for path in paths), default=1)
    repeated = 0 if context.can_pack_continuations else context.ids.shape[1]
    by_tokens = 2 * TOKENS_PER_PASS // (rows * (repeated + longest))
    by_logits = LOGITS_PER_PASS // (rows * longest * context.model.vocabulary_size)
    step = max(1, min(by_tokens, by_logits))
    return [range(start, min(start + step, len(paths))) for start in range(0, len(paths), step)]


def option_priors(model: CausalModel, prompt: Tokens, trie: OptionTrie) -> np.ndarray:
    """Return log p(option | prompt) for each option. PMI scoring takes the task's prompt without an item."""
    next_logits, context = prefill(model, [prompt])
    priors: np.ndarray = option_log_likelihoods(next_logits, context, trie).numpy()[0]
    return priors


def domain_prompt(prompts: Sequence[Tokens]) -> Tokens:
    """Return the task's prompt without an item: the common beginning of all ``prompts``, then their common end."""
    prefix = common_prefix(prompts)
    reversed_rests = [prompt[len(prefix) :][::-1] for prompt in prompts]
    return prefix + common_prefix(reversed_rests)[::-1]
