"""How fast one training is, compared with plain SFTTrainer's with the same settings, padded and padding-free.

    OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/lone_training.py [--rows 4 16 32] [--rounds 3] [--steps 30]

Each training is a process: nf4, r = 8 on the attention layers, the embedded base and task, the same threads. The kinds
take turns, forwards and backwards (A B C, C B A …), so that a machine that gets slower favours none. Real tokens a
second, from the end of step 5 to the end of the last one, with all that happens between steps: rows, logging, curve.
The table has each kind's median, and the ratios of medians. Two figures of one kind differ by the last column.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PLAIN = Path(__file__).with_name("train_plain.py")
THREADS = 2
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
FIRST = 5
"""The first step's end that counts: a multiple of ``training.logging_steps``, as the last step."""
KINDS = {"plain SFTTrainer": None, "qlora-exp, padded": "off", "qlora-exp, padding-free": "on"}


def plain(rows: int, steps: int, folder: Path) -> float:
    """Return the real tokens a second of plain SFTTrainer."""
    given = {"r": 8, "learning-rate": 1e-3, "seed": 1, "steps": steps, "batch": rows, "items": 4, "output": folder}
    command = [sys.executable, str(PLAIN), "--speed", *(f"--{key}={value}" for key, value in given.items())]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
    measured = next(json.loads(line) for line in shown.splitlines() if line.startswith('{"tokens"'))
    return float(measured["tokens"] / measured["seconds"])


def ours(rows: int, steps: int, padding_free: str, folder: Path) -> float:
    """Return the real tokens a second of one run."""
    command = [sys.executable, "-m", "qlora_exp.cli", "run", f"output_root={folder}", "quantization=nf4", "lora.r=8"]
    command += ["lora.alpha=16", "training.learning_rate=1e-3", "seed=1", f"training.max_steps={steps}"]
    command += [f"training.batch_size={rows}", f"training.threads={THREADS}", "evaluation=quick", "tracking=off"]
    command += ["evaluation.max_items=4", "evaluation.before=false", f"training.padding_free={padding_free}"]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    (curve,) = folder.glob("runs/*/curve.jsonl")
    points = {point["step"]: point for point in map(json.loads, curve.read_text().splitlines())}
    began, ended = points[FIRST], points[steps]
    return float((ended["tokens"] - began["tokens"]) / (ended["seconds"] - began["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of each training: a multiple of 5, above 5")
    given = parser.parse_args()
    if given.steps % FIRST or given.steps <= FIRST:
        parser.error("--steps is a multiple of 5, above 5")
    titles = " | ".join(f"{kind} (tokens/s)" for kind in KINDS)
    print(f"| rows a step | {titles} | padded / plain | padding-free / plain | largest / least of one kind |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for rows in given.rows:
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(given.rounds):
            for kind in list(KINDS) if number % 2 == 0 else reversed(KINDS):
                padding_free = KINDS[kind]
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name) / "outputs"
                    rates[kind].append(
                        plain(rows, given.steps, folder)
                        if padding_free is None
                        else ours(rows, given.steps, padding_free, folder)
                    )
        first, padded, free = (median(values) for values in rates.values())
        spread = max(max(values) / min(values) for values in rates.values())
        figures = f"{first:.0f} | {padded:.0f} | {free:.0f} | {padded / first:.2f} | {free / first:.2f}"
        print(f"| {rows} | {figures} | {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
