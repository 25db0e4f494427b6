"""What version 1 wrote is read under version 2's names, and an old key of the configuration is answered with its new
name."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.fit_types import Fit
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Failure, FewShot, RunRecord, Scores
from qlora_exp.records.upgrade import (
    ANSWER_KEYS,
    LADDER_SETTING_KEYS,
    PHASES,
    PREDICTED_MEMORY_KEYS,
    RECORD_KEYS,
    SETTING_KEYS,
    SKIPPED_TRIAL_KEYS,
    renamed,
)
from qlora_exp.study.spec import read_spec
from qlora_exp.training.checkpoints import newest_valid
from tests.analysis import made_up
from tests.contracts import store

SLEEP = ("training.engine=sleep", "training.sleep_seconds=0.01", "tracking=off")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def backwards(names: dict[str, str]) -> dict[str, str]:
    """Path under its new name → the old name."""
    return {f"{path.rpartition('.')[0]}.{new}".lstrip("."): path.rpartition(".")[2] for path, new in names.items()}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for entry in value:
            yield from leaves(entry, path)
    else:
        yield path, value


def full_record() -> RunRecord:
    """A record with a value in each renamed field."""
    record = made_up.run()
    scores = replace(record.scores, few_shot=(FewShot(1, 5, ("a", "b"), Scores("validation", 3)),))
    config = json.loads(json.dumps(record.config))
    config["sweep"]["ladder"]["max_seeds"] = 7
    return record.replace(
        fit=Fit(100, 10, 120, 200, 0.1, 3),
        memory=replace(record.memory, process_reused=True),
        speed=replace(record.speed, base_evaluation_seconds=1.5, base_scores_cached=True),
        scores=scores,
        config=config,
        failure=Failure("X", "y", phase="evaluate base"),
        earlier_failures=(
            Failure("X", "y", phase="evaluate base"),
            Failure("X", "y", phase="train"),
            Failure("X", "y"),
        ),
    )


def as_version_1(record: RunRecord) -> dict[str, Any]:
    raw: dict[str, Any] = renamed(to_dict(record), backwards(RECORD_KEYS)) | {"schema_version": 1}
    for failure in (*filter(None, [raw["failure"]]), *raw["earlier_failures"]):
        failure["phase"] = {new: old for old, new in PHASES.items()}.get(failure["phase"], failure["phase"])
    return raw


def test_every_field_of_a_version_1_record_has_its_value_under_the_new_name(tmp_path: Path) -> None:
    record, file = full_record(), tmp_path / "record.json"
    raw = as_version_1(record)
    assert {path for path, _ in leaves(raw)} >= set(RECORD_KEYS), "each old name is in the file"
    write_json(file, raw)
    assert read_record(file) == record.replace(schema_version=2)
    write_json(file, read_record(file))
    assert json.loads(file.read_text()) == to_dict(record), "written again, it is an ordinary record of version 2"


def test_no_value_of_the_stored_version_1_records_is_lost(tmp_path: Path) -> None:
    files = sorted((store.unpacked("v1", tmp_path) / "outputs" / "runs").glob("*/record.json"))
    assert len(files) > 30
    for file in files:
        raw = json.loads(file.read_text(encoding="utf-8"))
        assert raw["schema_version"] == 1
        new = dict(leaves(to_dict(read_record(file))))
        old = {path: value for path, value in leaves(raw) if path != "schema_version"}
        for path, value in old.items():
            name = f"{path.rpartition('.')[0]}.{RECORD_KEYS[path]}" if path in RECORD_KEYS else path
            assert new[name] == PHASES.get(str(value), value), (file.parent.name, path)


def test_a_damaged_version_1_record_is_refused_with_the_key_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, change in enumerate(({"fit": 3}, {"failure": "no"}, {"earlier_failures": [4]}, {"memory": None})):
        folder = tmp_path / "outputs" / "runs" / f"damaged-{number}"
        folder.mkdir(parents=True)
        write_json(folder / "record.json", as_version_1(full_record()) | change)
        assert main(["show", folder.name]) == 2
        assert next(iter(change)) in capsys.readouterr().err


def edit(file: Path, names: dict[str, str]) -> None:
    write_json(file, renamed(json.loads(file.read_text(encoding="utf-8")), names))


def to_version_1(root: Path, name: str) -> None:
    """Change what a study wrote to what version 1 would have written."""
    file = root / "studies" / name / "study.json"
    edit(file, backwards({f"ladder.{old}": new for old, new in LADDER_SETTING_KEYS.items()}))
    raw = json.loads(file.read_text(encoding="utf-8"))
    old_keys = {new: old for old, new in SETTING_KEYS.items()}
    for group in ("fixed", "settings"):
        raw[group] = {old_keys.get(key, key): value for key, value in raw[group].items()}
    raw["overrides"] = [text.replace("sweep.ladder.max_seeds", "sweep.ladder.most_seeds") for text in raw["overrides"]]
    write_json(file, raw)
    answers = root / "studies" / name / "ladder.json"
    if answers.exists():
        edit(answers, backwards(ANSWER_KEYS | {f"ladders.{old}": new for old, new in ANSWER_KEYS.items()}))
    for record in (root / "runs").glob("*/record.json"):
        write_json(record, as_version_1(read_record(record)))
    with sqlite3.connect(root / "optuna.db") as connection:
        for table, rowid in (("study_user_attributes", "study_user_attribute_id"),):
            for number, text in connection.execute(f"select {rowid}, value_json from {table} where key = 'settings'"):
                settings = renamed(
                    json.loads(text), backwards({f"ladder.{a}": b for a, b in LADDER_SETTING_KEYS.items()})
                )
                settings = {old_keys.get(key, key): value for key, value in settings.items()}
                connection.execute(
                    f"update {table} set key = 'asks', value_json = ? where {rowid} = ?", (json.dumps(settings), number)
                )
        connection.execute(
            "update trial_user_attributes set key = 'uncounted_attempts' where key = 'interrupted_attempts'"
        )
        for number, text in connection.execute(
            "select trial_user_attribute_id, value_json from trial_user_attributes where key = 'predicted_not_to_fit'"
        ):
            skipped = renamed(json.loads(text), backwards(SKIPPED_TRIAL_KEYS))
            connection.execute(
                "update trial_user_attributes set value_json = ? where trial_user_attribute_id = ?",
                (json.dumps(skipped), number),
            )


def sweep(*overrides: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *SLEEP, *overrides])


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(line for line in lines if not line.startswith(("cpu ", "gpu ")))


def test_a_version_1_ladder_goes_on_and_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    ladder = ("sweeps=rank_doubling", "sweep.name=old", "sweep.ladder.r_max=16")
    assert sweep(*ladder, "sweep.ladder.max_seeds=4") == 0
    before = [said(capsys, "trials", "old", "--csv"), said(capsys, "best", "old"), said(capsys, "status", "old")]
    to_version_1(Path("outputs"), "old")
    assert "most_seeds" in Path("outputs/studies/old/study.json").read_text()
    after = [said(capsys, "trials", "old", "--csv"), said(capsys, "best", "old"), said(capsys, "status", "old")]
    assert after == before
    assert sweep(*ladder, "sweep.ladder.max_seeds=4") == 0, "the same command is still the same study"
    assert main(["resume", "old"]) == 0
    assert said(capsys, "trials", "old", "--csv") == before[0]
    assert sweep(*ladder, "sweep.ladder.max_seeds=3") == 2, "a smaller limit isn't"
    assert "max_seeds" in capsys.readouterr().err


def test_a_ladder_of_the_rules_first_edition_goes_on_with_its_settings_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ``study.json`` says ``lr_policy: transfer``, knows one pilot seed, and its seed axis lists eight seeds."""
    monkeypatch.chdir(store.unpacked("v2", tmp_path))
    before = said(capsys, "trials", "ladder", "--csv")
    with sqlite3.connect("outputs/optuna.db") as database:  # its last trial has not run yet
        [(last,)] = database.execute(
            "select max(trial_id) from trials join studies using (study_id) where study_name = 'ladder'"
        )
        tables = [name for (name,) in database.execute("select name from sqlite_master where name like 'trial%'")]
        for table in tables:
            database.execute(f"delete from {table} where trial_id = ?", (last,))
    database.close()
    assert main(["resume", "ladder"]) == 0
    shown = capsys.readouterr()
    assert "keeps its settings (lr_policy=carry, max_seeds=8) and continues with the present rule" in shown.err
    assert "(carry) chosen at r = 8 by 1 pilot seed and carried over" in shown.out
    assert said(capsys, "trials", "ladder", "--csv").count("\n") == before.count("\n")
    for ladder in json.loads(Path("outputs/studies/ladder/ladder.json").read_text())["ladders"]:
        assert (ladder["decision"], ladder["use_rank"], ladder["seeds"]) == ("stop", 8, {"8": 3, "16": 3})
    spec = read_spec(OutputPaths.of("outputs").study("ladder"))
    assert spec.ladder is not None
    assert (spec.ladder.lr_policy, spec.ladder.pilot_seeds, spec.ladder.max_seeds) == ("carry", 1, 8)
    assert main(["resume", "ladder", "sweep.ladder.max_seeds=16"]) == 2
    assert "8 in the study, 16 now" in capsys.readouterr().err


def test_the_earlier_name_of_a_learning_rate_policy_is_answered_with_the_new_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.yaml").write_text("sweep:\n  ladder:\n    lr_policy: transfer\n")
    for words in (("sweep.ladder.lr_policy=transfer",), ("--from", "mine.yaml")):
        assert main(["plan", "sweeps=rank_doubling", *words]) == 2
        assert "sweep.ladder.lr_policy=carry" in capsys.readouterr().err


def test_trials_that_version_1_skipped_stay_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("sweep.name=old", "lora.r=4,64", "budget.memory_bytes=800000")
    assert sweep(*grid) == 0
    before = [said(capsys, "trials", "old", "--csv"), said(capsys, "status", "old")]
    to_version_1(Path("outputs"), "old")
    assert [said(capsys, "trials", "old", "--csv"), said(capsys, "status", "old")] == before
    assert sweep(*grid) == 0
    assert said(capsys, "trials", "old", "--csv") == before[0]


def test_a_checkpoint_of_version_1_is_resumed(tmp_path: Path) -> None:
    from qlora_exp.training.checkpoints import ChecksumCallback

    folder = RunPaths(tmp_path / "run").checkpoints
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter.safetensors").write_bytes(b"weights")

    class Arguments:
        output_dir = str(folder)

    class State:
        global_step = 5

    ChecksumCallback(lambda: {"tokens": 3}).on_save(Arguments(), State(), None)
    assert newest_valid(folder) == (checkpoint, {"tokens": 3})
    raw = json.loads((checkpoint / "checksums.json").read_text())
    (checkpoint / "checksums.json").unlink()
    write_json(checkpoint / "seal.json", {"step": 5, "files": raw["files"], "carried": raw["resume_state"]})
    assert newest_valid(folder) == (checkpoint, {"tokens": 3})
    (checkpoint / "adapter.safetensors").write_bytes(b"damaged")
    assert newest_valid(folder) is None


def test_memory_predictions_that_version_1_stored_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_exp.cli import report
    from qlora_exp.errors import StudyError
    from qlora_exp.study.study import Study

    def lost(*_: Any) -> Any:
        raise StudyError("the database is gone", "here", "nothing")

    new = {key: number for number, key in enumerate(PREDICTED_MEMORY_KEYS.values(), 3)} | {"sentence": "Said"}
    paths, spec = OutputPaths.of("outputs").study("old"), SimpleNamespace(synthetic=False)
    write_json(paths.folder / "predicted_memory.json", renamed(new, backwards(PREDICTED_MEMORY_KEYS)))
    assert "near_the_edge" in (paths.folder / "predicted_memory.json").read_text()
    monkeypatch.setattr(Study, "read", lost)
    assert report._from_study(spec, paths, "predicted_memory.json", report._predicted_memory) == new


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "sweeps=rank_doubling", "sweep.ladder.most_seeds=4"),
        ("validate", "sweep.ladder.most_seeds=4"),
        ("run", "sweep.ladder.most_seeds=4"),
        ("plan", "--from", "mine.yaml"),
    ],
    ids=lambda words: " ".join(words),
)
def test_an_old_key_is_answered_with_its_new_name(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("sweep:\n  ladder:\n    most_seeds: 4\n")
    assert main(list(words)) == 2
    shown = capsys.readouterr().err
    assert "most_seeds" in shown
    assert "max_seeds" in shown.split("most_seeds", 1)[1]
    assert not Path("outputs").exists()


def test_an_earlier_versions_run_is_repeated_as_it_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record lacks the keys of later versions. Their defaults would train it without padding."""
    assert main(["run", *SLEEP]) == 0
    [path] = Path("outputs/runs").glob("*/record.json")
    record = json.loads(path.read_text())
    for key in ("padding_free", "micro_batch_tokens", "kernels"):
        del record["config"]["training"][key]
    path.write_text(json.dumps(record))
    assert main(["rerun", "last"]) == 0
    assert "training.padding_free=off" in capsys.readouterr().out
    again = [read_record(file) for file in Path("outputs/runs").glob("*/record.json") if file != path]
    assert [(one.config["training"]["padding_free"], one.config["training"]["kernels"]) for one in again] == [
        ("off", "none")
    ]
