"""Which exceptions mean that memory ran out, and which leave CUDA unusable. Imports neither torch nor this package."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator

MEMORY_MESSAGES = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|os error 12\b|bad_alloc"
    r"|_ALLOC(ATION)?_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
"""Torch's and Triton's allocations on CPU and CUDA; safetensors' and C++'s; CUBLAS_STATUS_ALLOC_FAILED and its like of
cuDNN, cuSOLVER, cuSPARSE and cuRAND."""
START_MESSAGES = re.compile(
    r"CU(BLAS|DNN|SOLVER|SPARSE)\w*_(NOT_INITIALIZED|INTERNAL_ERROR)|cublasLt ran into an error"
    r"|unable to find an engine to execute"
)
"""What CUDA's libraries say for many reasons. On a full GPU the reason is that their workspace found no room."""
FULL_GPU_BYTES = 512 * 2**20
"""With less free memory than this on the GPU, :data:`START_MESSAGES` mean that memory ran out."""
CUDA_MESSAGES = re.compile(r"\bCUDA (driver )?error\b|Triton Error \[CUDA\]|\bCU(BLAS|DNN|SOLVER|SPARSE)_STATUS_\w+")
BITSANDBYTES_EXIT = re.compile(r"^Error (.+) at line \d+ in file \S+$", re.MULTILINE)
"""bitsandbytes' kernels write this line to standard error, and then end the process with exit code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the machine's or the GPU's memory ran out, in ``error`` or in an error that led to it."""
    return any(_is_out_of_memory(cause) for cause in _chain(error))


def is_cuda_error(error: BaseException) -> bool:
    """Return whether CUDA or one of its libraries reported an error, in ``error`` or in an error that led to it.

    After some of them (illegal memory access, device-side assert, failed launch) every later call of the process fails.
    """
    return any(
        type(cause).__name__ == "AcceleratorError"
        or (isinstance(cause, RuntimeError) and CUDA_MESSAGES.search(str(cause)))
        for cause in _chain(error)
    )


def is_device_error(error: BaseException) -> bool:
    """Return whether the machine or the GPU caused ``error``, so that it says nothing about the user's input."""
    return is_out_of_memory(error) or is_cuda_error(error)


def bitsandbytes_error(output: str) -> str | None:
    """Return the CUDA error with which bitsandbytes ended a process, from its standard error; ``None``: it didn't."""
    errors = BITSANDBYTES_EXIT.findall(output)
    return str(errors[-1]) if errors else None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"):
        return False
    message = str(error)
    return bool(MEMORY_MESSAGES.search(message) or (START_MESSAGES.search(message) and _gpu_is_full()))


def _gpu_is_full() -> bool:
    """Return whether the current GPU has almost no free memory; False if it can't say so."""
    torch = sys.modules.get("torch")
    try:
        return torch is not None and torch.cuda.is_initialized() and torch.cuda.mem_get_info()[0] < FULL_GPU_BYTES
    except Exception:  # the context is unusable
        return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, its cause or the error during whose handling it was raised, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
