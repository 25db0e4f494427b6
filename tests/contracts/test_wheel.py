"""The wheel holds the same data files, commands, extras and public modules."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.contracts import wheel
from tests.contracts.golden_files import check, read


def test_the_wheel_holds_the_same_by_role(tmp_path: Path) -> None:
    check("wheel.json", wheel.contents(tmp_path))


@pytest.mark.parametrize("name", read("wheel.json")["public modules"])
def test_public_modules_are_imported_by_their_names(name: str) -> None:
    assert importlib.import_module(name).__name__ == name
