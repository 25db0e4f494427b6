"""Studies for the tests of this folder, and a worker that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_exp.paths import PACKAGE, OutputPaths, StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Device, Environment, RunRecord, Scores, ScoreTable, Status
from qlora_exp.records.types import Trial as TrialOf
from qlora_exp.study.space import parse_axes
from qlora_exp.study.study import Study
from qlora_exp.study.types import Claim, Outcome, Owner, StudySpec
from qlora_exp.system.environment import process_identity

AXES = {
    "lora.r": "4,8,16",
    "training.learning_rate": "tag(log, interval(1e-5,1e-2))",
    "lora.alpha_policy": "2r,fixed",
    "lora.alpha": "int(interval(1,64))",
}
CONDITIONS = {"lora.alpha": "lora.alpha_policy == fixed"}
ENVIRONMENT = Environment("3.11", "Linux", {}, Device("cpu", None, 1, None, None, None, False), *(None,) * 7)


def a_spec(root: Path, **changes: Any) -> StudySpec:
    """A small random search under ``root``; ``params`` and ``conditions`` as in ``sweep.``"""
    name = changes.pop("name", "s")
    conditions = changes.pop("conditions", {} if "params" in changes else CONDITIONS)
    axes = parse_axes(changes.pop("params", AXES), conditions)
    settings: dict[str, Any] = {
        "question": None,
        "created_at": "2026-01-01T00:00:00",
        "overrides": (),
        "axes": axes,
        "objectives": ("minimize scores.after.loss",),
        "constraints": (),
        "sampler": "random",
        "sampler_options": {},
        "pruner": "none",
        "pruner_options": {},
        "n_trials": 6,
        "seed": 7,
        "enqueue": (),
        "warm_start": (),
        "storage": f"sqlite:///{OutputPaths.of(root).optuna_database}",
        "output_root": str(root),
        "max_failures": None,
        "max_attempts": 3,
        "out_of_memory_retries": 0,
    }
    return StudySpec(name=name, **(settings | changes))


def paths_of(spec: StudySpec) -> StudyPaths:
    return OutputPaths.of(spec.output_root).study(spec.name)


def opened(spec: StudySpec) -> Study:
    return Study.open(spec, paths_of(spec))


def myself(slot: int = 0) -> Owner:
    return Owner(process_identity(), "here", slot)


def claimed(study: Study, lease_seconds: float = 600.0) -> Claim:
    claim = study.claim(myself(), lease_seconds)
    assert claim is not None
    return claim


def completed(*values: float, violations: tuple[float, ...] = ()) -> Outcome:
    return Outcome(Status.COMPLETED, values, violations, 1.0)


def loss_of(params: dict[str, Any]) -> float:
    """What a trial scores, by formula."""
    return float(params["lora.r"]) + float(params.get("training.learning_rate", 0.0))


def finish(study: Study) -> list[Claim]:
    """Run every trial that is left."""
    done = []
    while claim := study.claim(myself(), 600.0):
        study.tell(claim, completed(*(loss_of(claim.params) for _ in study.spec.objectives)))
        done.append(claim)
    return done


def a_record(claim: Claim, spec: StudySpec, status: Status = Status.COMPLETED, **changes: Any) -> RunRecord:
    trial = TrialOf(spec.name, claim.number, claim.attempt, claim.params)
    scores = ScoreTable(after=Scores("validation", 10, loss=loss_of(claim.params)))
    record = RunRecord(1, f"run-{claim.number}", "r", status, "2026-01-01T00:00:00", None, {}, ENVIRONMENT)
    return record.replace(trial=trial, scores=scores, **changes)


def worker(spec: StudySpec, code: str) -> subprocess.Popen[str]:
    """Another process with ``study`` open, ``me`` its owner, and this module's names; it runs ``code``."""
    file = Path(spec.output_root) / "spec.json"
    write_json(file, to_dict(spec))
    program = "\n".join(
        (
            "import json, sys",
            "from studies import *",
            "from qlora_exp.records.schema import from_dict",
            f"spec = from_dict(StudySpec, json.load(open({str(file)!r})))",
            "study = opened(spec)",
            "me = myself()",
            code,
        )
    )
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{PACKAGE.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """What a worker printed, as JSON."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)
