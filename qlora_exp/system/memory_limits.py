"""Memory limits of this process, memory in use, and processes that the kernel killed for lack of memory.

The kernel reports the machine in /proc and control groups (containers, Slurm jobs, systemd slices) in /sys/fs/cgroup.
A group's limit holds for all groups below it: the smallest limit up to the root counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
NEARLY_FULL_SHARE = 0.97
"""Share of memory in use above which a process mostly waits for pages."""
MAX_PAGE_FAULTS_PER_SECOND = 500.0
"""Major page faults per second above which a process mostly waits: the kernel has dropped the program's own pages."""


def total_bytes() -> int | None:
    """Return the machine's memory, or a control group's limit if it is smaller; ``None`` if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return min([total, *_limits()])


def is_nearly_full() -> bool:
    """Return whether the machine, or a control group of this process, has almost no memory left."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(PROC / "meminfo"), re.MULTILINE))
    total, available = int(fields.get("MemTotal", 0)), int(fields.get("MemAvailable", 0))
    if total and "MemAvailable" in fields and available < (1 - NEARLY_FULL_SHARE) * total:
        return True
    return any(used > NEARLY_FULL_SHARE * limit for used, limit in _used_of_limits())


def major_page_faults() -> int:
    """Return this process's major page faults since its start: pages that it had to wait for from disk."""
    fields = _read(PROC / "self" / "stat").rpartition(")")[2].split()
    return int(fields[9]) if len(fields) > 9 else 0


def out_of_memory_kills() -> int | None:
    """Return how many processes the kernel killed for lack of memory, in this process's control group, else on the
    machine; ``None`` if unknown."""
    for folder in _folders():
        match = re.search(r"^oom_kill (\d+)$", _read(folder / "memory.events") or _read(folder / "memory.oom_control"),
                          re.MULTILINE)  # fmt: skip
        if match:
            return int(match[1])
    match = re.search(r"^oom_kill (\d+)$", _read(PROC / "vmstat"), re.MULTILINE)
    return int(match[1]) if match else None


def _limits() -> Iterator[int]:
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdecimal():
                yield int(text)


def _used_of_limits() -> Iterator[tuple[int, int]]:
    """Yield (bytes in use that the kernel can't reclaim, limit in bytes) of each group with a limit.

    File pages are left out: the kernel can drop them.
    """
    for folder in _folders():
        limits = [text for name in ("memory.max", "memory.limit_in_bytes")
                  if (text := _read(folder / name).strip()).isdecimal()]  # fmt: skip
        used = dict(re.findall(r"^(anon|shmem|total_rss|total_shmem) (\d+)$", _read(folder / "memory.stat"), re.M))
        if limits and used:
            yield sum(map(int, used.values())), int(limits[0])


def _folders() -> list[Path]:
    """Return the folders of this process's memory group and of its parents."""
    folders: list[Path] = []
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        own = root / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return folders or [CGROUPS, CGROUPS / "memory"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
