"""Every package that ours imports is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import qlora_exp

PACKAGE = Path(qlora_exp.__file__).resolve().parent
PROJECT = PACKAGE.parent / "pyproject.toml"
OURS = {"qlora_exp", "hydra_plugins"}
DISTRIBUTIONS = {
    "pynvml": "nvidia-ml-py",
    "llama_cpp": "llama-cpp-python",
    "gguf": "gguf",
    "liger_kernel": "liger-kernel",
    "psycopg": "psycopg",
}
"""Import name → distribution, of packages that need not be installed where this test runs."""

pytestmark = pytest.mark.skipif(not PROJECT.is_file(), reason="a wheel has no pyproject.toml")


def sources() -> list[Path]:
    """All modules, those behind symlinks to top-level folders too."""
    return sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "analysis").rglob("*.py")})


def imported(file: Path) -> Iterator[str]:
    """Top-level names of all imports of other packages, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (str(one.value).split(".")[0] for one in node.args if isinstance(one, ast.Constant))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return {normal(re.split(r"[\s\[<>=!~;]", one, maxsplit=1)[0]) for one in listed}


OF_A_LAUNCHER = {"ray"}
"""Imported only where hydra-ray-launcher, which needs it, is the launcher. It can't be an extra: it wants an older
cloudpickle than joblib, so the constraints can't pin both."""


def test_every_import_is_a_declared_dependency() -> None:
    homes = packages_distributions()
    allowed = declared("gguf", "liger", "phone", "postgres") | OF_A_LAUNCHER
    undeclared = {
        (name, str(file.relative_to(PACKAGE)))
        for file in sources()
        for name in imported(file)
        if name not in sys.stdlib_module_names | OURS
        if not {normal(home) for home in homes.get(name, [DISTRIBUTIONS.get(name, name)])} & allowed
    }
    assert undeclared == set()


def test_every_declared_dependency_has_a_lower_bound() -> None:
    """Without one, an installer may take a version that has none of what is used."""
    for one in tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]:
        assert ">=" in one, one
