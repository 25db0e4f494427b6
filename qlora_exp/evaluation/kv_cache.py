"""Prefills prompts once and scores continuations with the KV cache: batches, padding, positions.

Prompts are padded on the left, regardless of the tokenizer's side: all rows end at the same index, and continuations
can be appended. Continuations are padded on the right. Position ids come from the mask, because models with absolute
positions (GPT-2) would otherwise count the padding. Everything runs under ``no_grad``: tensors of ``inference_mode``
couldn't be used in a later training of the same base model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from qlora_exp.errors import ModelError

# Memory limits, in addition to the configured batch size. For an 8B model with grouped-query attention, 16,384 cached
# tokens take 2 GiB, and 2^27 fp32 logits take half a GiB.
TOKENS_PER_PASS = 16_384
LOGITS_PER_PASS = 2**27

# Cache layers whose ``update`` makes new tensors and leaves the old ones unchanged: only these can be shared by forks.
_FORKABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def batches(lengths: Sequence[int], rows: int, tokens: int = TOKENS_PER_PASS) -> list[list[int]]:
    """Return indices of sequences in batches of similar length, longest first (so that out-of-memory shows at once).

    A batch has at most ``rows`` sequences and, with padding, at most ``tokens`` tokens; a longer sequence is a batch
    by itself.
    """
    result: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if result and len(result[-1]) < rows and (len(result[-1]) + 1) * longest <= tokens:
            result[-1].append(index)
        else:
            result.append([index])
            longest = lengths[index]
    return result


def padded(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (1: token, 0: padding), both of shape (sequences, longest), padded on ``side``.

    The padding is token 0. It is always masked, so its value doesn't matter.
    """
    longest = max(len(sequence) for sequence in sequences)
    ids, mask = [], []
    for sequence in sequences:
        padding = [0] * (longest - len(sequence))
        tokens, ones = list(sequence), [1] * len(sequence)
        ids.append(padding + tokens if side == "left" else tokens + padding)
        mask.append(padding + ones if side == "left" else ones + padding)
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask, dtype=torch.long, device=device)


@contextmanager
def scoring_mode(model: Any) -> Iterator[None]:
    """Set evaluation mode without gradients; restore every module's mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class CausalModel:
    """A causal language model, with or without adapters, that is called only with arguments its ``forward`` has."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._known = frozenset(inspect.signature(self.base.forward).parameters)
        self.device: torch.device = self.base.get_input_embeddings().weight.device
        self.vocabulary_size = int(self.base.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """The model's context length in tokens; ``None`` if its configuration doesn't have it."""
        text_config = self.base.config.get_text_config()
        limit = int(getattr(text_config, "max_position_embeddings", 0) or 0)
        return limit if limit > 0 else None

    @property
    def supports_custom_masks(self) -> bool:
        """Whether attention follows a mask of shape (rows, 1, tokens, all tokens), and distances follow from position
        ids alone.

        Not with ALiBi, and not with GPT-Neo, whose layers apply further causal masks by index.
        """
        config = self.base.config.get_text_config()
        plain = self.base.config._attn_implementation in ("eager", "sdpa") and not getattr(config, "alibi", False)
        has_own_masks = any(buffer.dtype is torch.bool and buffer.dim() == 4 for buffer in self.base.buffers())
        return plain and not has_own_masks and "position_ids" in self._known

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        keep: int,
        cache: Cache | None,
        use_cache: bool,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Cache | None]:
        """Return fp32 logits of the last ``keep`` positions, shape (rows, keep, vocabulary), and the cache.

        ``ids`` are the new tokens; ``mask`` also covers the cached ones. ``positions``: (rows, new tokens), required
        unless the mask has two dimensions.
        """
        if positions is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache}
        if cache is not None:
            arguments["past_key_values"] = cache
        if "position_ids" in self._known:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._known:
            arguments["logits_to_keep"] = keep
        if "output_router_logits" in self._known:  # router losses aren't defined for a text that is read in parts
            arguments["output_router_logits"] = False
        output = self._model(**arguments)
        return output.logits[:, -keep:].float(), getattr(output, "past_key_values", None)


@dataclass(frozen=True)
class PrefilledBatch:
    """Prefilled texts, one per row. Continuing them doesn't change this object."""

    model: CausalModel
    ids: Tensor
    """(rows, tokens), left-padded."""
    mask: Tensor
    cache: Cache | None
    """``None`` for models whose cache can't be shared (state-space layers): they read the whole text each time."""

    def select(self, rows: Sequence[int]) -> PrefilledBatch:
        """Return a batch of these rows, in this order; a row may repeat."""
        index = torch.tensor(rows, device=self.ids.device)
        cache = self.cache
        if cache is not None and list(rows) != list(range(len(self.ids))):
            cache = _fork_cache(cache)
            cache.batch_select_indices(index)
        return PrefilledBatch(self.model, self.ids[index], self.mask[index], cache)

    def extend(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, PrefilledBatch]:
        """Read ``ids`` (rows, k) after the text; return fp32 logits (rows, k, vocabulary) and the extended batch."""
        all_ids, all_mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)
        cache = _fork_cache(self.cache) if self.cache is not None else None
        logits, cache = self.model(
            all_ids if cache is None else ids, all_mask, keep=ids.shape[1], cache=cache, use_cache=cache is not None
        )
        return logits, PrefilledBatch(self.model, all_ids, all_mask, cache if self.cache is not None else None)

    @property
    def can_pack_continuations(self) -> bool:
        """Whether :meth:`branches` packs all paths into one row per text, without copies of the text's cache."""
        has_full_cache = self.cache is not None and all(type(layer) is DynamicLayer for layer in self.cache.layers)
        return has_full_cache and self.model.supports_custom_masks

    def score_continuations(self, paths: Sequence[Sequence[int]]) -> list[Tensor]:
        """Read each of ``paths`` after each text, independently of the other paths.

        Returns fp32 logits after each path's tokens, one tensor (rows, tokens, vocabulary) per path. If the model
        follows custom masks, one pass has all paths side by side after the text; else the text's keys and values are
        repeated for each path.
        """
        if self.can_pack_continuations:
            return self._packed_continuations(paths)
        rows = len(self.ids)
        ids, mask = padded([*paths] * rows, "right", self.model.device)
        logits, _ = self.select([row for row in range(rows) for _ in paths]).extend(ids, mask)
        by_path = logits.view(rows, len(paths), ids.shape[1], -1)
        return [by_path[:, number, : len(path)] for number, path in enumerate(paths)]

    def _packed_continuations(self, paths: Sequence[Sequence[int]]) -> list[Tensor]:
        assert self.cache is not None
        model, rows = self.model, len(self.ids)
        ids = torch.tensor([token for path in paths for token in path], device=model.device).expand(rows, -1)
        path_of = torch.tensor([number for number, path in enumerate(paths) for _ in path], device=model.device)
        depth = torch.tensor([depth for path in paths for depth in range(len(path))], device=model.device)
        causal = (path_of[:, None] == path_of) & (depth[:, None] >= depth)
        visible = torch.cat([self.mask.bool()[:, None].expand(-1, len(causal), -1), causal.expand(rows, -1, -1)], dim=2)
        dtype = model.base.get_input_embeddings().weight.dtype
        bias = torch.zeros(visible.shape, dtype=dtype, device=model.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )
        positions = self.mask.sum(dim=1, keepdim=True) + depth
        logits, _ = model(
            ids, bias[:, None], ids.shape[1], _fork_cache(self.cache), use_cache=True, positions=positions
        )
        return [logits[:, path_of == number] for number in range(len(paths))]


def prefill(model: CausalModel, texts: Sequence[Sequence[int]]) -> tuple[Tensor, PrefilledBatch]:
    """Read ``texts`` (none empty) in one pass; return the next token's fp32 logits (rows, vocabulary) and the batch."""
    ids, mask = padded(texts, "left", model.device)
    logits, cache = model(ids, mask, keep=1, cache=None, use_cache=True)
    return logits[:, 0], PrefilledBatch(model, ids, mask, cache if _forkable(cache) else None)


def start_token(tokenizer: Any) -> int:
    """Return the token that precedes a text without prompt: BOS, or EOS if the tokenizer has no BOS.

    Raises:
        ModelError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has neither a BOS nor an EOS token", hint="add one to tokenizer_config.json")


def _forkable(cache: Any) -> bool:
    # A subclass may store more than its layers: MiniMax's also has states of linear attention.
    return type(cache) is DynamicCache and all(type(layer) in _FORKABLE_LAYERS for layer in cache.layers)


def _fork_cache(cache: Cache) -> Cache:
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
