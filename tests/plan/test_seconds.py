"""Operations, rates, prices: against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_exp import calibration
from qlora_exp.compose import compose
from qlora_exp.config import Quantization
from qlora_exp.environment import probe_without_torch
from qlora_exp.errors import ConfigError
from qlora_exp.plan import Architecture, WeightShape
from qlora_exp.plan.feasibility import key_of
from qlora_exp.plan.prices import read_prices, usd_per_hour
from qlora_exp.plan.seconds import (
    Interval,
    Rate,
    machine_of,
    other_seconds,
    predicted_seconds,
    predicted_usd,
    rate_from_calibration,
    rate_from_records,
    train_flops_per_token,
)
from qlora_exp.records import SCHEMA_VERSION, Plan, RunRecord, Speed, Status

WIDTH, VOCABULARY = 64, 1000
SHAPES = tuple(
    WeightShape(f"layers.0.self_attn.{name}_proj", "linear", WIDTH, WIDTH, WIDTH * WIDTH, "attention")
    for name in "qkvo"
)
ONE_LAYER = Architecture("llama", 0, SHAPES, "lm_head", 1, WIDTH, VOCABULARY)
LAYERS, HEAD = 4 * WIDTH * WIDTH, VOCABULARY * WIDTH


def test_operations_of_a_token_in_numbers() -> None:
    attention = (4 + 8) * WIDTH * 100 / 2
    assert train_flops_per_token(ONE_LAYER, 10, 100, False) == 4 * LAYERS + 6 * HEAD + 60 + attention
    recomputed = attention + 4 * WIDTH * 100 / 2
    assert train_flops_per_token(ONE_LAYER, 10, 100, True, fused_head=False) == 6 * LAYERS + 4 * HEAD + 60 + recomputed


def test_seconds_and_dollars_are_operations_over_the_rate() -> None:
    config = compose(["training.max_steps=10", "training.batch_size=4", "training.max_length=100", "lora.r=2"])
    flops = 10 * 4 * 50 * train_flops_per_token(ONE_LAYER, 2 * 2 * WIDTH, 50, False)
    rate = Rate(Interval(flops / 4, flops / 2, flops, "seen"), "here", "nf4")
    seconds = predicted_seconds(ONE_LAYER, [SHAPES[0].name], config, "cpu", rate, length=50)
    assert seconds == Interval(1.0, 2.0, 4.0, "seen")
    assert predicted_usd(seconds, 3600.0) == seconds
    assert predicted_usd(seconds, None) is None
    assert predicted_seconds(ONE_LAYER, [SHAPES[0].name], config, "cpu", None) is None
    assert Interval(1.0, 2.0, 4.0, "seen").plus(Interval(1.0, 1.0, 2.0, "too")) == Interval(2.0, 3.0, 6.0, "seen; too")


def finished(
    tokens_per_second: float = 1.0,
    mode: str = "nf4",
    flops: float | None = 10.0,
    family: str = "tiny",
    seconds: tuple[float, float] | None = None,
) -> RunRecord:
    """``seconds``: of the whole run, and of its training."""
    plan = Plan(
        "", "", "llama", 1, 1, 1, (), 1, 1.0, 1.0, "cpu", "nf4", "float32", "float32", 1, 1, 1, 1, False, "plain"
    )
    config = {"model": {"family": family, "variant": "base"}, "quantization": {"mode": mode}, "evaluation": {"on": 1}}
    total, train = seconds or (None, None)
    return RunRecord(
        SCHEMA_VERSION,
        "run",
        "run",
        Status.COMPLETED,
        "",
        None,
        config,
        probe_without_torch(),
        plan=replace(plan, train_flops_per_token=flops),
        speed=Speed(train_tokens_per_second=tokens_per_second, total_seconds=total, train_seconds=train),
    )


KIN = key_of(finished().config, probe_without_torch().device)


def test_finished_trainings_recalibrate_the_rate() -> None:
    here = machine_of(probe_without_torch())
    assert rate_from_records([], here, "nf4", KIN) is None
    assert rate_from_records([finished(7.0, "fp32"), finished(7.0, flops=None)], here, "nf4", KIN) is None
    assert rate_from_records([finished(7.0)], "another machine", "nf4", KIN) is None
    one = rate_from_records([finished(7.0)], here, "nf4", KIN)
    assert one is not None
    assert (one.flops_per_second.low, one.flops_per_second.high) == pytest.approx((35.0, 140.0))
    several = rate_from_records([finished(rate) for rate in (9.0, 10.0, 10.0, 11.0)], here, "nf4", KIN)
    assert several is not None
    speed = several.flops_per_second
    assert speed.middle == pytest.approx((90.0 * 100 * 100 * 110) ** 0.25)
    assert 70 < speed.low < 90
    assert 110 < speed.high < 130


def test_trainings_of_the_same_base_go_before_those_of_others() -> None:
    here = machine_of(probe_without_torch())
    others = [finished(rate, family="large") for rate in (100.0, 200.0)]
    alone = rate_from_records([finished(7.0)], here, "nf4", KIN)
    assert rate_from_records([*others, finished(7.0)], here, "nf4", KIN) == alone
    of_others = rate_from_records(others, here, "nf4", KIN)
    assert of_others is not None
    assert of_others.flops_per_second.middle == pytest.approx((1000.0 * 2000.0) ** 0.5)


def test_loading_and_scoring_are_told_by_runs_with_the_same_evaluation_alone() -> None:
    here, device = machine_of(probe_without_torch()), probe_without_torch().device
    runs = [finished(seconds=(30.0, 20.0)), finished(seconds=(60.0, 20.0))]
    config = runs[0].config
    told = other_seconds(runs, here, config, device)
    assert told is not None
    assert told.middle == pytest.approx((10.0 * 40.0) ** 0.5)
    assert told.low < 10.0 < 40.0 < told.high
    assert other_seconds(runs, here, {**config, "evaluation": {"on": 2}}, device) is None
    assert other_seconds(runs, "another machine", config, device) is None
    assert other_seconds([one.replace(status=Status.FAILED) for one in runs], here, config, device) is None
    assert other_seconds([finished(family="large", seconds=(30.0, 20.0)), finished()], here, config, device) is None


def test_calibrated_rates_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = probe_without_torch()
    assert calibration.known_rate(here, Quantization.nf4) is None
    calibration.rates_file().parent.mkdir()
    calibration.rates_file().write_text(json.dumps({machine_of(here): {"nf4": 2e9}, "other": 3}))
    assert calibration.known_rate(here, Quantization.nf4) == rate_from_calibration(2e9, machine_of(here), "nf4")
    assert calibration.known_rate(here, Quantization.int8) is None
    assert calibration.known_rate(replace(here, torch_threads=7), Quantization.nf4) is None
    calibration.rates_file().write_text("{torn")
    assert calibration.known_rate(here, Quantization.nf4) is None


def test_the_shipped_prices_are_read_by_a_drivers_name() -> None:
    table = read_prices()
    assert usd_per_hour("cuda", "NVIDIA A100-SXM4-80GB", table) == table["A100 SXM4"]
    assert usd_per_hour("cuda", "Tesla T4", table) == table["T4"]
    assert usd_per_hour("cuda", "some other card", table) is None
    assert usd_per_hour("cpu", "any processor", table) == table["cpu"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("eur_per_hour: {T4: 0.5}", "usd_per_hour"),
        ("usd_per_hour: {T4: cheap}", "T4"),
        ("usd_per_hour: {T4: -1}", "T4"),
        ("usd_per_hour: [T4]", "devices"),
        ("usd_per_hour: {", "read"),
    ],
)
def test_a_price_table_with_another_unit_or_a_wrong_price_is_refused(tmp_path: Path, text: str, told: str) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_prices(table)
    assert told in f"{caught.value.what} {caught.value.where} {caught.value.hint}"
