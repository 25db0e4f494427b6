"""Exactly once: who claims, requeues and tells what, whatever is killed when. Real SQLite, real processes."""

from __future__ import annotations

import dataclasses
import signal
import sqlite3
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from studies import a_record, a_spec, answer, claimed, completed, finish, loss_of, myself, opened, paths_of, worker

from qlora_exp.errors import ConfigError, Problems, StudyError
from qlora_exp.records.fit_types import Fit, SkippedTrial
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Failure, Process, Status
from qlora_exp.study.open import rebuild_study
from qlora_exp.study.study import Study
from qlora_exp.study.trials import FAILURE, SKIPPED
from qlora_exp.study.types import Outcome, Owner

NOBODY = Owner(Process(2**22 + 1, 1, None), "gone", 0)
"""No Linux process has this id."""


def test_a_study_ends_with_n_trials_however_often_it_is_opened(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    first = opened(spec)
    first.tell(claimed(first), completed(1.0))
    numbers = [claim.number for claim in finish(opened(spec))]
    assert numbers == [1, 2, 3, 4, 5]
    assert opened(spec).claim(myself(), 600.0) is None
    counts = opened(dataclasses.replace(spec, n_trials=8)).counts()
    assert (counts.completed, counts.to_ask) == (6, 2)


def test_a_resumed_study_asks_what_an_undisturbed_one_would_have_asked(tmp_path: Path) -> None:
    undisturbed = {claim.number: claim.params for claim in finish(opened(a_spec(tmp_path / "a")))}
    spec = a_spec(tmp_path / "b")
    resumed = {}
    while claim := opened(spec).claim(myself(), 600.0):
        resumed[claim.number] = claim.params
    assert resumed == undisturbed
    assert len({str(params) for params in resumed.values()}) == 6


def test_a_trial_of_a_dead_worker_is_claimed_again_with_its_number_parameters_and_run(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path))
    lost = study.claim(NOBODY, 600.0)
    assert lost is not None
    study.set_run(lost, "the-run")
    again = claimed(study)
    assert (again.number, again.params, again.run_id, again.attempt) == (lost.number, lost.params, "the-run", 2)
    assert not study.heartbeat(lost)
    study.tell(lost, completed(99.0))
    assert study.trials()[0].state == "RUNNING"


def test_a_silent_worker_loses_its_trial_after_the_lease_and_a_heartbeat_keeps_it(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path))
    first, second = claimed(study), claimed(study)
    time.sleep(0.3)
    assert study.heartbeat(second)
    taken_over = claimed(study, lease_seconds=0.25)
    assert (taken_over.number, taken_over.attempt) == (first.number, 2)


def test_attempts_are_capped_and_the_trial_then_failed(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path, n_trials=1, max_attempts=2))
    claims = [study.claim(NOBODY, 600.0), study.claim(NOBODY, 600.0)]
    assert [claim and claim.attempt for claim in claims] == [1, 2]
    assert study.claim(NOBODY, 600.0) is None
    (row,) = study.trials()
    assert (row.state, row.status) == ("FAIL", Status.FAILED)
    assert "attempt 2 of 2" in str(row.failure)


def test_a_memory_retry_is_granted_as_often_as_asked_for_and_is_no_attempt_lost(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path, max_attempts=1, out_of_memory_retries=1))
    first = claimed(study)
    assert study.requeue_with_half_micro_batch(first)
    second = claimed(study)
    assert (second.number, second.params, second.out_of_memory_retries) == (first.number, first.params, 1)
    assert not study.requeue_with_half_micro_batch(second)


def test_an_ended_trial_is_told_once(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path))
    claim = claimed(study)
    study.tell(claim, completed(1.0))
    study.tell(claim, completed(2.0))
    assert study.trials()[0].values == (1.0,)


def test_an_interrupted_trial_waits(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path))
    study.tell(claimed(study), Outcome(Status.INTERRUPTED, (None,), (), None))
    assert study.trials()[0].state == "WAITING"


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (Status.PRUNED, "PRUNED"),
        (Status.OUT_OF_MEMORY, "PRUNED"),
        (Status.DIVERGED, "PRUNED"),
        (Status.FAILED, "FAIL"),
    ],
)
def test_every_end_is_told_as_what_it_is(tmp_path: Path, status: Status, state: str) -> None:
    study = opened(a_spec(tmp_path))
    study.tell(claimed(study), Outcome(status, (None,), (), 2.0, Failure("Kind", "why")))
    (row,) = study.trials()
    assert (row.state, row.status, row.seconds, row.failure) == (state, status, 2.0, "Kind: why")
    assert row.feasible is (status not in (Status.OUT_OF_MEMORY, Status.DIVERGED))


def test_a_completed_run_without_the_objective_is_a_failure(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path))
    study.tell(claimed(study), Outcome(Status.COMPLETED, (None,), (), 2.0))
    assert study.trials()[0].status is Status.FAILED


def test_the_best_breaks_no_constraint(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path, constraints=("memory.peak_train_bytes <= 8e9",)))
    for value, violation in ((1.0, 5.0), (2.0, -1.0), (3.0, 0.0)):
        study.tell(claimed(study), completed(value, violations=(violation,)))
    assert [row.values for row in study.best()] == [(2.0,)]


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    objectives = ("minimize scores.after.loss", "maximize scores.after.accuracy")
    study = opened(a_spec(tmp_path, objectives=objectives))
    for values in ((1.0, 0.1), (2.0, 0.5), (3.0, 0.4)):
        study.tell(claimed(study), completed(*values))
    assert [row.values for row in study.best()] == [(1.0, 0.1), (2.0, 0.5)]


@pytest.mark.parametrize(("limit", "failures"), [(2, 2), (0.5, 3), (0.01, 1)])
def test_max_failures_is_a_number_or_a_share(tmp_path: Path, limit: float, failures: int) -> None:
    study = opened(a_spec(tmp_path, max_failures=limit))
    for told in range(failures):
        assert not study.failures_reached(), told
        study.tell(claimed(study), Outcome(Status.FAILED, (None,), (), None))
    assert study.failures_reached()


def test_enqueued_configurations_come_first_then_the_grid_and_each_once(tmp_path: Path) -> None:
    params = {"lora.r": "4,8", "targets.modules": "[q_proj],[k_proj]"}
    spec = a_spec(
        tmp_path, params=params, sampler="grid", n_trials=5, enqueue=({"lora.r": 8, "targets.modules": ["k_proj"]},)
    )
    study = opened(spec)
    assert study.claim(NOBODY, 600.0) is not None
    asked = [claim.params for claim in finish(opened(spec))]
    points = [(8, "k_proj"), (4, "q_proj"), (4, "k_proj"), (8, "q_proj")]
    assert asked[:4] == [{"lora.r": r, "targets.modules": [module]} for r, module in points]
    assert len(asked) == 5


def test_an_inactive_axis_is_neither_asked_nor_overridden(tmp_path: Path) -> None:
    for claim in finish(opened(a_spec(tmp_path, n_trials=8))):
        fixed = claim.params["lora.alpha_policy"] == "fixed"
        assert ("lora.alpha" in claim.params) is fixed
        assert len(claim.overrides) == len(claim.params)


def test_a_study_that_asks_something_else_is_told_apart(tmp_path: Path) -> None:
    opened(a_spec(tmp_path))
    with pytest.raises(StudyError, match="exists with other settings") as caught:
        opened(a_spec(tmp_path, params={"lora.r": "4,8"}, objectives=("minimize scores.after.loss",)))
    assert "axes" in str(caught.value.where)
    assert "objectives" not in str(caught.value.where)


def test_all_that_is_wrong_with_a_search_is_told_before_anything_is_made(tmp_path: Path) -> None:
    spec = a_spec(
        tmp_path,
        objectives=("minimize scores.after.los", "maximize scores.after.accuracy"),
        sampler="tpe",
        sampler_options={"n_startup_trial": 3},
        pruner="asha",
        enqueue=({"lora.r": 5}, {"lora.q": 1}),
    )
    with pytest.raises(Problems) as caught:
        opened(spec)
    text = str(caught.value)
    for word in ("scores.after.loss", "n_startup_trials", "single objective", "outside the search", "lora.r"):
        assert word in text
    assert not (tmp_path / "optuna.db").exists()


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"sampler": "tpe", "sampler_options": {"n_startup_trials": "x"}}, "sweep.sampler_options.n_startup_trials"),
        ({"pruner": "median", "pruner_options": {"n_warmup_steps": 1.5}}, "sweep.pruner_options.n_warmup_steps"),
        ({"pruner": "asha", "pruner_options": {"min_resource": False}}, "sweep.pruner_options.min_resource"),
    ],
)
def test_an_option_of_another_type_is_told_before_the_first_trial(
    tmp_path: Path, changes: dict[str, Any], place: str
) -> None:
    with pytest.raises(ConfigError, match="can't be") as caught:
        opened(a_spec(tmp_path, **changes))
    assert caught.value.where == place
    opened(a_spec(tmp_path, name="t", sampler="tpe", sampler_options={"prior_weight": 1, "n_startup_trials": 3}))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true"])
def test_a_storage_in_memory_is_refused_and_leaves_the_study_to_a_real_one(tmp_path: Path, url: str) -> None:
    spec = a_spec(tmp_path)
    with pytest.raises(StudyError, match="memory"):
        Study.open(spec, paths_of(spec), storage_url=url)
    assert opened(spec).counts().finished == 0


def test_an_option_that_a_sampler_refuses_is_told(tmp_path: Path) -> None:
    spec = a_spec(tmp_path, sampler="tpe", sampler_options={"group": True, "multivariate": False})
    with pytest.raises(ConfigError, match="TPESampler"):
        opened(spec)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "cmaes"])
def test_every_sampler_finds_its_way_through_a_conditional_space(tmp_path: Path, sampler: str) -> None:
    spec = a_spec(tmp_path, sampler=sampler, n_trials=12)
    claims = finish(opened(spec))
    assert [claim.number for claim in claims] == list(range(12))
    assert len({claim.params["training.learning_rate"] for claim in claims}) == 12


def test_tpe_learns_from_trials_out_of_memory_what_failed_ones_dont_teach(tmp_path: Path) -> None:
    def asked_beyond_memory(name: str, status: Status) -> int:
        spec = a_spec(tmp_path, name=name, params={"lora.r": "int(interval(1,64))"}, sampler="tpe", n_trials=30)
        study, beyond = opened(spec), 0
        while claim := study.claim(myself(), 600.0):
            r = claim.params["lora.r"]
            beyond += r > 32
            study.tell(claim, Outcome(status, (None,), (), 1.0) if r > 32 else completed(-float(r)))
        return beyond

    assert asked_beyond_memory("told", Status.OUT_OF_MEMORY) < asked_beyond_memory("untold", Status.FAILED)


def test_earlier_studies_teach_the_sampler_and_count_for_nothing(tmp_path: Path) -> None:
    params = {"lora.r": "int(interval(1,64))"}
    finish(opened(a_spec(tmp_path, name="earlier", params=params, n_trials=40, sampler="tpe")))
    cold = finish(opened(a_spec(tmp_path, name="cold", params=params, sampler="tpe")))
    study = opened(a_spec(tmp_path, name="warm", params=params, sampler="tpe", warm_start=("earlier",)))
    warm = finish(study)
    assert [claim.number for claim in warm] == list(range(6))
    assert study.counts().total == 6
    assert max(claim.params["lora.r"] for claim in warm) < max(claim.params["lora.r"] for claim in cold)
    with pytest.raises(ConfigError, match="no earlier study"):
        opened(a_spec(tmp_path, name="lost", params=params, warm_start=("earlie",)))


def test_a_bad_trial_is_pruned_and_a_good_one_not(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path, pruner="median", pruner_options={"n_startup_trials": 2}))
    for value in (1.0, 1.1):
        claim = claimed(study)
        assert not study.report(claim, 10, value)
        study.tell(claim, completed(value))
    assert not study.report(claimed(study), 10, 0.5)
    assert study.report(claimed(study), 10, 2.0)


def test_wilcoxon_compares_the_same_items_at_the_same_step(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path, pruner="wilcoxon", objectives=("maximize scores.after.accuracy",)))
    losses = [0.1 * (item % 7) for item in range(40)]
    best = claimed(study)
    assert not study.report(best, 10, 0.9, losses)
    study.tell(best, completed(0.9))
    worse = [loss + 0.01 for loss in losses]
    assert study.report(claimed(study), 10, 0.9, worse)
    assert not study.report(claimed(study), 10, 0.9, [loss - 0.01 for loss in losses])
    assert not study.report(claimed(study), 20, 0.9, worse)


@pytest.mark.long
def test_eight_processes_start_cold_on_one_fresh_database_and_none_fails_or_doubles(tmp_path: Path) -> None:
    spec = a_spec(tmp_path, n_trials=16)
    code = "print(json.dumps([claim.number for claim in finish(study)]))"
    numbers = [number for process in [worker(spec, code) for _ in range(8)] for number in answer(process)]
    assert sorted(numbers) == list(range(16))
    assert opened(spec).counts().completed == 16


def test_a_killed_claimers_trial_is_taken_over_at_once_and_nothing_stays_running(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    undisturbed = {claim.number: claim.params for claim in finish(opened(a_spec(tmp_path / "undisturbed")))}
    process = worker(spec, "print(claimed(study).number, flush=True); import time; time.sleep(600)")
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    claims = finish(opened(spec))
    assert {claim.number: claim.params for claim in claims} == undisturbed
    assert [claim.attempt for claim in claims] == [2, 1, 1, 1, 1, 1]
    assert opened(spec).counts().completed == 6


@pytest.mark.parametrize("writes", range(1, 7))
def test_a_claim_killed_after_any_of_its_writes_leaves_a_trial_that_asks_the_same(tmp_path: Path, writes: int) -> None:
    undisturbed = finish(opened(a_spec(tmp_path / "undisturbed", n_trials=2)))
    spec = a_spec(tmp_path, n_trials=2)
    code = f"""
import os, sqlalchemy
left = [{writes}]
def die(connection):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
sqlalchemy.event.listen(study._storage._backend.engine, "commit", die)
study.claim(me, 600.0)
"""
    worker(spec, code).wait()
    assert [claim.params for claim in finish(opened(spec))] == [claim.params for claim in undisturbed]


@pytest.mark.parametrize("damage", ["garbled", "truncated", "lost"])
def test_a_damaged_database_is_told_and_made_again_from_the_runs(tmp_path: Path, damage: str) -> None:
    spec = a_spec(tmp_path)
    study = opened(spec)
    undisturbed = {claim.number: claim.params for claim in finish(opened(a_spec(tmp_path / "undisturbed")))}
    records = []
    for status in (Status.COMPLETED, Status.OUT_OF_MEMORY, Status.RUNNING):
        claim = claimed(study)
        records.append(a_record(claim, spec, status))
    claimed(study)
    database = tmp_path / "optuna.db"
    content = database.read_bytes()
    if damage == "lost":
        database.unlink()
    else:
        database.write_bytes(b"garbage" * 1000 if damage == "garbled" else content[: len(content) // 2])
    with pytest.raises(StudyError) as caught:
        opened(spec)
    assert "qlora-exp resume s --rebuild" in str(caught.value)

    rebuild_study(spec, paths_of(spec), records, spec.storage)
    rebuilt = opened(spec)
    assert (tmp_path / "optuna.db.damaged-1").exists() is (damage != "lost")
    assert [row.state for row in rebuilt.trials()] == ["COMPLETE", "PRUNED", "WAITING"]
    assert rebuilt.trials()[0].values == (loss_of(undisturbed[0]),)
    claims = finish(rebuilt)
    assert [claim.run_id for claim in claims] == ["run-2", None, None, None]
    assert {row.number: row.params for row in rebuilt.trials()} == undisturbed


def test_rebuilding_keeps_a_study_that_is_whole(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    finish(opened(spec))
    rebuild_study(spec, paths_of(spec), [], spec.storage)
    assert opened(spec).counts().completed == 6


def test_optunas_own_tools_read_the_study(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    finish(opened(spec))
    study = optuna.load_study(study_name="s", storage=spec.storage)
    assert len(study.trials) == 6
    assert study.best_value == opened(spec).best()[0].values[0]
    with sqlite3.connect(tmp_path / "optuna.db") as database:
        assert database.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_optunas_experimental_warnings_reach_nobody(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        study = opened(a_spec(tmp_path, sampler="tpe", pruner="wilcoxon"))
        study.tell(claimed(study), completed(1.0))
        claimed(study)
    assert [str(one.message) for one in told if "experimental" in str(one.message)] == []


def test_a_refusal_whose_telling_was_cut_short_is_forgotten_when_the_trial_ends_in_another_way(tmp_path: Path) -> None:
    study = opened(a_spec(tmp_path, n_trials=2))
    skipped = SkippedTrial(Fit(200, 0, 200, 100, 0.1, 0), None, None)
    for status in (Status.COMPLETED, Status.PRUNED):
        lost = study.claim(NOBODY, 600.0)
        assert lost is not None
        study._storage.set_trial_user_attr(lost.trial_id, FAILURE, to_dict(Failure("PredictedNotToFit", "too much")))
        study._storage.set_trial_user_attr(lost.trial_id, SKIPPED, to_dict(skipped))
        study.tell(claimed(study), dataclasses.replace(completed(1.0), status=status))
    assert [(row.skipped, row.failure) for row in study.trials()] == [(None, None)] * 2
    assert (study.counts().skipped, study.counts().pruned, study.counts().to_ask) == (0, 1, 0)


def test_after_five_trials_in_a_row_that_did_not_fit_one_is_drawn_at_random(tmp_path: Path) -> None:
    refused = Outcome(Status.PRUNED, (None,), (), None, skipped=SkippedTrial(Fit(200, 0, 200, 100, 0.1, 0), None, None))

    def sixth(outcomes: list[Outcome], folder: str, sampler: str = "qmc") -> dict[str, Any]:
        spec = a_spec(tmp_path / folder, sampler=sampler, params={"lora.r": "int(interval(1,100000))"})
        study = opened(spec)
        for outcome in outcomes:
            study.tell(claimed(study), outcome)
        return claimed(study).params

    undisturbed = sixth([completed(1.0)] * 5, "undisturbed")
    assert sixth([completed(1.0), *[refused] * 4], "four") == undisturbed
    assert sixth([refused] * 5, "five") == sixth([completed(1.0)] * 5, "random", "random") != undisturbed
