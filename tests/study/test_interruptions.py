"""A trial that its worker was told to stop is none the worse for it, and one that failed can be run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage

from qlora_exp.records.types import Failure, Process, Status
from qlora_exp.study.reopen_trials import retry_trials
from qlora_exp.study.space import parse_axes
from qlora_exp.study.study import Study
from qlora_exp.study.types import Outcome, Owner
from qlora_exp.system.environment import process_identity
from tests.workers.small_study import paths_of, spec_of


def test_interruptions_cost_no_attempt(tmp_path: Path) -> None:
    axes = parse_axes({"lora.r": "choice(2,4)"}, {})
    spec = spec_of(tmp_path, 1, axes=axes, storage=f"sqlite:///{tmp_path / 'optuna.db'}", max_attempts=2)
    study = Study.open(replace(spec, sampler="grid", n_trials=1), paths_of(tmp_path))
    owner = Owner(process_identity(), "worker", 0)
    for _ in range(4):
        claim = study.claim(owner, 60.0)
        assert claim is not None
        study.tell(claim, Outcome(Status.INTERRUPTED, (None,), (), None))
        assert study.counts().waiting == 1
    first = study.claim(owner, 60.0)
    assert first is not None
    assert study.requeue(first, "its host died")
    second = study.claim(owner, 60.0)
    assert second is not None
    assert second.number == first.number
    assert not study.requeue(second, "its host died again")
    assert study.counts().failed == 1


@pytest.mark.parametrize(("what", "numbers"), [("failed", [1]), ("out_of_memory", [2])])
def test_what_ended_badly_is_run_again_with_as_many_attempts_as_a_new_trial_and_nothing_else(
    tmp_path: Path, what: str, numbers: list[int]
) -> None:
    axes = parse_axes({"lora.r": "choice(2,4,8,16)"}, {})
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    spec = spec_of(tmp_path, 4, axes=axes, storage=url, max_attempts=2, sampler="grid")
    study, owner = Study.open(spec, paths_of(tmp_path)), Owner(process_identity(), "worker", 0)
    for status in (Status.COMPLETED, Status.FAILED, Status.OUT_OF_MEMORY, Status.DIVERGED):
        claim = study.claim(owner, 60.0)
        assert claim is not None
        if status is Status.FAILED:
            assert study.requeue(claim, "its host died")
            claim = study.claim(owner, 60.0)
            assert claim is not None
        failure = None if status is Status.COMPLETED else Failure("Wrong", "it went wrong")
        study.tell(claim, Outcome(status, (1.0 if failure is None else None,), (), 1.0, failure))
    before = {row.number: row for row in study.trials()}
    assert retry_trials(spec, paths_of(tmp_path), what, url) == numbers
    again = Study.open(spec, paths_of(tmp_path))
    assert again.counts().waiting == 1
    assert {row.number: row for row in again.trials() if row.state != "WAITING"} == {
        number: row for number, row in before.items() if number not in numbers
    }
    claim = again.claim(owner, 60.0)
    assert claim is not None
    assert (claim.number, claim.params) == (numbers[0], before[numbers[0]].params)
    assert again.requeue(claim, "its host died")  # the first of two attempts
    claim = again.claim(owner, 60.0)
    assert claim is not None
    again.tell(claim, Outcome(Status.COMPLETED, (0.5,), (), 1.0))
    row = again.trials()[numbers[0]]
    assert (row.status, row.values, row.failure, row.feasible) == (Status.COMPLETED, (0.5,), None, True)
    assert retry_trials(spec, paths_of(tmp_path), what, url) == []


@pytest.mark.parametrize("skew_seconds", [-7200.0, 0.0, 7200.0])
def test_a_worker_elsewhere_keeps_its_trial_while_it_is_heard_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_seconds: float
) -> None:
    axes = parse_axes({"lora.r": "choice(2)"}, {})
    spec = spec_of(tmp_path, 1, axes=axes, storage=f"sqlite:///{tmp_path / 'optuna.db'}", sampler="grid")
    theirs, ours = Study.open(spec, paths_of(tmp_path)), Study.open(spec, paths_of(tmp_path))
    me = Owner(process_identity(), "worker", 0)

    def at(seconds: float, here: bool) -> None:
        monkeypatch.setattr("time.monotonic", lambda: 50.0 + seconds)
        monkeypatch.setattr("time.time", lambda: 1e9 + seconds + (0.0 if here else skew_seconds))

    at(0.0, here=False)
    claim = theirs.claim(Owner(Process(12, 1, "another boot", "pod-a"), "far", 0), 60.0)
    assert claim is not None
    for seconds in range(0, 300, 20):
        at(seconds, here=False)
        assert theirs.heartbeat(claim)
        at(seconds + 5.0, here=True)
        assert ours.claim(me, 60.0) is None
    found = []
    for seconds in range(300, 400, 20):
        at(seconds, here=True)
        found.append(ours.claim(me, 60.0))
    assert [one.number for one in found if one is not None] == [claim.number]


class Killed(BaseException):
    """Stands for a process that ended right after a write."""


WRITES = (
    *("create_new_trial", "set_trial_param", "set_trial_state_values", "set_study_system_attr"),
    *("set_trial_system_attr", "set_trial_user_attr"),
)
ADAPTIVE = {
    "nsga2": {"population_size": 2},
    "tpe": {"n_startup_trials": 2},
    "cmaes": {"n_startup_trials": 1},
    "gp": {"n_startup_trials": 2},
}


@pytest.mark.parametrize(
    ("sampler", "writes"),
    [
        pytest.param("nsga2", ("set_study_system_attr",), id="nsga2 at each generation"),
        *(pytest.param(name, WRITES, id=f"{name} at every write", marks=pytest.mark.faults) for name in ADAPTIVE),
    ],
)
def test_a_study_whose_process_dies_after_any_write_asks_what_an_undisturbed_one_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, writes: tuple[str, ...]
) -> None:
    """The storage's own writes, whoever makes them: ours and the sampler's."""
    written, fatal, killed = 0, 0, 0

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal written
            answer = write(*arguments, **named)
            written += 1
            if written == fatal:
                raise Killed
            return answer

        return wrapped

    for name in writes:
        monkeypatch.setattr(RDBStorage, name, dying(getattr(RDBStorage, name)))
    axes = parse_axes({"lora.r": "choice(2,4,8,16)", "training.learning_rate": "tag(log,interval(1e-5,1e-2))"}, {})
    nobody = Owner(Process(2**22 + 1, 1, None), "gone", 0)
    sought = {"axes": axes, "sampler": sampler, "sampler_options": ADAPTIVE[sampler], "max_attempts": 9}

    def ended(folder: Path) -> list[tuple[int, str, Any, Any]]:
        nonlocal killed
        spec = spec_of(folder, 7, storage=f"sqlite:///{folder / 'optuna.db'}", **sought)
        while True:
            try:
                study = Study.open(spec, paths_of(folder))
                while claim := study.claim(nobody, 60.0):
                    value = abs(claim.params["lora.r"] - 8) + claim.params["training.learning_rate"]
                    study.tell(claim, Outcome(Status.COMPLETED, (value,), (), 1.0))
            except Killed:
                killed += 1
            else:
                return [(row.number, row.state, row.params, row.values) for row in study.trials()]

    undisturbed = ended(tmp_path / "undisturbed")
    moments, differing = written, []
    for fatal in range(1, moments + 1):
        written = 0
        if ended(tmp_path / str(fatal)) != undisturbed:
            differing.append(fatal)
    assert (killed, differing) == (moments, [])
    assert moments >= 2
