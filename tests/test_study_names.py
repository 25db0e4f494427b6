"""A study's name in any script: no two names share a folder, and no verb takes one name for another."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.config.overrides import hydra_value
from qlora_exp.errors import QloraExpError
from qlora_exp.orchestration.command import study_spec
from qlora_exp.paths import OutputPaths, slug
from qlora_exp.records.find import find_study, study_names
from qlora_exp.study.spec import read_spec, write_spec

SLEEP = ["lora.r=4", "training.engine=sleep", "training.sleep_seconds=0", "tracking=off"]
NAMES = [
    *("a-b", "a b", "a/b", "A-B", "a_b", "é", "e", "..", "con", "学习率", "学习", "скорость", "Скорость", "🤗"),
    *("👩\u200d💻", "a'b", 'a"b', "x" * 64, "x" * 65, "x" * 70, "${x}", "a=b", "[a,b]", "1", "null", "true"),
    *("unnamed", "%2e", "ＡB"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *arguments])


def named(name: str) -> str:
    return "sweep.name=" + hydra_value(name.replace("${", "\\${"))


def test_each_name_has_a_folder_of_its_own_and_finds_it() -> None:
    asked = study_spec([*SLEEP, "sweep.name=one"]).spec
    outputs = OutputPaths.of("outputs")
    for name in NAMES:
        write_spec(replace(asked, name=name), outputs.study(name))
    folders = {outputs.study(name).folder for name in NAMES}
    assert len({str(folder).lower() for folder in folders}) == len(NAMES)
    assert all(folder.parent == outputs.studies for folder in folders)
    assert all(len(folder.name) <= 80 and folder.name.isascii() for folder in folders)
    assert sorted(study_names(outputs)) == sorted(NAMES)
    for name in NAMES:
        assert find_study(name, outputs) == outputs.study(name)
        assert read_spec(find_study(name, outputs)).name == name
    assert find_study(unicodedata.normalize("NFD", "é"), outputs) == outputs.study("é")
    for name in ("A B", "学", "a+b", "-", "ab", "É"):
        with pytest.raises(QloraExpError):
            find_study(name, outputs, whole_name=True)


@pytest.mark.parametrize("name", ["学习 🤗/e${x}'", "Ä b"])
def test_every_verb_takes_such_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*SLEEP, named(name)) == 0
    for verb in (["status"], ["best"], ["trials", "--csv"], ["clean", "--yes"], ["resume"]):
        assert main([verb[0], name, *verb[1:]]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["stop", name]) == 2
    assert "no process works on the study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("''", "can't be empty"),
        ("last", "means the newest one"),
        ("'a\nb'", "control characters"),
        ("x" * 201, "at most 200"),
        ("'-x'", "begin with -"),
    ],
)
def test_a_name_that_could_not_be_used_is_refused(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*SLEEP, f"sweep.name={name}") == 2
    assert told in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("there", "typed"), [("a-b", "a b"), ("a-b", "A-B"), ("demo-2", "demo"), ("学习", "学"), ("unnamed", "学习")]
)
def test_what_deletes_takes_the_whole_name_alone(there: str, typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*SLEEP, named(there)) == 0
    [run] = OutputPaths.of("outputs").runs.iterdir()
    (run / "checkpoints").mkdir()
    assert main(["clean", typed, "--keep", "best:0", "--yes"]) == 2
    assert there in capsys.readouterr().err
    assert (run / "checkpoints").is_dir()
    assert main(["clean", there, "--keep", "best:0", "--yes"]) == 0
    assert not (run / "checkpoints").exists()


def test_a_folder_that_an_earlier_version_named_is_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*SLEEP, "sweep.name='a b'", "lora.r=4,8", "sweep.n_trials=1") == 0
    outputs = OutputPaths.of("outputs")
    os.rename(outputs.study("a b").folder, outputs.studies / slug("a b"))
    assert outputs.study("a b").folder.name == "a-b"
    assert main(["resume", "a b", "sweep.n_trials=2"]) == 0
    assert hydra(*SLEEP, "sweep.name=a-b") == 0
    assert sorted(study_names(outputs)) == ["a b", "a-b"]
    assert len(list(outputs.studies.iterdir())) == 2
    assert [len(read_spec(outputs.study(name)).axes) for name in ("a b", "a-b")] == [1, 0]
