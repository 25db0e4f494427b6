"""The lowest versions that pyproject.toml allows: `python tests/lower_bounds.py pins` prints them for pip, and
`python tests/lower_bounds.py imports` imports every module of the package. `make test-lower-bounds` calls both."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PROGRAMS = ("__main__", "trial_main", "job")
"""Modules that are started, not imported."""


def pins() -> Iterator[str]:
    """Each dependency at its lower bound, with its marker."""
    for one in tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]:
        requirement, _, marker = one.partition(";")
        found = re.match(r"([\w.-]+)[^>]*>=\s*([\w.]+)", requirement)
        assert found, one
        yield f"{found[1]}=={found[2]}" + (f" ;{marker}" if marker else "")


def import_all() -> int:
    import qlora_exp

    names = [module.name for module in pkgutil.walk_packages(qlora_exp.__path__, "qlora_exp.")]
    for name in names:
        if name.rpartition(".")[2] not in PROGRAMS and not name.startswith("qlora_exp.plugins"):
            importlib.import_module(name)
    print(f"{len(names)} modules")
    return 0


if __name__ == "__main__":
    sys.exit(import_all() if sys.argv[1:] == ["imports"] else print(*pins(), sep="\n"))
