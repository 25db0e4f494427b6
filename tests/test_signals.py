"""One event brings several signals; a person who asks twice is in a hurry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_exp.system import signals
from qlora_exp.system.signals import Meaning

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Also where the tests were started by nohup."""
    previous = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, previous)


def heard(*numbers: int, pause: float = 0.0) -> list[Meaning]:
    found: list[Meaning] = []
    with signals.handle_signals(lambda number, frame: found.append(signals.meaning_of(number))):
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)
    return found


@pytest.mark.parametrize(
    ("numbers", "last"),
    [
        ((HUP, HUP), Meaning.SAME),  # the kernel and the shell
        ((HUP, TERM), Meaning.SAME),  # and a parent that ends
        ((TERM, TERM), Meaning.SAME),  # a supervisor and a parent
        ((INT, TERM), Meaning.SAME),
        ((INT, INT), Meaning.SAME),  # no finger is so quick: a wrapper passed it on
        ((HUP, INT), Meaning.AGAIN),
        ((TERM, INT), Meaning.AGAIN),
    ],
)
def test_what_comes_at_once_is_one_request_unless_a_person_asks(numbers: tuple[int, ...], last: Meaning) -> None:
    assert heard(*numbers) == [Meaning.FIRST, last]


def test_ctrl_c_twice_is_two_requests() -> None:
    assert heard(INT, INT, pause=0.15) == [Meaning.FIRST, Meaning.AGAIN]


def test_a_process_that_ignores_hangups_goes_on_ignoring_them() -> None:
    previous = signal.signal(HUP, signal.SIG_IGN)
    try:
        with signals.signals_as_interrupts():
            os.kill(os.getpid(), HUP)
            time.sleep(0.01)
    finally:
        signal.signal(HUP, previous)


def send(*numbers: int, steps: list[int] | None = None) -> None:
    """To this process; ``steps`` gets those that didn't interrupt it."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.15)
        if steps is not None:
            steps.append(number)


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_each_of_them_interrupts(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), signals.signals_as_interrupts():
        send(number)


def test_what_is_held_back_ends_at_the_second_ctrl_c_alone(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt), signals.signals_as_interrupts(), signals.delay_interrupt("being delivered"):
        send(TERM, HUP, INT, INT, steps=steps)
    assert steps == [TERM, HUP, INT]
    assert capfd.readouterr().err.splitlines() == ["being delivered"]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.ENDING_SIGNALS]
    with signals.signals_as_interrupts(), signals.delay_interrupt(""):
        pass
    assert [signal.getsignal(number) for number in signals.ENDING_SIGNALS] == before


@pytest.mark.parametrize("number", [HUP, TERM, INT])
def test_an_interrupted_import_leaves_the_exit_code_to_the_program(number: int, tmp_path: Path) -> None:
    """Imports run texts by ``exec``: CPython would end the process by SIGINT in place of the exit code."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal, sys\n"
        "from qlora_exp.system import signals\n"
        f"signal.signal({number}, signal.SIG_DFL)\n"
        "try:\n"
        "    with signals.signals_as_interrupts():\n"
        f"        exec('os.kill(os.getpid(), {number})')\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n",
        encoding="utf-8",
    )
    search = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command, environment = [sys.executable, "-m", "interrupted"], {**os.environ, "PYTHONPATH": search}
    assert subprocess.run(command, env=environment, timeout=60).returncode == 130
