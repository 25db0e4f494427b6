"""What rounding shapes up saves where a CPU computes in 16 bit: the embedded base in fp16, with and without it.

    python tests/benchmarks/rounded_shapes.py [--steps 60] [--rounds 2]

Each training in a fresh process on one thread, the two kinds in turn; memory beyond what the process has after its
imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_exp.system import heap

AS_THEY_ARE = "from qlora_exp.architecture import run_plan as plan; plan.COMPILED_MULTIPLES = (1, 1); "
COMMAND = "import sys; from qlora_exp.cli import main; sys.exit(main(sys.argv[1:]))"


def trained(rounded: bool, steps: int) -> tuple[float, float]:
    """MB and seconds of one training."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        heap.MALLOC_VARIABLE: heap.TUNABLES,
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = ["model=embedded", "quantization=fp16", f"training.max_steps={steps}", "training.device=cpu"]
        quick = ["evaluation=quick", "evaluation.max_items=50", "tracking=off", f"output_root={folder}"]
        code = COMMAND if rounded else AS_THEY_ARE + COMMAND
        subprocess.run([sys.executable, "-c", code, "run", *settings, *quick], env=environment, check=True)
        record = json.loads(next(Path(folder).rglob("record.json")).read_text(encoding="utf-8"))
    assert (record["plan"]["length_multiple"] > 1) == rounded
    return record["memory"]["train_working_set_bytes"] / 1e6, record["speed"]["train_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    for _ in range(given.rounds):
        for rounded in (False, True):
            megabytes, seconds = trained(rounded, given.steps)
            print(f"{'rounded up' if rounded else 'as they are'}: {megabytes:.0f} MB, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
