"""A sweep on a small memory, with and without prediction: what is wasted on trials that can't fit.

    python tests/benchmarks/feasibility.py [--memory-bytes 300000000] [--steps 4]

The embedded model on a CPU, a fresh process a trial, one at a time. Every trial's process may have so many bytes of
data (RLIMIT_DATA) beyond what it has after its imports: torch is then refused memory, as by a card that is full, and
the run ends as OUT_OF_MEMORY. (RLIMIT_AS also counts what is only reserved, and a cgroup's limit kills the process.)
Without prediction (``budget.memory_bytes=null``) every trial is started.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import Status
from qlora_exp.study.spec import read_spec
from qlora_exp.study.study import Study

SPACE = ("training.batch_size=16,32,64,96,128,192", "lora.r=4,16")
FIXED = (
    *("quantization=fp32", "training.device=cpu", "training.threads=1", "tracking=off", "evaluation.before=false"),
    *("evaluation.forgetting=false", "evaluation.baselines=false", "evaluation.max_items=4"),
    *("evaluation.generate=false", "workers.count=1", "workers.isolation=fresh", "sweep.max_failures=null"),
)
STACKS_BYTES = 64 * 2**20
"""Of threads that a training starts after the imports."""
IN_VAIN = (Status.OUT_OF_MEMORY, Status.FAILED)


@dataclass(frozen=True)
class Swept:
    """What came of one sweep. Seconds: of the trials that did not complete, from their processes' start, and of the
    whole command."""

    completed: int
    wasted: int
    skipped: int
    wasted_seconds: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory-bytes", type=int, default=300_000_000)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{arguments.memory_bytes / 1e6:.0f} MB; {' × '.join(SPACE)}; {arguments.steps} steps")
    print("| | completed | started and failed | not started | wasted seconds | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, budget in (("without", "null"), ("with", str(arguments.memory_bytes))):
            swept = sweep(name, Path(folder), arguments.memory_bytes, arguments.steps, budget)
            figures = (swept.completed, swept.wasted, swept.skipped)
            seconds = f"{swept.wasted_seconds:.0f} | {swept.seconds:.0f}"
            print(f"| {name} prediction | {' | '.join(map(str, figures))} | {seconds} |", flush=True)


def sweep(name: str, root: Path, memory_bytes: int, steps: int, budget: str) -> Swept:
    """The same grid under the same limit; ``budget``: what ``budget.memory_bytes`` says."""
    own = (f"training.max_steps={steps}", f"budget.memory_bytes={budget}", f"sweep.name={name}", f"output_root={root}")
    limit = data_after_imports() + STACKS_BYTES + memory_bytes
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "qlora_exp", "-m", *FIXED, *own, *SPACE],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return counted(OutputPaths.of(root), name, time.monotonic() - started)


def counted(outputs: OutputPaths, name: str, seconds: float) -> Swept:
    paths = outputs.study(name)
    rows = Study.open(read_spec(paths), paths).trials()
    vain = [row for row in rows if row.status is not Status.COMPLETED and row.skipped is None]
    records = [read_record(outputs.run(row.run_id).record) for row in rows if row.run_id is not None]
    ended = sorted((datetime.fromisoformat(str(record.ended_at)), record.status) for record in records)
    in_vain = [(end - before).total_seconds() for (before, _), (end, status) in pairwise(ended) if status in IN_VAIN]
    return Swept(
        completed=sum(row.status is Status.COMPLETED for row in rows),
        wasted=len(vain),
        skipped=sum(row.skipped is not None for row in rows),
        wasted_seconds=sum(in_vain),
        seconds=seconds,
    )


def data_after_imports() -> int:
    """Bytes of data (VmData) of a trial host that has imported what training needs."""
    code = "import qlora_exp.runs.pipeline, qlora_exp.runs.execute as app; print(open('/proc/self/status').read())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = re.search(r"VmData:\s+(\d+) kB", told)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
