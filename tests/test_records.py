"""A record survives its file: equal after a round trip, refused when torn or foreign, never half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths
from qlora_exp.records import find
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import SCHEMA_VERSION, Device, Environment, Memory, RunRecord, Scores, ScoreTable, Status


def make_record() -> RunRecord:
    device = Device("cpu", "a processor", 1, 8 << 30, None, None, bf16=True)
    environment = Environment("3.11", "linux", {"torch": "2.13.0"}, device, 2, 8 << 30, 2, None, "PASSIVE", None, None)
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        run_id="run",
        name="a run",
        status=Status.COMPLETED,
        started_at="2026-01-01T00:00:00+00:00",
        ended_at=None,
        config={"lora": {"r": 8}, "name": None},
        environment=environment,
        memory=Memory(base_weight_bytes=123, process_reused=True),
        scores=ScoreTable(after=Scores(split="validation", items=3, loss=0.5, other={"bleu": 1.0})),
        warnings=("one",),
    )


def test_a_record_is_equal_after_a_round_trip(tmp_path: Path) -> None:
    record = make_record()
    write_json(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record


def test_a_number_that_is_not_finite_is_written_as_unknown(tmp_path: Path) -> None:
    record = make_record()
    scores = ScoreTable(after=Scores(split="validation", items=3, loss=float("nan"), perplexity=float("inf")))
    write_json(tmp_path / "record.json", record.replace(scores=scores))
    after = read_record(tmp_path / "record.json").scores.after
    assert after is not None
    assert after.loss is None
    assert after.perplexity is None


def test_an_unknown_key_of_a_newer_writer_is_ignored(tmp_path: Path) -> None:
    raw = to_dict(make_record()) | {"invented_later": 1}
    (tmp_path / "record.json").write_text(json.dumps(raw))
    assert read_record(tmp_path / "record.json") == make_record()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: raw.pop("run_id"), "run_id"),
        (lambda raw: raw.update(status="GREAT"), "GREAT"),
        (lambda raw: raw.update(schema_version=99), "99"),
        (lambda raw: raw.pop("schema_version"), "schema_version"),
        (lambda raw: raw["memory"].update(base_weight_bytes="much"), "base_weight_bytes"),
        (lambda raw: raw["environment"].pop("device"), "device"),
        (lambda raw: raw.update(config=[]), "config"),
        (lambda raw: raw.update(warnings=["a", 1]), "warnings[1]"),
        (lambda raw: raw["memory"].update(base_weight_bytes=1.5), "memory.base_weight_bytes"),
        (lambda raw: raw["memory"].update(base_weight_bytes=True), "base_weight_bytes"),
    ],
)
def test_a_damaged_record_is_refused_with_the_key_named(tmp_path: Path, change, told: str) -> None:
    raw = to_dict(make_record())
    change(raw)
    (tmp_path / "record.json").write_text(json.dumps(raw))
    with pytest.raises(RecordError) as caught:
        read_record(tmp_path / "record.json")
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"a": 1}', "\x00\x00"])
def test_a_torn_or_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RecordError):
        read_record(tmp_path / "record.json")


def test_a_writer_killed_at_any_moment_leaves_a_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    script = (
        "import sys, itertools, pathlib\n"
        "from qlora_exp.records.files import write_json\n"
        "for n in itertools.count():\n"
        "    write_json(pathlib.Path(sys.argv[1]), {'schema_version': 1, 'n': n, 'filler': 'x' * 200_000})\n"
    )
    for delay in (0.05, 0.11, 0.23):
        child = subprocess.Popen([sys.executable, "-c", script, str(path)])
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert len(json.loads(path.read_text())["filler"]) == 200_000


def test_the_newest_ended_runs_are_read_and_one_that_may_change_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "MAX_ENDED_RUNS", 6)
    outputs = OutputPaths.of(tmp_path)

    def write(number: int, status: Status = Status.COMPLETED) -> None:
        record = make_record().replace(run_id=f"run-{number}", status=status)
        write_json(outputs.run(f"run-{number}").record, record)

    def names() -> list[str]:
        return [record.run_id for record in ended.records()]

    ended = find.EndedRuns(outputs)
    assert names() == []
    for number in range(1, 8):
        write(number)
    write(7, Status.RUNNING)
    write(6, Status.OUT_OF_MEMORY)
    outputs.run("run-5").record.write_text("{torn", encoding="utf-8")
    (outputs.runs / "run-4" / "record.json").unlink()
    assert names() == ["run-3", "run-2"]
    write(7)
    write(6, Status.PRUNED)
    write(5)
    assert names() == ["run-7", "run-6", "run-5", "run-3", "run-2"]
    write(8)
    write(9)
    assert names() == ["run-9", "run-8", "run-7", "run-6", "run-5"]
    (tmp_path / "file").write_text("")
    assert find.EndedRuns(OutputPaths.of(tmp_path / "file")).records() == []
