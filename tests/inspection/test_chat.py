"""``qlora-exp chat``: two conversations with one user, in the run's template."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from qlora_exp.cli import main

RUN = [
    *("model.variant=instruct", "training.device=cpu", "training.max_steps=3", "training.batch_size=8"),
    *("quantization=fp32", "evaluation=quick", "evaluation.max_items=4", "evaluation.before=false", "tracking=off"),
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "outputs"
    assert main(["run", *RUN, f"output_root={folder}"]) == 0
    return folder


def said(lines: list[str], outputs: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return main(["chat", "last", "--steps", "4", *arguments, "--output-root", str(outputs)])


def test_each_model_continues_its_own_answers_and_the_conversation_can_be_saved(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    lines = ["a large wild cat", "", "and a small one", "/inspect", f"/save {file}", "/quit", "not read"]
    assert said(lines, outputs, monkeypatch) == 0
    talk = json.loads(file.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    for side in ("tuned", "base"):
        turns = talk[side]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
        assert [turn["content"] for turn in turns[::2]] == ["a large wild cat", "and a small one"]
        assert all(f"{side}: {turn['content']}" in printed for turn in turns[1::2])
    # The earlier turns are read: the same message has other probabilities without them.
    with_turns = printed[printed.index("base rank") :]
    assert said(["and a small one", "/inspect"], outputs, monkeypatch, "--only", "tuned") == 0
    printed = capsys.readouterr().out
    assert "base: " not in printed
    assert printed[printed.index("base rank") :].splitlines()[2] != with_turns.splitlines()[2]


def test_sampled_answers_differ_from_each_other_and_the_conversation_repeats(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        lines = [*["a cat"] * 4, f"/save {file}"]
        assert said(lines, outputs, monkeypatch, "--sample", "temperature=3,seed=5", "--only", "base") == 0
        talk = json.loads(file.read_text(encoding="utf-8"))
        answers.append([turn["content"] for turn in talk["base"][1::2]])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 4


def test_an_interrupted_answer_ends_and_the_conversation_goes_on_without_it(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_exp.inspection import chat

    generate, calls = chat.generate_steps, []

    def interrupted(*arguments: object, **settings: object) -> object:
        calls.append(settings)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "generate_steps", interrupted)
    lines = ["an interrupted one", "a wild cat", f"/save {tmp_path / 'talk.json'}"]
    assert said(lines, outputs, monkeypatch, "--only", "tuned") == 0
    assert "stopped" in capsys.readouterr().out
    talk = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [turn["content"] for turn in talk["tuned"][::2]] == ["a wild cat"]


def test_what_would_command_a_terminal_is_not_printed() -> None:
    from qlora_exp.inspection.page import printable, visible_token

    assert printable("a\x1b[2Jb\r\nc\td") == "a�[2Jb�\nc\td"
    assert visible_token(" a\x1b\n") == "·a�⏎"


def test_a_mistake_is_answered_and_the_conversation_goes_on(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/inspct", "/sample temprature=1", "/save", "/base", "a wild cat", "/system Be brief.", "/new", "/help"]
    assert said(lines, outputs, monkeypatch) == 0
    printed = capsys.readouterr().out
    for words in ("did you mean /inspect", "did you mean temperature", "/save FILE", "base: ", "/sample SETTINGS"):
        assert words in printed
    assert "tuned: " not in printed
    assert main(["chat", "last", "--only", "both", "--output-root", str(outputs)]) == 2
