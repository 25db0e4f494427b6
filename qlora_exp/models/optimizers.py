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
from bitsandbytes.optim.optimizer import Optimizer8bit

PAGED_STATES = {"state1", "state2"}
"""What ``get_state_buffer`` allocates: an optimizer's moments."""
ATTACH_GLOBAL = 1
"""Flag of cudaMallocManaged: all streams may use the memory."""
MEMORY_ALLOCATION_ERROR = 2
"""cudaErrorMemoryAllocation."""


@contextmanager
def bitsandbytes_optimizers() -> Iterator[None]:
    """Train in the ``with`` block: paged memory that runs out is raised, and nothing of the training is kept.

    * States that a checkpoint holds are put into paged memory again: bitsandbytes loads them into the GPU's memory.
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
    load_state_dict = Optimizer8bit.load_state_dict
    Optimizer8bit.load_state_dict = _paging(load_state_dict)
    try:
        yield
    finally:
        functional.get_paged = get_paged
        Optimizer8bit.load_state_dict = load_state_dict
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


def _paging(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    """Return ``load_state_dict``, after which a paged optimizer's states are where a new optimizer has them."""

    def load(optimizer: Any, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        load_state_dict(optimizer, state_dict, move_to_device=move_to_device and not optimizer.is_paged)
        if not optimizer.is_paged:
            return
        for parameter, state in optimizer.state.items():
            for name in PAGED_STATES & state.keys():
                value = state[name]
                allocate = optimizer.get_state_buffer  # of small parameters they aren't paged
                if value.shape != parameter.shape:  # AdEMAMix keeps two averages in one tensor
                    allocate = optimizer._get_state_double_buffer
                state[name] = allocate(parameter, dtype=value.dtype).copy_(value)
        optimizer.to_gpu()  # the rest, which is small

    return load


def _call_cuda(name: str, *arguments: Any) -> int | None:
    """Return the result of a function of the CUDA runtime that bitsandbytes uses; ``None`` if it uses none."""
    library = bitsandbytes.functional.lib
    function = getattr(getattr(library, "_lib", None), name, None) if library.compiled_with_cuda else None
    return None if function is None else int(function(*arguments))
