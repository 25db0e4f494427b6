"""Choosing one configuration by short runs before its ladder: which runs come next, and what the answer says."""

from __future__ import annotations

import json
import random
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import ENVIRONMENT

from qlora_exp.cli import main
from qlora_exp.config.enums import LrPolicy
from qlora_exp.config.schema import LadderConfig
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.orchestration.command import study_spec
from qlora_exp.rank_doubling.ladder import is_done, next_point
from qlora_exp.rank_doubling.ladder_trials import LadderTrial
from qlora_exp.rank_doubling.screening import Screening, ladder_after_screening, screen, screening_object
from qlora_exp.rank_doubling.settings import TRAINING_STEPS, ladder_axes, max_trials, resolve
from qlora_exp.records.types import Failure, Memory, RunRecord, Status
from qlora_exp.study.proposer import TrialPoint
from qlora_exp.study.types import LadderSettings, LadderSpec

CONFIG = LadderConfig(
    r_start=8, r_max=16, seeds=3, max_seeds=3, pilot_seed=1000, pilot_seeds=2, margin=0.05, half_zone=None,
    lr_policy=LrPolicy.fixed, lr_factors=[1.0], stop_pilots=False, screening_steps=10, seed_sd=None, item_sd=None,
)  # fmt: skip
WEIGHTS = {"fp16": 200, "int8": 110, "nf4": 70}
Level = Callable[[TrialPoint], float | None]


def spec_of(count: int = 6) -> LadderSpec:
    points = [{"model.variant": variant, "quantization": mode} for variant in ("base", "instruct") for mode in WEIGHTS]
    ladders = [LadderSettings({**point, TRAINING_STEPS: 80}, 1e-3, 0.0, "2r") for point in points[:count]]
    return resolve(CONFIG, 1, ladders)


def ran(point: TrialPoint, level: Level) -> LadderTrial:
    record = RunRecord(
        1, "-".join(map(str, point.values())), "r", Status.COMPLETED, "2026-01-01", None, {}, ENVIRONMENT
    )
    record = record.replace(memory=Memory(base_weight_bytes=WEIGHTS[point["quantization"]]))
    loss = level(point)
    if loss is None:
        failure = Failure("OutOfMemoryError", "no memory")
        return LadderTrial(point, True, record.replace(status=Status.OUT_OF_MEMORY, failure=failure))
    hard, own = np.random.default_rng(0), np.random.default_rng(random.Random(str(point)).getrandbits(32))
    values = loss + hard.normal(0, 0.5, 60) + own.normal(0, 0.01, 60)
    items = {f"i{number}": float(value) for number, value in enumerate(values)}
    if point["evaluation.split"] == "test":
        return LadderTrial(point, True, record, losses=items)
    return LadderTrial(point, True, record, validation=items)


def play(spec: LadderSpec, level: Level, at_once: int, seed: int, until: int | None = None) -> list[LadderTrial]:
    """All trials that are asked for, ``at_once`` running at a time and ending in any order."""
    chance, ended, running = random.Random(seed), list[LadderTrial](), list[TrialPoint]()
    while until is None or len(ended) < until:
        seen = [*ended, *(LadderTrial(point, False) for point in running)]
        point = next_point(spec, seen) if len(running) < at_once else None
        if point is not None:
            running.append(point)
        elif running:
            ended.append(ran(running.pop(chance.randrange(len(running))), level))
        else:
            assert is_done(spec, ended)
            break
    return ended


def levels(base: float = 0.0, instruct: float = 0.3, fp16: float = 0.0, int8: float = 0.05, nf4: float = 0.1) -> Level:
    of_variant, of_mode = {"base": base, "instruct": instruct}, {"fp16": fp16, "int8": int8, "nf4": nf4}
    return lambda point: 2.0 + of_variant[point["model.variant"]] + of_mode[point["quantization"]]


def state_of(spec: LadderSpec, trials: list[LadderTrial]) -> Screening:
    return screen(spec, trials)


def test_the_better_half_goes_on_with_twice_the_steps_and_only_the_last_one_gets_a_ladder() -> None:
    spec = spec_of()
    trials = play(spec, levels(), at_once=1, seed=0)
    short = [t.params for t in trials if t.params[TRAINING_STEPS] < 80]
    by_steps = Counter(params[TRAINING_STEPS] for params in short)
    assert by_steps == {10: 6 * 2, 20: 3 * 2, 40: 2 * 2}
    assert {params["lora.r"] for params in short} == {8}
    assert {params["evaluation.split"] for params in short} == {"validation"}
    assert {(params["model.variant"], params["quantization"]) for params in short if params[TRAINING_STEPS] == 40} == {
        ("base", "fp16"),
        ("base", "int8"),
    }
    of_ladder = [t.params for t in trials if t.params[TRAINING_STEPS] == 80]
    assert {(p["model.variant"], p["quantization"], p["evaluation.split"]) for p in of_ladder} == {
        ("base", "fp16", "test")
    }
    assert len(trials) <= max_trials(spec)
    (steps,) = (axis for axis in ladder_axes(spec) if axis.key == TRAINING_STEPS)
    assert steps.values == (10, 20, 40, 80)


def test_the_choice_depends_neither_on_the_order_of_the_runs_nor_on_a_kill_in_between() -> None:
    spec = spec_of()
    once = play(spec, levels(), at_once=1, seed=0)
    for seed, at_once in ((1, 3), (2, 5)):
        other = play(spec, levels(), at_once=at_once, seed=seed)
        assert state_of(spec, other) == state_of(spec, once)
        assert {str(t.params) for t in other} == {str(t.params) for t in once}
    for cut in (5, 13, 20, len(once) - 1):
        ended = once[:cut]
        while point := next_point(spec, ended):
            ended.append(ran(point, levels()))
        assert {str(t.params) for t in ended} == {str(t.params) for t in once}


def test_of_two_within_noise_the_one_with_the_smaller_weights_is_taken_and_it_is_said() -> None:
    spec = spec_of()
    found = state_of(spec, play(spec, levels(int8=0.0, nf4=0.2), at_once=1, seed=0))
    assert found.winner is not None
    assert found.winner.axes["quantization"] == "int8"
    assert found.cheaper_taken or found.rounds[-1].configurations[0].axes["quantization"] == "int8"
    answer = screening_object(spec, found)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["use"] == {"model.variant": "base", "quantization": "int8"}
    assert answer["sentence"].startswith("Use base · int8: of 6 configurations")
    assert "Not settled: base · fp16 was within noise" in answer["sentence"]


def test_one_that_is_behind_beyond_noise_is_not_taken_for_its_smaller_weights() -> None:
    spec = spec_of()
    found = state_of(spec, play(spec, levels(), at_once=1, seed=0))
    assert found.winner is not None
    assert found.winner.axes["quantization"] == "fp16"
    assert not found.cheaper_taken
    assert "Every dropped one was behind beyond noise" in screening_object(spec, found)["sentence"]


def test_what_a_budget_leaves_open_is_said_with_what_to_use_for_now() -> None:
    spec = spec_of()
    nothing = screening_object(spec, state_of(spec, play(spec, levels(), 1, 0, until=7)))
    assert (nothing["use"], nothing["chosen"]) == (None, False)
    assert "None of the 6 configurations has been compared yet" in nothing["sentence"]
    partly = screening_object(spec, state_of(spec, play(spec, levels(), 1, 0, until=15)))
    assert (partly["use"], partly["chosen"]) == ({"model.variant": "base", "quantization": "fp16"}, False)
    assert partly["sentence"] == (
        "Use base · fp16 for now: it is the best of 6 after 10 steps. Not settled: whether it is better than"
        " base · int8, base · nf4, which the next round compares."
    )


def test_a_configuration_without_a_result_is_dropped_and_named_and_none_at_all_ends_the_study() -> None:
    spec = spec_of()

    def no_memory(point: TrialPoint) -> float | None:
        return None if point["quantization"] == "fp16" else levels()(point)

    found = screening_object(spec, state_of(spec, play(spec, no_memory, 2, 0)))
    assert found["use"] == {"model.variant": "base", "quantization": "int8"}
    assert "Without a result: base · fp16 (out of memory (OutOfMemoryError: no memory)), instruct" in found["sentence"]
    failed = play(spec, lambda point: None, 2, 0)
    assert len(failed) == 12
    none = screening_object(spec, state_of(spec, failed))
    assert none["sentence"].startswith("No configuration is chosen: no configuration left a validation loss after 10")


def test_without_screening_every_configuration_has_its_ladder() -> None:
    spec = replace(spec_of(), screening_steps=None)
    assert ladder_after_screening(spec, []) == (spec, None)


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        ("sweep.ladder.screening_steps=80", "sweep.ladder.screening_steps=80", "for example 20"),
        ("training.max_steps=null training.max_tokens=5000", TRAINING_STEPS, "training.max_steps=200"),
        ("model.variant=base quantization=nf4", "sweep.ladder.screening_steps=20", "quantization=nf4,int8"),
        ("training.max_steps=40,80", f"{TRAINING_STEPS}=…", "another sampler"),
    ],
)
def test_screening_that_can_not_choose_is_refused_before_anything_runs(
    overrides: str, where: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(QloraExpError) as raised:
        study_spec(["sweeps=choose", *overrides.split(), f"output_root={tmp_path}"])
    errors = (
        [raised.value] if isinstance(raised.value, ConfigError) else getattr(raised.value, "errors", [raised.value])
    )
    assert any(where in str(error) and hint in str(error) for error in errors), raised.value


@pytest.mark.long
def test_the_whole_question_is_one_study_that_a_budget_may_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SYNTHETIC: with the real machinery, stopped by its budget and continued."""
    asleep = ["training.engine=sleep", "training.sleep_seconds=0.01", "tracking=off", "workers.count=1"]
    options: list[Any] = ["--output-root", str(tmp_path)]
    command = [
        "sweep",
        "choose",
        *asleep,
        "sweep.name=c",
        "sweep.ladder.r_max=16",
        "sweep.ladder.max_seeds=3",
        *options,
    ]
    code = main([*command, "budget.tokens=1500"])
    first = capsys.readouterr().out
    assert "the budget is spent" in first
    assert (code == 2) == ("It settled nothing" in first), "a budget that settles nothing is an error"
    settle = next(line for line in first.splitlines() if line.startswith("  to settle it: "))
    runs = len(list((tmp_path / "runs").iterdir()))
    main(shlex.split(settle.removeprefix("  to settle it: qlora-exp ")))
    assert len(list((tmp_path / "runs").iterdir())) > runs, "the printed command starts further trials"
    assert main(command) == 0
    answer = json.loads((tmp_path / "studies" / "c" / "ladder.json").read_text())
    assert answer["screening"]["chosen"]
    assert len(answer["ladders"]) == 1
    assert answer["screening"]["use"].items() <= answer["ladders"][0]["axes"].items()
    assert answer["ladders"][0]["sentence"].endswith(f"Screening runs: {answer['screening']['sentence']}")
    assert "compared yet" in first or "for now" in first
    capsys.readouterr()
    assert main(["best", "c", *options]) == 0
