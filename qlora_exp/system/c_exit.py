"""Calls a function when C code ends the process with ``exit``, as bitsandbytes' kernels do after a CUDA error.

Python notices nothing of it: no exception is raised, and functions of :mod:`atexit` aren't called.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def call_at_c_exit(callback: Callable[[], None]) -> Iterator[None]:
    """Call ``callback`` if C code of this process calls ``exit`` while the ``with`` block runs; its errors are dropped.

    Does nothing where the C library can't take a registration back: it would be called after Python has ended.
    """
    library = ctypes.CDLL(None)
    try:
        register, take_back = getattr(library, "__cxa_atexit"), getattr(library, "__cxa_finalize")
    except AttributeError:
        yield
        return
    process, running = os.getpid(), True

    def at_exit(_: object) -> None:
        if running and os.getpid() == process:  # not in a forked child
            with contextlib.suppress(Exception):
                callback()

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(at_exit)
    owner = ctypes.c_char(b"\0")  # its address identifies the registration
    try:
        register(function, None, ctypes.byref(owner))
        yield
    finally:
        running = False
        take_back(ctypes.byref(owner))  # calls at_exit once more
