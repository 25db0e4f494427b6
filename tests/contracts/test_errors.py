"""A user error ends with the exit code, and points at the place, that it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contracts import errors
from tests.contracts.golden_files import differences, read, report

pytestmark = pytest.mark.long
COMPARED = ("command", "exit_code", "where", "bare")
"""The message is stored for whoever reads a change, and may change."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("errors")
    return errors.errors(folder)


@pytest.mark.parametrize("name", errors.ERRORS)
def test_an_error_has_the_same_exit_code_and_place(found: dict[str, Any], name: str) -> None:
    old, new = ({key: one.get(key) for key in COMPARED} for one in (read("errors.json").get(name, {}), found[name]))
    lines = differences(old, new)
    assert not lines, f"{report('errors.json', lines, name)}\n\nthe message now:\n{found[name]['message']}"
