from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.comparable import groups_of, require_comparable, setting_differences
from qlora_exp.errors import AnalysisError
from qlora_exp.records.types import RunRecord, Status


def other_plan(record: RunRecord, **changes: object) -> RunRecord:
    assert record.plan is not None
    return record.replace(plan=replace(record.plan, **changes))


def ended_by_budget(record: RunRecord, steps: int) -> RunRecord:
    assert record.training is not None
    return record.replace(training=replace(record.training, steps=steps, ended_by_budget="tokens"))


def other_data(record: RunRecord, **changes: object) -> RunRecord:
    assert record.data is not None
    return record.replace(data=replace(record.data, **changes))


def test_runs_that_differ_in_their_configuration_alone_are_one_group() -> None:
    records = [made_up.run(0, r=8), made_up.run(1, r=16), made_up.run(2, mode="fp16", learning_rate=0.004)]
    assert len(require_comparable(records).records) == 3


def test_the_rows_alone_must_be_equal_across_checkpoints_and_formats() -> None:
    cells = [(variant, written) for variant in ("base", "instruct") for written in ("plain", "chat")]
    records = [
        other_data(made_up.run(n, variant=variant, written=written), fingerprint=written, rows_fingerprint="rows")
        for n, (variant, written) in enumerate(cells)
    ]
    assert len(require_comparable(records).records) == 4
    others = [other_data(record, rows_fingerprint="fewer rows") for record in records[2:]]
    with pytest.raises(AnalysisError, match="data_version"):
        require_comparable([*records[:2], *others])


def test_a_record_of_an_older_version_is_not_comparable_with_a_newer_one_of_other_rows() -> None:
    old, new = made_up.run(0), other_data(made_up.run(1, r=16), rows_fingerprint="rows")
    assert old.data is not None
    assert old.data.rows_fingerprint is None
    assert len(require_comparable([old, new]).records) == 2
    with pytest.raises(AnalysisError, match="data_version"):
        require_comparable([old, other_data(new, fingerprint="fewer rows")])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (other_plan(made_up.run(9), max_steps=7), "max_steps: 80 in 2 runs, 7 in 1 runs"),
        (ended_by_budget(made_up.run(9), steps=11), "max_steps: 80 in 2 runs, 11 in 1 runs"),
        (other_plan(made_up.run(9), adapter_dtype="bfloat16"), "adapter_dtype"),
        (other_plan(made_up.run(9), batch_size=4), "batch_size"),
        (other_data(made_up.run(9), fingerprint="other rows"), "data_version"),
        (other_data(made_up.run(9), task="another"), "task"),
        (made_up.run(9, split="validation"), "split: test in 2 runs, validation in 1 runs"),
    ],
)
def test_a_comparison_of_runs_that_are_not_comparable_is_refused_with_the_difference_named(
    changed: RunRecord, named: str
) -> None:
    with pytest.raises(AnalysisError, match="aren't comparable") as refused:
        require_comparable([made_up.run(0), made_up.run(1, r=16), changed])
    assert named in refused.value.what


def test_base_and_instruct_read_the_same_rows_by_other_tokenizers_and_stay_comparable() -> None:
    base = made_up.run(0)
    instruct = other_data(made_up.run(1, variant="instruct", written="chat"), fingerprint="read as chat")
    assert len(groups_of([base, instruct])) == 1


def test_synthetic_runs_are_refused() -> None:
    with pytest.raises(AnalysisError, match="SYNTHETIC"):
        require_comparable([made_up.run(0), made_up.run(1).replace(synthetic=True)])


def test_runs_that_did_not_finish_are_in_no_group() -> None:
    groups = groups_of([made_up.run(0), made_up.failed(1), made_up.run(2).replace(status=Status.RUNNING)])
    assert [len(group.records) for group in groups] == [1]
    assert setting_differences(groups) == []
