"""The twelve trials of orchestration.py as a Hydra application with hydra-optuna-sweeper, against ``qlora-exp sweep``.

    python -m pip install --target SITE --no-deps hydra-optuna-sweeper==1.4.0rc3 hydra-core==1.4.0rc3 \
        omegaconf==2.4.1rc1
    OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/official_sweeper.py --site SITE [--rounds 1] [--steps 80]
        [--batch 32]

The application is what one writes with that sweeper: ``@hydra.main``, the training of train_plain.py, the validation
loss as the value; its basic launcher runs all trials in one process, so that imports are paid once, and loads the model
for each. Nothing of it is stored and no run is logged; ``qlora-exp sweep`` writes records, the study's database and the
MLflow store.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from orchestration import ENVIRONMENT, ITEMS, RANKS, RATES, SEEDS, records, run_sweep

APPLICATION = """
    import argparse, sys
    sys.path.insert(0, {folder!r})
    import hydra
    from train_plain import train

    @hydra.main(version_base=None, config_path=None)
    def main(config) -> float:
        given = dict(config, steps={steps}, batch={batch}, items={items}, output="out", speed=False)
        return train(argparse.Namespace(**given))

    main()
"""


def run_official(folder: Path, site: Path, steps: int, batch: int) -> float:
    """Return the seconds of the application's multirun."""
    program = folder / "application.py"
    there = {"folder": str(Path(__file__).parent), "steps": steps, "batch": batch, "items": ITEMS}
    program.write_text(textwrap.dedent(APPLICATION).format(**there))
    command = [sys.executable, str(program), "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid"]
    command += [f"hydra.sweeper.n_trials={len(RANKS) * len(RATES) * len(SEEDS)}", "hydra.sweeper.direction=minimize"]
    for key, values in (("r", RANKS), ("learning_rate", RATES), ("seed", SEEDS)):
        command.append(f"+{key}=choice({','.join(map(str, values))})")
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=ENVIRONMENT | {"PYTHONPATH": str(site)})
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True, help="the folder that has hydra-optuna-sweeper")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80, help="of each trial")
    parser.add_argument("--batch", type=int, default=32, help="rows of each of its steps")
    given = parser.parse_args()
    print("| round | hydra-optuna-sweeper (s) | qlora-exp sweep (s) | ours / theirs |\n|---|---|---|---|", flush=True)
    for number in range(1, given.rounds + 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = run_official(folder, given.site.resolve(), given.steps, given.batch)
            ours = run_sweep(folder / "outputs", given.steps, given.batch)
            assert len(records(folder / "outputs")) == len(RANKS) * len(RATES) * len(SEEDS), "a trial is missing"
        print(f"| {number} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
