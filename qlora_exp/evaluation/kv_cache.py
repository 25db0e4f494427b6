"""Reading prompts once and going on from them: batches, padding, positions and the key/value cache.

Prompts are padded on the left whatever the tokenizer's own side is, so that all rows end at the same index and what
follows can be appended; continuations are padded on the right. Position ids are counted from the mask, because models
with absolute positions (GPT-2) would otherwise count the padding. Everything runs under ``no_grad``: tensors made in
``inference_mode`` could not take part in a later training of the same base.
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

# Memory bounds, independent of the batch size asked for: on an 8B model with grouped-query attention 16,384 cached
# tokens are 2 GiB, and 2^27 fp32 logits are half a GiB.
TOKENS_PER_PASS = 16_384
LOGITS_PER_PASS = 2**27

# Caches whose ``update`` makes new tensors instead of writing into the old ones: only they can be shared by forks.
_FORKABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def batches(lengths: Sequence[int], rows: int, tokens: int = TOKENS_PER_PASS) -> list[list[int]]:
    """Indices of sequences in batches of similar length, longest first (an out-of-memory shows at once).

    A batch has at most ``rows`` sequences and, padded, at most ``tokens`` tokens; a longer sequence goes alone.
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


def max_positions(model: Any) -> int | None:
    """How many tokens a model takes; ``None`` where its configuration doesn't say."""
    return CausalModel(model).max_positions


def padded(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1: a token, 0: padding), both of shape (sequences, longest), padded on ``side``.

    Padding is token 0: it is masked everywhere, so its value never matters.
    """
    longest = max(len(sequence) for sequence in sequences)
    ids, mask = [], []
    for sequence in sequences:
        gap = [0] * (longest - len(sequence))
        tokens, ones = list(sequence), [1] * len(sequence)
        ids.append(gap + tokens if side == "left" else tokens + gap)
        mask.append(gap + ones if side == "left" else ones + gap)
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask, dtype=torch.long, device=device)


@contextmanager
def scoring_mode(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class CausalModel:
    """A causal language model (with or without adapters) called with the arguments that its forward knows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._known = frozenset(inspect.signature(self.base.forward).parameters)
        self.device: torch.device = self.base.get_input_embeddings().weight.device
        self.vocabulary_size = int(self.base.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """How many tokens the model takes; None where its configuration doesn't say."""
        text_config = self.base.config.get_text_config()
        limit = int(getattr(text_config, "max_position_embeddings", 0) or 0)
        return limit if limit > 0 else None

    @property
    def takes_masks_of_its_callers(self) -> bool:
        """Whether attention sees what a mask (rows, 1, tokens, all tokens) says, and distances follow from position ids
        alone. GPT-Neo's layers lay triangles of their own over it, by place and no larger than its positions."""
        config = self.base.config.get_text_config()
        plain = self.base.config._attn_implementation in ("eager", "sdpa") and not getattr(config, "alibi", False)
        own = any(buffer.dtype is torch.bool and buffer.dim() == 4 for buffer in self.base.buffers())
        return plain and not own and "position_ids" in self._known

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        keep: int,
        cache: Cache | None,
        use_cache: bool,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Cache | None]:
        """Logits in fp32 of the last ``keep`` positions, shape (rows, keep, vocabulary), and the cache.

        ``ids`` are the new tokens; ``mask`` covers the cached ones too. ``positions``: (rows, new tokens), where they
        don't follow from a mask of two dimensions.
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
        if "output_router_logits" in self._known:  # their loss can't be had of a text that is read in parts
            arguments["output_router_logits"] = False
        output = self._model(**arguments)
        return output.logits[:, -keep:].float(), getattr(output, "past_key_values", None)


@dataclass(frozen=True)
class PrefilledBatch:
    """Texts that the model has read, one a row. Going on from it leaves it as it was."""

    model: CausalModel
    ids: Tensor
    """(rows, tokens), left-padded."""
    mask: Tensor
    cache: Cache | None
    """None for models whose cache can't be shared (state-space layers): they read the text again each time."""

    def select(self, rows: Sequence[int]) -> PrefilledBatch:
        """These rows, in this order, repeats allowed."""
        index = torch.tensor(rows, device=self.ids.device)
        cache = self.cache
        if cache is not None and list(rows) != list(range(len(self.ids))):
            cache = _fork_cache(cache)
            cache.batch_select_indices(index)
        return PrefilledBatch(self.model, self.ids[index], self.mask[index], cache)

    def extend(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, PrefilledBatch]:
        """Read ``ids`` (rows, k) after the text: fp32 logits after each (rows, k, vocabulary), and the context."""
        all_ids, all_mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)
        cache = _fork_cache(self.cache) if self.cache is not None else None
        logits, cache = self.model(
            all_ids if cache is None else ids, all_mask, keep=ids.shape[1], cache=cache, use_cache=cache is not None
        )
        return logits, PrefilledBatch(self.model, all_ids, all_mask, cache if self.cache is not None else None)

    @property
    def can_pack_continuations(self) -> bool:
        """Whether :meth:`branches` needs one copy of each text, whatever the number of paths."""
        whole = self.cache is not None and all(type(layer) is DynamicLayer for layer in self.cache.layers)
        return whole and self.model.takes_masks_of_its_callers

    def branches(self, paths: Sequence[Sequence[int]]) -> list[Tensor]:
        """Read each of ``paths`` after each text as if it stood there alone: of each path fp32 logits after its tokens,
        (rows, tokens, vocabulary). Where attention can be told who sees whom, the paths stand side by side behind the
        text; elsewhere its keys and values are repeated for each."""
        if self.can_pack_continuations:
            return self._side_by_side(paths)
        rows = len(self.ids)
        ids, mask = padded([*paths] * rows, "right", self.model.device)
        logits, _ = self.select([row for row in range(rows) for _ in paths]).extend(ids, mask)
        apart = logits.view(rows, len(paths), ids.shape[1], -1)
        return [apart[:, number, : len(path)] for number, path in enumerate(paths)]

    def _side_by_side(self, paths: Sequence[Sequence[int]]) -> list[Tensor]:
        assert self.cache is not None
        model, rows = self.model, len(self.ids)
        ids = torch.tensor([token for path in paths for token in path], device=model.device).expand(rows, -1)
        path_of = torch.tensor([number for number, path in enumerate(paths) for _ in path], device=model.device)
        depth = torch.tensor([depth for path in paths for depth in range(len(path))], device=model.device)
        own = (path_of[:, None] == path_of) & (depth[:, None] >= depth)
        seen = torch.cat([self.mask.bool()[:, None].expand(-1, len(own), -1), own.expand(rows, -1, -1)], dim=2)
        dtype = model.base.get_input_embeddings().weight.dtype
        hidden = torch.zeros(seen.shape, dtype=dtype, device=model.device).masked_fill(~seen, torch.finfo(dtype).min)
        positions = self.mask.sum(dim=1, keepdim=True) + depth
        logits, _ = model(
            ids, hidden[:, None], ids.shape[1], _fork_cache(self.cache), use_cache=True, positions=positions
        )
        return [logits[:, path_of == number] for number in range(len(paths))]


def prefill(model: CausalModel, texts: Sequence[Sequence[int]]) -> tuple[Tensor, PrefilledBatch]:
    """One pass over ``texts`` (none empty): fp32 logits of the next token (rows, vocabulary), and the context."""
    ids, mask = padded(texts, "left", model.device)
    logits, cache = model(ids, mask, keep=1, cache=None, use_cache=True)
    return logits[:, 0], PrefilledBatch(model, ids, mask, cache if _forkable(cache) else None)


def start_token(tokenizer: Any) -> int:
    """What stands before a text that has nothing before it: BOS, or EOS where the tokenizer has no BOS.

    Raises:
        ModelError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has neither a BOS nor an EOS token", hint="add one to tokenizer_config.json")


def _forkable(cache: Any) -> bool:
    # A subclass may keep more than its layers do: MiniMax's has the states of linear attention.
    return type(cache) is DynamicCache and all(type(layer) in _FORKABLE_LAYERS for layer in cache.layers)


def _fork_cache(cache: Cache) -> Cache:
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
