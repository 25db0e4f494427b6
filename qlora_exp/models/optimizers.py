"""bitsandbytes' optimizers in a process that goes on after the training."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim import GlobalOptimManager

ATTACH_GLOBAL = 1
"""Flag of cudaMallocManaged: all streams may use the memory."""
MEMORY_ALLOCATION_ERROR = 2
"""cudaErrorMemoryAllocation."""


@contextmanager
def bitsandbytes_optimizers() -> Iterator[None]:
    """Train in the ``with`` block: paged memory that runs out is raised, and nothing of the training is kept.

    * A failed allocation of a paged optimizer raises ``torch.OutOfMemoryError``. bitsandbytes would end the process.
    * transformers registers each embedding with bitsandbytes for 8-bit optimizers, and bitsandbytes keeps its states in
      paged memory forever. Both are undone: they would grow by a base's embedding and by a training's states.

    Afterwards the optimizer's states must not be used any more.
    """
    functional = bitsandbytes.functional
    overrides = GlobalOptimManager.get_instance().module_weight_config_triple
    paged = GlobalPageManager.get_instance().paged_tensors
    earlier_overrides, earlier_paged = len(overrides), len(paged)
    get_paged = functional.get_paged
    functional.get_paged = _checked(get_paged)
    try:
        yield
    finally:
        functional.get_paged = get_paged
        del overrides[earlier_overrides:]
        for tensor in paged[earlier_paged:]:
            _call_cuda("cudaFree", ctypes.c_void_p(tensor.data_ptr()))
        del paged[earlier_paged:]


def _checked(get_paged: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return ``get_paged`` with an attempt at the same allocation before it."""

    def get(*shape: int, dtype: torch.dtype = torch.float32, **device: Any) -> torch.Tensor:
        size = dtype.itemsize * math.prod(shape)
        address = ctypes.c_void_p()
        code = _call_cuda(
            "cudaMallocManaged", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(ATTACH_GLOBAL)
        )
        if code == MEMORY_ALLOCATION_ERROR:
            _call_cuda("cudaGetLastError")  # clears it: the next kernel would report it
            raise torch.OutOfMemoryError(f"CUDA out of memory: a paged optimizer needs {size} more bytes")
        if code == 0:
            _call_cuda("cudaFree", address)
        return get_paged(*shape, dtype=dtype, **device)

    return get


def _call_cuda(name: str, *arguments: Any) -> int | None:
    """Return the result of a function of the CUDA runtime that bitsandbytes uses; ``None`` if it uses none."""
    library = bitsandbytes.functional.lib
    function = getattr(getattr(library, "_lib", None), name, None) if library.compiled_with_cuda else None
    return None if function is None else int(function(*arguments))
