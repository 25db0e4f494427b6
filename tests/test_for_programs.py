"""What programs rely on: the keys of ``--json`` are those of docs/json.md, and AGENTS.md's commands work as written."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import store
from tests.contracts.calling import Called, call, called_in

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = re.compile(r"^## `(?P<command>[^`]+)`.*?\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (?P<keys>`[^|]+) \|", re.MULTILINE)
PROSE = re.compile("MLflow UI:|      or:|qlora-exp run |how sure: |to confirm: ")
"""Lines that are no table's: a terminal breaks them."""
SLEEP = ["training.engine=sleep", "training.sleep_seconds=0"]


def documented() -> dict[str, list[str]]:
    """Command of a chapter of docs/json.md → the keys in the first column of its table."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    found = {}
    for chapter in CHAPTER.finditer(text):
        cells = [row["keys"] for row in ROW.finditer(chapter["text"])]
        found[chapter["command"]] = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    return found


KEYS = documented()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of an earlier version: trained runs and four studies."""
    folder: Path = tmp_path_factory.mktemp("programs")
    return store.unpacked("v2", folder)


@pytest.fixture
def here(outputs: Path) -> Iterator[None]:
    with called_in(outputs):
        yield


def parsed(*arguments: str, code: int = 0) -> Any:
    called = call(*arguments)
    assert called.code == code, called.err
    return json.loads(called.out)


def table() -> list[str]:
    losses = {8: (1.0, 1.1, 1.0), 16: (0.9, 0.8, 0.9)}
    rows = [f"{rank},{seed},{loss}" for rank, values in losses.items() for seed, loss in enumerate(values)]
    Path("results.csv").write_text("\n".join(["rank,seed,loss", *rows]) + "\n")
    return ["results.csv", "--margin", "0.02"]


COMMANDS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "ls runs --json": ("ls runs", list),
    "ls models --json": ("ls models", list),
    "trials --json": ("trials ladder", list),
    "best --json": ("best ladder", list),
    "status --json": ("status half", list),
    "show --json": ("show last", list),
    "diff --json": ("diff last real-0000", list),
    "validate --json": ("validate quantization=fp32", list),
    "data preview --json": ("data preview quantization=fp32 --count 1", list),
    "doctor --json": ("doctor --no-self-test", list),
    "plan --json": ("plan quantization=fp32", list),
    "plan --sizes --json": ("plan --sizes", list),
    "analyze --json": ("analyze", table),
    "report --json": ("report real --output report", list),
}


def test_every_chapter_of_the_document_is_tested() -> None:
    assert sorted(KEYS) == sorted(COMMANDS)
    assert all(KEYS.values())


@pytest.mark.parametrize("chapter", COMMANDS)
def test_json_has_the_documented_keys(chapter: str, here: None) -> None:
    command, more = COMMANDS[chapter]
    words = [run_id_of(word) if word == "real-0000" else word for word in command.split()]
    called = call(*words, *more(), "--json")
    assert called.code in ((0, 1) if words[0] == "doctor" else (0,)), called.err
    content = json.loads(called.out)
    rows = content if isinstance(content, list) else [content]
    assert rows
    for row in rows:
        assert [key for key in KEYS[chapter] if key not in row] == []
        if chapter == "ls runs --json":
            assert sorted(row) == sorted(KEYS[chapter])


def run_id_of(trial: str) -> str:
    return next(folder.name for folder in sorted(Path("outputs/runs").iterdir()) if trial in folder.name)


def test_tables_are_flat_and_csv_has_the_same_cells(here: None) -> None:
    for command in (["ls", "runs"], ["trials", "search"], ["ls", "sweeps"]):
        rows = parsed(*command, "--json")
        assert all(not isinstance(value, dict) for row in rows for value in row.values())
    rows = parsed("ls", "runs", "--json")
    cells = list(csv.DictReader(io.StringIO(call("ls", "runs", "--csv").out)))
    assert [row["run_id"] for row in cells] == [row["run_id"] for row in rows]
    assert [float(row["loss"]) for row in cells if row["loss"]] == [row["loss"] for row in rows if row["loss"]]
    columns = call("ls", "runs", "--csv", "--columns", "loss,status").out.splitlines()[0]
    assert columns == "run_id,short_id,loss,status"


def test_every_short_id_finds_its_run(here: None) -> None:
    for row in parsed("ls", "runs", "--json"):
        assert parsed("show", row["short_id"], "--json")["run_id"] == row["run_id"]


def test_tables_fit_a_terminal_of_100_columns(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    one_line_a_run = ("ls runs", "trials search", "trials ladder")
    for command in (*one_line_a_run, "ls models", "ls sweeps", "best search", "status half"):
        called = call(*command.split())
        lines = [line for line in called.out.splitlines() if not PROSE.match(line)]
        assert called.code == 0
        assert [line for line in lines if len(line.rstrip()) > 100] == [], command
        if command in one_line_a_run:
            rows = parsed(*command.split(), "--json")
            assert len([line for line in lines if any(str(row["short_id"]) in line for row in rows)]) == len(rows)
            assert len(lines) <= len(rows) + 5


def test_a_list_of_one_study_and_a_field_that_is_unknown(here: None) -> None:
    rows = parsed("ls", "runs", "--study", "sea", "--json")
    assert {row["study"] for row in rows} == {"search"}
    assert call("ls", "runs", "--study", "nothing").code == 2
    alone = {row["run_id"] for row in parsed("ls", "runs", "--where", "study=null", "--json")}
    assert alone == {row["run_id"] for row in parsed("ls", "runs", "--json") if row["study"] is None}


def lines_of(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_every_command_of_agents_md_works_as_written(tmp_path: Path) -> None:
    """In its order, in an empty folder. Nothing is trained: runs and sweeps sleep, and the report refuses such runs."""
    with called_in(tmp_path):
        for line in lines_of("AGENTS.md"):
            words = shlex.split(line.removeprefix("$ "))
            if words[0] == "pip":
                assert (ROOT / "constraints.txt").is_file()
                continue
            called = command(words)
            refused = words[1] == "report"
            assert called.code == (2 if refused else 0), f"{line}: {called.err}"
            if "--json" in words:
                json.loads(called.out)


def command(words: list[str]) -> Called:
    if words[:3] == ["python", "-m", "qlora_exp"]:
        words = ["qlora-exp", "run", *words[3:]]
    ids = iter(sorted(folder.name for folder in Path("outputs/runs").glob("*")))
    words = [next(ids) if word == "RUN" else word for word in words[1:]]
    return call(*words, *(SLEEP if words[0] in ("run", "rerun") else []))


def test_exit_codes_are_documented_alike() -> None:
    for document in ("AGENTS.md", "docs/json.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == ["0", "1", "2", "130"]
