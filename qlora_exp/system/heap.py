"""glibc settings with which training on a CPU needs less memory, at the same speed: freed chunks merge at once.

torch allocates aligned memory. glibc cuts the excess off and keeps these small chunks in two caches (tcache, fastbins)
without merging them. The gap of a freed tensor is then slightly too small for the next tensor of the same size.
Without the two caches a freed chunk merges with its neighbours. glibc reads the setting only at process start.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MALLOC_VARIABLE = "GLIBC_TUNABLES"
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
NVIDIA_DRIVER = Path("/dev/nvidiactl")
DEVICE_CPU = re.compile(r"\+{0,2}training\.device=['\"]?cpu['\"]?")
NO_TRAINING_FLAGS = {
    *("-m", "--multirun", "-h", "--help", "--hydra-help", "--info", "-i", "--cfg", "-c", "--shell-completion", "-sc"),
    *("--version",),
}
"""Flags with which the command trains nothing in this process."""


def tunables_for_training() -> str | None:
    """Return GLIBC_TUNABLES for a training process on a CPU: the user's value, else :data:`TUNABLES`; ``None`` if it
    isn't set and the C library isn't glibc."""
    current = os.environ.get(MALLOC_VARIABLE)
    return current if current is not None or not _is_glibc() else TUNABLES


def malloc_tunables() -> str | None:
    """Return GLIBC_TUNABLES of this process; ``None`` if it isn't set."""
    return os.environ.get(MALLOC_VARIABLE)


def merges_free_chunks(tunables: str | None) -> bool:
    """Return whether a process with these ``tunables`` merges freed chunks at once."""
    return tunables is not None and all(setting in tunables.split(":") for setting in TUNABLES.split(":"))


def environment_for_training() -> Mapping[str, str]:
    """Return additional environment variables for a process that trains on a CPU."""
    value = tunables_for_training()
    return {} if value is None else {MALLOC_VARIABLE: value}


def on_cpu(device: str) -> bool:
    """Return whether ``training.device=device`` means a CPU on this machine, as far as known without torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return device == "cpu" or (device == "auto" and (hidden or not NVIDIA_DRIVER.exists()))


def reexec_with_tunables(arguments: Sequence[str]) -> None:
    """Restart this process with :data:`TUNABLES`, before the command with ``arguments`` has done anything.

    Returns without a restart if GLIBC_TUNABLES is set or if this process won't train on a CPU. Nor does it restart a
    script, a notebook or a debugger that calls the command.
    """
    on_the_cpu = on_cpu("cpu" if any(DEVICE_CPU.fullmatch(text) for text in arguments) else "auto")
    if (
        malloc_tunables() is None
        and on_the_cpu
        and _is_glibc()
        and not NO_TRAINING_FLAGS & set(arguments)
        and _is_a_command()
    ):
        with contextlib.suppress(OSError):  # no restart: training works without the setting
            os.execve(sys.executable, sys.orig_argv, {**os.environ, MALLOC_VARIABLE: TUNABLES})


def _is_a_command() -> bool:
    """Return whether this process is the command itself, not a script, notebook or debugger that calls it."""
    arguments = sys.argv[1:]
    is_ours = Path(sys.argv[0]).name in ("qlora-exp", "__main__.py") and sys.gettrace() is None
    return is_ours and sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == arguments


def _is_glibc() -> bool:
    """Return whether the C library is glibc 2.31 or newer, which knows both settings."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 31)
    except (AttributeError, OSError, ValueError):  # not glibc
        return False
