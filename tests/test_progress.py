"""What a run shows while it works: counts with the time left, few lines in a log, a learning curve as text."""

from __future__ import annotations

import io
from typing import Any

import pytest

from qlora_exp import progress
from qlora_exp.cli import main
from qlora_exp.data.encoding import Encoding, encode_rows
from qlora_exp.runs import console
from qlora_exp.runs.console import ProgressReporter
from qlora_exp.runs.text_curve import text_curve


class Clock:
    """Stands for the standard library's time in the modules that read it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (console, progress):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_says_how_many_items_are_scored_and_how_long_the_rest_takes(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressReporter(stream) as reporter:
        reporter.phase("prepare")
        clock.now = 12.5
        reporter.phase("evaluate")
        for done in range(0, 3601, 4):
            clock.now = 12.5 + done / 10
            progress.report_progress(done, 3600, "test items scored")
        reporter.phase("train")
    first, second, *counts, last = stream.getvalue().splitlines()
    assert first == "prepare  (0.0 s elapsed)"
    assert second == "evaluate  (12.5 s elapsed, prepare took 12.5 s)"
    assert last == "train  (6:12 min elapsed, evaluate took 6:00 min)"
    assert 9 <= len(counts) <= 10
    assert counts[4] == "  1,808 of 3,600 test items scored, about 2:59 min left"


def test_seconds_left_follow_the_work_and_not_the_number_of_items(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressReporter(stream) as reporter:
        reporter.phase("evaluate")
        for done, share in ((0, 0.0), (10, 0.8), (20, 1.0)):  # the longest items come first
            clock.now += 80.0 * (done > 0)
            progress.report_progress(done, 20, "items scored", share)
    assert "10 of 20 items scored, about 20.0 s left" in stream.getvalue()


def test_short_work_leaves_no_line_and_nobody_listens_after_the_run(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressReporter(stream) as reporter:
        reporter.phase("load")
        for done in range(101):
            clock.now += 0.05
            progress.report_progress(done, 100, "weights loaded")
    assert stream.getvalue().splitlines() == ["load  (0.0 s elapsed)"]
    clock.now += 1000
    progress.report_progress(1, 2, "weights loaded")
    assert len(stream.getvalue().splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_phases_clock_goes_on_after_its_first_piece_of_counted_work(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with ProgressReporter(stream) as reporter:
        reporter.phase("evaluate")
        for unit, seconds in (("items scored", 2.0), ("passages scored", 40.0)):
            progress.report_progress(0, 10, unit)
            clock.now += seconds
            progress.report_progress(10, 10, unit)
        reporter.phase("done")
    lines = [line for line in stream.getvalue().splitlines() if "evaluate" in line]
    assert "42.0 s" in lines[-1]


def test_steps_show_both_losses_and_the_rate(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressReporter(stream) as reporter:
        reporter.phase("train")
        reporter.step(1, 20, {"loss": 4.0, "tokens": 100, "seconds": 2.0})
        clock.now = 70.0
        reporter.step(10, 20, {"validation_loss": 3.5, "tokens": 1000, "seconds": 10.0})
    assert "step 10/20, loss 4, validation loss 3.5, 100 tokens/s, about 1:18 min left" in stream.getvalue()


def curve(steps: int) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [{"step": step, "loss": 8.0 / step} for step in range(1, steps + 1)]
    points[-1]["validation_loss"] = 9.0 / steps
    return points


def test_a_learning_curve_fits_a_terminal_and_names_both_losses() -> None:
    lines = text_curve(curve(80), io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert max(map(len, lines)) <= 100
    assert "•" in lines[0]
    assert "◆ validation loss 0.1125" in lines[-1]
    assert "step 80" in lines[-2]
    assert text_curve(curve(2), io.StringIO()) == []


def test_a_terminal_without_unicode_gets_a_learning_curve_in_ascii() -> None:
    lines = text_curve(curve(80), io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert all(line.isascii() for line in lines)
    assert "*" in lines[0]
    assert "o validation loss" in lines[-1]


def test_a_loss_that_is_not_finite_is_left_out_of_the_curve() -> None:
    points = [*curve(10), {"step": 11, "loss": float("nan")}, {"step": 12, "loss": None}]
    lines = text_curve(points, io.StringIO())
    assert any("step 10" in line for line in lines)


@pytest.mark.parametrize("changes", [{}, {"lstrip": True}, {"normalized": True}])
def test_the_end_token_is_appended_only_where_that_equals_tokenizing_the_whole_text(changes: dict[str, bool]) -> None:
    """Tokenizing the text a third time, with its end, is a third of ``prepare``."""
    import datetime

    import tokenizers

    from qlora_exp.config.compose import compose
    from qlora_exp.data.splits import load_rows
    from qlora_exp.estimate.tokenizer_file import FileTokenizer
    from qlora_exp.paths import EMBEDDED

    tokenizer = FileTokenizer(EMBEDDED / "base")
    if changes:
        flags = {"special": True, "normalized": False, **changes}
        tokenizer._tokenizer.add_special_tokens([tokenizers.AddedToken("<end>", **flags)])
        tokenizer.added_tokens_decoder = tokenizer._tokenizer.get_added_tokens_decoder()
        tokenizer.eos_token = "<end>"
    rows = load_rows(compose(["task.max_train_items=200"]).task).train
    encodings = encode_rows(rows, tokenizer, "plain", date=datetime.date(2026, 1, 1))
    assert len(encodings) == 200
    for encoding in encodings:
        assert isinstance(encoding, Encoding)
        texts = encoding.texts
        assert list(encoding.ids) == tokenizer(texts.prompt + texts.completion + texts.end)["input_ids"]


def test_a_curve_is_printed_on_request_and_not_into_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    synthetic = ("training.engine=sleep", "training.sleep_seconds=0.01", "training.max_steps=6", "tracking=off")
    assert main(["run", *synthetic, "training.logging_steps=1", f"output_root={tmp_path}"]) == 0
    assert "training loss" not in capsys.readouterr().out
    assert main(["run", *synthetic, "training.logging_steps=1", f"output_root={tmp_path}", "--curve"]) == 0
    assert "training loss" in capsys.readouterr().out
