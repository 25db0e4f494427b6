"""A trial that its worker was told to stop is none the worse for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qlora_exp.environment import process_identity
from qlora_exp.records import Status
from qlora_exp.study import Study, parse_axes
from qlora_exp.study.types import Outcome, Owner
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
