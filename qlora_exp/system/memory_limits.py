"""How much memory this process may take, how much of it is left, and whether the kernel has ended a process for it.

The kernel tells of the machine in /proc and of control groups (containers, Slurm jobs, systemd slices) in
/sys/fs/cgroup. A group's limit holds for all groups below it, so that the smallest on the way up counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
NEARLY_FULL = 0.97
"""Share of the memory in use above which a process spends its time waiting for pages."""
PAGES_PER_SECOND = 500.0
"""Pages read back from disk, above which the same holds: of the program itself, which were thrown out for data."""


def total_bytes() -> int | None:
    """The machine's memory, or a control group's limit where that is smaller; ``None``: the system doesn't tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return min([total, *_limits()])


def is_nearly_full() -> bool:
    """Whether the machine, or a control group of this process, has next to no memory left."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(PROC / "meminfo"), re.MULTILINE))
    total, available = int(fields.get("MemTotal", 0)), int(fields.get("MemAvailable", 0))
    if total and "MemAvailable" in fields and available < (1 - NEARLY_FULL) * total:
        return True
    return any(used > NEARLY_FULL * limit for used, limit in _used_of_limits())


def pages_read_back() -> int:
    """How many pages this process has waited for the disk for, since it started."""
    fields = _read(PROC / "self" / "stat").rpartition(")")[2].split()
    return int(fields[9]) if len(fields) > 9 else 0


def kills() -> int | None:
    """How many processes of this one's control group the kernel has ended for want of memory; else of the machine;
    ``None``: it doesn't tell."""
    for folder in _folders():
        found = re.search(r"^oom_kill (\d+)$", _read(folder / "memory.events") or _read(folder / "memory.oom_control"),
                          re.MULTILINE)  # fmt: skip
        if found:
            return int(found[1])
    found = re.search(r"^oom_kill (\d+)$", _read(PROC / "vmstat"), re.MULTILINE)
    return int(found[1]) if found else None


def _limits() -> Iterator[int]:
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdecimal():
                yield int(text)


def _used_of_limits() -> Iterator[tuple[int, int]]:
    """Bytes that can't be given back (no file's pages), and the limit, of each group that has one."""
    for folder in _folders():
        limits = [text for name in ("memory.max", "memory.limit_in_bytes")
                  if (text := _read(folder / name).strip()).isdecimal()]  # fmt: skip
        held = dict(re.findall(r"^(anon|shmem|total_rss|total_shmem) (\d+)$", _read(folder / "memory.stat"), re.M))
        if limits and held:
            yield sum(map(int, held.values())), int(limits[0])


def _folders() -> list[Path]:
    """The folders of this process's memory group, and of those above it."""
    found: list[Path] = []
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = GROUPS / "memory" if controllers else GROUPS
        here = root / path.lstrip("/")
        found += [folder for folder in (here, *here.parents) if folder == root or root in folder.parents]
    return found or [GROUPS, GROUPS / "memory"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
