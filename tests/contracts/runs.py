"""What one run and three small sweeps leave: records, studies, tables, curves, per-item scores, MLflow, folders."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

from tests.contracts.calling import Called, call, called_in, start
from tests.contracts.masking import masked

SMALL = (
    "quantization=fp32 training.batch_size=4 training.max_length=128 training.device=cpu training.threads=1 "
    "task.max_train_items=200 task.max_validation_items=40 task.max_test_items=40 "
)
RUN = (
    f"run {SMALL} model.variant=instruct task.format=chat lora.r=2 targets=all_linear name=contract "
    "training.max_steps=4 training.micro_batch_size=2 training.logging_steps=1 training.evaluate_every_steps=2 "
    "evaluation.max_items=8 evaluation.max_new_tokens=4 evaluation.forgetting_documents=4 evaluation.split=test "
    "evaluation.few_shots=1 evaluation.few_shot_draws=1 budget.tokens=100000"
)
"""Every kind of score: before, after, on test, generated, by few-shot prompts, forgetting in text and chats."""
SLEEP = "training.engine=sleep training.sleep_seconds=0.01 tracking=off"
SWEEPS = {
    "real": f"run -m {SMALL} lora.r=1,2 sweep.name=real training.max_steps=2 evaluation=quick evaluation.max_items=8 "
    "'sweep.objectives=[minimize scores.after.loss,minimize memory.adapter_bytes]'",
    "ladder": f"sweep rank_doubling {SLEEP} sweep.name=ladder model.variant=base,instruct sweep.ladder.r_max=16 "
    "sweep.ladder.margin=0.1 sweep.ladder.lr_policy=carry",
    "search": f"run -m {SLEEP} sweep.name=search lora.r=4,8,16 quantization=fp32,nf4 "
    "'training.learning_rate=tag(log,interval(1e-4,1e-2))' sweep.sampler=tpe sweep.n_trials=8 "
    "'sweep.constraints=[\"memory.peak_train_bytes <= 2e6\"]' training.evaluate_every_steps=5 sweep.pruner=median "
    "'+sweep.pruner_options={n_startup_trials: 1}' 'sweep.enqueue=[{lora.r: 8, training.learning_rate: 2e-3}]'",
}
"""Two trained trials with two objectives; rank doubling and a search with a pruner and a constraint, asleep."""
ENDS = {
    "fails": "training.sleep_fault=fail",
    "diverges": "training.sleep_fault=diverge",
    "out of memory": "training.sleep_fault=out_of_memory",
    "spent": "budget.tokens=1000 budget.usd_per_hour=1",
    "goal": "'task.goal=\"accuracy >= 0.2\"' lora.rslora=true seed=3",
}
"""Sleeping runs, by how they end."""
TRANSIENT = re.compile(r"\.lock$|^cache/|(^|/)__pycache__/|-journal$|-wal$|-shm$")
"""Files that come and go."""


def make(folder: Path) -> dict[str, Called]:
    """Run and sweeps in ``folder``: their outputs lie in ``outputs/``."""
    called = {"run": start(folder, *words(RUN))}
    for name, command in SWEEPS.items():
        called[name] = start(folder, *words(command))
    with called_in(folder):
        for name in ENDS:
            called[name] = call(*words(sleeping(name)))
    return called


def sleeping(name: str) -> str:
    return f"run {SLEEP} 'name={name}' {ENDS[name]}"


def words(command: str) -> list[str]:
    return shlex.split(command)


def collected(folder: Path, called: dict[str, Called]) -> dict[str, Any]:
    """Golden file → what the commands have left for it."""
    outputs = folder / "outputs"
    records = records_of(outputs)
    folders = {str(folder): "<folder>"}
    commands = {"run": RUN, **SWEEPS, **{name: sleeping(name) for name in ENDS}}
    results = {
        "runs/commands.json": {
            name: {"command": " ".join(words(command)), "exit_code": called[name].code}
            for name, command in commands.items()
        },
        "runs/records.json": {name: masked(record, folders) for name, record in records.items()},
        "runs/studies.json": {name: masked(study_of(outputs, name), folders) for name in SWEEPS},
        "runs/files.json": files_of(folder),
        "runs/details.json": masked(details_of(outputs, records["contract"]), folders),
    }
    with called_in(folder):
        results["runs/trials.json"] = {name: trials_of(name) for name in SWEEPS}
    results["runs/mlflow.json"] = masked(mlflow_of(folder), folders)
    return results


def records_of(outputs: Path) -> dict[str, Any]:
    """A run's name, or ``STUDY NUMBER`` of a trial, → its record.json."""
    found = {}
    for file in sorted((outputs / "runs").glob("*/record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        trial = record.get("trial")
        found[f"{trial['study']} {trial['number']}" if trial else record["name"]] = record
    return found


def study_of(outputs: Path, name: str) -> dict[str, Any]:
    """Every JSON file in a study's folder."""
    files = sorted((outputs / "studies" / name).glob("*.json"))
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def trials_of(name: str) -> list[dict[str, Any]]:
    """``trials NAME --csv`` by row and column; the order of the columns counts, too."""
    called = call("trials", name, "--csv")
    assert called.code == 0, called.err
    rows = list(csv.reader(io.StringIO(called.out)))
    values = [[number_of(text) for text in row] for row in rows[1:]]
    return [{"columns": rows[0]}, *(masked(dict(zip(rows[0], row, strict=True))) for row in values)]


def number_of(text: str) -> float | int | str:
    """A cell of a table as what it is, so that floats are compared with their tolerance."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def files_of(folder: Path) -> list[str]:
    """The files below the folder that the commands were called in; of equal ones of several trials, one."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    kept = {name for name in names if not TRANSIENT.search(name)}
    return sorted({re.sub(r"-\d{4}-<hex>", "-<number>-<hex>", masked(name)) for name in kept})


def details_of(outputs: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Curve, per-item table and the state of tracking of the trained run."""
    import pyarrow.parquet as pq

    folder = outputs / "runs" / record["run_id"]
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    tables = {}
    for file in sorted(folder.glob("*.parquet")):
        table = pq.read_table(file)
        tables[file.name] = {
            "columns": {field.name: str(field.type) for field in table.schema},
            "rows": table.num_rows,
            "first": table.slice(0, 2).to_pylist(),
        }
    tracking = json.loads((folder / "tracking.json").read_text(encoding="utf-8"))
    return {"curve.jsonl": curve, "items": tables, "tracking.json": tracking}


OF_A_CLONE = re.compile(r"git\.")
"""Tags that only a run from a git clone has."""


def mlflow_of(folder: Path) -> dict[str, Any]:
    """Every run of the tracking store, trials by study and number: parameters, metrics, tags. ``train/…`` metrics have
    their history, of the others the last value counts: when a background thread delivers, differs."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    found: dict[str, Any] = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            histories = {
                key: [[point.step, point.value] for point in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            }
            number = run.data.tags.get("qlora_exp.trial.number")
            name = run.info.run_name if number is None else f"{run.data.tags['qlora_exp.trial.study']} {number}"
            found[f"{experiment.name}: {name}"] = {
                "status": run.info.status,
                "params": dict(run.data.params),
                "metrics": {
                    key: points if key.startswith("train/") else points[-1] for key, points in histories.items()
                },
                "tags": {key: value for key, value in run.data.tags.items() if not OF_A_CLONE.search(key)},
                "artifacts": sorted(one.path for one in client.list_artifacts(run.info.run_id)),
            }
    return found
