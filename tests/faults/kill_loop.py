"""Sweeps that are killed at random moments and started again, each compared with one that nobody disturbed.

    python -m tests.faults.kill_loop --rounds 30 --seed 1 [--kinds tpe,joblib] [--folder DIR]

A round starts a sweep of one kind, kills or hangs up some of its processes a few times (the controller, a worker, a
trial host, or all at once), starts the same command again each time, and lets it end. In some rounds every start has
another host name, as in a container that was replaced. Then the study, its records and MLflow must be what they are
without a kill. One JSON object a round; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

TAG = "QLORA_EXP_KILL_LOOP"
"""Environment variable by which every process of a round is found, whoever started it."""
ROUND_SECONDS, KILLING_SECONDS, LEFT_SECONDS = 600.0, 240.0, 20.0
KINDS = ("tpe", "tpe_pruner", "grid2", "random2", "joblib", "qmc", "nsga2", "ladder", "real")
WAYS = ("controller", "everything", "host", "worker", "hangup")
"""Which processes are killed; ``hangup`` kills none, it closes the terminal."""
IN_A_CONTAINER = ("everything", "host", "hangup")
"""With the controller everything in it ends."""
ADAPTIVE = ("tpe", "tpe_pruner", "nsga2")
"""Kinds whose sampler learns from the trials that have ended by then."""
WHOLE, BY_TRIAL = ("numbers", "left"), ("states", "params", "values", "records")
IN_MLFLOW = {"COMPLETED": "FINISHED", "PRUNED": "KILLED"}
CAN_RENAME_HOST = os.geteuid() == 0 and shutil.which("unshare") is not None

_RATE = "training.learning_rate=tag(log,interval(1e-5,1e-2))"
_LEASES = ("sweep.max_attempts=30", "workers.lease_seconds=15", "workers.heartbeat_seconds=2")
_SLEEP = ("training.engine=sleep", "training.sleep_seconds=0.5", *_LEASES)
_GRID = ("lora.r=2,4,8,16", "quantization=nf4,int8,fp16")
_SEARCH = ("lora.r=4,8,16,32", _RATE)
SWEEPS: dict[str, tuple[str, ...]] = {
    "tpe": (*_SEARCH, "sweep.sampler=tpe", "sweep.n_trials=14", *_SLEEP),
    "tpe_pruner": (
        *(*_SEARCH, "sweep.sampler=tpe", "sweep.n_trials=14", "sweep.pruner=median"),
        *("training.evaluate_every_steps=4", *_SLEEP),
    ),
    "grid2": (*_GRID, "workers.count=2", *_SLEEP),
    "random2": ("lora.r=2,4,8,16", _RATE, "sweep.sampler=random", "sweep.n_trials=14", "workers.count=2", *_SLEEP),
    "joblib": (*_GRID, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "workers.jobs=2", *_SLEEP),
    "qmc": (*_SEARCH, "sweep.sampler=qmc", "sweep.n_trials=12", *_SLEEP),
    "nsga2": (
        *_SEARCH,
        "sweep.sampler=nsga2",
        "+sweep.sampler_options.population_size=4",
        "sweep.n_trials=14",
        *_SLEEP,
    ),
    "ladder": (
        *("sweeps=rank_doubling", "sweep.ladder.r_max=16", "sweep.ladder.max_seeds=3"),
        *("sweep.ladder.lr_policy=fixed", *_SLEEP),
    ),
    "real": (
        *("lora.r=2,4", "quantization=fp32,nf4", "training.max_steps=8", "training.save_every_steps=2"),
        *("evaluation=quick", "evaluation.max_items=24", *_LEASES),
    ),
}


@dataclass
class Round:
    """What was done in a round, and what was wrong after it."""

    kind: str
    seed: int
    renamed: bool
    kills: list[tuple[str, float]] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


class Processes:
    """One sweep's command and all that it starts, in a session of its own."""

    def __init__(self, kind: str, folder: Path, seed: int, renamed: bool) -> None:
        self.root, self.name = folder / "outputs", f"k{seed}"
        self._tag, self._renamed, self._starts = uuid.uuid4().hex, renamed, 0
        self._command = [
            *(sys.executable, "-m", "qlora_exp", "-m", *SWEEPS[kind], f"output_root={self.root}"),
            *(f"sweep.name={self.name}", f"sweep.seed={seed}"),
        ]
        folder.mkdir(parents=True)
        self._log = folder / "log"
        self.start()

    def start(self) -> None:
        command, self._starts = self._command, self._starts + 1
        if self._renamed:
            name = f'hostname pod-{self._starts}; exec "$@"'
            command = ["unshare", "--uts", "bash", "-c", name, "bash", *command]
        environment = {**os.environ, TAG: self._tag, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self._log.open("ab") as log:
            self.controller = subprocess.Popen(
                command, cwd=self.root.parent, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_hear_hangups,
            )  # fmt: skip

    def trials_told(self) -> int:
        """How many trials have ended by what was printed."""
        return self._log.read_bytes().count(b"] trial ")

    def alive(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def hosts(self) -> list[psutil.Process]:
        return [process for process in self.alive() if "qlora_exp.orchestration.trial_main" in command_of(process)]

    def workers(self) -> list[psutil.Process]:
        """joblib's."""
        found = [(process, command_of(process)) for process in self.alive()]
        return [process for process, text in found if "loky" in text and "resource_tracker" not in text]

    def all_gone(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(TAG) == self._tag and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            return False


def _hear_hangups() -> None:
    """Also where this program was started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


def play(kind: str, seed: int, folder: Path, renamed: bool | None = None, ways: Sequence[str] | None = None) -> Round:
    """One round in ``folder``, which is emptied first.

    ``renamed``: whether every start has another host name; ``None``: in one round of four. ``ways``: of killing.
    """
    rng = random.Random(f"{kind}/{seed}")
    found = Round(kind, seed, renamed=CAN_RENAME_HOST and rng.random() < 0.25)
    found.renamed = found.renamed if renamed is None else renamed
    ways = ways or (IN_A_CONTAINER if found.renamed else WAYS)
    began = time.monotonic()
    expected = undisturbed(kind, seed, folder / "undisturbed")
    if isinstance(expected, str):
        found.findings.append(expected)
        return found
    shutil.rmtree(folder / "killed", ignore_errors=True)
    sweep = Processes(kind, folder / "killed", seed, found.renamed)
    try:
        _kill_it(sweep, rng, found, ways)
        _let_it_end(sweep, found)
        if not sweep.all_gone(LEFT_SECONDS):
            found.findings.append(f"left after its end: {[command_of(process) for process in sweep.alive()]}")
    finally:
        for process in sweep.alive():
            process.kill()
    actual = facts(sweep.root, sweep.name)
    found.attempts = actual["attempts"]
    found.findings += differences(expected, actual, _run_in_turn(actual) if kind in ADAPTIVE else None)
    found.seconds = round(time.monotonic() - began, 1)
    return found


def undisturbed(kind: str, seed: int, folder: Path) -> dict[str, Any] | str:
    """What the sweep gives when nobody kills anything; a text: how even that failed."""
    shutil.rmtree(folder, ignore_errors=True)
    sweep = Processes(kind, folder, seed, renamed=False)
    code = sweep.controller.wait(timeout=ROUND_SECONDS)
    return facts(sweep.root, sweep.name) if code == 0 else f"exit code {code} without a kill: {folder / 'log'}"


def _kill_it(sweep: Processes, rng: random.Random, found: Round, ways: Sequence[str]) -> None:
    began, wanted = time.monotonic(), rng.randint(3, 6)
    while len(found.kills) < wanted and time.monotonic() - began < KILLING_SECONDS:
        _wait_for_a_moment(sweep, rng)
        if sweep.controller.poll() is not None:
            if sweep.controller.returncode == 0:
                return
            sweep.start()
            continue
        way = _kill(sweep, rng, ways)
        found.kills.append((way, round(time.monotonic() - began, 1)))
        if way not in ("controller", "everything", "hangup"):
            continue
        code = sweep.controller.wait(timeout=ROUND_SECONDS)
        if way == "hangup" and code not in (0, 130, -signal.SIGHUP):
            found.findings.append(f"exit code {code} after a hangup")
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.0, 3.0))
        elif not sweep.all_gone(LEFT_SECONDS):
            left = [command_of(process) for process in sweep.alive()]
            found.findings.append(f"{LEFT_SECONDS:.0f} s after {way} still there: {left}")
        sweep.start()


def _wait_for_a_moment(sweep: Processes, rng: random.Random) -> None:
    """Any moment from the imports on; or the second after a trial has ended, when much is written."""
    late = rng.random() < 0.3
    pause = rng.choice([rng.uniform(0.2, 3.0), rng.uniform(2.0, 8.0), rng.uniform(4.0, 11.0)])
    ended, until = sweep.trials_told(), time.monotonic() + (30.0 if late else pause)
    while time.monotonic() < until and sweep.controller.poll() is None:
        if late and sweep.trials_told() > ended:
            late, until = False, time.monotonic() + rng.uniform(0.0, 1.0)
        time.sleep(0.02)


def _kill(sweep: Processes, rng: random.Random, ways: Sequence[str]) -> str:
    """Kill or hang up some process; which way."""
    hosts, workers = sweep.hosts(), sweep.workers()
    way = rng.choice(ways)
    if (way == "host" and not hosts) or (way == "worker" and not workers):
        way = ways[0]
    if way == "hangup":  # as the kernel does for a terminal that is closed, and the shell once more
        for _ in range(2):
            os.killpg(sweep.controller.pid, signal.SIGHUP)
        return way
    victims = {
        "controller": lambda: [psutil.Process(sweep.controller.pid)],
        "everything": sweep.alive,
        "host": lambda: [rng.choice(hosts)],
        "worker": lambda: [rng.choice(workers)],
    }[way]()
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    return way


def _let_it_end(sweep: Processes, found: Round) -> None:
    """A launcher that lost a worker ends with 1; the same command then goes on."""
    codes: list[int] = []
    while len(codes) < 6:
        try:
            codes.append(sweep.controller.wait(timeout=ROUND_SECONDS))
        except subprocess.TimeoutExpired:
            found.findings.append(f"still at work after {ROUND_SECONDS:.0f} s")
            return
        if codes[-1] == 0:
            return
        sweep.start()
    found.findings.append(f"exit codes {codes}")


def facts(root: Path, name: str) -> dict[str, Any]:
    """What counts of a study: its trials in Optuna, its records, its runs in MLflow. Durations and names don't."""
    with sqlite3.connect(f"file:{root / 'optuna.db'}?mode=ro", uri=True) as database:
        columns = "t.number, t.state, t.trial_id, t.datetime_start, t.datetime_complete"
        query = f"select {columns} from trials t join studies s on s.study_id = t.study_id where s.study_name = ?"
        trials = database.execute(f"{query} order by number", (name,)).fetchall()
        params, values, claims = (
            [database.execute(query, (trial_id,)).fetchall() for _, _, trial_id, *_ in trials]
            for query in (
                "select param_name, param_value from trial_params where trial_id = ? order by param_name",
                "select objective, value from trial_values where trial_id = ? order by objective",
                "select value_json from trial_user_attributes where trial_id = ? and key = 'claim'",
            )
        )
    records = [json.loads(file.read_text(encoding="utf-8")) for file in root.glob("runs/*/record.json")]
    return {
        "numbers": [number for number, *_ in trials],
        "states": [state for _, state, *_ in trials],
        "spans": [(started, ended) for *_, started, ended in trials],
        "params": params,
        "values": values,
        "attempts": [json.loads(rows[0][0])["attempt"] if rows else 0 for rows in claims],
        "records": sorted((record["trial"]["number"], record["status"]) for record in records),
        "mlflow": _mlflow(root.parent / "mlflow.db"),
        "left": sorted(file.name for file in (root / "studies").glob("*/orchestrator.json")),
    }


def _mlflow(file: Path) -> list[tuple[str, str, bool]]:
    """(run id of ours or ``the study``, status, whether it has a parent), sorted."""
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        tags: dict[str, dict[str, str]] = {}
        for run, key, value in database.execute("select run_uuid, key, value from tags"):
            tags.setdefault(run, {})[key] = value
        runs = database.execute("select run_uuid, status from runs where lifecycle_stage = 'active'").fetchall()
    found = []
    for run, status in runs:
        own = tags.get(run, {})
        found.append((own.get("qlora_exp.run_id", "the study"), status, "mlflow.parentRunId" in own))
    return sorted(found)


def _run_in_turn(actual: dict[str, Any]) -> int:
    """How many of the first trials each ended before the next one began.

    From another host name nobody can see whether the process of an unfinished trial is alive, so that trial waits for
    its lease while later ones run. A sampler then knows less than in an undisturbed sweep when it is asked for those,
    and a pruner more when that trial is run again.
    """
    spans = actual["spans"]
    for number, ((_, ended), (started, _)) in enumerate(pairwise(spans)):
        if ended is None or started is None or started < ended:
            return number
    return len(spans)


def differences(expected: dict[str, Any], actual: dict[str, Any], comparable: int | None = None) -> list[str]:
    """Between a sweep that was killed and one that wasn't; empty: none. ``comparable``: how many trials must have the
    same parameters, values and endings (the others must have ended, too); ``None``: all."""
    found = [f"{key}: {actual[key]} instead of {expected[key]}" for key in WHOLE if actual[key] != expected[key]]
    found += [
        f"{key}: {actual[key][:comparable]} instead of {expected[key][:comparable]}"
        for key in BY_TRIAL
        if actual[key][:comparable] != expected[key][:comparable]
    ]
    if len(actual["records"]) != len(expected["records"]) or set(actual["states"]) - {"COMPLETE", "PRUNED"}:
        found.append(f"states {actual['states']}, records {actual['records']}")
    runs = actual["mlflow"]
    names = [name for name, _, _ in runs]
    records = dict(actual["records"]) if comparable is not None else dict(expected["records"])
    statuses = sorted((name == "the study", status, parent) for name, status, parent in runs)
    due = [(False, IN_MLFLOW.get(status, status), True) for status in records.values()]
    study = [(True, status, parent) for name, status, parent in expected["mlflow"] if name == "the study"]
    if statuses != sorted(due + study):
        found.append(f"MLflow has {runs}")
    if len(set(names)) != len(names):
        found.append(f"MLflow has a run twice: {names}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next ones count on")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--folder", type=Path, help="where the rounds are kept; default: a temporary one, removed")
    parser.add_argument("--ways", help=f"of killing, e.g. {','.join(WAYS)}")
    parser.add_argument("--renamed", action="store_true", default=None, help="every start has another host name (root)")
    asked = parser.parse_args(arguments)
    kinds, wrong = asked.kinds.split(","), 0
    ways = asked.ways.split(",") if asked.ways else None
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="kill_loop."))
    for number in range(asked.rounds):
        seed = asked.seed + number
        kind = kinds[seed % len(kinds)]
        one = play(kind, seed, folder / f"{seed}_{kind}", asked.renamed, ways)
        print(json.dumps(asdict(one)), flush=True)
        wrong += bool(one.findings)
    if asked.folder is None and not wrong:
        shutil.rmtree(folder)
    print(f"{asked.rounds} rounds, {wrong} with findings", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
