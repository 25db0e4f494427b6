"""A run and small sweeps leave the records, studies, tables and MLflow runs that they left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import runs
from tests.contracts.golden_files import RELATIVE_TOLERANCE, check, read

pytestmark = pytest.mark.long
SHARE = re.compile(r"accuracy|_f1|exact_match|invalid_answer_rate|rouge_l")
"""Scores that count items: on a machine that rounds otherwise, one item in eight may fall the other way."""
GRADIENT = re.compile(r"gradient_norm|perplexity")


def tolerance(key: str) -> tuple[float, float]:
    """A relative 1e-4, 1e-3 for what amplifies rounding, and one item for a share of items."""
    if SHARE.search(key):
        return RELATIVE_TOLERANCE, 1 / 8
    return (1e-3 if GRADIENT.search(key) else RELATIVE_TOLERANCE), 1e-9


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("runs")
    called = runs.make(folder)
    told = "\n".join(f"{name}: {one.err}" for name, one in called.items() if one.code not in (0, 1))
    assert not told, told
    return runs.collected(folder, called)


@pytest.mark.parametrize("name", ["commands", "studies", "files", "details", "trials", "mlflow"])
def test_runs_and_sweeps_leave_the_same(found: dict[str, Any], name: str) -> None:
    check(f"runs/{name}.json", found[f"runs/{name}.json"], tolerance)


def test_the_records_are_those_of_the_same_runs(found: dict[str, Any]) -> None:
    assert sorted(found["runs/records.json"]) == sorted(read("runs/records.json"))


@pytest.mark.parametrize("run", sorted(read("runs/records.json")))
def test_a_record_has_the_same_fields_and_values(found: dict[str, Any], run: str) -> None:
    check("runs/records.json", found["runs/records.json"].get(run), tolerance, key=run)
