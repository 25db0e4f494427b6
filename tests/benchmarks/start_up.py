"""How long a start takes: from a command to its first step, and from one trial's end to the next one's start.

    OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/start_up.py [--rounds 3]

first step  from the command to the end of the first step, which is logged: ``qlora-exp run`` and ``train_plain.py``, in
            turn; for comparison, the imports that any such process makes. Before its first step a run plans, writes its
            first record and loads the model; with ``evaluation.before=false`` it scores nothing.
next trial  ``workers.isolation=fresh``, one worker, six trials of one step: from a trial's end to the next one's first
            record. A new trial process is forked from the server, reads the rows and plans; for comparison, the imports
            of a new interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

PLAIN = Path(__file__).with_name("train_plain.py")
THREADS = 2
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
SMALL = ["quantization=nf4", "lora.r=8", "evaluation=quick", "evaluation.max_items=4", "evaluation.before=false"]
SMALL += ["tracking=off", f"training.threads={THREADS}"]


def run_first_step(folder: Path) -> float:
    """Return the seconds from ``qlora-exp run`` to the first line of its curve."""
    command = [sys.executable, "-m", "qlora_exp.cli", "run", f"output_root={folder}", *SMALL, "training.max_steps=3"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        while not any(path.stat().st_size for path in folder.glob("runs/*/curve.jsonl")):
            assert process.poll() is None, "the run ended before its first step"
            time.sleep(0.005)
        return time.perf_counter() - began  # leaving the block waits for the run's end


def plain_first_step(folder: Path) -> float:
    """Return the seconds from ``python train_plain.py`` to the end of its first step."""
    given = {"r": 8, "learning-rate": 1e-3, "seed": 1, "steps": 6, "batch": 16, "items": 4, "output": folder}
    command = [sys.executable, str(PLAIN), "--speed", *(f"--{key}={value}" for key, value in given.items())]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("first step") for line in process.stdout)
        seconds = time.perf_counter() - began
        process.stdout.read()
    return seconds


def imports(_: Path) -> float:
    """Return the seconds of a new interpreter that imports what a training needs."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import qlora_exp.runs.pipeline"], check=True, env=ENVIRONMENT)
    return time.perf_counter() - began


def between_trials(folder: Path) -> list[float]:
    """Return the seconds from each trial's end to the next one's start, without the first pair."""
    command = [sys.executable, "-m", "qlora_exp", "-m", f"output_root={folder}", *SMALL, "training.max_steps=1"]
    command += ["seed=1,2,3,4,5,6", "workers.isolation=fresh"]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    records = [json.loads(path.read_text()) for path in folder.glob("runs/*/record.json")]
    assert len(records) == 6, "a trial is missing"
    starts = sorted(datetime.datetime.fromisoformat(record["started_at"]).timestamp() for record in records)
    ends = sorted(datetime.datetime.fromisoformat(record["ended_at"]).timestamp() for record in records)
    return [start - end for start, end in zip(starts[1:], ends, strict=False)][1:]


MEASURES: dict[str, Callable[[Path], float]] = {"run": run_first_step, "plain": plain_first_step, "imports": imports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    first: dict[str, list[float]] = {kind: [] for kind in MEASURES}
    for number in range(given.rounds):
        for kind in list(first) if number % 2 == 0 else reversed(first):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "outputs"
                first[kind].append(MEASURES[kind](folder))
    run, plain, alone = (median(values) for values in first.values())
    print("| qlora-exp run to its first step (s) | train_plain.py (s) | run / plain | imports alone (s) |")
    print(f"|---|---|---|---|\n| {run:.1f} | {plain:.1f} | {run / plain:.2f} | {alone:.1f} |")
    with tempfile.TemporaryDirectory() as name:
        gaps = between_trials(Path(name) / "outputs")
    print("\n| from a trial's end to the start of the next, in a new process (s) | largest | relative to imports |")
    print(f"|---|---|---|\n| {median(gaps):.2f} | {max(gaps):.2f} | {median(gaps) / alone:.2f} |")


if __name__ == "__main__":
    main()
