"""Labels: what varies among runs, in a few characters, and ids that are as short as commands allow."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_exp.formatting import TableColumn, fitted_table
from qlora_exp.records.labels import label, labels, shared_settings, short_id

NF4 = {"model": {"family": "embedded", "variant": "base"}, "quantization": {"mode": "nf4"}}


def settings(r: int, rate: float, seed: int, **changes: Any) -> dict[str, Any]:
    return {"config": {**NF4, "lora": {"r": r}, "training": {"learning_rate": rate}, "seed": seed, **changes}}


def test_a_label_has_what_varies_and_the_header_what_does_not() -> None:
    rows = [settings(8, 0.004, 1), settings(16, 0.00282843, 3)]
    assert labels(rows) == ["r8 lr0.004 s1", "r16 lr0.0028 s3"]
    assert shared_settings(rows) == "embedded base nf4"


def test_numbers_have_enough_digits_to_differ() -> None:
    assert labels([settings(8, rate, 1) for rate in (0.00282843, 0.0028199)]) == ["lr0.00283", "lr0.00282"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([settings(8, 1e-5, 1)] * 2, ["embedded base nf4 r8 lr1e-5 s1", "embedded base nf4 r8 lr1e-5 s1 (2)"]),
        ([{"lora.r": 8}, {"lora.r": 8, "lora.dropout": 0.1}], ["default", "dropout0.1"]),
        ([{"quantization": "nf4"}, {"quantization": "fp32"}], ["nf4", "fp32"]),
        ([{"targets.modules": ["q_proj", "v_proj"]}, {"targets": "mlp"}], ["q_proj+v_proj", "mlp"]),
        ([{"lora.rslora": True, "seed": 1}, {"lora.rslora": False, "seed": 1}], ["rslora=true", "rslora=false"]),
        ([{"model.path": "/models/a"}, {"model.path": "/models/b/"}], ["a", "b"]),
        ([{"a.ratio": 1, "b.ratio": 2}, {"a.ratio": 3, "b.ratio": 4}], ["a.ratio=1 b.ratio=2", "a.ratio=3 b.ratio=4"]),
        ([{"a.ratio": 1, "b.share": 2}, {"a.ratio": 3, "b.share": 2}], ["ratio=1", "ratio=3"]),
        (
            [{"evaluation.split": "test", "seed": 1}, {"evaluation.split": "validation", "seed": 2}],
            ["s1", "s2 validation"],
        ),
        (
            [{"lora.alpha_policy": "fixed", "lora.alpha": 32}, {"lora.alpha_policy": "2r", "lora.alpha": None}],
            ["alpha32", "alpha=2r"],
        ),
        (
            [{"task.prompt": "a long prompt\nof two lines and more {x}"}, {}],
            ["prompt=a long prompt of two li…", "default"],
        ),
        ([], []),
    ],
)
def test_labels_of_settings(rows: list[dict[str, Any]], expected: list[str]) -> None:
    assert labels(rows) == expected


def test_models_in_folders_of_one_name_are_named_with_their_parents() -> None:
    folders = ["/a/x/model", "/a/y/model", "/b/y/model"]
    rows = [settings(8, 0.004, 1, model={"family": "local", "path": path}) for path in folders]
    assert labels(rows) == ["a/x/model", "a/y/model", "b/y/model"]
    assert labels(rows[:2]) == ["x/model", "y/model"]
    assert shared_settings([rows[0], rows[0]]).split()[0] == "model"


def test_what_follows_from_the_model_or_changes_no_result_is_not_in_a_label() -> None:
    rows = [
        settings(8, 0.004, 1, model={"family": family, "checkpoints": {"base": family}}, output_root=family)
        for family in ("qwen3_0_6b", "smollm2_135m")
    ]
    assert labels(rows) == ["qwen3_0_6b", "smollm2_135m"]


def test_a_trials_name_depends_on_its_own_params_alone() -> None:
    assert label({"lora.r": 16, "training.learning_rate": 0.002828, "seed": 3}) == "r16 lr0.0028 s3"
    assert label({}) == "default"


def test_a_short_id_is_as_long_as_it_must_be() -> None:
    runs = ["20261130-120000-a-3f2a", "20261130-120001-b-3f2a", "20261130-120002-a-2026"]
    assert short_id("20261130-120000-embedded-base-nf4-r8-3f2a") == "3f2a"
    assert [short_id(run, runs) for run in runs] == ["a-3f2a", "b-3f2a", "a-2026"]
    assert short_id(runs[0], [*runs, "x-a-3f2a"]) not in ("3f2a", "a-3f2a")


def test_a_table_leaves_out_the_least_important_columns_where_it_is_narrow() -> None:
    rows = [{"run": "3f2a", "label": "r16 lr0.0028 s3", "peak_bytes": 123456789, "rate": None}]
    columns = [
        TableColumn("run"),
        TableColumn("label", priority=1),
        TableColumn("peak_bytes", "peak", priority=2),
        TableColumn("rate", priority=3),
    ]
    wide, missing = fitted_table(rows, columns, 100)
    assert (len(wide.columns), missing) == (4, [])
    narrow, missing = fitted_table(rows, columns, 28)
    assert [column.header for column in narrow.columns] == ["run", "label"]
    assert [column.key for column in missing] == ["peak_bytes", "rate"]
