"""What one ask and one tell cost with 100, 1,000 and 10,000 finished trials in storage: at most 1.5× the cost at 100.

python tests/benchmarks/ask_tell.py [--rounds 30]

Random sampler; the sampler's own time (drawing, the wrapper included) is measured inside and shown apart. Medians over
the rounds; SQLite on this machine's disk, so the milliseconds are mostly its commits.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

from studies import a_spec, completed, myself, opened

from qlora_exp.study.distributions import distribution

SIZES = (100, 1_000, 10_000)


class Stopwatch:
    """Seconds spent inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def fill(database: Path, spaces: dict[str, str], size: int) -> None:
    """Finished trials in one transaction, straight into Optuna's tables: through its API 10,000 take minutes."""
    with closing(sqlite3.connect(database)) as connection, connection:
        numbers = range(size)
        connection.executemany(
            "INSERT INTO trials (trial_id, number, study_id, state) VALUES (?, ?, 1, 'COMPLETE')",
            [(number + 1, number) for number in numbers],
        )
        connection.executemany(
            "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, 0, ?, 'FINITE')",
            [(number + 1, float(number)) for number in numbers],
        )
        connection.executemany(
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (?, ?, ?, ?)",
            [(number + 1, key, 1.0, space) for number in numbers for key, space in spaces.items()],
        )
        connection.executemany(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, 'run_id', ?)",
            [(number + 1, f'"run-{number}"') for number in numbers],
        )


def measure(root: Path, size: int, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of claim and of tell without the sampler, and the sampler's own in both."""
    spec = a_spec(
        root, params={"lora.r": "4,8,16", "training.learning_rate": "interval(0,1)"}, n_trials=size + rounds + 1
    )
    study = opened(spec)
    fill(root / "optuna.db", {axis.key: distribution_to_json(distribution(axis)) for axis in spec.axes}, size)
    watch = Stopwatch()
    sampler = study._study.sampler
    for name in ("infer_relative_search_space", "sample_relative", "sample_independent"):
        setattr(sampler, name, watch.wrap(getattr(sampler, name)))
    asks, tells, draws = [], [], []
    for round_number in range(rounds + 1):
        watch.seconds = 0.0
        start = time.perf_counter()
        claim = study.claim(myself(), 600.0)
        asked = time.perf_counter()
        assert claim is not None
        study.tell(claim, completed(0.5))
        told = time.perf_counter()
        if round_number:  # the first reads everything, once per process
            asks.append(asked - start - watch.seconds)
            tells.append(told - asked)
            draws.append(watch.seconds)
    return tuple(1000 * statistics.median(series) for series in (asks, tells, draws))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    table = Table("trials in storage", "ask, ms", "tell, ms", "ask + tell, ms", "times that at 100", "sampler, ms")
    base = None
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            ask, tell, draw = measure(Path(folder), size, rounds)
        base = base or ask + tell
        table.add_row(
            f"{size:,}", f"{ask:.1f}", f"{tell:.1f}", f"{ask + tell:.1f}", f"{(ask + tell) / base:.2f}", f"{draw:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
