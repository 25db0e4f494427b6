from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def kill_rounds(request: pytest.FixtureRequest) -> int | None:
    """``--kill-rounds N``; ``None``: each test's own number."""
    rounds: int | None = request.config.getoption("--kill-rounds")
    return rounds
