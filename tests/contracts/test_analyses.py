"""The analyses answer fixed tables and made-up records as they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contracts import analyses
from tests.contracts.golden_files import check, missing_numbers, read, report

TEXTS = ("report", "report within 0.05")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("analyses")
    return analyses.analyses(folder)


@pytest.mark.parametrize("question", analyses.QUESTIONS)
def test_a_table_gets_the_same_answer(found: dict[str, Any], question: str) -> None:
    key = f"analyze {question}"
    check("analyses.json", found[key], key=key)


def test_the_reports_table_of_runs_is_the_same(found: dict[str, Any]) -> None:
    check("analyses.json", found["runs.csv"], key="runs.csv")


@pytest.mark.parametrize("name", TEXTS)
def test_a_report_still_says_every_number(found: dict[str, Any], name: str) -> None:
    old, new = read("analyses.json")[name], found[name]
    assert (new["exit_code"], new["error"]) == (old["exit_code"], old["error"])
    lines = [line for key in ("headline", "numbers") for line in missing_numbers(key, old[key], new[key])]
    assert not lines, report("analyses.json", lines, name)
