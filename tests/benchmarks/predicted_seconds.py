"""Predicted and measured seconds of training, in fresh processes on one thread: docs/predicted_seconds.csv.

    python tests/benchmarks/predicted_seconds.py --measure   # some minutes on an idle core
    python tests/benchmarks/predicted_seconds.py             # predicts again for the measured ones by the calibration

The machine is calibrated first (``qlora-exp calibrate``). Each training is predicted by that calibration, as if no run
had been made, and those of the embedded model by all others of them in the same quantization, too. Prints a Markdown
table, how many intervals hold what was measured, and the shares of the calibrated rate that the fitted ones reach.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from predicted_memory import Case, overrides

from qlora_exp.config.enums import Quantization
from qlora_exp.estimate.calibration import calibration_flops_per_second, rate_from_calibration, rates_file
from qlora_exp.estimate.throughput import Interval, from_finished_runs, prediction_interval, seconds_at
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.system import heap

TABLE = Path(__file__).resolve().parents[2] / "docs" / "predicted_seconds.csv"
IN_PROCESSOR_TIME = (
    "import sys, time; time.perf_counter = time.process_time; "
    "from qlora_exp.cli import main; sys.exit(main(sys.argv[1:]))"
)
"""On one thread that waits for nothing as long as the wall's, whatever else the machine does."""
OWN_TASK = 0
"""In place of a length: the embedded model's own task, of which one token in thirteen carries a loss. Else rows of one
length, with a loss on nearly all of it."""


@dataclass(frozen=True)
class Training:
    """``fitted``: said before anything was measured. CALIBRATED_SHARE may be fitted to these; the others are held out,
    with all architectures but the embedded pair's and plain Llama's."""

    case: Case
    steps: int
    fitted: bool

    @property
    def split(self) -> str:
        return "fit" if self.fitted else "held out"

    @property
    def settings(self) -> dict[str, str | int]:
        case = self.case
        names = ("architecture", "hidden", "layers", "vocabulary", "quantization", "r", "targets", "batch", "length")
        return {"split": self.split, **{name: getattr(case, name) for name in names}, "steps": self.steps}


def embedded(mode: str, r: int, targets: str, batch: int, length: int, steps: int, fitted: bool) -> Training:
    return Training(Case("embedded", 192, 4, 4096, mode, r, targets, batch, length), steps, fitted)


TRAININGS = (
    embedded("fp32", 8, "all_linear", 16, OWN_TASK, 30, True),
    embedded("fp32", 16, "all_linear", 4, 256, 10, False),
    embedded("nf4", 64, "all_linear", 8, OWN_TASK, 25, True),
    embedded("nf4", 8, "attention", 32, OWN_TASK, 12, False),
    embedded("int8", 8, "all_linear", 8, 128, 10, True),
    embedded("int8", 4, "attention", 4, OWN_TASK, 40, False),
    embedded("fp32", 4, "attention_qv", 8, 128, 10, True),
    embedded("fp32", 32, "attention", 4, OWN_TASK, 50, False),
    embedded("nf4", 8, "mlp", 2, 256, 16, True),
    embedded("nf4", 16, "all_linear", 8, 96, 12, False),
    embedded("int8", 16, "all_linear", 16, OWN_TASK, 20, True),
    embedded("int8", 32, "attention", 16, 64, 12, False),
    Training(Case("llama", 512, 4, 8192, "fp32", 8, "all_linear", 4, 128), 5, True),
    Training(Case("qwen3", 512, 4, 16384, "nf4", 8, "all_linear", 4, 128), 4, False),
    Training(Case("llama", 768, 4, 4096, "nf4", 16, "attention", 2, 256), 4, True),
    Training(Case("gpt2", 512, 4, 4096, "fp32", 16, "attention", 8, 96), 4, False),
    Training(Case("llama", 512, 4, 4096, "bf16", 16, "all_linear", 4, 128), 5, True),
    Training(Case("smollm2_135m", 576, 30, 49152, "fp32", 8, "all_linear", 4, 64), 2, False),
)


@dataclass(frozen=True)
class Measured:
    """Operations and seconds of one training; ``by_runs``: what the others tell of it."""

    train_flops: float
    calibrated_flops_per_second: float
    train_seconds: float
    by_runs: Interval | None

    @property
    def share(self) -> float:
        """Of the calibrated rate, what it reached."""
        return self.train_flops / self.train_seconds / self.calibrated_flops_per_second

    @property
    def by_calibration(self) -> Interval:
        seconds = seconds_at(rate_from_calibration(self.calibrated_flops_per_second), self.train_flops)
        assert seconds is not None
        return seconds


Row = tuple[Training, Measured]


def measured_rows(folder: Path, to_do: int) -> list[Row]:
    """Those whose runs lie in ``folder``, after as many of the others as ``to_do`` says were made there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment |= {heap.MALLOC_VARIABLE: heap.TUNABLES, "XDG_CACHE_HOME": str(folder / "cache")}
    os.environ["XDG_CACHE_HOME"] = environment["XDG_CACHE_HOME"]
    if not rates_file().exists():
        command(environment, "calibrate", "--threads", "1")
    places = {training: folder / "-".join(map(str, training.settings.values())) for training in TRAININGS}
    for training in [one for one in TRAININGS if not records_in(places[one])][:to_do]:
        places[training].mkdir(exist_ok=True)  # an output root of its own: no other run is seen there
        command(environment, "run", *settings(training, places[training]))
        print(training, file=sys.stderr, flush=True)
    records = {training: found[0] for training, place in places.items() if (found := records_in(place))}
    return [
        (training, measured(record, [other for key, other in records.items() if key != training]))
        for training, record in records.items()
    ]


def records_in(place: Path) -> list[RunRecord]:
    records = [read_record(file) for file in (place / "outputs").rglob("record.json")]
    return [record for record in records if record.status is Status.COMPLETED]


def command(environment: Mapping[str, str], *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESSOR_TIME, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{arguments}\n{done.stdout}\n{done.stderr}")


def settings(training: Training, folder: Path) -> list[str]:
    own = training.case.length == OWN_TASK
    case = replace(training.case, length=64) if own else training.case
    left_out = ("training.max_steps=", *(("task", "training.max_length=") if own else ()))
    kept = [text for text in overrides(case, folder, joined=True) if not text.startswith(left_out)]
    return [*kept, f"training.max_steps={training.steps}", "training.threads=1"]


def measured(record: RunRecord, others: Sequence[RunRecord]) -> Measured:
    plan = record.plan
    assert plan is not None
    assert plan.train_flops_per_token is not None
    assert plan.predicted_train_tokens is not None
    assert record.speed.train_seconds is not None
    flops = plan.train_flops_per_token * plan.predicted_train_tokens
    calibrated = calibration_flops_per_second(record.environment, Quantization(record.config["quantization"]["mode"]))
    assert calibrated is not None
    rate = from_finished_runs(others, record.environment, record.config, record.speed.steps).rate
    return Measured(flops, calibrated, record.speed.train_seconds, seconds_at(rate, flops))


def read_rows() -> list[Row]:
    """Those of TRAININGS that were measured."""
    known = {tuple(map(str, training.settings.values())): training for training in TRAININGS}
    rows = []
    with TABLE.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            training = known[tuple(line[name] for name in TRAININGS[0].settings)]
            ends = [line[f"by_runs_{end}_seconds"] for end in ("low", "middle", "high")]
            by_runs = Interval(*map(float, ends), line["by_runs_basis"]) if all(ends) else None
            figures = ("train_flops", "calibrated_flops_per_second", "train_seconds")
            rows.append((training, Measured(*(float(line[name]) for name in figures), by_runs)))
    return rows


def write_rows(rows: Sequence[Row]) -> None:
    with TABLE.open("w", encoding="utf-8", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for training, found in rows:
            line = {
                **training.settings,
                "train_flops": f"{found.train_flops:.6g}",
                "calibrated_flops_per_second": f"{found.calibrated_flops_per_second:.6g}",
                "train_seconds": f"{found.train_seconds:.4g}",
                "share_of_calibrated": f"{found.share:.3g}",
                **ends_of("by_calibration", found.by_calibration),
                **ends_of("by_runs", found.by_runs),
                "by_runs_basis": found.by_runs.basis if found.by_runs is not None else "",
            }
            if writer is None:
                writer = csv.DictWriter(stream, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)


def ends_of(name: str, interval: Interval | None) -> dict[str, str]:
    ends = ("low", "middle", "high")
    return {f"{name}_{end}_seconds": "" if interval is None else f"{asdict(interval)[end]:.4g}" for end in ends}


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| | training | split | by the calibration | by the other runs | measured |"
    yield "|---|---|---|---|---|---|"
    for training, found in rows:
        case = training.case
        length = "its own task" if case.length == OWN_TASK else f"{case.length} tokens"
        model = f"{case.architecture} {case.hidden}"
        what = f"{case.quantization}, r = {case.r} {case.targets}, {training.steps} × {case.batch} rows, {length}"
        told = " | ".join(map(words, (found.by_calibration, found.by_runs)))
        yield f"| {model} | {what} | {training.split} | {told} | {found.train_seconds:.1f} s |"


def words(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.middle:.1f} s ({interval.low:.1f}–{interval.high:.1f})"


def coverage(rows: Sequence[Row]) -> Iterator[str]:
    for split in ("fit", "held out"):
        chosen = [found for training, found in rows if training.split == split]
        yield f"by the calibration, {split}: {held(chosen, [found.by_calibration for found in chosen])}"
    told = [found for _, found in rows if found.by_runs is not None]
    yield f"by the other runs: {held(told, [found.by_runs for found in told if found.by_runs is not None])}"


def held(found: Sequence[Measured], intervals: Sequence[Interval]) -> str:
    pairs = list(zip(found, intervals, strict=True))
    within = sum(told.low <= one.train_seconds <= told.high for one, told in pairs)
    factors = [max(one.train_seconds / told.middle, told.middle / one.train_seconds) for one, told in pairs]
    if not factors:
        return "none"
    return (
        f"{within} of {len(pairs)} intervals hold what was measured; the middle is off by a factor of"
        f" {statistics.median(factors):.2f} (median), {max(factors):.2f} (most)"
    )


def fitted_shares(rows: Sequence[Row]) -> Interval:
    """What CALIBRATED_SHARE is by the fitted trainings: the interval for one more, and the mean of what they took for
    each operation."""
    shares = [found.share for training, found in rows if training.fitted]
    return prediction_interval(shares, statistics.harmonic_mean(shares), f"{len(shares)} fitted trainings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="calibrate and train anew")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; what lies there isn't made again")
    parser.add_argument("--most", type=int, default=len(TRAININGS), help="of the trainings only so many now")
    given = parser.parse_args()
    if given.measure:
        with contextlib.ExitStack() as stack:
            folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            rows = measured_rows(folder.absolute(), given.most)
    else:
        rows = read_rows()
    write_rows(rows)
    print(*table(rows), "", *coverage(rows), sep="\n")
    print(f"CALIBRATED_SHARE by the fitted ones: {fitted_shares(rows)}")


if __name__ == "__main__":
    main()
