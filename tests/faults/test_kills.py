"""SIGKILL at random moments: after a resume the study is what it would have been without it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.faults import kill_loop
from tests.faults.sweeps import (
    SLEEP,
    Sweep,
    finish,
    multirun,
    optuna_states,
    records,
    survivors,
    trials,
    verb,
    wait_until,
    what_counts,
)

GRID = ("lora.r=1,2,4,8", "seed=1,2", "sweep.name=kills")
RANDOM = (
    "lora.r=1,2,4,8",
    "training.learning_rate=tag(log, interval(1e-4, 1e-2))",
    "sweep.sampler=random",
    "sweep.n_trials=8",
    "sweep.name=kills",
)
# More attempts than a test can kill: here a lost trial must come back however often it is hit.
MANY_ATTEMPTS = "sweep.max_attempts=100"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """What the sweeps give when nobody kills anything."""
    found = {}
    for space in (GRID, RANDOM):
        root = tmp_path_factory.mktemp("undisturbed") / "outputs"
        finish(multirun(root, *space, *SLEEP, MANY_ATTEMPTS))
        found[space] = what_counts(trials(root, "kills"))
        assert len(found[space]) == 8
    return found


def kill_at_random(root: Path, command: list[str], rng: random.Random) -> str:
    """Start the command, kill its controller or one of its hosts after a while, and wait until it has ended."""
    sweep = Sweep(command)
    time.sleep(rng.uniform(0.5, 6.0))
    hosts = sweep.hosts()
    if hosts and rng.random() < 0.5:
        target = "host"
        rng.choice(hosts).kill()
        time.sleep(rng.uniform(0.0, 2.0))
    else:
        target = "controller"
    if sweep.alive:
        sweep.kill()
    sweep.wait()
    wait_until(lambda: not survivors(root), f"processes outlive their parent: {survivors(root)}", seconds=10)
    return target


def check_rounds(tmp_path: Path, rounds: int, undisturbed: dict[tuple[str, ...], list[dict[str, str]]]) -> None:
    for number in range(rounds):
        seed = random.randrange(2**32)
        print(f"round {number}: seed {seed}")
        rng = random.Random(seed)
        root = tmp_path / f"round{number}" / "outputs"
        space = rng.choice((GRID, RANDOM))
        command = multirun(root, *space, *SLEEP, MANY_ATTEMPTS)
        for _ in range(rng.randint(1, 3)):
            print(f"  killed: {kill_at_random(root, command, rng)}")
        # The same command goes on; from the second time on there may also be a study to resume by name.
        by_name = (root / "studies" / "kills" / "study.json").exists() and rng.random() < 0.5
        finish(verb(root, "resume", "kills") if by_name else command)
        assert what_counts(trials(root, "kills")) == undisturbed[space]
        assert optuna_states(root) == ["COMPLETE"] * 8
        assert [record["status"] for record in records(root)] == ["COMPLETED"] * 8
        assert sorted(record["trial"]["number"] for record in records(root)) == list(range(8))
        assert not survivors(root)


@pytest.mark.faults
def test_a_sweep_killed_at_random_ends_like_an_undisturbed_one(
    tmp_path: Path, undisturbed: dict[tuple[str, ...], list[dict[str, str]]], kill_rounds: int | None
) -> None:
    check_rounds(tmp_path, 2 if kill_rounds is None else kill_rounds, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("kind", kill_loop.KINDS)
def test_every_kind_of_sweep_killed_at_random_moments_ends_like_an_undisturbed_one(
    tmp_path: Path, kind: str, kill_rounds: int | None
) -> None:
    """Studies, records and MLflow; by hand and for longer: ``python -m tests.faults.kill_loop --rounds 30``."""
    for number in range(1 if kill_rounds is None else kill_rounds):
        one = kill_loop.play(kind, random.randrange(2**16), tmp_path / str(number))
        print(one)
        assert one.findings == []


@pytest.mark.faults
def test_a_sweep_whose_terminal_is_closed_again_and_again_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    one = kill_loop.play("grid2", random.randrange(2**16), tmp_path, renamed=False, ways=("hangup",))
    assert one.findings == [], one


@pytest.mark.faults
@pytest.mark.skipif(not kill_loop.CAN_RENAME_HOST, reason="another host name needs root and unshare")
def test_a_sweep_whose_container_is_replaced_goes_on_in_the_next_one(tmp_path: Path) -> None:
    one = kill_loop.play("grid2", random.randrange(2**16), tmp_path, renamed=True)
    assert one.findings == [], one
