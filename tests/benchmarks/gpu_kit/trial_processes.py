"""Stages that look at trial processes: warm bases, killed ones, several on one card, a broken CUDA context, a study.

A sweep refuses a card on which another process holds memory: a stage's own process must not use CUDA before it starts
one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sqlite3
import subprocess
import tarfile
import time
from pathlib import Path

from gpu_kit import faults
from gpu_kit.commands import card_used_bytes, run_records, sweep, sweep_command, train
from gpu_kit.inputs import Kit
from gpu_kit.runner import ROOT, TOKEN_VARIABLE, processes_of

MEMORY_SLACK_BYTES = 8 * 2**20
ENDS_SECONDS = 10.0
"""For a killed worker's processes to end."""
STARTS_SECONDS = 120.0
MEMORY_BACK_SECONDS = 5.0


def held_bytes() -> int:
    """Return the bytes of tensors that the process holds: on CUDA what torch has allocated, else those that Python can
    reach."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated())
    gc.unfreeze()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def warm_base(kit: Kit) -> None:
    """Seven trials in one process: equal ones have equal losses, and nothing of an earlier one stays in memory."""
    from qlora_exp.models.base_cache import BaseCache

    family, optimizer = "llama3_2_1b", "adamw_8bit"
    common = [*kit.quick("warm", 4, items=4), "quantization=nf4", "targets=all_linear", "training.batch_size=4"]
    common += ["training.logging_steps=1", *(["training.threads=1"] if kit.rehearse else [])]
    length = 48 if kit.rehearse else 512
    fresh = _fresh_losses(kit, [*kit.own_task(length, family=family), *common])  # before this process uses CUDA
    bases, first, empty = BaseCache(), None, {}
    trials = [
        ("A", 0, []),
        ("B", 0, ["lora.r=64"]),
        ("A", 0, []),
        ("A with 8-bit AdamW", 0, [f"training.optimizer={optimizer}"]),
        ("A on another base", 1, [f"training.optimizer={optimizer}"]),
        ("A", 0, []),
    ]
    for number, (name, seed, more) in enumerate(trials):
        overrides = [*kit.own_task(length, family=family, seed=seed), *common, *more]
        record, status = train(overrides, bases)
        kit.findings.check(f"trial {number}, {name}: status", status == "COMPLETED", status, "COMPLETED")
        if record is None:
            continue
        held = held_bytes()
        empty.setdefault("bytes", held)
        losses = _losses(kit, "warm", record.run_id)
        kit.findings.row("warm base", trial=number, name=name, held_bytes=held, losses=losses)
        wanted = empty["bytes"] + MEMORY_SLACK_BYTES if not kit.rehearse else empty["bytes"] + 2**16
        kit.findings.check(f"trial {number}, {name}: memory", held <= wanted, held, f"<= {wanted} bytes")
        if name == "A":
            first = losses if first is None else first
            difference = max((abs(a - b) for a, b in zip(losses, first, strict=True)), default=None)
            # On CUDA attention's backward pass adds in any order: only the first loss must be equal to the bit.
            same = difference == 0 if kit.rehearse else losses[:1] == first[:1]
            wanted_losses = "no difference" if kit.rehearse else "equal first losses"
            kit.findings.check(f"trial {number}: losses of the first A", same, f"± {difference}", wanted_losses)
    same = fresh == first if kit.rehearse else fresh[:1] == (first or [])[:1]
    kit.findings.check("a new process: losses of the first A", same, fresh, first)


def _losses(kit: Kit, name: str, run_id: str) -> list[float]:
    file = kit.outputs(name) / "runs" / run_id / "curve.jsonl"
    points = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [point["loss"] for point in points if point.get("loss") is not None]


def _fresh_losses(kit: Kit, overrides: list[str]) -> list[float]:
    """Train in a process that loads its base itself: one trial of a sweep, whose device a rehearsal can mock."""
    kept = [one for one in overrides if not one.startswith("output_root=")]
    environment = faults.environment_with("none", kit.out / "site-fresh", kit.rehearse)
    done = sweep("fresh", [*kept, f"output_root={kit.outputs('fresh')}", "lora.r=8"], environment)
    records = run_records(kit.outputs("fresh"))
    print(done, flush=True)
    return _losses(kit, "fresh", records[0].run_id) if records else []


def killed(kit: Kit) -> None:
    """A trial process that is killed continues from its checkpoint; a killed command leaves no process."""
    length = 48 if kit.rehearse else 512
    common = [*kit.own_task(length), "quantization=nf4", "targets=all_linear", "training.batch_size=4"]
    overrides = [*common, *kit.quick("killed", 8), "lora.r=2,4", "training.save_every_steps=2"]
    done = sweep("killed", overrides, faults.environment_with("killed", kit.out / "site-killed", kit.rehearse))
    records = run_records(kit.outputs("killed"))
    statuses = [str(record.status) for record in records]
    kit.findings.check("statuses", statuses == ["COMPLETED"] * 2, f"{statuses} {done}", "two COMPLETED")
    resumed = [record.training.resumed_from_step for record in records if record.training is not None]
    kit.findings.check("resumed from step", resumed == [4, None], resumed, [4, None])
    attempts = [record.trial.attempt for record in records if record.trial is not None]
    kit.findings.check("attempts", attempts == [2, 1], attempts, [2, 1])
    _kill_command(kit, common)


def _kill_command(kit: Kit, common: list[str]) -> None:
    """SIGKILL to the command while a trial trains: its trial processes end, too, and free their memory."""
    site = kit.out / "site-slow"
    environment = faults.environment_with("slow", site, kit.rehearse)
    overrides = [*common, *kit.quick("slow", 200), "lora.r=2,4"]
    token = os.environ.get(TOKEN_VARIABLE, "")
    before = set(_pids(token))
    with (kit.out / "slow.log").open("wb") as log:
        process = subprocess.Popen(
            sweep_command("slow", overrides), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        until = time.monotonic() + STARTS_SECONDS
        while not (site / "marker").is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        started = (site / "marker").is_file() and process.poll() is None
        kit.findings.check("a trial trains", started, process.poll(), "yes")
        used = card_used_bytes(kit)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    until = time.monotonic() + ENDS_SECONDS
    while (left := set(_pids(token)) - before) and time.monotonic() < until:
        time.sleep(0.1)
    kit.findings.check("processes of a killed command", not left, sorted(left), "none")
    until = time.monotonic() + MEMORY_BACK_SECONDS
    while (now := card_used_bytes(kit)) >= used > 0 and time.monotonic() < until:
        time.sleep(0.1)
    kit.check_on_gpu("memory of a killed command", now < used, f"{used / 1e9:.2f} GB, then {now / 1e9:.2f}", "less")


def _pids(token: str) -> list[str]:
    return [entry.split()[0] for entry in processes_of(token)] if token else []


def shared_card(kit: Kit) -> None:
    """One, two and four trial processes on one card: tokens per second of all together."""
    length, steps = (48, 3) if kit.rehearse else (512, 30)
    rates: dict[int, float] = {}
    for count in (2,) if kit.rehearse else (1, 2, 4):
        trials, name = max(2, count), f"shared-{count}"
        ranks = ",".join(str(4 + number) for number in range(trials))
        overrides = [
            *(*kit.own_task(length), *kit.quick(name, steps), f"lora.r={ranks}", f"workers.count={count}"),
            *("quantization=nf4", "targets=all_linear", "training.batch_size=4"),
        ]
        done = sweep(name, overrides, faults.environment_with("none", kit.out / f"site-{name}", kit.rehearse))
        records = run_records(kit.outputs(name))
        statuses = [str(record.status) for record in records]
        kit.findings.check(f"{count}: statuses", statuses == ["COMPLETED"] * trials, f"{statuses} {done}", "COMPLETED")
        if not records:
            continue
        speeds = [record.speed.train_tokens_per_second or 0.0 for record in records]
        rates[count] = count * sum(speeds) / len(speeds)
        visible = {record.environment.cuda_visible_devices for record in records}
        processes = {record.memory.process_reused for record in records}
        kit.check_on_gpu(f"{count}: one card", len(visible) == 1 and None not in visible, visible, "one UUID")
        limits = [record.fit.limit_bytes for record in records if record.fit is not None]
        total = records[0].environment.device.memory_bytes or 0
        fair = bool(limits) and all(limit <= total / count * 1.01 for limit in limits)
        kit.check_on_gpu(f"{count}: memory limit", fair, limits[:1], f"<= {total / count:.0f} bytes")
        joules = [record.speed.energy_joules for record in records]
        kit.findings.row("processes on one card", processes=count, tokens_per_second=rates[count], joules=sum(
            one for one in joules if one), trials=trials, reused=len(processes) > 1)  # fmt: skip
    if 1 in rates:
        for count, rate in rates.items():
            kit.findings.row("gain of processes on one card", processes=count, gain=rate / rates[1])


def sticky_error(kit: Kit) -> None:
    """A trial makes its process's CUDA context unusable: only that trial fails."""
    overrides = [
        *(*kit.own_task(48 if kit.rehearse else 512), *kit.quick("sticky", 2), "lora.r=2,4,8"),
        *("quantization=nf4", "targets=all_linear", "training.batch_size=4", "sweep.max_attempts=1"),
        "sweep.max_failures=2",
    ]
    environment = faults.environment_with("sticky", kit.out / "site-sticky", kit.rehearse)
    done = sweep("sticky", overrides, environment)
    records = run_records(kit.outputs("sticky"))
    statuses = [str(record.status) for record in records]
    wanted = ["FAILED", "COMPLETED", "COMPLETED"]
    kit.findings.check("statuses", statuses == wanted, f"{statuses} {done}", wanted)
    failure = records[0].failure if records else None
    message = failure.message if failure is not None else ""
    kit.findings.check("message", "assert" in message.lower(), message[:200], "names the assertion")


def study(kit: Kit) -> None:
    """Rank doubling on the embedded pair's task, with MLflow: an answer, and every figure where a user looks for it."""
    outputs, with_mlflow = kit.outputs("study"), _has_mlflow()
    steps, items = (2, 8) if kit.rehearse else (60, 200)
    overrides = [
        *("sweeps=rank_doubling", "quantization=nf4", "workers.count=2", f"output_root={outputs}"),
        *("sweep.ladder.r_start=4", f"sweep.ladder.r_max={8 if kit.rehearse else 16}"),
        *("sweep.ladder.seeds=2", "sweep.ladder.max_seeds=2", "sweep.ladder.lr_policy=fixed"),
        *(f"training.max_steps={steps}", "training.batch_size=8"),
        *(f"evaluation.max_items={items}", "training.learning_rate=4e-3", "evaluation.baselines=false"),
        *(f"tracking={'mlflow' if with_mlflow else 'off'}", f"training.device={'auto' if kit.rehearse else 'cuda'}"),
    ]
    if kit.rehearse:
        overrides += ["task.max_test_items=64", "task.max_train_items=200"]
    done = sweep("study", overrides, faults.environment_with("none", kit.out / "site-study", kit.rehearse))
    records = run_records(outputs)
    statuses = {str(record.status) for record in records}
    kit.findings.check("statuses", statuses == {"COMPLETED"}, f"{statuses} {done}", "COMPLETED")
    ladder = outputs / "studies" / "study" / "ladder.json"
    answers = json.loads(ladder.read_text(encoding="utf-8")) if ladder.is_file() else []
    shown = answers if isinstance(answers, list) else answers.get("ladders", [])
    kit.findings.check("the ladder's answer", bool(shown), str(shown)[:200], "one")
    measured = [(record.speed.energy_joules, record.memory.peak_train_bytes) for record in records]
    kit.findings.check(
        "energy and memory", all(all(pair) for pair in measured), measured[:2], "a number in each record"
    )
    kit.findings.row("study", runs=len(records), seconds=sum(record.speed.total_seconds or 0 for record in records))
    if with_mlflow:
        logged = _logged_runs(outputs.parent / "mlflow.db")
        missing = [record.run_id for record in records if record.run_id not in logged]
        kit.findings.check("runs in MLflow", bool(records) and not missing, f"missing: {missing}", "all")
    else:
        kit.findings.not_checked("runs in MLflow", "MLflow is not installed")
    with tarfile.open(kit.out / "records.tar.gz", "w:gz") as archive:
        for file in sorted(kit.out.glob("outputs/*/*/runs/*/record.json")):
            archive.add(file, file.relative_to(kit.out).as_posix())


def _has_mlflow() -> bool:
    import importlib.util

    return importlib.util.find_spec("mlflow") is not None


def _logged_runs(database: Path) -> set[str]:
    """Return the values of all tags of MLflow's runs: our run ids are among them."""
    if not database.is_file():
        return set()
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        names = connection.execute("select name from runs").fetchall()
        tags = connection.execute("select value from tags").fetchall()
    return {value for (value,) in [*names, *tags]}
