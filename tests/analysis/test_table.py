"""``qlora-exp analyze``: published tables, long tables, and the tables that no answer can be drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_exp.cli import main

RANKS = (1, 2, 4, 8, 64)
WIKISQL = (73.4, 73.3, 73.7, 73.8, 73.5)
MNLI = (91.3, 91.4, 91.3, 91.6, 91.4)
"""LoRA paper (Hu et al. 2021), table 6, GPT-3 with Wq and Wv adapted; ±0.5 and ±0.1."""


def published(folder: Path, scores: tuple[float, ...], name: str = "accuracy") -> Path:
    lines = [f"rank,{name}", *(f"{rank},{score}" for rank, score in zip(RANKS, scores, strict=True))]
    return written(folder, "\n".join(lines))


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    file = folder / name
    file.write_text(text + "\n", encoding="utf-8")
    return file


def answered(capsys: pytest.CaptureFixture[str], file: Path, *options: str) -> Any:
    assert main(["analyze", str(file), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_lora_papers_wikisql_is_inconclusive_at_half_a_point_and_stops_at_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published(tmp_path, WIKISQL)
    fine = answered(capsys, file, "--se", "0.5", "--margin", "0.5")
    assert (fine["decision"], fine["recommended_rank"], fine["margin"]) == ("inconclusive", None, 0.5)
    coarse = answered(capsys, file, "--se", "0.5", "--margin", "2")
    assert (coarse["decision"], coarse["recommended_rank"]) == ("stop", 1)
    steps = [(step["from_rank"], step["to_rank"]) for step in fine["comparisons"]]
    assert steps == [(1, 2), (2, 4), (4, 8), (8, 64)]
    assert [step["gain"] for step in fine["comparisons"]] == pytest.approx([-0.1, 0.4, 0.1, -0.3])
    assert any("8 → 64" in note for note in fine["notes"])


def test_the_lora_papers_mnli_stops_at_rank_1_at_half_a_point_and_is_open_at_a_tenth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published(tmp_path, MNLI)
    coarse = answered(capsys, file, "--se", "0.1", "--margin", "0.5")
    # 0.1 + 2.128 · 0.1·√2 = 0.401, below 0.5 + 0.25.
    assert (coarse["decision"], coarse["recommended_rank"]) == ("stop", 1)
    assert coarse["comparisons"][0]["high"] == pytest.approx(0.401, abs=0.001)
    assert answered(capsys, file, "--se", "0.1", "--margin", "0.1")["decision"] == "inconclusive"


def test_a_steep_table_continues_in_either_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up = answered(capsys, published(tmp_path, (50, 60, 70, 80, 90)), "--se", "0.5", "--margin", "1")
    assert (up["decision"], up["recommended_rank"]) == ("continue", 64)
    file = published(tmp_path, (5, 4, 3, 2, 1), name="eval_loss")
    down = answered(capsys, file, "--se", "0.05", "--margin", "0.1")
    assert (down["decision"], [step["gain"] for step in down["comparisons"]]) == ("continue", [1, 1, 1, 1])
    assert answered(capsys, file, "--se", "0.05", "--margin", "0.1", "--higher-is-better")["decision"] == "stop"


def test_one_number_a_rank_concludes_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = published(tmp_path, (50, 60, 70, 80, 90))
    found = answered(capsys, file, "--margin", "1")
    assert (found["decision"], found["recommended_rank"]) == ("inconclusive", None)
    assert {step["low"] for step in found["comparisons"]} == {None}
    assert main(["analyze", str(file), "--margin", "1"]) == 0
    assert "One run per rank" in capsys.readouterr().out


def test_a_std_of_some_runs_is_a_standard_error_and_few_runs_know_it_badly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = written(tmp_path, "r,accuracy,std,n\n8,50,1,4\n16,60,1,4", "std.csv")
    error = written(tmp_path, "LoRA_r;Accuracy;SE\n8;50;0.5\n16;60;0.5", "se.csv")
    many = written(tmp_path, "r,accuracy,std,n\n8,50,50,10000\n16,60,50,10000", "many.csv")
    few, known, large = (answered(capsys, file, "--margin", "2")["comparisons"][0] for file in (spread, error, many))
    # Student's t with 6 degrees of freedom and the normal quantile, both at 1/30.
    assert 10 - few["low"] == pytest.approx(2.237 * 0.5 * 2**0.5, rel=1e-3)
    assert 10 - known["low"] == pytest.approx(1.834 * 0.5 * 2**0.5, rel=1e-3)
    assert large["low"] == pytest.approx(known["low"], rel=1e-3)


def test_right_and_wrong_answers_are_scores_of_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{r},{s},{i},{(i + s) % 4 < r // 8}" for r in (8, 16) for s in (1, 2, 3) for i in range(40)]
    found = answered(capsys, written(tmp_path, "\n".join(["rank,seed,item,correct", *rows])), "--margin", "0.1")
    assert found["comparisons"][0]["gain"] == pytest.approx(0.25)
    assert any("every seed gave exactly the same gain" in note for note in found["notes"])


def long_table(gains: tuple[float, ...], seeds: int = 5, items: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    by_seed = rng.normal(0, 0.3, seeds)
    rows = []
    for step, level in enumerate(-np.cumsum([0.0, *gains])):
        for seed in range(seeds):
            noise = by_seed[seed] + rng.normal(0, 0.005)
            common = {"Rank": 8 * 2**step, "seed": seed, "memory": 1e9 * 2**step}
            if not items:
                rows.append({**common, "eval_loss": 2 + level + noise})
            for item in range(items):
                rows.append({**common, "item": f"q{item}", "eval_loss": 2 + item + level + noise + rng.normal(0, 0.02)})
    return rows


@pytest.mark.parametrize("items", [0, 30])
def test_seeds_are_paired_and_every_format_gives_the_same_answer(
    items: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = long_table((0.4, 0.3, 0.0), items=items)
    names = list(rows[0])
    text = "\n".join(",".join(map(str, row)) for row in [names, *([row[n] for n in names] for row in rows)])
    files = [
        written(tmp_path, text),
        written(tmp_path, text.replace(",", "\t"), "table.tsv"),
        written(tmp_path, json.dumps(rows), "table.json"),
        written(tmp_path, json.dumps({name: [row[name] for row in rows] for name in names}), "columns.json"),
        written(tmp_path, "\n".join(json.dumps(row) for row in reversed(rows)), "table.jsonl"),
        tmp_path / "table.parquet",
    ]
    pq.write_table(pa.Table.from_pylist(rows), files[-1])
    found = [answered(capsys, file, "--margin", "0.1") for file in files]
    assert (found[0]["decision"], found[0]["recommended_rank"]) == ("stop", 32)
    assert any("50% less memory than r = 64" in note for note in found[0]["notes"])
    assert [one["decision"] for one in found] == ["stop"] * len(files)
    for one in found[1:]:
        for step, other in zip(one["comparisons"], found[0]["comparisons"], strict=True):
            assert step == pytest.approx(other)


def test_each_configuration_has_an_answer_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "quantization": name} for name in ("nf4", "int8") for row in long_table((0.4, 0.0))]
    found = answered(capsys, written(tmp_path, json.dumps(rows), "table.json"), "--margin", "0.1")
    assert [one["configuration"] for one in found["configurations"]] == ["nf4", "int8"]
    assert {one["recommended_rank"] for one in found["configurations"]} == {16}


def test_nested_json_is_read_by_dotted_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"lora": {"r": r}, "se": 0.1, "metrics": {"exact": s}} for r, s in ((8, 50.0), (16, 60.0))]
    file = written(tmp_path, json.dumps(rows), "table.json")
    found = answered(capsys, file, "--score-column", "metrics.exact", "--higher-is-better", "--margin", "1")
    assert found["decision"] == "continue"


@pytest.mark.parametrize(
    ("rank", "seed", "score"),
    [
        ("params.lora.r", "params.seed", "metrics.eval_loss"),
        ("config.lora_r", "config.seed", "eval/loss"),
        ("config/lora/r", "config/seed", "summary/loss"),
        ("peft_config.r", "Seed", "Eval Loss"),
    ],
)
def test_the_names_of_trackers_exports_are_understood(
    rank: str, seed: str, score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"run-{i},finished,{r['Rank']},{r['seed']},{r['eval_loss']}" for i, r in enumerate(long_table((0.4, 0.0)))]
    file = written(tmp_path, "\n".join([f"Name,State,{rank},{seed},{score}", *rows]))
    found = answered(capsys, file, "--margin", "0.1")
    assert (found["decision"], found["recommended_rank"]) == ("stop", 16)


def test_several_metrics_of_an_export_ask_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "params.r,metrics.eval_loss,metrics.accuracy,metrics.train_loss\n8,1,2,3\n16,1,2,3")
    assert main(["analyze", str(file), "--margin", "1"]) == 2
    assert "several columns could be the score: metrics.eval_loss, metrics.accuracy" in capsys.readouterr().err
    assert answered(capsys, file, "--score-column", "metrics.accuracy", "--margin", "1")["decision"] == "inconclusive"


def test_items_of_a_single_run_do_not_stand_in_for_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in long_table((0.4, 0.0), items=30) if row["seed"] == 0]
    found = answered(capsys, written(tmp_path, json.dumps({"rows": rows}), "table.json"), "--margin", "0.1")
    assert found["decision"] == "inconclusive"
    assert found["comparisons"][0]["gain"] == pytest.approx(0.4, abs=0.05)
    assert found["comparisons"][0]["low"] is None


def test_a_margin_that_is_not_given_depends_on_the_kind_of_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = answered(capsys, published(tmp_path, WIKISQL), "--se", "0.5")
    assert (accuracy["margin"], accuracy["margin_text"]) == (pytest.approx(0.734), "1%")
    assert any("only a start" in note for note in accuracy["notes"])
    loss = answered(capsys, published(tmp_path, (2.0, 1.9, 1.8, 1.7, 1.6), name="eval_loss"), "--se", "0.01")
    assert (loss["margin"], loss["margin_text"]) == (pytest.approx(0.005), "0.25%")
    assert any("0.25% of the score at r = 1, as in a sweep" in note for note in loss["notes"])
    units = {"share_of_loss": 0.0025, "nats_per_item": None, "nats_per_token": pytest.approx(0.005), "task": None}
    assert loss["margin_units"] == units


def test_each_doubling_of_a_step_is_held_to_the_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "rank,loss,se\n8,2.0,0.01\n64,1.75,0.01")
    found = answered(capsys, file, "--margin", "0.1")
    [step] = found["comparisons"]
    assert (step["doublings"], step["margin"], found["margin"]) == (3, pytest.approx(0.3), 0.1)
    assert (step["decision"], found["use_rank"]) == ("stop", 8), "0.25 over three doublings is below 0.1 each"
    assert found["regret_rank"] == 64
    assert found["regret_bound"] == pytest.approx(step["high"])


@pytest.mark.parametrize(
    ("margin", "score", "size"),
    [
        ("0.25%", "loss", 0.005),
        ("0.25%", "wer", 0.005),
        ("0.01 nats_per_token", "eval_loss", 0.01),
        ("0.1 nats_per_item", "loss_per_item", 0.1),
        ("0.3", "accuracy", 0.3),
    ],
)
def test_a_margin_is_read_in_the_units_of_the_score(
    margin: str, score: str, size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published(tmp_path, (2.0, 1.9, 1.8, 1.7, 1.6), name=score)
    found = answered(capsys, file, "--se", "0.01", "--margin", margin)
    assert (found["margin"], found["margin_text"]) == (pytest.approx(size), margin)


@pytest.mark.parametrize(
    ("margins", "score", "words"),
    [
        (["0.25%"], "accuracy", "a share of accuracy has no meaning"),
        (["0.25%", "0.1"], "loss", "2 margins"),
        (["0.25% 0.1"], "loss", "2 margins"),
        (["1% of the tuning gain"], "loss", "no score before tuning"),
        (["0.1 nats_per_item"], "loss", "isn't known to be in nats per item"),
        (["0.1 nats_per_token"], "perplexity", "isn't known to be in nats per token"),
        (["0.1 nats_per_itme"], "loss", "did you mean nats_per_item"),
        (["-1"], "loss", "invalid margin -1"),
    ],
)
def test_a_margin_that_makes_no_sense_for_the_score_is_refused(
    margins: list[str], score: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published(tmp_path, (2.0, 1.9, 1.8, 1.7, 1.6), name=score)
    assert main(["analyze", str(file), "--se", "0.01", *(f"--margin={margin}" for margin in margins)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "--margin" in error


def test_the_answer_begins_with_a_rank_to_use_and_what_it_may_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published(tmp_path, WIKISQL)
    found = answered(capsys, file, "--se", "0.5", "--margin", "0.5")
    assert (found["recommended_rank"], found["use_rank"]) == (None, 1)
    assert found["regret_rank"] == 8
    assert found["regret_bound"] == pytest.approx(0.4 + 2.128 * 0.5 * 2**0.5, abs=1e-3)
    assert main(["analyze", str(file), "--se", "0.5", "--margin", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Use r = 1. It costs at most 1.9 in accuracy against r = 8.")
    assert "Margin per doubling: 0.5 in accuracy." in out
    unknown = answered(capsys, published(tmp_path, WIKISQL), "--margin", "0.5")
    assert (unknown["use_rank"], unknown["regret_bound"], unknown["regret_rank"]) == (1, None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no row"),
        ("rank,accuracy", "no row"),
        ("size,accuracy\n8,1\n16,2", "no column with the rank"),
        ("rank,points\n8,1\n16,2", "no column with the score"),
        ("rank,loss,accuracy\n8,1,1\n16,2,2", "several columns could be the score"),
        ("rank,accuracy\n8,nan\n16,2", "r = 16 is the only rank.*1 row without a score is left out.*line 2"),
        ("rank,accuracy\n8,\n16,", "no row has a rank and a score in 'accuracy'"),
        ("rank,accuracy\n8,good\n16,2", "'good', not a number"),
        ("rank,accuracy\neight,1\n16,2", "'eight', not a number"),
        ("rank,accuracy\n8.5,1\n16,2", "invalid rank 8.5"),
        ("rank,accuracy\n8,1\n8,2", "only rank"),
        ("rank,seed,accuracy\n8,1,1\n16,1,2\n16,1,2", "r = 16, seed 1 has two scores"),
        ("rank,seed,precision,accuracy\n8,1,nf4,1\n8,1,int8,1\n16,1,nf4,2", "differ in precision"),
        ("rank,accuracy\n8,1\n8,2\n16,3", "add a column seed"),
        ("rank,seed,item,loss\n8,1,a,1\n8,1,b,1\n8,2,a,1\n16,1,a,1\n16,2,a,1", "seed 2 lacks some of the 2 items"),
        ("rank,accuracy\n8,1,3\n16,2", "columns"),
        ("rank,accuracy\n8,73.4%\n16,0.74", "written with % .*line 2.* and without"),
        ("rank;accuracy\n8;73,4\n16;74.0", "decimal comma .*line 2.* and a point"),
        ('rank,ppl\n8,"1,234"\n16,"1,200"', "'1,234', not a number.*separate thousands"),
        ("rank,accuracy\n8,73.4 (0.5)\n16,74 (0.5)", "write it after ±"),
        ("rank,accuracy\n8,73.4 ± 0\n16,74 ± 0", "invalid standard error 0"),
        ("rank,accuracy,accuracy\n8,1,2\n16,2,3", "two columns are called accuracy"),
        ("Name,r,loss\nr8-seed1,8,1\nr8-seed2,8,2\nx,16,1", "differ in Name.*add a column seed"),
        ("rank,seed,max_steps,loss\n8,1,100,1\n16,1,200,2", "aren't comparable: max_steps is 100, 200"),
        ("r,params.split,seed,loss\n8,test,1,1\n16,validation,1,2", "params.split is test, validation"),
        ("rank,accuracy,se\n8,1,-1\n16,2,1", "standard error"),
    ],
)
def test_a_table_without_an_answer_is_one_clear_message_and_exit_2(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["analyze", str(written(tmp_path, text)), "--margin", "0.5"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search(words, told.err.replace("\n", " "))
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.json", "{"), ("t.json", '{"a": 1}'), ("t.jsonl", "[1]"), ("t.parquet", "no"), ("t.xlsx", ""), ("t.csv", None)],
)
def test_files_that_are_not_what_they_are_called_are_told(
    name: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        written(tmp_path, content, name)
    assert main(["analyze", str(tmp_path / name), "--margin", "1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_score_whose_direction_is_not_known_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "rank,points\n8,1\n16,2")
    assert main(["analyze", str(file), "--score-column", "points", "--margin", "1"]) == 2
    assert "--higher-is-better or --lower-is-better" in capsys.readouterr().err
    assert main(["analyze", str(file), "--score-column", "points", "--higher-is-better", "--se", "0"]) == 2
    assert "invalid standard error 0" in capsys.readouterr().err
    assert main(["analyze", str(file), "--score-column", "point"]) == 2
    assert "did you mean points" in capsys.readouterr().err
