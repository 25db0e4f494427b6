"""Attention over rows without padding: a batch is one sequence of real tokens, and ``cu_seq_lens`` bounds its rows.

transformers' FlashAttention implementations take ``cu_seq_lens`` themselves. Its SDPA implementation makes a mask over
the whole batch, whose size is the square of all tokens. :data:`ROWS` is SDPA per row instead: queries, keys and values
are laid out as rows × longest row, and all else is computed for real tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from qlora_exp.architecture.padding import window_reason
from qlora_exp.models.causality import ordinary_tokens
from qlora_exp.system.device_errors import is_device_error

ROWS = "qlora_exp_rows"
"""The name of :func:`rows_attention` among transformers' attention implementations."""
PROBE_LENGTHS = (5, 9, 13)
"""Tokens of the rows of :func:`measured_padding_reason`."""
LOGITS_TOLERANCE = 1e-5
"""Mean difference of the logits in float32 on a CPU, as a share of the largest logit (of 1 if that is smaller)."""
ROUNDED_SHARE = 0.05
"""The same with 16-bit or int8 arithmetic, and on CUDA, as a share of the logits' standard deviation. int8 rounds by
what else is in the batch, and float32 may be TF32. A row that sees another row's tokens differs by more."""

_places: Any = WeakTensorKeyDictionary()
"""``cu_seq_lens`` → where its tokens lie among rows × longest, so that only a batch's first layer computes it."""


class UnsupportedLayer(ValueError):
    """A layer asks for attention that :func:`rows_attention` doesn't compute; the message is a clause."""


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    longest_row: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention of each row over itself, (1, tokens, heads, width), as transformers' interface asks for.

    Args:
        query, key, value: (1, heads, tokens, width); keys and values may have fewer heads.
        cu_seq_lens_q: (rows + 1), the index of each row's first token, and the number of tokens.
        max_length_q: tokens of the longest row, or more.
        longest_row: what windows are compared with; ``None``: ``max_length_q``.

    Raises:
        UnsupportedLayer: the layer has a mask, a bias, a soft cap, sinks or a short window, or isn't causal.
    """
    _check_layer(attention_mask, cu_seq_lens_q, longest_row or max_length_q, kwargs)
    assert cu_seq_lens_q is not None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _takes_groups(query):
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    rows, tokens = len(cu_seq_lens_q) - 1, query.shape[2]
    full = rows * max_length_q == tokens  # one row, or rows of equal length: nothing to lay out
    place = None if full else _place(cu_seq_lens_q, tokens, max_length_q)

    def laid_out(flat: torch.Tensor) -> torch.Tensor:
        by_token = flat[0].transpose(0, 1)
        if place is not None:
            by_token = flat.new_zeros(rows * max_length_q, *by_token.shape[1:]).index_copy(0, place, by_token)
        return by_token.reshape(rows, max_length_q, *by_token.shape[1:]).transpose(1, 2)

    attended = scaled_dot_product_attention(
        laid_out(query),
        laid_out(key),
        laid_out(value),
        dropout_p=dropout,
        is_causal=True,  # padding follows the tokens of its row: no real token sees it, and no mask is needed
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    by_token = attended.transpose(1, 2).flatten(0, 1)
    return (by_token if place is None else by_token.index_select(0, place))[None], None


def _takes_groups(query: torch.Tensor) -> bool:
    """Return whether one of torch's kernels without a matrix of scores takes fewer heads of keys than of queries.

    On CUDA those are FlashAttention and cuDNN: 16 bits, Ampere or newer. The memory-efficient kernel takes equal
    numbers only (``aten/src/ATen/native/transformers/sdp_utils_cpp.h``).
    """
    if query.device.type != "cuda":
        return True
    narrow = query.dtype != torch.float32 or torch.is_autocast_enabled("cuda")
    return narrow and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _check_layer(
    mask: torch.Tensor | None, bounds: torch.Tensor | None, longest: int, arguments: dict[str, Any]
) -> None:
    if bounds is None:
        raise UnsupportedLayer("its layers don't pass on where rows begin")
    if mask is not None:
        raise UnsupportedLayer("its attention makes a mask by itself")
    if arguments.get("is_causal") is False:
        raise UnsupportedLayer("its attention isn't causal")
    for name, meaning in (("softcap", "a soft cap"), ("s_aux", "sinks"), ("position_bias", "a bias by position")):
        if arguments.get(name) is not None:
            raise UnsupportedLayer(f"its attention has {meaning}")
    window = arguments.get("sliding_window")
    if window is not None and window < longest:
        raise UnsupportedLayer(window_reason(window, longest))


def _place(cu_seq_lens: torch.Tensor, tokens: int, longest: int) -> torch.Tensor:
    """Return each token's index among rows × ``longest``: (tokens). Nothing is read back from the device."""
    kept = _places.get(cu_seq_lens)
    if kept is None or kept[0] != longest:
        bounds, index = cu_seq_lens.long(), torch.arange(tokens, device=cu_seq_lens.device)
        row = torch.bucketize(index, bounds[1:], right=True)
        kept = longest, row * longest + index - bounds[row]
        _places[cu_seq_lens] = kept
    place: torch.Tensor = kept[1]
    return place


AttentionInterface.register(ROWS, rows_attention)
AttentionMaskInterface.register(ROWS, lambda *args, **kwargs: None)


@contextmanager
def attention_by_rows(model: Any) -> Iterator[None]:
    """Use :func:`rows_attention` where ``model`` (with or without adapters) uses SDPA, until the block ends.

    FlashAttention stays: it takes ``cu_seq_lens`` itself.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = base.config._attn_implementation
    if original != "sdpa":
        yield
        return
    base.set_attn_implementation(ROWS)
    if base.config._attn_implementation != ROWS:  # transformers only warns
        raise UnsupportedLayer("its attention can't be replaced")
    try:
        yield
    finally:
        base.set_attn_implementation(original)


def measured_padding_reason(model: Any, longest_row: int) -> str | None:
    """Return why ``model`` (a base) needs padded rows of up to ``longest_row`` tokens; ``None`` if it doesn't.

    Three rows are read padded and without padding: their logits must be equal up to rounding.
    """
    texts = torch.split(ordinary_tokens(model, sum(PROBE_LENGTHS)), list(PROBE_LENGTHS))
    ends = torch.tensor([0, *PROBE_LENGTHS], device=model.device).cumsum(0).to(torch.int32)
    longest = max(PROBE_LENGTHS)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in PROBE_LENGTHS], device=model.device)
    ids = torch.zeros_like(mask).masked_scatter(mask.bool(), torch.cat(texts))
    flat: dict[str, Any] = {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(n, device=model.device) for n in PROBE_LENGTHS])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if model.config._attn_implementation == "sdpa":
        flat["longest_row"] = longest_row
    try:
        with torch.no_grad():
            padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
            with attention_by_rows(model):
                unpadded = model(**flat, use_cache=False).logits[0].float()
    except Exception as error:  # an architecture can fail in any way without a mask
        if is_device_error(error):
            raise
        return str(error) if isinstance(error, UnsupportedLayer) else f"it fails without padding: {_line(error)}"
    exact = LOGITS_TOLERANCE * max(float(padded.abs().max()), 1.0)
    tolerance = ROUNDED_SHARE * float(padded.std()) if _is_rounded(model) else exact
    equal = float((padded - unpadded).abs().mean()) <= tolerance
    # The evaluation reports a model that computes NaN.
    return None if equal or not bool(padded.isfinite().all()) else "its logits differ without padding"


def _is_rounded(model: Any) -> bool:
    """Return whether the model computes in 16 or 8 bits, or may compute in TF32."""
    weight = model.get_input_embeddings().weight
    rounded = weight.dtype != torch.float32 or weight.device.type == "cuda"
    return rounded or any(isinstance(module, Linear8bitLt) for module in model.modules())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
