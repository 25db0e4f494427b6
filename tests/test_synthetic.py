"""training.engine=sleep: honest about being synthetic, deterministic, quick to start, and able to fail in every way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status, Trial
from qlora_exp.runs.execute import execute
from qlora_exp.training.outcome import PruneCheck


def sleeping(output: Path, *more: str) -> Config:
    quick = ["training.engine=sleep", "training.sleep_seconds=0.02", "tracking=off", f"output_root={output}"]
    return compose([*quick, *more])


def run(output: Path, *more: str) -> RunRecord:
    return execute(sleeping(output, *more))


def test_a_synthetic_run_says_so_everywhere(tmp_path: Path) -> None:
    record = run(tmp_path)
    assert record.status is Status.COMPLETED
    assert record.synthetic
    assert record.name.startswith("SYNTHETIC")
    assert any("SYNTHETIC" in warning for warning in record.warnings)
    assert read_record(OutputPaths.of(tmp_path).run(record.run_id).record) == record


def test_its_score_depends_on_the_axes_and_the_seed_only(tmp_path: Path) -> None:
    first, again = run(tmp_path, "lora.r=4"), run(tmp_path, "lora.r=4", "training.sleep_seconds=0.03")
    assert first.scores == again.scores
    for axis in ("lora.r=64", "training.learning_rate=1e-2", "quantization=fp4", "seed=7"):
        assert run(tmp_path, "lora.r=4", axis).scores != first.scores


def test_its_test_items_say_what_its_score_says_and_are_the_same_each_time(tmp_path: Path) -> None:
    def losses(*more: str) -> list[float]:
        record = run(tmp_path, "evaluation.split=test", *more)
        table = pq.read_table(OutputPaths.of(tmp_path).run(record.run_id).items("after", "test"))
        found: list[float] = table["loss_sum_nats"].to_pylist()
        assert record.scores.test is not None
        assert record.scores.test.loss_per_item == pytest.approx(sum(found) / len(found))
        return found

    assert losses("lora.r=4") == losses("lora.r=4")
    means = [sum(losses(f"lora.r={r}")) for r in (2, 4, 8)]
    assert means[0] - means[1] > means[1] - means[2] > 0


@pytest.mark.parametrize(
    ("fault", "status"),
    [("out_of_memory", Status.OUT_OF_MEMORY), ("diverge", Status.DIVERGED), ("fail", Status.FAILED)],
)
def test_a_fault_gives_its_status(tmp_path: Path, fault: str, status: Status) -> None:
    record = run(tmp_path, f"training.sleep_fault={fault}")
    assert record.status is status
    assert record.failure is not None
    assert record.scores.after is None


def test_memory_suffices_with_half_the_micro_batch(tmp_path: Path) -> None:
    record = run(tmp_path, "training.sleep_fault=out_of_memory", "training.micro_batch_size=8")
    assert record.status is Status.COMPLETED


def test_it_asks_whether_to_stop_and_stops(tmp_path: Path) -> None:
    asked: list[tuple[int, float]] = []

    def ask(step: int, loss: float, items: Sequence[float] | None) -> bool:
        assert items is not None
        assert sum(items) / len(items) == pytest.approx(loss)
        asked.append((step, loss))
        return step >= 10

    record = execute(sleeping(tmp_path, "training.evaluate_every_steps=5"), report=PruneCheck(ask, per_item=True))
    assert record.status is Status.PRUNED
    assert [step for step, _ in asked] == [5, 10]
    assert asked[0][1] > asked[1][1]


def test_a_resumed_run_keeps_its_folder_and_its_earlier_failures(tmp_path: Path) -> None:
    trial = Trial("s", 3, 1, {"lora.r": 4})
    faulty = sleeping(tmp_path, "training.sleep_fault=fail")
    record = execute(faulty, run_id="given-id", trial=trial)
    assert (record.run_id, record.trial) == ("given-id", trial)
    again = execute(sleeping(tmp_path), resume="given-id", trial=Trial("s", 3, 2, {"lora.r": 4}))
    assert again.status is Status.COMPLETED
    assert [failure.kind for failure in again.earlier_failures] == ["RuntimeError"]
    assert again.trial is not None
    assert again.trial.attempt == 2
    assert len(list(OutputPaths.of(tmp_path).runs.iterdir())) == 1


def test_nothing_heavy_is_imported_for_it(tmp_path: Path) -> None:
    program = f"""
import sys
from qlora_exp.runs.execute import execute
from qlora_exp.config.compose import compose
execute(compose(["training.engine=sleep", "training.sleep_seconds=0", "tracking=off", "output_root={tmp_path}"]))
print(" ".join({{"torch", "transformers", "mlflow", "numpy", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
