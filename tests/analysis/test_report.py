from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis import ladder_sections, sections
from qlora_exp.analysis.ladder_views import ladder_views
from qlora_exp.analysis.report import build
from qlora_exp.analysis.report_content import (
    AnswerCard,
    CardStatus,
    ReportContent,
    StudyInfo,
    to_csv,
    to_html,
    to_markdown,
)
from qlora_exp.cli import main
from qlora_exp.errors import AnalysisError
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Baselines, RunRecord, Scores, Status

LADDER: dict[str, Any] = {
    "decision": "stop",
    "recommended_rank": 16,
    "margin": 0.02,
    "half_zone": 0.01,
    "comparisons": [
        {"from_rank": 8, "to_rank": 16, "gain": 0.09, "low": 0.07, "high": 0.11, "decision": "continue"},
        {"from_rank": 16, "to_rank": 32, "gain": 0.004, "low": -0.005, "high": 0.012, "decision": "stop"},
    ],
    "sentence": "Returns have diminished at r = 16.",
}


def of(records: list[RunRecord], **asked: Any) -> ReportContent:
    return build(records, [StudyInfo("made-up", **asked)])


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    return data | {"runs": json.loads(gzip.decompress(base64.b64decode(data["runs"])))}


def test_html_markdown_and_csv_have_the_same_figures() -> None:
    report = of(made_up.many(60))
    page, text = to_html(report), to_markdown(report)
    for section in report.sections:
        for table in section.tables:
            for row in table.rows:
                for value in row:
                    if isinstance(value, str) and value:
                        assert value.replace("|", "\\|") in text
    rows = list(csv.reader(io.StringIO(to_csv(report))))
    assert len(rows) == 61
    assert data_of(page)["runs"][0] == [row[0] for row in rows[1:]]


def test_the_page_asks_nothing_of_a_network() -> None:
    page = to_html(of(made_up.many(30)))
    own = page.replace(re.search(r"</script>\s*<script>(.*?)</script>", page, re.DOTALL)[1], "")  # type: ignore[index]
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", own)
    assert "default-src 'none'" in page
    assert page.count("Plotly.react(") == 1
    assert len(page.encode()) < 6.5e6


def test_what_other_people_wrote_is_text_never_markup() -> None:
    nasty = "</script><img src=x onerror=alert(1)>"
    record = made_up.run(0, targets="mlp").replace(warnings=(nasty,), run_id=nasty)
    broken = made_up.failed(1, Status.FAILED, nasty)
    page = to_html(build([record, broken], [StudyInfo(nasty, question=nasty, ladders=[{**LADDER, "sentence": nasty}])]))
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_costs_name_the_prices_that_they_are_counted_by() -> None:
    def priced(number: int, hourly: float | None, source: str | None) -> RunRecord:
        made = made_up.run(number)
        assert made.plan is not None
        return made.replace(plan=replace(made.plan, usd_per_hour=hourly, usd_per_hour_from=source))

    one, other = priced(0, 0.17, "conf/prices.yaml: cpu"), priced(1, 2.0, "budget.usd_per_hour")
    paragraphs = sections.speed_section([one, other, priced(2, None, None)]).paragraphs
    assert "2 USD (budget.usd_per_hour), 0.17 USD (conf/prices.yaml: cpu)" in paragraphs[-1]
    assert len(sections.speed_section([priced(3, None, None)]).paragraphs) == 1


def card(report: ReportContent, name: str) -> AnswerCard:
    return next(card for card in report.cards if card.name == name)


def test_scores_that_flatter_are_said_to_do_so_after_what_to_use() -> None:
    report = of([made_up.run(n, r=2**n, split="validation") for n in (2, 3, 4)])
    assert report.headline[0].startswith("Best on validation, not confirmed: base, r = ")
    assert "validation split, which the search itself used" in report.headline[-1]
    assert "evaluation.split=test" in to_markdown(report)
    records = [made_up.run(n, r=2**n) for n in (2, 3, 4)]
    assert not any("flatter" in sentence for sentence in of(records).headline)
    assert "was searched" in of(records, objectives=("minimize scores.test.loss_per_item",)).headline[-1]


def test_the_first_line_names_variant_rank_quantization_rate_score_interval_cost_and_what_a_doubling_gains() -> None:
    runs = [
        made_up.run(10 * r + s, r=r, seed=s, loss=1.5 - 0.01 * (r == 16) + 0.02 * s, accuracy=0.4 + 0.01 * s)
        for r in (8, 16)
        for s in (1, 2, 3)
    ]
    step = {"from_rank": 8, "to_rank": 16, "gain": 0.0154, "low": -0.0154, "high": 0.0308, "decision": "stop"}
    ladder = {"decision": "stop", "use_rank": 8, "margin": 0.1, "half_zone": 0.05, "comparisons": [step]}
    first = of(runs, ladders=[ladder]).headline[0]
    assert re.fullmatch(
        r"Use base, r = 8, nf4, learning rate 0\.001: accuracy 0\.42 \(95 % CI 0\.\d+ to 0\.\d+, 3 seeds and 1,000"
        r" items\);"
        r" 1\.79 MB of trainable state; doubling r gains 1\.0 % of the loss \(95 % CI -1\.0 to 2\.0 %\)\.",
        first,
    ), first  # fmt: skip
    alone = of(runs[:1]).headline[0]
    assert "1,000 items alone: one seed" in alone


def test_a_ladder_of_an_earlier_version_that_is_inconclusive_has_a_rank_to_use_and_what_it_may_cost() -> None:
    step = {"from_rank": 8, "to_rank": 16, "gain": 0.15, "low": 0.03, "high": 0.3, "decision": "inconclusive"}
    old = {**LADDER, "decision": "inconclusive", "recommended_rank": None, "comparisons": [step]}
    report = of([made_up.run(3), made_up.run(4, r=16)], ladders=[old])
    rank = card(report, "rank")
    assert (rank.status, rank.verdict) == (CardStatus.OPEN, "R = 8 for now")
    assert "at most 20.0 % of the loss against r = 16" in str(rank.cost)
    bounded = {**old, "use_rank": 16, "regret_bound": 0.15, "regret_rank": 32, "settle_command": "qlora-exp x"}
    rank = card(of([made_up.run(3), made_up.run(4, r=16)], ladders=[bounded]), "rank")
    assert "r = 16 costs at most 10.0 % of the loss against r = 32" in str(rank.cost)
    assert of([made_up.run(3), made_up.run(4, r=16)], ladders=[bounded]).headline[0].startswith("Use base, r = 16")


def test_no_sentence_stands_in_the_report_twice() -> None:
    kinds = [(v, m, r, s) for v in ("base", "instruct") for m in ("nf4", "fp16") for r in (8, 16) for s in (1, 2, 3)]
    runs = [
        made_up.run(
            n, variant=v, mode=m, r=r, seed=s, loss=1.5 + 0.1 * (v == "base") + 0.01 * s, goal="accuracy >= 0.5"
        )
        for n, (v, m, r, s) in enumerate(kinds)
    ]
    report = of([run.replace(baselines=Baselines("test", "act", 0.2, 0.1, 0.7, 0.7, 30.0)) for run in runs])
    assert {card.name for card in report.cards} >= {"rank", "variant", "quantization", "targets", "goal", "baseline"}
    texts = [*report.headline]
    texts += [text for c in report.cards for text in (*c.evidence, c.cost, c.settle) if text]
    texts += [text for section in report.sections for text in (*section.paragraphs, *section.points)]
    sentences = [one for text in texts for one in re.split(r"(?<=[.:;]) (?=[A-Z])", text) if len(one) > 40]
    assert [one for one, count in Counter(sentences).items() if count > 1] == []


def test_every_plot_has_titled_axes_and_intervals_and_tells_the_variants_apart() -> None:
    runs = [
        made_up.run(
            100 * r + 10 * s + i, r=r, seed=s, variant=v, loss=1.5 + 0.02 * s + 0.1 * i * s, accuracy=0.5 + 0.01 * s
        )
        for r in (8, 16)
        for s in (1, 2, 3)
        for i, v in enumerate(("base", "instruct"))
    ]
    stopped = made_up.failed(9000, Status.PRUNED, "behind")
    ladders = [
        {**LADDER, "comparisons": LADDER["comparisons"][:1], "axes": {"model.variant": v}} for v in ("base", "instruct")
    ]
    runs = [
        run.replace(trial=replace(run.trial, params={"model.variant": run.config["model"]["variant"]}))
        for run in runs
        if run.trial
    ]

    def curves(run: RunRecord) -> dict[int, float]:
        return {step: 6.0 / step + 0.01 * (run.seed or 0) for step in (1, 5, 10)}

    report = build([*runs, stopped], [StudyInfo("made-up", ladders=ladders)], curves=curves)
    figures = {section.name: section.figures for section in report.sections if section.figures}
    assert figures.keys() >= {"rank", "curves", "tradeoffs", "instruct-base", "memory"}
    for name, plots in figures.items():
        for plot in plots:
            titles = [plot["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
            assert any(titles), name
            if name == "curves":
                assert any(trace.get("fill") == "toself" for trace in plot["data"])
                continue
            errors = [trace[end] for trace in plot["data"] for end in ("error_x", "error_y") if end in trace]
            assert any(error["visible"] for error in errors), (name, titles)
    for plot in (*figures["rank"], *figures["curves"], *figures["tradeoffs"]):
        names = " ".join(trace.get("name", "") for trace in plot["data"])
        assert "base" in names
        assert "instruct" in names
    assert len(figures["rank"]) == 3, "gains, the compared measure, the task's own metric"
    faint = [trace for trace in figures["curves"][0]["data"] if trace["opacity"] < 0.5 and "fill" not in trace]
    assert [trace["name"] for trace in faint] == ["base, stopped early"]


def test_the_shares_of_seed_and_split_are_left_out_of_what_mattered() -> None:
    shares = {"lora.r": 0.3, "training.learning_rate": 0.1, "seed": 0.4, "evaluation.split": 0.2}
    report = of([made_up.run(3), made_up.run(4, r=16)], importance={"scores.after.loss_per_item": shares})
    [table] = next(section for section in report.sections if section.name == "importance").tables
    assert [row[1] for row in table.rows] == ["lora.r", "training.learning_rate"]
    assert [row[2] for row in table.rows] == pytest.approx([0.75, 0.25])


def test_the_first_line_is_chosen_on_validation_and_scored_on_test() -> None:
    lucky = made_up.run(0, r=4, loss=1.0, validation_loss=2.0)
    chosen = made_up.run(1, r=8, loss=1.5, validation_loss=1.4)
    report = of([lucky, chosen])
    assert report.headline[0].startswith("Use base, r = 8,")
    assert "loss per item 1.5 " in card(report, "configuration").evidence[0]


def test_a_winner_is_told_with_how_many_it_cannot_be_told_from() -> None:
    levels = {4: 1.9, 8: 1.50, 16: 1.49, 32: 1.2}
    runs = [
        made_up.run(10 * r + s, r=r, seed=s, loss=loss + 0.02 * s, validation_loss=1.0 if r == 16 else 2.0)
        for r, loss in levels.items()
        for s in (1, 2, 3)
    ]
    assert "It isn't shown to be better than 2 of the others." in card(of(runs), "configuration").evidence[0]


def test_over_a_configuration_scored_in_another_way_nothing_is_shown() -> None:
    runs = [made_up.run(s, r=8, seed=s, loss=1.0 + 0.02 * s) for s in (1, 2, 3)]
    other = made_up.run(9, r=16)
    elsewise = replace(
        other.scores, test=Scores("test", 1000, rouge_l=0.5), after=Scores("validation", 1000, rouge_l=0.5)
    )
    report = of([*runs, other.replace(scores=elsewise)])
    assert "It isn't shown to be better than 1 of the others." in card(report, "configuration").evidence[0]


def test_the_ladders_rank_is_in_the_first_line_and_its_gains_are_shares_of_the_loss() -> None:
    report = of([made_up.run(n, r=2**n) for n in (3, 4, 5)], ladders=[LADDER])
    assert report.headline[0].startswith("Use base, r = 16,")
    section = next(s for s in report.sections if s.name == "ladder-1")
    assert section.paragraphs[0] == LADDER["sentence"]
    assert section.tables[0].rows[1] == ("16 → 32", "stop", *(pytest.approx(g / 1.5) for g in (0.004, -0.005, 0.012)))
    assert section.figures[0]["data"][0]["y"] == pytest.approx([9 / 1.5, 0.4 / 1.5])


def test_rates_that_follow_the_rank_are_one_line_and_others_a_line_each() -> None:
    def lines(*points: tuple[int, float]) -> int:
        report = of([made_up.run(n, r=r, learning_rate=rate) for n, (r, rate) in enumerate(points)])
        figure, _ = [f for s in report.sections if s.name == "rank" for f in s.figures]
        return len(figure["data"])

    assert lines((8, 4e-3), (16, 2.8e-3), (32, 2e-3)) == 1
    assert lines((8, 1e-3), (16, 1e-3), (8, 4e-3), (16, 4e-3)) == 2


def test_several_ladders_are_named_by_their_axes() -> None:
    several = [{**LADDER, "axes": {"model.variant": variant}} for variant in ("base", "instruct")]
    report = of([made_up.run(n, r=2**n) for n in (3, 4, 5)], ladders=several)
    assert len([s for s in report.sections if s.name.startswith("ladder-")]) == 2
    assert len(set(report.headline[:2])) == 2


def test_runs_of_several_protocols_are_shown_apart_and_the_first_line_says_so() -> None:
    records = [made_up.run(n, r=2**n) for n in (2, 3, 4)]
    odd = made_up.run(9)
    assert odd.plan is not None
    report = of([*records, odd.replace(plan=replace(odd.plan, max_steps=7))])
    assert "max_steps: 80 in 3 runs, 7 in 1 runs" in report.headline[-1]
    assert any("7 steps" in section.title for section in report.sections)
    assert len({section.name for section in report.sections}) == len(report.sections)


def test_what_a_ladder_left_open_is_on_the_card_with_what_would_settle_it() -> None:
    undecided = {**LADDER, "decision": "inconclusive", "would_settle": "It would take about 12 seeds."}
    rank = card(of([made_up.run(3), made_up.run(4, r=16)], ladders=[undecided]), "rank")
    assert rank.status is CardStatus.OPEN
    assert "r = 16 to 32" in rank.evidence[0]
    assert "about 12 seeds" in str(rank.settle)


def test_how_often_a_ladder_errs_is_what_the_calibration_found() -> None:
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \|.*?\| ([\d.]+) ± .*? % \| ([\d.]+) ± .*? % \| ≤", page, re.MULTILINE)
    assumed = [max(float(a), float(b)) for name, a, b in rows if "pairs 0.8" not in name]
    assert len(assumed) >= 100
    assert max(assumed) <= 100 * ladder_sections.MAX_ERROR_RATE < max(assumed) + 1
    sure = ladder_sections.error_rate_sentence(ladder_views([StudyInfo("made-up", ladders=[LADDER])], []))
    assert sure is not None
    assert "at most 5 %" in sure


def test_failures_are_counted_with_what_they_cost() -> None:
    report = of([made_up.run(0), made_up.failed(1), made_up.failed(2)])
    text = to_markdown(report)
    assert "2 of 3 runs did not complete; they took 1.3 minutes." in text
    assert "| OUT_OF_MEMORY | OutOfMemoryError: no memory left | 2 |" in text


def test_a_run_that_is_still_running_is_no_failure() -> None:
    text = to_markdown(of([made_up.run(0), made_up.run(1, r=16).replace(status=Status.RUNNING)]))
    assert "Every run that has ended completed." in text
    assert "1 runs have not ended" in text


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no run"),
        ([made_up.failed(0)], "no run has finished: 1 are OUT_OF_MEMORY"),
        ([made_up.run(0).replace(synthetic=True)], "SYNTHETIC"),
    ],
)
def test_a_study_without_an_answer_is_refused_in_a_sentence(records: list[RunRecord], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        of(records)


def test_one_seed_one_rank_and_scores_that_are_not_numbers_are_told_as_limits() -> None:
    lost = made_up.run(2, mode="fp16", loss=float("nan"), accuracy=float("nan"))
    text = to_markdown(of([made_up.run(0), made_up.run(1, mode="int8"), lost]))
    assert "One seed per configuration" in text
    assert "Only r = 8 was run" in text
    assert "1 finished runs have no finite score" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_a_configuration_whose_last_run_has_no_score_leaves_a_report_that_says_so() -> None:
    report = of([made_up.run(0), made_up.run(1, loss=float("nan"), accuracy=float("nan"))])
    assert report.headline == ()
    assert "no configuration has a finite score" in to_html(report)


def test_without_any_score_nothing_is_drawn_of_quality() -> None:
    report = of([made_up.run(0, loss=float("nan"), accuracy=float("nan"))])
    assert "no finished run has a score" in str(report.why_none)
    assert "tradeoffs" not in {section.name for section in report.sections}


def write_runs(output: OutputPaths, records: list[RunRecord]) -> None:
    for record in records:
        write_json(output.run(record.run_id).record, to_dict(record))


def test_the_verb_writes_the_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = OutputPaths.of(tmp_path / "outputs")
    write_runs(output, made_up.many(12))
    assert main(["report", "--output-root", str(output.root), "--output", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "runs.csv"}
    assert data_of((tmp_path / "out" / "report.html").read_text())["runsAt"] == "../outputs/runs"
    printed = capsys.readouterr().out
    assert printed.startswith("Use base, r = ")
    assert "Which quantization?" in printed


def test_the_verb_refuses_what_no_report_can_be_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = OutputPaths.of(tmp_path / "outputs")
    assert main(["report", "no-such-study", "--output-root", str(output.root)]) == 2
    write_runs(output, [made_up.run(0)])
    assert main(["report", "--equivalence", "-1", "--output-root", str(output.root)]) == 2
    assert "invalid margin" in capsys.readouterr().err


def cells(number: int, seeds: range, **run: Any) -> list[RunRecord]:
    kinds = [(variant, written) for variant in ("base", "instruct") for written in ("plain", "chat")]
    return [
        made_up.run(
            number + 10 * cell + place, variant=variant, written=written, seed=seed,
            loss=1.5 - 0.3 * (variant == "instruct") + 0.01 * place, **run,
        )
        for cell, (variant, written) in enumerate(kinds)
        for place, seed in enumerate(seeds)
    ]  # fmt: skip


def as_pilot(record: RunRecord) -> RunRecord:
    assert record.trial is not None
    return record.replace(trial=replace(record.trial, params={"evaluation.split": "validation"}))


def test_pilots_are_set_aside_and_the_headline_is_the_instruct_or_base_sentence() -> None:
    pilots = [as_pilot(run) for run in cells(500, range(1000, 1004), split="validation")]
    report = of([*cells(0, range(1, 4)), *pilots])
    assert report.why_none is None
    assert report.headline[0].startswith("Use instruct, plain prompts, r = 8")
    assert card(report, "variant").verdict == "Use instruct"
    assert card(report, "variant").evidence[0].startswith("After tuning, the instruct model is better: ")
    section = next(s for s in report.sections if s.name == "instruct-base")
    assert "pilots with other seeds" in section.paragraphs[0]
    limits = next(s for s in report.sections if s.name == "limits")
    assert any("16 pilots chose learning rates" in point for point in limits.points)
    assert [s.name for s in report.sections].count("instruct-base") == 1
    only = of(pilots)
    assert "validation split, which the search itself used" in only.headline[-1]


def test_runs_trained_to_equal_tokens_are_no_other_protocol_but_a_check_of_the_first() -> None:
    def read(record: RunRecord, tokens: int) -> RunRecord:
        return record.replace(speed=replace(record.speed, train_tokens=tokens))

    found = [read(run, 1400 if run.config["model"]["variant"] == "instruct" else 1000) for run in cells(0, range(1, 4))]
    again = [
        read(made_up.run(900 + seed, seed=seed, loss=1.4, settings={"training.max_tokens": 1400}), 1400)
        for seed in (1, 2, 3)
    ]
    again = [run.replace(plan=replace(run.plan, max_steps=113)) for run in again if run.plan is not None]
    report = of([*found, *again])
    assert report.why_none is None
    paragraph = next(s for s in report.sections if s.name == "instruct-base").paragraphs[1]
    assert "At equal tokens (base trained to 1,400): +" in paragraph
