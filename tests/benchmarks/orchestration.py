"""What orchestration costs: a sweep beside the loop that is written today, beside its own trials, and on two workers.

    OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/orchestration.py [--part loop|idle|start] [--rounds 1]
        [--steps 80] [--batch 32]

loop   12 short trials of the embedded model, one after the other: ``qlora-exp sweep`` beside a fresh
       ``python train_plain.py`` per trial, in turn; and beside the sum of the trials' own train and evaluation seconds
       plus one load, without and with the imports that any process which trains must make once.
idle   24 sleeping trials of unequal length on two hosts: the share of host time between the first start and the last
       end in which no trial ran; beside it, by arithmetic over the same lengths, what waiting for batches of two costs.
start  from the command until the first trial runs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLAIN = Path(__file__).with_name("train_plain.py")
RANKS, RATES, SEEDS = (2, 4, 8), (5e-4, 1e-3), (1, 2)
THREADS, ITEMS = 2, 64
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
"""Of all that is timed: as many threads for both. Without bytecode every start would compile this package anew; an
installed one is compiled."""
LENGTHS = tuple(round(2.0 + 0.5 * ((7 * n) % 12), 1) for n in range(24))


def command(*overrides: str, root: Path) -> list[str]:
    return [sys.executable, "-m", "qlora_exp", "-m", f"output_root={root}", *overrides]


def timed(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(arguments, check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - started


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(root.glob("runs/*/record.json"))]


def run_loop(root: Path, steps: int, batch: int) -> float:
    total = 0.0
    for r, rate, seed in itertools.product(RANKS, RATES, SEEDS):
        given: dict[str, float | Path] = {"r": r, "learning-rate": rate, "seed": seed, "steps": steps, "batch": batch}
        given |= {"items": ITEMS, "output": root / f"{r}"}
        total += timed([sys.executable, str(PLAIN), *(f"--{key}={value}" for key, value in given.items())])
    return total


def run_sweep(root: Path, steps: int, batch: int) -> float:
    return timed(
        command(
            f"lora.r={','.join(map(str, RANKS))}",
            f"training.learning_rate={','.join(map(str, RATES))}",
            f"seed={','.join(map(str, SEEDS))}",
            "quantization=nf4",
            f"training.max_steps={steps}",
            f"training.batch_size={batch}",
            f"training.threads={THREADS}",
            "evaluation=quick",
            f"evaluation.max_items={ITEMS}",
            root=root,
        )
    )


def loop(rounds: int, steps: int, batch: int) -> None:
    print(
        "| round | plain loop (s) | sweep (s) | sweep / loop | sweep / (sum of trials + one load) | and imports |\n"
        "|---|---|---|---|---|---|"
    )
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            plain = run_loop(Path(folder) / "plain", steps, batch)
            ours = run_sweep(Path(folder) / "outputs", steps, batch)
            found = records(Path(folder) / "outputs")
        assert len(found) == len(RANKS) * len(RATES) * len(SEEDS), "a trial is missing"
        speeds = [record["speed"] for record in found]
        own = sum(speed["train_seconds"] + speed["evaluation_seconds"] for speed in speeds)
        own += max(speed["load_seconds"] for speed in speeds)
        imports = timed([sys.executable, "-c", "import qlora_exp.runs.pipeline"])
        ratios = f"{ours / plain:.2f} | {ours / own:.2f} | {ours / (own + imports):.2f}"
        print(f"| {number} | {plain:.1f} | {ours:.1f} | {ratios} |", flush=True)


def moments(record: dict[str, Any]) -> tuple[float, float]:
    """Start and end in seconds; the end from the duration, which is finer than the record's whole seconds."""
    started = datetime.datetime.fromisoformat(record["started_at"]).timestamp()
    return started, started + record["speed"]["total_seconds"]


def idle() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "outputs"
        # A seed each, so that equal lengths are trials of their own.
        wall = timed(
            command(
                "training.engine=sleep",
                "tracking=off",
                "seed=1,2",
                f"training.sleep_seconds={','.join(dict.fromkeys(str(length) for length in LENGTHS))}",
                "workers.count=2",
                root=root,
            )
        )
        found = records(root)
    spans = sorted(moments(record) for record in found)
    busy = sum(end - start for start, end in spans)
    window = max(end for _, end in spans) - spans[0][0]
    lengths = [end - start for start, end in spans]
    batches = sum(max(lengths[i : i + 2]) for i in range(0, len(lengths), 2))
    print(f"{len(found)} trials, {busy:.1f} s of work on two hosts; the whole command {wall:.1f} s")
    print("| idle share, pulled | idle share, in batches of two (by arithmetic) |\n|---|---|")
    print(f"| {1 - busy / (2 * window):.3f} | {1 - busy / (2 * batches):.3f} |")


def start() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in {
            "sleep": ("training.engine=sleep", "training.sleep_seconds=0.1", "tracking=off"),
            "embedded": ("training.max_steps=1", "evaluation=quick", "tracking=off"),
        }.items():
            root = Path(folder) / name
            began = time.time()
            timed(command("seed=1,2", *overrides, root=root))
            first = min(path.stat().st_ctime for path in root.glob("runs/*/config.yaml"))
            print(f"| until the first trial runs ({name}) | {first - began:.1f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("loop", "idle", "start"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80, help="of each trial of the loop")
    parser.add_argument("--batch", type=int, default=32, help="rows of each of its steps")
    given = parser.parse_args()
    if given.part in (None, "loop"):
        loop(given.rounds, given.steps, given.batch)
    if given.part in (None, "idle"):
        idle()
    if given.part in (None, "start"):
        start()


if __name__ == "__main__":
    main()
