"""``plan --json`` counts what it counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contracts import plans
from tests.contracts.golden_files import check

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("plans")
    return plans.plans(folder)


@pytest.mark.parametrize("arguments", plans.PLANS, ids=lambda text: text or "nothing")
def test_a_plan_counts_the_same(found: dict[str, Any], arguments: str) -> None:
    check("plans.json", found[arguments], key=arguments)
