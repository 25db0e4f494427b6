"""Made-up records of finished runs, quickly: the figures mean nothing, only their shape is that of real ones.

``python tests/analysis/made_up.py 10000`` times the report of that many.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

import synthetic

from qlora_exp.records.types import Failure, Goal, RunRecord, Scores, ScoreTable, Status, Trial

BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.5}


@cache
def template() -> RunRecord:
    return synthetic.completed("made-up", "lora.r=8")


def scores(split: str, loss_per_item: float, accuracy: float = 0.5, items: int = 1000) -> Scores:
    return Scores(
        split, items, loss=loss_per_item / 2.4, loss_per_item=loss_per_item, accuracy=accuracy,
        bits_per_byte=loss_per_item / 5,
    )  # fmt: skip


def run(
    number: int = 0,
    *,
    loss: float = 1.5,
    validation_loss: float | None = None,
    seed: int = 1,
    r: int = 8,
    mode: str = "nf4",
    targets: str = "all_linear",
    variant: str = "base",
    written: str = "plain",
    learning_rate: float = 0.001,
    split: str = "test",
    memory: float | None = None,
    speed: float = 2000.0,
    accuracy: float = 0.5,
    study: str = "made-up",
    settings: Mapping[str, Any] | None = None,
    goal: str | None = None,
) -> RunRecord:
    """One finished run; ``settings``: dotted key → value."""
    made = template()
    chosen = {
        "lora.r": r,
        "quantization.mode": mode,
        "targets.set": targets,
        "model.variant": variant,
        "training.learning_rate": learning_rate,
        **(settings or {}),
    }
    config = {group: copy.copy(values) for group, values in made.config.items()} | {"seed": seed}
    for key, value in chosen.items():
        group, _, name = key.partition(".")
        config[group][name] = value
    held = 10_000_000.0 * BYTES[mode] if memory is None else memory
    parameters = {"all_linear": 14_000, "mlp": 9_000, "attention": 5_000}[targets] * r
    assert made.plan is not None
    assert made.data is not None
    plan = replace(made.plan, trainable_parameters=parameters, format=written, alpha=2.0 * r)
    test = scores("test", loss, accuracy)
    after = scores("validation", validation_loss if validation_loss is not None else loss, accuracy)
    on_test = {"test": test, "test_before": scores("test", 9.0, 0.1)} if split == "test" else {}
    half = 0.026
    return made.replace(
        run_id=f"20260102-030405-made-up-study-{number:05}-{number % 65536:04x}",
        name=f"made up {number}",
        seed=seed,
        config=config,
        plan=plan,
        memory=replace(
            made.memory, base_weight_bytes=int(held), quantization_state_bytes=0, adapter_bytes=4 * parameters,
            gradient_bytes=4 * parameters, optimizer_bytes=8 * parameters,
        ),
        speed=replace(made.speed, train_tokens_per_second=speed, total_seconds=40.0),
        scores=ScoreTable(before=scores("validation", 9.0, 0.1), after=after, **on_test),
        goal=Goal(goal, split, accuracy, accuracy - half, accuracy + half, "yes") if goal else None,
        trial=Trial(study, number, 1, {}),
    )  # fmt: skip


def failed(number: int, status: Status = Status.OUT_OF_MEMORY, message: str = "no memory left") -> RunRecord:
    record = run(number)
    return record.replace(status=status, scores=ScoreTable(), failure=Failure("OutOfMemoryError", message))


def many(count: int) -> list[RunRecord]:
    """A study of ``count`` runs: six ranks, four quantizations, three target sets, learning rates and seeds."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        point, seed = divmod(number, 3)
        r, mode = 2 ** (1 + point % 6), list(BYTES)[point // 6 % 4]
        targets = ("all_linear", "mlp", "attention")[point // 24 % 3]
        rate = float(f"{1e-4 * 1.004 ** (point // 72):.6g}")
        if number % 97 == 5:
            found.append(failed(number))
            continue
        loss = 1.4 + 0.6 / r + 0.03 * (mode == "nf4") + float(draw.normal(0, 0.02))
        speed = 2500 - 10 * r - 300 * (mode == "nf4") + float(draw.normal(0, 20))
        found.append(
            run(number, loss=loss, seed=seed, r=r, mode=mode, targets=targets, learning_rate=rate, speed=speed)
        )
    return found


def main() -> None:
    from qlora_exp.analysis.report import build
    from qlora_exp.analysis.report_content import StudyInfo, to_csv, to_html, to_markdown

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    records = many(count)
    started = time.process_time()
    report = build(records, [StudyInfo("made-up")])
    page = to_html(report, "runs")
    to_markdown(report), to_csv(report)
    print(
        f"{count} records: {time.process_time() - started:.1f} s of processor time, {len(page.encode()) / 1e6:.2f} MB"
    )
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
