from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Measure, configurations
from qlora_exp.analysis.contrasts import Difference, ItemScores, Side, difference, holm
from qlora_exp.analysis.instruct_base import InstructBase, compare_variants
from qlora_exp.analysis.instruct_base_words import instruct_section, primary_lead, variant_recommendation
from qlora_exp.analysis.ladder_views import ladder_rank_of, ladder_views
from qlora_exp.analysis.margin import Margin, MarginUnit, parse_margin
from qlora_exp.analysis.recommendation import ComparisonVerdict, comparison_verdict, share_of_loss
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.records.types import Baselines, FewShot, Forgetting, RunRecord

CELLS = (("base", "plain"), ("base", "chat"), ("instruct", "plain"), ("instruct", "chat"))
LOSS = Measure("loss_per_item", False)


def study(
    instruct_gain: float, cells: Sequence[tuple[str, str]] = CELLS, seeds: int = 3, first: int = 1, **run: Any
) -> list[RunRecord]:
    draw = np.random.default_rng(1)
    return [
        made_up.run(
            100 * first + 10 * cell + seed,
            variant=variant,
            written=written,
            seed=seed,
            loss=1.5 - instruct_gain * (variant == "instruct") + float(draw.normal(0, 0.005)),
            **run,
        )
        for cell, (variant, written) in enumerate(cells)
        for seed in range(first, first + seeds)
    ]


def compared(records: list[RunRecord], items: ItemScores | None = None, **options: Any) -> InstructBase:
    found = compare_variants(configurations(records, LOSS), items, **options)
    assert found is not None
    return found


def paragraph(found: InstructBase) -> str:
    """What the card and the section say."""
    return " ".join([primary_lead(found), *instruct_section(found).paragraphs])


def words_of(records: list[RunRecord], **options: Any) -> str:
    return paragraph(compared(records, **options))


def test_a_clear_gain_of_instruct_is_called_better_and_its_opposite_worse() -> None:
    # 0.5 of the base's 1.5 nats per item.
    assert (
        "After tuning, the instruct model is better: base costs 33 % of the loss against instruct (95 % CI"
        in words_of(study(0.5))
    )
    assert "After tuning, the base model is better: instruct costs 33 % of the loss against base (95 % CI" in words_of(
        study(-0.5)
    )


def test_all_four_cells_are_compared_and_none_hides_another() -> None:
    found = compared(study(0.5))
    assert [c.name for c in found.cells] == ["base, plain", "base, chat", "instruct, plain", "instruct, chat"]
    assert found.missing == ()
    assert "after tuning, in bits per byte (below 0: a loss): base" in paragraph(found)


def test_equivalence_is_said_only_within_a_margin_that_was_given() -> None:
    assert "it is not settled which model is better: " in words_of(study(0.0))
    # 0.03 bits per byte of 0.3.
    equal = words_of(study(0.0), margin=Margin(0.03, MarginUnit.SCORE))
    assert "After tuning, both models are equivalent within 10 % of the loss: " in equal


def test_a_single_seed_never_settles_what_tuning_did() -> None:
    found = compared(study(0.5, seeds=1))
    assert "it is not settled which model is better: " in paragraph(found)
    assert any("One seed" in note for note in found.notes)
    alone = Difference(0.5, 0.4, 0.6, 1, "1000 items alone")
    assert comparison_verdict(alone, None) is ComparisonVerdict.OPEN
    assert variant_recommendation(found).regret_bound is None


def test_accuracy_stands_beside_bits_per_byte_with_which_it_need_not_agree() -> None:
    records = [
        run.replace(scores=replace(run.scores, test_before=made_up.scores("test", 2.0 + gap, 0.3 + gap)))
        for run in study(0.5)
        for gap in [-0.1 if run.config["model"]["variant"] == "instruct" else 0.1]
    ]
    found = compared(records)
    assert found.before_tuning is not None
    assert found.before_tuning.value > 0
    by_name = {contrast.name: contrast.difference.value for contrast in found.secondary}
    assert by_name["instruct over base, before tuning, by likelihood"] == pytest.approx(-0.2)
    assert "In accuracy (above 0: instruct is better), the difference is -0.2" in paragraph(found)


def test_missing_cells_are_named_and_the_rest_is_compared() -> None:
    found = compared(study(0.5, (("base", "plain"), ("instruct", "chat"))))
    assert found.missing == ("base in the chat format", "instruct in the plain format")
    assert found.tuned is not None
    assert "Gain of the chat format" not in paragraph(found)


def test_one_variant_alone_is_no_comparison() -> None:
    assert compare_variants(configurations(study(0.0, CELLS[:2]), LOSS)) is None


def test_cells_without_a_common_seed_are_told_to_have_no_pairs() -> None:
    found = compared([*study(0.5, CELLS[:2]), *study(0.5, CELLS[2:], first=7)])
    assert found.tuned is None
    assert any("share no seed" in note for note in found.notes)
    assert "before tuning and unknown after tuning" in paragraph(found)


def test_a_cell_is_chosen_on_validation_and_judged_on_test() -> None:
    lucky = made_up.run(90, variant="instruct", written="chat", learning_rate=0.1, loss=0.1, validation_loss=9.0)
    found = compared([*study(0.2), lucky])
    (cell,) = (c for c in found.cells if c.name == "instruct, chat")
    assert cell.tuned.bits_per_byte is not None
    assert cell.tuned.bits_per_byte > 0.2
    assert cell.searched == 2


def test_pilots_of_other_seeds_choose_the_cells_and_those_of_the_same_seeds_do_not() -> None:
    records = study(0.2)
    pilots = [
        made_up.run(500 + n, variant=v, written=w, seed=1000, split="validation", loss=1.0 + (v, w).count("plain"))
        for n, (v, w) in enumerate(CELLS)
    ]
    found = compared(records, pilots=pilots)
    assert (found.instruct.written, found.base.written) == ("chat", "chat")
    assert "chosen by pilots with other seeds" in paragraph(found)
    leaking = [pilot.replace(seed=1) for pilot in pilots]
    assert "by the same runs' validation scores" in words_of(records, pilots=leaking)
    assert "by the same runs' validation scores" in words_of(records, pilots=pilots[:3])


def test_ranks_that_the_answering_runs_chose_are_told_beside_the_pilots_and_so_are_unequal_ones() -> None:
    records = study(0.2, (("base", "plain"), ("instruct", "chat")))
    larger = [made_up.run(700 + s, variant="instruct", written="chat", seed=s, r=32, loss=1.0) for s in (1, 2, 3)]
    pilots = [
        made_up.run(800 + n, variant=v, written=w, seed=1000, split="validation", learning_rate=rate)
        for n, (v, w) in enumerate((("base", "plain"), ("instruct", "chat")))
        for rate in (0.0005, 0.001)
    ]
    found = compared([*records, *larger], pilots=pilots)
    assert "within a cell by the same runs' validation scores" in paragraph(found)
    assert "(instruct, chat, r = 32) with (base, plain, r = 8), chosen" in paragraph(found)
    assert [cell.searched for cell in found.cells] == [2, 3]


def test_each_variant_is_compared_at_the_rank_that_its_ladder_says_to_use() -> None:
    cells = (("base", "plain"), ("instruct", "chat"))

    def of_ladder(runs: list[RunRecord]) -> list[RunRecord]:
        return [
            run.replace(trial=replace(run.trial, params={"model.variant": run.config["model"]["variant"]}))
            for run in runs
            if run.trial is not None
        ]

    # The larger rank is better in every run, but no ladder recommends it for instruct.
    larger = [run.replace(run_id=f"{run.run_id}-16") for run in study(0.3, cells, r=16)]
    larger = [run.replace(scores=replace(run.scores, after=made_up.scores("validation", 0.1))) for run in larger]
    runs = of_ladder([*study(0.2, cells), *larger])
    answers = [
        {"axes": {"model.variant": "instruct"}, "use_rank": 8, "recommended_rank": None, "decision": "inconclusive"},
        {"axes": {"model.variant": "base"}, "recommended_rank": 16, "decision": "continue"},
    ]
    found = compared(runs, rank_of=ladder_rank_of(ladder_views([StudyInfo("made-up", ladders=answers)], runs)))
    assert (found.instruct.configuration.rank, found.base.configuration.rank) == (8, 16)
    of_another = compared(runs, rank_of=ladder_rank_of(ladder_views([StudyInfo("another", ladders=answers)], runs)))
    assert (of_another.instruct.configuration.rank, of_another.base.configuration.rank) == (16, 16)


def test_what_to_use_comes_with_the_most_that_it_may_cost_and_what_would_settle_it() -> None:
    clear = variant_recommendation(compared(study(0.5)))
    assert (clear.use, clear.verdict, clear.regret_bound) == ("instruct", "instruct is better than base", 0.0)
    assert clear.settle is None
    assert clear.sentence.startswith("Use instruct: After tuning, the instruct model is better: base costs ")
    # Half a per cent of the loss apart, with as much noise between seeds.
    found = compared(study(0.002))
    open_ = variant_recommendation(found)
    assert found.tuned is not None
    assert found.tuned.low is not None
    assert found.tuned.high is not None
    assert open_.verdict == "not settled"
    assert open_.regret_bound == pytest.approx(-found.tuned.low if open_.use == "instruct" else found.tuned.high)
    assert open_.regret_against != open_.use
    assert "seeds of each would settle it" in str(open_.settle)


def test_a_margin_is_a_share_of_the_loss_in_every_unit() -> None:
    runs = [made_up.run(1, loss=2.0)]  # 2.4 tokens an item, 0.4 bits per byte, 9.0 before tuning
    texts = {"1%": 0.01, "0.02 nats_per_item": 0.01, "0.0083333 nats_per_token": 0.01, "1% of the tuning gain": 0.035}
    for text, share in texts.items():
        assert share_of_loss(parse_margin(text), runs) == pytest.approx(share, rel=1e-3), text
    assert share_of_loss(Margin(0.004, MarginUnit.SCORE), runs) == pytest.approx(0.01)


def items_of(shift_of_chat: float = 0.0) -> ItemScores:
    values = np.random.default_rng(0).normal(1.0, 0.5, 200)

    def items(record: RunRecord, moment: str, score: str) -> Mapping[str, float] | None:
        if score != "bits_per_byte":
            return None
        shift = -0.1 * (record.config["model"]["variant"] == "instruct") + 0.001 * (record.seed or 0)
        shift += shift_of_chat * (record.plan is not None and record.plan.format == "chat")
        noise = np.random.default_rng(record.seed or 0).normal(0, 0.01, len(values))
        return {str(i): float(value) + shift for i, value in enumerate(values + noise)}

    return items


def test_what_tuning_gains_pairs_items_by_name_and_not_by_place() -> None:
    plain = items_of()

    def turned(record: RunRecord, moment: str, score: str) -> Mapping[str, float] | None:
        found = plain(record, moment, score)
        if found is None or moment == "after":
            return found
        return {item: 2 * value for item, value in reversed(found.items())}

    found = compared(study(0.5), turned)
    assert found.gain is not None
    assert found.gain.low is not None
    # Paired rightly, an item's own level cancels: only the seeds are left, which are nearly equal here.
    assert found.gain.value - found.gain.low < 0.01
    assert found.gain.value == pytest.approx(-0.1)  # 0.2 better before, 0.1 after


def test_items_that_pair_give_an_interval_over_seeds_and_items() -> None:
    found = compared(study(0.5), items_of())
    assert found.tuned is not None
    assert found.tuned.over == "3 seeds and 200 items"
    assert abs(found.tuned.value - 0.1) < 1e-9


def test_items_that_do_not_pair_are_told_and_leave_the_seeds() -> None:
    def items(record: RunRecord, moment: str, score: str) -> Mapping[str, float]:
        return {f"{record.config['model']['variant']} {i}": 1.0 for i in range(5)}

    found = compared(study(0.5), items)
    assert found.tuned is not None
    assert found.tuned.over == "3 seeds"
    assert any("of other items" in note for note in found.notes)


def without_score(record: RunRecord) -> RunRecord:
    assert record.scores.test is not None
    test = replace(record.scores.test, bits_per_byte=float("nan"))
    return record.replace(scores=replace(record.scores, test=test))


def test_a_seed_whose_score_is_not_finite_is_left_out_and_told() -> None:
    found = compared([without_score(run) if run.seed == 3 else run for run in study(0.5)])
    assert found.tuned is not None
    assert found.tuned.over == "2 seeds"
    assert "1 of 3 shared seeds have no finite score on both sides and are left out." in found.notes
    none_left = compared([without_score(run) for run in study(0.5)])
    assert none_left.tuned is None
    assert "before tuning and unknown after tuning" in paragraph(none_left)


def test_scores_of_the_split_that_was_searched_are_told_to_be() -> None:
    found = compared(study(0.5, split="validation"))
    assert "On embedded (its validation split)" in paragraph(found)
    assert any("flatter" in note for note in found.notes)


def test_adjusted_p_is_holms() -> None:
    # Holm (1979) on four hypotheses: 4 × .01, 3 × .013, 2 × .03 and 1 × .04, each at least the one before.
    assert holm([0.03, 0.01, 0.04, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.5, None, 0.01]) == pytest.approx([1.0, None, 0.03])
    assert holm([]) == []


def test_no_effect_is_found_in_at_most_a_twentieth_of_the_families() -> None:
    draw = np.random.default_rng(5)
    families = [holm(list(draw.uniform(size=8))) for _ in range(4000)]
    assert 0.04 < np.mean([min(p for p in family if p is not None) <= 0.05 for family in families]) < 0.06


def test_the_templates_effect_is_a_secondary_contrast_within_each_variant() -> None:
    found = compared(study(0.5), items_of(shift_of_chat=0.2))
    worth = {c.name: c for c in found.secondary if c.name.startswith("chat over plain")}
    assert len(worth) == 4
    for contrast in worth.values():
        assert contrast.difference.value == pytest.approx(-0.2)
        assert contrast.adjusted_p is not None
        assert contrast.difference.p is not None
        assert contrast.adjusted_p >= contrast.difference.p


def test_worked_examples_are_compared_with_none_over_their_draws() -> None:
    shown = tuple(
        FewShot(n, 5, ("a", "b", "c"), made_up.scores("validation", 7.0), made_up.scores("test", 7.0 + 0.1 * n, 0.2))
        for n in (1, 2, 3)
    )
    records = [run.replace(scores=replace(run.scores, few_shot=shown)) for run in study(0.5)]
    found = compared(records)
    assert found.base.few_shot is not None
    assert found.base.few_shot.accuracy == pytest.approx(0.2)
    (contrast,) = (c for c in found.secondary if c.name.startswith("3 examples over none, base"))
    assert contrast.difference.value == pytest.approx((9.0 - 7.2) / 5)
    assert contrast.difference.over == "3 draws"
    assert "With 3 examples in the prompt, base has accuracy 0.200 before tuning" in paragraph(found)


def with_forgetting(record: RunRecord, nats: float) -> RunRecord:
    forgotten = Forgetting(1.0, 1.0 + nats, nats, None, None, 32, "general text")
    return record.replace(scores=replace(record.scores, forgetting=forgotten))


def test_who_forgets_more_is_said_only_where_it_holds_among_all_contrasts() -> None:
    def forgetful(base: float, instruct: float, noise: float) -> list[RunRecord]:
        draw = np.random.default_rng(2)
        level = {"base": base, "instruct": instruct}
        records = study(0.5)
        return [with_forgetting(r, level[r.config["model"]["variant"]] + float(draw.normal(0, noise))) for r in records]

    assert "Base forgets more" in words_of(forgetful(0.5, 0.1, 1e-5))
    assert "Instruct forgets more" in words_of(forgetful(0.1, 0.5, 1e-5))
    assert "Which model forgets more is not settled" in words_of(forgetful(0.3, 0.3, 0.1))


def test_stability_is_a_standard_deviation_with_its_interval() -> None:
    (cell, *_) = compared(study(0.0)).cells
    values = [run.scores.test.bits_per_byte for run in cell.runs if run.scores.test is not None]
    assert cell.seed_sd == pytest.approx(np.std(values, ddof=1))  # type: ignore[arg-type]
    assert cell.seed_sd_low is not None
    assert cell.seed_sd_high is not None
    # 95 %, two degrees of freedom: sd·√(2/7.378) and sd·√(2/0.05064).
    assert cell.seed_sd_low == pytest.approx(cell.seed_sd * 0.5207, rel=1e-3)
    assert cell.seed_sd_high == pytest.approx(cell.seed_sd * 6.285, rel=1e-3)


def with_tokens(records: list[RunRecord], **tokens: int) -> list[RunRecord]:
    return [r.replace(speed=replace(r.speed, train_tokens=tokens[r.config["model"]["variant"]])) for r in records]


def test_equal_tokens_are_checked_or_said_not_to_be() -> None:
    assert "Equal examples are equal tokens here" in words_of(with_tokens(study(0.5), base=1000, instruct=1040))
    apart = with_tokens(study(0.5), base=1000, instruct=1400)
    said = words_of(apart)
    assert "Equal-token check: not done" in said
    assert "training.max_tokens=1400" in said
    base = (compared(apart).base.variant, compared(apart).base.written)
    again = with_tokens(study(0.2, [base], first=1), base=1410, instruct=0)
    found = compared(apart, budgeted=again)
    assert found.tokens.done
    assert found.tokens.difference is not None
    assert "At equal tokens (base trained to 1,400)" in paragraph(found)
    far = with_tokens(study(0.2, [base], first=1), base=1200, instruct=0)
    assert not compared(apart, budgeted=far).tokens.done


def test_a_baseline_that_is_not_beaten_is_said_so_plainly() -> None:
    def against(majority: float, linear: float) -> str:
        baselines = Baselines("test", "act", majority, 0.1, linear, linear, 30.0)
        runs = [run.replace(baselines=baselines) for run in study(0.5)]  # accuracy 0.5 of 1,000 items
        return " ".join(instruct_section(compared(runs)).points)

    assert "is below that of always answering 'act' (0.600 on test): -10 points (95 % CI -14 to -5.7)" in against(
        0.6, 0.7
    )
    assert "is below that of TF-IDF with logistic regression (0.700 on test): -20 points" in against(0.2, 0.7)
    assert "is above that of TF-IDF with logistic regression (0.400 on test): +10 points" in against(0.2, 0.4)
    assert "isn't shown to differ from that of TF-IDF with logistic regression (0.510" in against(0.2, 0.51)


def test_an_untouched_model_has_no_seed_and_one_pair_is_all_there_is() -> None:
    records = study(0.5)
    found = difference(Side(tuple(records[:3]), "before"), Side(tuple(records[6:9]), "before"), "bits_per_byte", None)
    assert found is not None
    assert (found.seeds, found.low, found.p) == (1, None, None)


def test_the_section_shows_every_contrast_the_lines_to_beat_and_what_prompts_are_made_of() -> None:
    baselines = Baselines("test", "act", 0.2, 0.1, 0.7, 0.7, 30.0)
    section = instruct_section(compared([r.replace(baselines=baselines) for r in study(0.5)]))
    captions = [str(one.caption) for one in section.tables]
    assert any("Holm" in caption for caption in captions)
    names = [str(row[0]) for one in section.tables for row in one.rows]
    assert any(name.startswith("primary: instruct") for name in names)
    assert "baseline: TF-IDF with logistic regression" in names
    assert any("prompts are made of" in caption for caption in captions)
    differences, accuracies = section.figures
    assert "primary: instruct over base, after tuning" in differences["data"][0]["y"]
    assert "after tuning" in {trace["name"] for trace in accuracies["data"]}
    lines = [(shape["name"], shape["y0"]) for shape in accuracies["layout"]["shapes"]]
    assert lines[0] == ("baseline: always act, 0.200", 0.2)
