"""A run that is predicted far above the memory is refused before anything starts, by any setting that makes it so."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.training.micro_batches import cut_rows, padded_tokens

ROWS = 10_000_000
"""More than any machine can hold in one micro-batch: terabytes."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "rows.jsonl"
    rows = [{"prompt": f"Row {number}: a berry has the colour", "completion": " red"} for number in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "settings",
    [
        (f"training.batch_size={ROWS}",),
        (f"training.batch_size={ROWS}", f"training.micro_batch_size={ROWS}", "model.variant=instruct"),
        (f"training.batch_size={ROWS}", "training.gradient_checkpointing=on", "training.padding_free=off"),
    ],
)
def test_a_batch_far_above_the_memory_starts_nothing(
    settings: tuple[str, ...], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("task=local", f"task.path={task}", f"output_root={tmp_path / 'outputs'}", "tracking=off")
    assert main(["run", *given, "training.device=cpu", *settings]) == 2
    errors = capsys.readouterr().err
    assert "is predicted to need" in errors
    assert "training.micro_batch_size=" in errors
    assert not (tmp_path / "outputs" / "runs").exists()


def test_a_micro_batch_in_tokens_is_planned_for_a_huge_batch(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cutting the rows of a step was quadratic: such a plan, and such a run, never ended."""
    given = ("task=local", f"task.path={task}", "training.batch_size=1000000", "training.micro_batch_tokens=1000000")
    assert main(["plan", "--json", *given]) == 0
    [planned] = json.loads(capsys.readouterr().out)
    assert planned["settings"]["micro_batch_tokens"] == 1_000_000


@pytest.mark.parametrize("cost", [sum, padded_tokens(), padded_tokens(8)])
def test_micro_batches_hold_as_many_rows_as_their_limit_allows(cost) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(0, 40))]
        limit = draw.choice((1, 10, 50, 200, 1000, 10**6))
        groups = cut_rows(lengths, limit, cost)
        in_order = [row for group in groups for row in group]
        assert in_order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        for group, following in itertools.zip_longest(groups, groups[1:]):
            assert len(group) == 1 or cost([lengths[row] for row in group]) <= limit
            if following:
                assert cost([lengths[row] for row in (*group, following[0])]) > limit
