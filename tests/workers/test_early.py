"""Hosts that are started before the study is open."""

from __future__ import annotations

from pathlib import Path

import psutil

from qlora_exp.config.compose import compose_raw
from qlora_exp.orchestration.prestart import prestarted, process_starts, take_started
from tests.workers.small_study import paths_of, workers_of

ASLEEP = ["training.engine=sleep", "tracking=off"]


def test_a_host_started_early_is_taken_once_and_one_that_nobody_takes_is_ended(tmp_path: Path) -> None:
    config, workers, paths = compose_raw(ASLEEP), workers_of(count=2), paths_of(tmp_path)
    first, second = process_starts(config, workers, paths)
    before = set(psutil.Process().children())
    with prestarted(config, workers, paths, at_most=2):
        early = {child.pid for child in set(psutil.Process().children()) - before}
        taken = take_started(first)
        assert taken.pid in early
        (untaken,) = early - {taken.pid}
        new = take_started(first)
        assert new.pid not in early
    assert psutil.pid_exists(taken.pid)
    assert not psutil.pid_exists(untaken)
    after = take_started(second)
    assert after.pid != untaken
    for host in (taken, new, after):
        host.kill()


def test_no_more_hosts_start_early_than_there_are_trials(tmp_path: Path) -> None:
    config, workers, paths = compose_raw(ASLEEP), workers_of(count=3), paths_of(tmp_path)
    before = set(psutil.Process().children())
    with prestarted(config, workers, paths, at_most=1):
        assert len(set(psutil.Process().children()) - before) == 1


def test_what_keeps_hosts_from_starting_early_is_left_for_the_worker_to_tell(tmp_path: Path) -> None:
    paths = paths_of(tmp_path)
    paths.logs.write_text("no folder")
    with prestarted(compose_raw(ASLEEP), workers_of(count=1), paths, at_most=1):
        pass
