"""The C library's heap, told to join what is freed at once: less memory for a training on a CPU, in the same time.

torch asks for aligned memory; glibc cuts slivers off it and keeps them apart for the next small request, so that the
gap that a freed tensor leaves is a little too small for the next tensor of its size. Without those two caches a sliver
joins its neighbours when it is freed. glibc reads the setting when a process starts, and has no other word for it.
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
ELSEWHERE = {
    *("-m", "--multirun", "-h", "--help", "--hydra-help", "--info", "-i", "--cfg", "-c", "--shell-completion", "-sc"),
    *("--version",),
}
"""Flags of the doors with which this process trains nothing itself."""


def tunables() -> str | None:
    """What a training process started here on a CPU is told: as the user has it, else :data:`TUNABLES`; ``None``:
    nothing, for the C library isn't glibc."""
    told = os.environ.get(MALLOC_VARIABLE)
    return told if told is not None or not _is_glibc() else TUNABLES


def malloc_tunables() -> str | None:
    """What this process was told."""
    return os.environ.get(MALLOC_VARIABLE)


def merges_free_chunks(tunables: str | None) -> bool:
    """Whether a process that was told ``tunables`` joins what is freed."""
    return tunables is not None and all(setting in tunables.split(":") for setting in TUNABLES.split(":"))


def environment() -> Mapping[str, str]:
    """Environment variables for a process that trains on a CPU."""
    wanted = tunables()
    return {} if wanted is None else {MALLOC_VARIABLE: wanted}


def on_cpu(device: str) -> bool:
    """Whether ``training.device=device`` means a CPU here, as far as can be told without torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return device == "cpu" or (device == "auto" and (hidden or not NVIDIA_DRIVER.exists()))


def reexec_with_tunables(arguments: Sequence[str]) -> None:
    """Have this process begin again with the setting: a command, with ``arguments``, that will train by itself and has
    done nothing yet. Returns where the setting is there, the user has chosen another, nothing will be trained here on a
    CPU, or the process is another program, which calls the command."""
    on_the_cpu = on_cpu("cpu" if any(DEVICE_CPU.fullmatch(text) for text in arguments) else "auto")
    if malloc_tunables() is None and on_the_cpu and _is_glibc() and not ELSEWHERE & set(arguments) and _is_a_command():
        with contextlib.suppress(OSError):  # then as it is: it trains all the same
            os.execve(sys.executable, sys.orig_argv, {**os.environ, MALLOC_VARIABLE: TUNABLES})


def _is_a_command() -> bool:
    """Whether this process is the command itself, not a script, notebook or debugger that calls it."""
    given = sys.argv[1:]
    ours = Path(sys.argv[0]).name in ("qlora-exp", "__main__.py") and sys.gettrace() is None
    return ours and sys.orig_argv[len(sys.orig_argv) - len(given) :] == given


def _is_glibc() -> bool:
    """And new enough to know both settings."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 31)
    except (AttributeError, OSError, ValueError):  # no such name elsewhere
        return False
