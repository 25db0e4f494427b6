"""Outputs that an earlier version left are read: runs, studies, MLflow; unfinished studies go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contracts import reading, store
from tests.contracts.golden_files import check, differences, missing_numbers, read, report

pytestmark = pytest.mark.long
STEPS = [f"{number:02} {step}" for number, step in enumerate(reading.STEPS)]


@pytest.fixture(scope="module", params=store.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(version: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("read")
    return reading.readings(folder, version)


@pytest.mark.parametrize("step", STEPS)
def test_a_command_reads_them(version: str, found: dict[str, Any], step: str) -> None:
    """Exit codes, tables and the places of errors are equal; of a text, every number is still there."""
    old, new = dict(read(f"{version}/readings.json")[step]), dict(found[step])
    message = new.pop("message", "")
    old.pop("message", None)
    lines = missing_numbers("numbers", old.pop("numbers", ""), new.pop("numbers", ""))
    lines += differences(old, new)
    assert not lines, f"{report(f'{version}/readings.json', lines, step)}\n{message}"


def test_the_report_says_the_same_numbers(version: str, found: dict[str, Any]) -> None:
    key = "real_report/report.md"
    lines = missing_numbers(key, read(f"{version}/readings.json")[key], found[key])
    assert not lines, report(f"{version}/readings.json", lines)


@pytest.mark.parametrize("part", ["real_report/runs.csv", "mlflow"])
def test_tables_and_mlflow_hold_the_same(version: str, found: dict[str, Any], part: str) -> None:
    new = found[part]
    if part == "mlflow":  # runs that were made again on this machine have its processor's name
        stored = read(f"{version}/readings.json")[part]
        tags = {name: {**run["tags"], **_device(stored.get(name))} for name, run in new.items()}
        new = {name: {**run, "tags": tags[name]} for name, run in new.items()}
    check(f"{version}/readings.json", new, key=part)


def _device(stored: Any) -> dict[str, str]:
    return {"device": stored["tags"]["device"]} if stored is not None and "device" in stored["tags"] else {}


def test_records_are_loaded_in_python(version: str, tmp_path: Path) -> None:
    check(f"{version}/loaded.json", reading.loaded(tmp_path, version))
