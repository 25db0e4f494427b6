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


_UNDROPPABLE = r"^(?:anon|shmem|total_rss|total_shmem) (\d+)$"
"""Without file pages, which the kernel can drop."""


def total_bytes() -> int | None:
    """Return the machine's memory, or a control group's limit if it is smaller; ``None`` if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return min([total, *(limit for _, limit in _limits())])


def is_nearly_full() -> bool:
    """Return whether the machine, or a control group of this process, has almost no memory left."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read(PROC / "meminfo"), re.MULTILINE))
    total, available = int(fields.get("MemTotal", 0)), int(fields.get("MemAvailable", 0))
    if total and "MemAvailable" in fields and available < (1 - NEARLY_FULL_SHARE) * total:
        return True
    for folder, limit in _limits():
        used = re.findall(_UNDROPPABLE, read(folder / "memory.stat"), re.MULTILINE)
        if sum(map(int, used)) > NEARLY_FULL_SHARE * limit:
            return True
    return False


def available_bytes() -> int | None:
    """Return how much memory new data can take without swapping, on the machine and in this process's control groups;
    ``None`` if unknown."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", read(PROC / "meminfo"), re.MULTILINE)
    free = [int(match[1]) * 1024] if match else []
    for folder, limit in _limits():
        used = re.findall(_UNDROPPABLE, read(folder / "memory.stat"), re.MULTILINE)
        free.append(max(limit - sum(map(int, used)), 0))
    return min(free, default=None)


def major_page_faults() -> int:
    """Return this process's major page faults since its start: pages that it had to wait for from disk."""
    fields = read(PROC / "self" / "stat").rpartition(")")[2].split()
    return int(fields[9]) if len(fields) > 9 else 0


def out_of_memory_kills() -> int | None:
    """Return how many processes the kernel killed for lack of memory, in this process's control group, else on the
    machine; ``None`` if unknown."""
    counts = [read(folder / "memory.events") or read(folder / "memory.oom_control") for folder in _folders()]
    for text in (*counts, read(PROC / "vmstat")):
        match = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        if match:
            return int(match[1])
    return None


def _limits() -> Iterator[tuple[Path, int]]:
    """Yield the folder and the limit in bytes of each group that has one."""
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = read(folder / name).strip()
            if text.isdecimal():
                yield folder, int(text)


def _folders() -> list[Path]:
    """Return the folders of this process's memory group and of its parents."""
    folders: list[Path] = []
    for line in read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        own = root / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return folders or [CGROUPS, CGROUPS / "memory"]


def read(path: Path) -> str:
    """Return the text of a file of the kernel's; empty if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
