"""What is in the wheel, by role: where a module or a data file lies inside the package may change."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from tests.contracts.calling import call, called_in
from tests.contracts.golden_files import ROOT

PACKAGE = "qlora_exp"
PUBLIC = ("qlora_exp", "qlora_exp.analysis", "qlora_exp.cli")
"""What others import by name."""
FOLDERS = ("conf", "sweeps")
"""Folders of the package whose files keep their places: their paths are choices of the command line."""


def contents(folder: Path) -> dict[str, Any]:
    """As the build backend would pack this checkout. (tests/test_packaging.py builds and installs the wheel.)"""
    from hatchling.builders.wheel import WheelBuilder
    from packaging.requirements import Requirement

    builder = WheelBuilder(str(ROOT))
    files = sorted(PurePosixPath(Path(file.distribution_path).as_posix()) for file in builder.recurse_included_files())
    data = [file for file in files if file.suffix != ".py"]
    placed = {
        name: [str(file.relative_to(f"{PACKAGE}/{name}")) for file in data if file.parts[:2] == (PACKAGE, name)]
        for name in FOLDERS
    }
    elsewhere = sorted(file.name for file in data if not (file.parts[0] == PACKAGE and file.parts[1] in FOLDERS))
    core = builder.metadata.core
    names = {str(file) for file in files}
    with called_in(folder):
        started = call("init", "mine")
        assert started.code == 0, started.err
        starter = sorted(file.relative_to("mine").as_posix() for file in Path("mine").rglob("*") if file.is_file())
    return {
        **placed,
        "other data files": elsewhere,
        "top level": sorted({file.parts[0] for file in files}),
        "public modules": [name for name in PUBLIC if f"{name.replace('.', '/')}/__init__.py" in names],
        "plugin": sorted({file.parts[1] for file in files if file.parts[0] == "hydra_plugins"}),
        "run by python -m": [name for name in PUBLIC if f"{name}/__main__.py" in names],
        "console scripts": sorted(core.scripts),
        "extras": sorted(core.optional_dependencies),
        "dependencies": sorted(Requirement(text).name for text in core.dependencies),
        "python": core.requires_python,
        "starter": starter,
    }
