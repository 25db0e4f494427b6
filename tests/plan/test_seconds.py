"""Operations, rates, prices: against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Quantization
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.errors import ConfigError
from qlora_exp.estimate import benchmark, calibration
from qlora_exp.estimate.device import device_by_name
from qlora_exp.estimate.estimator import Estimator, RunEstimate
from qlora_exp.estimate.planner import Planner
from qlora_exp.estimate.throughput import Interval, MeasuredThroughput, from_finished_runs, machine_of, t_95
from qlora_exp.estimate.workload import MeanRow, RowLengths, Workload, train_flops_per_token
from qlora_exp.records.types import SCHEMA_VERSION, Memory, Plan, RunRecord, Speed, Spent, Status
from qlora_exp.system.cards import Price, price_of, read_prices, usd_per_hour
from qlora_exp.system.environment import probe_without_torch

WIDTH, VOCABULARY = 64, 1000
SHAPES = tuple(
    WeightShape(f"layers.0.self_attn.{name}_proj", "linear", WIDTH, WIDTH, WIDTH * WIDTH, "attention")
    for name in "qkvo"
)
ONE_LAYER = Architecture("llama", 0, SHAPES, "lm_head", 1, WIDTH, VOCABULARY)
LAYERS, HEAD = 4 * WIDTH * WIDTH, VOCABULARY * WIDTH


def test_operations_of_a_token_in_numbers() -> None:
    attention = (4 + 8) * WIDTH * 100 / 2
    whole = MeanRow.whole(100)
    assert train_flops_per_token(ONE_LAYER, 10, whole, False) == 4 * LAYERS + 6 * HEAD + 60 + attention
    kept = train_flops_per_token(ONE_LAYER, 10, whole, True, keeps_attention=True)
    assert kept == 6 * LAYERS + 6 * HEAD + 80 + attention
    recomputed = attention + 4 * WIDTH * 100 / 2
    assert (
        train_flops_per_token(ONE_LAYER, 10, whole, True, fused_head=False) == 6 * LAYERS + 4 * HEAD + 80 + recomputed
    )


@pytest.mark.parametrize(("family", "per_token"), [("mixtral", 2), ("llama4_text", 4)])
def test_of_experts_those_count_that_a_token_passes_through(family: str, per_token: int) -> None:
    """By torch's own count of a forward pass. Llama 4 computes every expert for every token."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.models.inspect import architecture_of

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(family, **sizes, vocab_size=1000)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    described = architecture_of(model)
    assert {(one.count, one.per_token, one.intermediate, one.gated) for one in described.experts} == {
        (4, per_token, 96, True)
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(40)[None], use_cache=False)
    row = MeanRow(tokens=40, padded=40, scored=40, attended=40)
    forward = 40 * train_flops_per_token(described, 0, row, False, fused_head=False) / 2
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_padding_is_counted_in_the_layers_and_in_the_head_the_tokens_with_a_loss_alone() -> None:
    attention = (4 + 8) * WIDTH * 100 / 2
    of_a_row = 100 * (4 * LAYERS + 60 + attention) + 5 * 6 * HEAD
    assert train_flops_per_token(ONE_LAYER, 10, MeanRow(80, 100, 5, 100), False) == pytest.approx(of_a_row / 80)
    lengths = RowLengths.of([60, 100], [4, 6])
    training = compose(["training.max_steps=10", "training.batch_size=8"]).training
    assert Workload.of(training, lengths).row == MeanRow(80, 90, 5, 90)
    assert Workload.of(replace(training, micro_batch_size=1), lengths).row == MeanRow(80, 80, 5, 80)
    found = Workload.of(training, lengths)
    assert (found.tokens, found.padded_tokens, found.scored_tokens) == (1600, 1800, 100)


def test_without_padding_attention_alone_computes_the_longest_row() -> None:
    attention = (4 + 8) * WIDTH * 100 / 2
    of_a_row = 80 * (4 * LAYERS + 60) + 100 * attention + 5 * 6 * HEAD
    assert train_flops_per_token(ONE_LAYER, 10, MeanRow(80, 80, 5, 100), False) == pytest.approx(of_a_row / 80)
    training = compose(["training.max_steps=10", "training.batch_size=8"]).training
    found = Workload.of(training, RowLengths.of([60, 100], [4, 6]), padding_free=True)
    assert found.row == MeanRow(80, 80, 5, 90)
    assert (found.tokens, found.padded_tokens, found.scored_tokens) == (1600, 1600, 100)


def test_seconds_and_dollars_are_operations_over_the_rate() -> None:
    config = compose(["training.max_steps=10", "training.batch_size=4", "training.max_length=100", "lora.r=2"])
    flops = 10 * 4 * 50 * train_flops_per_token(ONE_LAYER, 2 * 2 * WIDTH, MeanRow.whole(50), False)

    def estimate(rate: Interval | None, usd_per_hour: float) -> RunEstimate:
        estimator = Estimator(
            ONE_LAYER,
            (SHAPES[0].name,),
            device_by_name("cpu").hardware,
            rows=lambda _: RowLengths.of([50] * 4, [50] * 4),
            rates=lambda *_: (MeasuredThroughput(rate, None, None), None),
            joined_heap=False,
            prices={"cpu": usd_per_hour} if usd_per_hour else {},
        )
        return estimator.estimate(config)

    rate = Interval(flops / 4, flops / 2, flops, "seen")
    priced = estimate(rate, 3600.0)
    assert priced.time.train == Interval(1.0, 2.0, 4.0, "seen")
    assert priced.usd(priced.time.train) == priced.time.train
    unpriced = estimate(rate, 0.0)
    assert unpriced.usd(unpriced.time.train) is None
    assert estimate(None, 3600.0).time.train is None
    assert Interval(1.0, 2.0, 4.0, "seen").plus(Interval(1.0, 1.0, 2.0, "too")) == Interval(2.0, 3.0, 6.0, "seen; too")


def finished(
    tokens_per_second: float = 1.0,
    mode: str = "nf4",
    flops: float | None = 10.0,
    family: str = "tiny",
    other: tuple[float, float, float] | None = None,
) -> RunRecord:
    """``other``: seconds of loading, of scoring the untouched base, of scoring the tuned one."""
    plan = Plan(
        "", "", "llama", 1, 1, 1, (), 1, 1.0, 1.0, "cpu", "nf4", "float32", "float32", 1, 1, 1, 1, False, "plain"
    )
    config = {"model": {"family": family, "variant": "base"}, "quantization": {"mode": mode}, "evaluation": {"on": 1}}
    load, untouched, evaluation = other or (None, None, None)
    return RunRecord(
        SCHEMA_VERSION,
        "run",
        "run",
        Status.COMPLETED,
        "",
        None,
        config,
        probe_without_torch(),
        plan=replace(plan, train_flops_per_token=flops, predicted_loss_tokens=1),
        speed=Speed(
            train_tokens=round(100 * tokens_per_second),
            train_seconds=100.0,
            load_seconds=load,
            base_evaluation_seconds=untouched,
            evaluation_seconds=evaluation,
        ),
    )


def without_padding(record: RunRecord) -> RunRecord:
    assert record.plan is not None
    return record.replace(plan=replace(record.plan, padding_free=True))


def seen(*records: RunRecord, of: RunRecord | None = None) -> MeasuredThroughput:
    """What ``records`` say of one more like ``of``."""
    return from_finished_runs(records, probe_without_torch(), (of or finished()).config)


def test_padded_trainings_say_nothing_of_one_without_padding() -> None:
    padded, of_an_earlier_version = finished(7.0), finished(8.0)
    without = without_padding(padded)
    padded = replace(padded, plan=replace(padded.plan, padding_free=False))
    records, here = [padded, of_an_earlier_version, without], probe_without_torch()
    rates = [from_finished_runs(records, here, padded.config, padding_free=free).rate for free in (False, True)]
    assert [rate.basis.partition(" ")[0] for rate in rates if rate is not None] == ["2", "1"]
    assert from_finished_runs([padded], here, padded.config, padding_free=True).rate is None


def test_trainings_of_the_same_base_tell_the_rate() -> None:
    assert seen().rate is None
    assert seen(finished(7.0, "fp32"), finished(7.0, flops=None), finished(7.0, family="large")).rate is None
    elsewhere = replace(probe_without_torch(), torch_threads=77)
    assert from_finished_runs([finished(7.0)], elsewhere, finished().config).rate is None
    one = seen(finished(7.0), finished(100.0, family="large")).rate
    assert one is not None
    assert (one.low, one.high) == pytest.approx((35.0, 140.0))
    assert "(a guess)" in one.basis
    speed = seen(*(finished(rate) for rate in (9.0, 10.0, 10.0, 11.0))).rate
    assert speed is not None
    assert 1 / speed.middle == pytest.approx(statistics.fmean(1 / rate for rate in (90.0, 100.0, 100.0, 110.0)))
    centre = (90.0 * 100 * 100 * 110) ** 0.25
    logs = [math.log(rate) for rate in (90.0, 100.0, 100.0, 110.0)]
    half = 2.3534 * statistics.stdev(logs) * (1 + 1 / 4) ** 0.5  # t with three degrees of freedom, 95 % one-sided
    assert (speed.low, speed.high) == pytest.approx((centre / math.exp(half), centre * math.exp(half)))
    assert speed.basis == "4 trainings of this base on this machine, 90 % prediction interval"
    instruct = finished(1.0)
    instruct.config["model"] = {"family": "tiny", "variant": "instruct"}
    assert seen(instruct, finished(7.0)).rate == seen(finished(7.0)).rate
    assert seen(finished(7.0), of=instruct).rate == seen(finished(7.0)).rate
    two = seen(finished(5.0), finished(20.0)).rate
    assert two is not None
    assert (two.low, two.high) == pytest.approx((25.0, 400.0))
    assert "is wider" in two.basis


def test_loading_and_scoring_are_told_by_runs_with_the_same_evaluation_alone() -> None:
    runs = [finished(other=(1.0, 5.0, 4.0)), finished(other=(2.0, 24.0, 14.0))]
    told = seen(*runs)
    assert told.other is not None
    assert told.other.middle == pytest.approx((10.0 + 40.0) / 2)
    assert told.other.low < 10.0 < 40.0 < told.other.high
    assert told.before == pytest.approx((6.0 + 26.0) / 2)
    assert told.rate is not None
    for key, changed in {"evaluation": {"on": 2}, "task": {"set": 1}, "model": {"family": "tiny"}}.items():
        other = finished()
        other.config[key] = changed
        assert seen(*runs, of=other).other is None, key
    assert seen(*(one.replace(status=Status.PRUNED) for one in runs)).other is None
    imported = runs[0].replace(speed=replace(runs[0].speed, total_seconds=118.0), spent=Spent(118.0, 100, None))
    alone = seen(imported).other
    assert alone is not None
    assert (alone.low, alone.middle, alone.high) == pytest.approx((9.0, 18.0, 36.0))
    repeated = imported.replace(spent=Spent(218.0, 200, None), speed=replace(imported.speed, total_seconds=218.0))
    assert seen(repeated).other == seen(runs[0]).other
    assert seen(finished(family="large", other=(1.0, 5.0, 4.0)), finished()).other is None


def test_a_record_that_lacks_its_configuration_or_has_no_figures_is_passed_over() -> None:
    assert seen(finished(7.0).replace(config={})) == MeasuredThroughput(None, None, None)
    for wrong in ({"train_seconds": 0.0}, {"train_seconds": -1.0}, {"train_seconds": math.nan}, {"train_tokens": None}):
        record = finished(7.0)
        assert seen(record.replace(speed=replace(record.speed, **wrong))).rate is None, wrong
    assert seen(finished(7.0, flops=0.0)).rate is None
    assert seen(finished(other=(math.nan, 1.0, 1.0)), finished(other=(0.0, 0.0, 0.0))).other is None


def test_operations_that_an_earlier_version_counted_for_every_token_tell_no_rate() -> None:
    record = finished(7.0)
    assert record.plan is not None
    assert seen(record.replace(plan=replace(record.plan, predicted_loss_tokens=None))).rate is None


def test_many_trainings_take_together_what_they_were_told_to() -> None:
    rates = (1.0, 2.0, 9.0)
    told = seen(*(finished(rate) for rate in rates)).rate
    assert told is not None
    flops = 600.0
    assert 3 * flops / told.middle == pytest.approx(sum(flops / (10.0 * rate) for rate in rates))
    one_slow = seen(*(finished(rate) for rate in (*[9.0] * 20, 0.01))).rate
    assert one_slow is not None
    assert one_slow.low <= one_slow.middle <= one_slow.high


def test_the_ends_of_an_interval_are_students() -> None:
    from scipy.stats import t

    for degrees in (*range(1, 31), 100, 499):
        assert t_95(degrees) == pytest.approx(t.ppf(0.95, degrees), rel=2e-4), degrees


def test_another_checkpoint_or_revision_is_another_base() -> None:
    for key in ("checkpoints", "revision", "path"):
        other = finished(7.0)
        other.config["model"] = {"family": "tiny", "variant": "base", key: "other"}
        assert seen(other).rate is None, key


def test_of_trials_warm_runs_tell_what_loading_and_scoring_take_and_of_runs_cold_ones() -> None:
    cold = finished(other=(20.0, 1.0, 1.0))
    warm = finished(other=(0.0, 1.0, 1.0))
    warm = warm.replace(memory=Memory(process_reused=True))
    here = probe_without_torch()
    for records in ([cold, warm], [warm, cold]):
        told = [from_finished_runs(records, here, cold.config, warm=one).other for one in (False, True)]
        assert [one.middle for one in told if one is not None] == pytest.approx([22.0, 2.0])
    assert from_finished_runs([cold], here, cold.config, warm=True).other == seen(cold).other


def test_a_training_that_was_mostly_its_start_is_told_by_its_later_steps() -> None:
    short = finished(1.0)
    short = short.replace(speed=replace(short.speed, steps=2, train_tokens_per_second=50.0))
    short = short.replace(speed=replace(short.speed, excluded_steps=1))

    def rate(steps: int, record: RunRecord = short) -> float | None:
        found = from_finished_runs([record], probe_without_torch(), record.config, steps).rate
        return found.middle if found is not None else None

    assert rate(20) == pytest.approx(10.0)
    assert rate(21) == pytest.approx(500.0)
    assert rate(21, short.replace(speed=replace(short.speed, steps=1, excluded_steps=0))) is None


def test_an_epochs_last_step_has_what_is_left() -> None:
    training = compose(["training.max_steps=10", "training.batch_size=8"]).training
    row = MeanRow.whole(10.0)

    def rows(count: int) -> RowLengths:
        return RowLengths.of([10] * count, [10] * count)

    assert Workload.of(training, rows(36)) == Workload(10, 7.2, row, 720)
    assert Workload.of(training, rows(4)) == Workload(10, 4.0, row, 400)
    assert Workload.of(training, rows(16)) == Workload(10, 8.0, row, 800)
    assert Workload.of(training) == Workload(10, 8.0, MeanRow.whole(training.max_length), 80 * training.max_length)
    assert Workload.of(replace(training, max_tokens=1000), rows(4)) == Workload(25, 4.0, row, 1000)


def test_one_look_tells_each_configuration_what_it_would_be_told_alone() -> None:
    here = probe_without_torch()
    both = [
        compose(["quantization=nf4", f"training.max_steps={n}", f"training.threads={here.cpu_cores}"]) for n in (20, 21)
    ]
    short = without_padding(finished(1.0)).replace(
        config=to_plain(both[0]), environment=replace(here, torch_threads=here.cpu_cores)
    )
    short = short.replace(speed=replace(short.speed, steps=2, excluded_steps=1, train_tokens_per_second=50.0))

    def seconds(planner: Planner, config: Config) -> float | None:
        train = planner.estimate(config).time.train
        return train.middle if train is not None else None

    one = Planner(records=[short])
    assert [seconds(one, config) for config in both] == [seconds(Planner(records=[short]), config) for config in both]
    assert seconds(one, both[0]) != pytest.approx(seconds(one, both[1]), rel=0.5)


@pytest.mark.parametrize(
    ("hosts", "isolation", "told"), [(False, "warm", 22.0), (True, "warm", 2.0), (True, "fresh", 22.0)]
)
def test_trials_on_warm_hosts_load_nothing(hosts: bool, isolation: str, told: float) -> None:
    here = probe_without_torch()
    config = compose(["quantization=nf4", "training.threads=1", f"workers.isolation={isolation}"])
    cold = finished(other=(20.0, 1.0, 1.0)).replace(config=to_plain(config), environment=replace(here, torch_threads=1))
    warm = cold.replace(speed=replace(cold.speed, load_seconds=0.0), memory=Memory(process_reused=True))
    other = Planner(records=[cold, warm], hosts=hosts).estimate(config).time.other
    assert other is not None
    assert other.middle == pytest.approx(told)


def test_a_card_is_told_by_the_runs_where_the_last_one_on_such_a_card_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = probe_without_torch()
    card = replace(here.device, kind="cuda", name="NVIDIA GeForce RTX 4090")
    there, upgraded = replace(here, device=card, packages={"torch": "2"}), replace(here, device=card)
    config = compose(["model=embedded", "quantization=nf4", "training.gradient_checkpointing=off"])
    of_config = without_padding(finished(10.0)).replace(config=to_plain(config))
    records = [of_config.replace(environment=one) for one in (here, upgraded, there, there)]

    def seconds(card: str | None, *given: RunRecord) -> Interval | None:
        return Planner(device_by_name(card or "cuda"), records=given).estimate(config).time.train

    assert seconds("rtx4090", *records) == seconds("rtx4090", records[1])
    assert seconds(None, *records) == seconds("rtx4090", records[1])
    assert seconds("rtx4090", *records) is not None
    assert seconds("a100_80gb", *records) is None
    assert seconds("rtx4090", records[0]) is None


def test_calibrated_rates_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = probe_without_torch()
    assert calibration.calibrated_rate(here, Quantization.nf4) is None
    calibration.rates_file().parent.mkdir()
    calibration.rates_file().write_text(json.dumps({machine_of(here): {"nf4": 2e9}, "other": 3}))
    assert calibration.calibrated_rate(here, Quantization.nf4) == calibration.rate_from_calibration(2e9)
    assert calibration.calibrated_rate(here, Quantization.int8) is None
    assert calibration.calibrated_rate(replace(here, torch_threads=7), Quantization.nf4) is None
    monkeypatch.setattr(calibration, "COUNT_VERSION", calibration.COUNT_VERSION + 1)
    assert calibration.calibrated_rate(here, Quantization.nf4) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration.rates_file().write_text("{torn")
    assert calibration.calibrated_rate(here, Quantization.nf4) is None


def test_a_calibration_counts_the_same_operations_in_every_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once a look, rates differ by what is counted alone."""
    monkeypatch.setitem(benchmark.PROBE_SIZES, "cpu", (64, 1, 1, 8))
    counted = {}
    for mode in calibration.MODES:
        monkeypatch.setattr("time.perf_counter", count().__next__)
        counted[mode] = benchmark.measured_flops_per_second(mode, "cpu", seconds=1.0)
    assert counted == dict.fromkeys(calibration.MODES, counted[Quantization.fp32])


def test_the_shipped_prices_are_read_by_a_drivers_name() -> None:
    table = read_prices()
    assert usd_per_hour("cuda", "NVIDIA A100-SXM4-80GB", table) == table["A100 SXM4"]
    assert usd_per_hour("cuda", "Tesla T4", table) == table["T4"]
    assert usd_per_hour("cuda", "some other card", table) is None
    assert usd_per_hour("cpu", "any processor", table) == table["cpu"]


def test_a_price_says_where_it_is_from_and_a_given_one_wins() -> None:
    assert price_of(0.0, "cpu", "any processor") == Price(0.0, "budget.usd_per_hour")
    assert price_of(None, "cpu", "any processor") == Price(read_prices()["cpu"], "conf/prices.yaml: cpu")
    assert price_of(None, "cuda", "Tesla T4") == Price(read_prices()["T4"], "conf/prices.yaml: Tesla T4")
    assert price_of(None, "cuda", "some other card") is None


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
