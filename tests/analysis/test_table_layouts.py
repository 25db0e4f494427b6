"""``qlora-exp analyze`` on tables laid out as trackers, evaluators and papers write them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_exp.cli import main

RANKS = (8, 16, 32, 64)
SEEDS = (1, 2, 3)
Runs = dict[tuple[int, int], float]


def runs(gains: tuple[float, ...] = (0.4, 0.3, 0.0), level: float = 2.0) -> Runs:
    """(rank, seed) → loss: it falls by the gains, with a noise over seeds that ranks share, and a little more."""
    rng = np.random.default_rng(0)
    by_seed = rng.normal(0, 0.1, len(SEEDS))
    levels = level - np.cumsum([0.0, *gains])
    return {
        (rank, seed): round(float(levels[i] + by_seed[j] + rng.normal(0, 0.005)), 6)
        for i, rank in enumerate(RANKS[: len(gains) + 1])
        for j, seed in enumerate(SEEDS)
    }


def comma(head: list[str], rows: list[list[Any]], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows([head, *rows])
    return stream.getvalue()


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def answered(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> Any:
    code = main(["analyze", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    assert main(["analyze", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


def noted(answer: Any, *words: str) -> bool:
    return any(all(word in note for word in words) for note in answer["notes"])


def mlflow_ui(scores: Runs) -> str:
    """MLflow's "Download CSV": all values quoted, params, metrics and tags without prefixes, durations as text."""
    head = ["Start Time", "Duration", "Run ID", "Name", "Source Type", "Source Name", "User", "Status"]
    head += ["lora.r", "seed", "training.learning_rate", "eval_loss", "train_loss", "mlflow.note.content"]
    times = {8: "480ms", 16: "12.3s", 32: "5.8min", 64: "1.2h"}
    rows: list[list[Any]] = []
    for (r, s), loss in scores.items():
        rows.append([f"2026-11-0{s} 10:00:00", times[r], f"{r:08x}{s}", f"r{r}-s{s}", "LOCAL", "train.py", "me"])
        rows[-1] += ["FINISHED", r, s, 0.001, loss, loss - 0.2, ""]
    rows.append(["2026-11-09 10:00:00", "", "parent", "sweep", "LOCAL", "sweep.py", "me", "FINISHED", *[""] * 6])
    return comma(head, rows, quoting=csv.QUOTE_ALL)


def wandb_ui(scores: Runs) -> str:
    """W&B's table export: everything quoted, a state, config keys and summary keys as columns."""
    head = ["Name", "State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep", "lora_r", "seed", "eval/loss"]
    rows: list[list[Any]] = [
        [f"run-{r}-{s}", "finished", "-", "me", "", "2026-11-01T10:00:00.000Z", "348", "", r, s, loss]
        for (r, s), loss in scores.items()
    ]
    return comma(head, rows, quoting=csv.QUOTE_ALL)


def wandb_api(scores: Runs) -> str:
    """W&B's documented export script: a DataFrame of dicts, which to_csv prints as Python does."""
    rows = []
    for number, ((r, s), loss) in enumerate(scores.items()):
        summary = {"_runtime": 348.2, "eval/loss": loss, "grad_norm": float("nan"), "_wandb": {"runtime": 348}}
        config = {"lora_r": r, "seed": s, "peft": {"target_modules": ["q_proj", "v_proj"], "bias": None}}
        rows.append([number, str(summary), str(config), f"run-{r}-{s}"])
    return comma(["", "summary", "config", "name"], rows)


def optuna_trials(scores: Runs) -> str:
    """Optuna's ``study.trials_dataframe().to_csv()``."""
    head = ["", "number", "value", "datetime_start", "datetime_complete", "duration", "params_r", "user_attrs_seed"]
    rows: list[list[Any]] = [
        [n, n, loss, "2026-11-01 10:00:00", "2026-11-01 10:05:48", "0 days 00:05:48.200000", r, s, "COMPLETE"]
        for n, ((r, s), loss) in enumerate(scores.items())
    ]
    return comma([*head, "state"], rows)


def layouts(folder: Path, scores: Runs) -> dict[str, tuple[list[Path], list[str]]]:
    """The same runs in every layout → (files, further options)."""
    rows = [{"rank": r, "seed": s, "loss": loss} for (r, s), loss in scores.items()]
    long = [list(row.values()) for row in rows]
    ranks = sorted({r for r, _ in scores})
    by_seed: list[list[Any]] = [[s, *(scores[r, s] for r in ranks)] for s in SEEDS]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    lower = ["--lower-is-better"]
    texts: dict[str, tuple[str, list[str]]] = {
        "plain.csv": (comma(["rank", "seed", "loss"], long), []),
        "semicolon.csv": (
            comma(["LoRA Rank", "Seed", "Test NLL"], [[r, s, str(x).replace(".", ",")] for r, s, x in long], ";"),
            [],
        ),
        "tab.tsv": (comma(["Rank r", "seed", "eval_loss"], [[f"r={r}", s, x] for r, s, x in long], "\t"), []),
        "floats.csv": (comma(["rank", "seed", "loss"], [[f"{r}.0", f"{s}.0", x] for r, s, x in long]), []),
        "wide.csv": (comma(["seed", *(f"r = {r}" for r in ranks)], by_seed), lower),
        "wide_named.csv": (comma(["seed", *(f"loss_r{r}" for r in ranks)], by_seed), []),
        "wide_seeds.csv": (
            comma(["rank", *(f"loss seed {s}" for s in SEEDS)], [[r, *(scores[r, s] for s in SEEDS)] for r in ranks]),
            [],
        ),
        "grid.csv": (comma(["seed \\ rank", *map(str, ranks)], by_seed), lower),
        "pivot.csv": (comma(["seed", *map(str, ranks)], by_seed), lower),
        "metrics.csv": (
            comma(
                ["rank", "seed", "metric", "value"],
                [row for r, s, x in long for row in ([r, s, "loss", x], [r, s, "seconds", 348])],
            ),
            [],
        ),
        "table.md": (
            "# Results\n\n" + markdown(["**Rank**", "Seed", "Loss ↓"], [[r, s, f"**{x}**"] for r, s, x in long]),
            [],
        ),
        "table.txt": (markdown(["`r`", "seed", "loss"], long), []),
        "rows.json": (json.dumps(rows), []),
        "columns.json": (json.dumps(columns), []),
        "split.json": (json.dumps({"columns": list(rows[0]), "index": [], "data": long}), []),
        "indexed.json": (json.dumps({k: {str(i): x for i, x in enumerate(v)} for k, v in columns.items()}), []),
        "lines.json": ("\n".join(json.dumps(row) for row in rows), []),
        "nested.jsonl": (
            "\n".join(json.dumps({"config": {"lora": {"r": r}, "seed": s}, "test": {"loss": x}}) for r, s, x in long),
            [],
        ),
        "mlflow.csv": (mlflow_ui(scores), []),
        "wandb.csv": (wandb_ui(scores), []),
        "wandb_api.csv": (wandb_api(scores), []),
        "optuna.csv": (optuna_trials(scores), lower),
    }
    found = {name: ([written(folder, name, text)], options) for name, (text, options) in texts.items()}
    found["table.parquet"] = ([folder / "table.parquet"], [])
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    found["halves"] = (
        [
            written(folder, f"half{n}.json", json.dumps([row for row in rows if (row["seed"] == 1) == n]))
            for n in (0, 1)
        ],
        [],
    )
    found["a file a run"] = (
        [written(folder, f"runs/r{r}-seed{s}/result.json", json.dumps({"loss": x})) for r, s, x in long],
        [],
    )
    return found


def test_the_same_runs_get_the_same_answer_in_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = layouts(tmp_path, runs())
    found = {name: answered(capsys, *paths, *options, "--margin", "0.1") for name, (paths, options) in files.items()}
    first = found.pop("plain.csv")
    assert (first["decision"], first["recommended_rank"]) == ("stop", 32)
    for name, other in found.items():
        assert "configurations" not in other, name
        assert (other["configuration"], other["decision"], other["recommended_rank"]) == (None, "stop", 32), name
        for step, expected in zip(other["comparisons"], first["comparisons"], strict=True):
            assert step == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("score", "se"),
    [
        ("83.3", None),
        ("83.3%", None),
        ("83.3 ± 0.4", 0.4),
        ("83.3+-0.4", 0.4),
        ("$83.3 \\pm 0.4$", 0.4),
        ("83,3±0,4", 0.4),
    ],
)
def test_percentages_and_errors_are_read_from_the_cell(
    score: str, se: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = comma(["rank", "accuracy"], [["r=8", score], ["r=16", score.replace("83", "85")]], ";")
    found = answered(capsys, written(tmp_path, "t.csv", text), "--margin", "1")
    [step] = found["comparisons"]
    assert step["gain"] == pytest.approx(2)
    assert noted(found, "percentage points") == ("%" in score)
    if se is None:
        assert step["low"] is None
    else:
        assert 2 - step["low"] == pytest.approx(1.834 * se * 2**0.5, rel=1e-3)
        assert noted(found, "±", "read as a standard error")


def test_mlflows_own_export_gives_times_and_leaves_out_its_parent_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answered(capsys, written(tmp_path, "runs.csv", mlflow_ui(runs())), "--margin", "0.1")
    # 5.8 min of 1.2 h.
    assert noted(found, "r = 32 takes 92% less time than r = 64")
    assert noted(found, "1 row without a score is left out", "line 14")


def test_rows_without_a_rank_are_counted_and_ask_for_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[r, s, "base", 2 - r / 100 + s / 1000] for r in (8, 16) for s in (1, 2, 3)]
    rows.append(["", "", "", 1.5])  # a study's parent run has its best trial's score
    text = comma(["params.lora.r", "params.seed", "params.model.variant", "loss_per_item"], rows)
    found = answered(capsys, written(tmp_path, "runs.csv", text), "--margin", "0.1")
    assert noted(found, "1 row without a rank is left out", "line 8")
    assert not noted(found, "No answer for")


def test_this_packages_runs_in_mlflow_are_answered_on_the_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "run_id": f"{r}{s}",
            "status": "FINISHED",
            "params.lora.r": r,
            "params.seed": s,
            "params.model.variant": "base",
        }
        | {"metrics.score/loss_per_item": loss + 1, "metrics.score_test/loss_per_item": loss}
        | {"metrics.score_test/accuracy": 0.5, "metrics.score_before/loss_per_item": 9.0, "metrics.train/loss": 0.1}
        | {"metrics.score/forgetting_nats_per_byte": 0.01, "metrics.baseline/tfidf_accuracy": 0.7}
        for (r, s), loss in runs().items()
    ]
    file = written(tmp_path, "runs.csv", comma(list(rows[0]), [list(row.values()) for row in rows]))
    found = answered(capsys, file, "--margin", "0.1")
    assert (found["configuration"], found["recommended_rank"]) == ("base", 32)
    assert noted(found, "The score is metrics.score_test/loss_per_item")


@pytest.mark.parametrize("state", ["crashed", "failed", "running", "killed"])
def test_a_run_of_wandb_that_did_not_finish_is_left_out_and_counted_even_with_a_score(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = runs()
    text = wandb_ui({**scores, (64, 3): 99.0})
    before, _, last = text.rpartition('"finished"')
    found = answered(capsys, written(tmp_path, "w.csv", f'{before}"{state}"{last}'), "--margin", "0.1")
    assert (found["decision"], found["recommended_rank"]) == ("stop", 32)
    assert noted(found, "1 row of runs that didn't finish is left out", "r = 64: 1", "line 13")
    assert noted(found, "r = 32 and r = 64 share 2 of their seeds")


def test_wandb_runs_without_a_score_are_counted_by_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[list[Any]] = [[r, s, loss] for (r, s), loss in runs().items()]
    rows += [[64, 4, ""], [64, 5, "NaN"], [32, 4, "inf"]]
    found = answered(capsys, written(tmp_path, "w.csv", comma(["rank", "seed", "loss"], rows)), "--margin", "0.1")
    assert (found["decision"], found["recommended_rank"]) == ("stop", 32)
    assert noted(found, "3 rows without a score are left out", "r = 64: 2, r = 32: 1", "speaks against its rank")


REPORT = ["run", "status", "study", "trial", "model", "variant", "format", "quantization", "r", "alpha", "targets"]
REPORT += ["learning_rate", "seed", "split", "loss_per_item", "accuracy", "base_accuracy", "bits/byte", "peak_memory"]


def test_our_own_reports_runs_are_read_with_their_pilots_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[list[Any]] = []
    for variant, gains in (("base", (0.4, 0.3, 0.0)), ("instruct", (0.4, 0.0, 0.0))):
        for (r, s), loss in runs(gains).items():
            at = ["embedded", variant, "plain", "nf4", r, 2 * r, "all_linear", 0.004]
            rows.append(
                [f"{variant}{r}{s}", "COMPLETED", "ladder", len(rows), *at, s, "test", loss, 0.4, 0.1, 0.5, 10**6 * r]
            )
            pilot = [f"p{variant}{r}{s}", "COMPLETED", "ladder", len(rows), *at[:-1], 0.001 * s, 1000, "validation"]
            rows.append([*pilot, 9.0, 0.1, 0.1, 2.0, 10**6 * r])
    rows.append(
        ["x", "DIVERGED", "ladder", 99, "embedded", "base", "plain", "nf4", 64, 128, "all_linear", 1, 4, *[""] * 6]
    )
    found = answered(capsys, written(tmp_path, "runs.csv", comma(REPORT, rows)), "--margin", "0.1")
    base, instruct = found["configurations"]
    assert base["configuration"] == "embedded, base, plain, nf4, all_linear"
    assert (base["recommended_rank"], instruct["recommended_rank"]) == (32, 16)
    assert noted(base, "12 rows of pilot runs", "left out")
    assert noted(base, "1 row of runs that didn't finish")
    assert noted(base, "The score is loss_per_item; accuracy, bits/byte can be named")


def peft_result(rank: int, seed: int, accuracy: float, status: str = "success", **config: Any) -> str:
    """A result file of PEFT's method comparison, with the keys that matter and some that don't."""
    metrics: list[dict[str, Any]] = [
        {"step": step, "valid accuracy": 0.1 * step, "train loss": 1 / step, "tokens / sec": 6743.6} for step in (1, 2)
    ]
    metrics.append({"step": 2, "test accuracy": accuracy, "train loss": 0.5, "train total tokens": 4198051})
    train = {
        "model_id": "meta-llama/Llama-3.2-3B",
        "dtype": "bfloat16",
        "max_steps": 5000,
        "batch_size": 4,
        "seed": seed,
    }
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "rank_pattern": {}, "use_dora": False, **config}
    content = {
        "run_info": {"created_at": "2025-06-19", "train_config": train, "peft_config": peft, "error_msg": ""},
        "train_info": {"cuda_memory_max": 10**9 * rank, "train_time": 1796.2, "status": status, "metrics": metrics},
        "meta_info": {"package_info": {"peft-version": "0.15.2"}, "system_info": {"release": "6.8"}},
    }
    return json.dumps(content, indent=2)


def test_pefts_result_files_are_one_run_each_and_its_list_of_metrics_counts_by_its_last_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        written(tmp_path, f"lora--rank{r}-{s}.json", peft_result(r, s, 1.5 - loss / 2, target_modules=names))
        for ((r, s), loss), names in zip(runs().items(), [["q_proj", "v_proj"], ["v_proj", "q_proj"]] * 6, strict=True)
    ]
    failed = written(tmp_path, "lora--rank64-9.json", peft_result(64, 9, 0.0, "failed"))
    found = answered(capsys, *files, failed, "--margin", "0.05")
    assert (found["decision"], found["recommended_rank"]) == ("stop", 32)
    assert found["comparisons"][0]["gain"] == pytest.approx(0.2, abs=0.01)
    assert noted(found, "test accuracy", "valid accuracy")
    assert noted(found, "runs that didn't finish", "r = 64: 1", "lora--rank64-9.json")
    assert noted(found, "50% less memory than r = 64")
    dora = written(tmp_path, "dora--rank64-1.json", peft_result(64, 9, 0.5, use_dora=True))
    assert "use_dora is False, True" in refused(capsys, *files, dora, "--margin", "0.05")


def lm_eval_result(accuracy: float, adapter: str = "") -> str:
    """A results file of lm-evaluation-harness: task → "metric,filter", and standard errors of the items."""
    arguments = "pretrained=meta-llama/Llama-3.2-1B,dtype=bfloat16" + (f",peft={adapter}" if adapter else "")
    content = {
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": accuracy, "acc_stderr,none": 0.01, "acc_norm,none": 0.5},
            "mmlu": {"alias": "mmlu", "acc,none": accuracy / 2, "acc_stderr,none": "N/A"},
            "mmlu_law": {"alias": " - law", "acc,none": 0.9, "acc_stderr,none": 0.1},
        },
        "group_subtasks": {"mmlu": ["mmlu_law"]},
        "versions": {"arc_easy": 1.0},
        "n-shot": {"arc_easy": 0, "mmlu": 5},
        "higher_is_better": {"arc_easy": {"acc": True}},
        "config": {"model": "hf", "model_args": arguments, "limit": None, "random_seed": 0, "numpy_seed": 1234},
    }
    return json.dumps(content)


@pytest.mark.parametrize("in_path", [True, False], ids=["rank in the path", "rank in peft="])
def test_lm_evals_standard_errors_are_of_items_and_do_not_stand_in_for_seeds(
    in_path: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        written(tmp_path, f"DeepSeek-R1-r{r}/results_2026.json", lm_eval_result(accuracy))
        if in_path
        else written(tmp_path, f"{'ab'[r > 8]}/results_2026.json", lm_eval_result(accuracy, f"DeepSeek-R1/lora-r{r}"))
        for r, accuracy in ((8, 0.6), (16, 0.7))
    ]
    found = answered(capsys, *files, "--score-column", "acc,none", "--margin", "0.02")
    easy, mmlu = found["configurations"]
    assert [easy["configuration"], mmlu["configuration"]] == ["arc_easy", "mmlu"]
    [step] = easy["comparisons"]
    assert 0.1 - step["low"] == pytest.approx(1.834 * 0.01 * 2**0.5, rel=1e-3)
    assert (easy["decision"], easy["recommended_rank"]) == ("inconclusive", None)
    assert "noise of the test items only" in easy["sentence"]
    assert (easy["use_rank"], easy["regret_bound"]) == (8, None), "the bound would lack the seeds' noise"
    assert noted(easy, "acc_stderr,none", "not that of the training seed")
    assert noted(easy, "No column has the rank: it is read from the paths")
    assert not noted(easy, "One run per rank")
    assert mmlu["comparisons"][0]["low"] is None


def test_lm_evals_logged_samples_are_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 1, 60)
    files = []
    for r in (8, 16):
        for s in SEEDS:
            right = hard + (r == 16) * 0.9 + rng.normal(0, 0.1, 60) > 0
            lines = [
                json.dumps(
                    {
                        "doc_id": i,
                        "doc": {"question": "a\u2028b", "r": 3, "seed": 7},
                        "resps": [[["x"]]],
                        "acc": float(x),
                    },
                    ensure_ascii=False,
                )
                for i, x in enumerate(right)
            ]
            files.append(written(tmp_path, f"r{r}-seed{s}/samples_arc.jsonl", "\n".join(lines) + "\n"))
    found = answered(capsys, *files, "--margin", "0.05")
    assert found["decision"] == "continue"
    assert noted(found, "seed", "paths")


@pytest.mark.parametrize("name", ["accuracy_stderr", "accuracy_se", "accuracy_std", "std accuracy", "stderr"])
def test_a_column_of_a_scores_own_noise_is_used(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = comma(["rank", "accuracy", name], [[8, 50, 0.5], [16, 60, 0.5]])
    found = answered(capsys, written(tmp_path, "t.csv", text), "--margin", "2")
    assert 10 - found["comparisons"][0]["low"] == pytest.approx(1.834 * 0.5 * 2**0.5, rel=1e-3)
    assert found["decision"] == ("inconclusive" if name == "accuracy_stderr" else "continue")
    assert not noted(found, "One run per rank")


LORA_TABLE_6 = """\
| Dataset | Weight Type | r = 1 | r = 2 | r = 4 | r = 8 | r = 64 |
|---|:--|--:|--:|--:|--:|--:|
| WikiSQL (±0.5%) | Wq, Wv | 73.4 | 73.3 | 73.7 | 73.8 | **73.5** |
| MultiNLI (±0.1%) | Wq, Wv | 91.3 | 91.4 | 91.3 | 91.6 | 91.4 |
"""


def test_a_papers_wide_table_is_read_as_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "paper.md", f"Some text.\n\n{LORA_TABLE_6}\nMore text | with a bar.\n")
    fine = answered(capsys, file, "--higher-is-better", "--se", "0.5", "--margin", "0.5")["configurations"]
    assert [one["configuration"] for one in fine] == ["WikiSQL (±0.5%), Wq, Wv", "MultiNLI (±0.1%), Wq, Wv"]
    assert (fine[0]["decision"], fine[0]["recommended_rank"]) == ("inconclusive", None)
    coarse = answered(capsys, file, "--higher-is-better", "--se", "0.5", "--margin", "2")["configurations"]
    assert (coarse[0]["decision"], coarse[0]["recommended_rank"]) == ("stop", 1)
    assert [step["gain"] for step in fine[0]["comparisons"]] == pytest.approx([-0.1, 0.4, 0.1, -0.3])
    assert "--higher-is-better or --lower-is-better" in refused(capsys, file, "--margin", "1")


def rates_grid() -> list[dict[str, Any]]:
    best = {8: 0.004, 16: 0.002, 32: 0.002, 64: 0.001}
    return [
        {"rank": r, "learning_rate": rate, "seed": s, "loss": round(loss + 0.2 * abs(np.log2(rate / best[r])), 6)}
        for (r, s), loss in runs().items()
        for rate in (0.001, 0.002, 0.004)
    ]


def test_the_best_learning_rate_of_each_rank_is_optimistic_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rates_grid()
    file = written(tmp_path, "grid.json", json.dumps(rows))
    message = refused(capsys, file, "--margin", "0.1")
    assert "r = 8, seed 1 has two scores (row 1 and row 2)" in message
    assert "differ in learning_rate" in message
    assert "--best-over" in message
    found = answered(capsys, file, "--margin", "0.1", "--best-over", "learning_rate")
    plain = answered(capsys, *layouts(tmp_path, runs())["plain.csv"][0], "--margin", "0.1")
    assert found["comparisons"] == plain["comparisons"]
    assert noted(found, "optimistic", "r = 8: 0.004 (of 3)", "r = 64: 0.001 (of 3)")
    each = answered(capsys, file, "--margin", "0.1", "--configuration-column", "learning_rate")
    assert [one["configuration"] for one in each["configurations"]] == ["0.001", "0.002", "0.004"]


def test_a_grid_of_rates_and_ranks_is_read_in_either_direction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates, ranks = (0.001, 0.002), (8, 16)
    score = {(8, 0.001): 1.0, (8, 0.002): 0.9, (16, 0.001): 0.7, (16, 0.002): 0.8}
    down = comma(["lr \\ rank", *map(str, ranks)], [[lr, *(score[r, lr] for r in ranks)] for lr in rates])
    across = comma(["rank/lr", *map(str, rates)], [[r, *(score[r, lr] for lr in rates)] for r in ranks])
    unnamed = comma(["lr", *map(str, ranks)], [[lr, *(score[r, lr] for r in ranks)] for lr in rates])
    for text in (down, across, unnamed):
        file = written(tmp_path, "grid.csv", text)
        found = answered(capsys, file, "--margin", "0.1", "--best-over", "lr", "--lower-is-better")
        [step] = found["comparisons"]
        assert step["gain"] == pytest.approx(0.2)
        assert noted(found, "are read as ranks") == (text == unnamed)


def test_the_best_value_is_not_one_that_only_a_lucky_seed_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*rates_grid(), {"rank": 8, "learning_rate": 0.1, "seed": 1, "loss": 0.0}]
    file = written(tmp_path, "grid.json", json.dumps(rows))
    found = answered(capsys, file, "--margin", "0.1", "--best-over", "learning_rate")
    assert noted(found, "r = 8: 0.004 (of 3; 1 with fewer runs ignored)")


def test_a_value_that_is_written_in_two_ways_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {("1e-4", 8): 1.3, ("2e-4", 8): 1.4, ("1e-4", 16): 1.2, ("2e-4", 16): 1.3}
    rows = [[r, seed, rate, score] for (rate, r), score in scores.items() for seed in (1, 2)]
    rows[0][2], rows[4][2] = "0.0001", "0.00010"
    file = written(tmp_path, "rates.csv", comma(["rank", "seed", "learning_rate", "loss"], rows))
    found = answered(capsys, file, "--margin", "0.05", "--best-over", "learning_rate")
    assert found["comparisons"][0]["gain"] == pytest.approx(0.1)
    assert noted(found, "r = 8: 0.0001 (of 2)")


def test_the_error_of_test_items_decides_nothing_beside_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = comma(["rank", "acc", "acc_stderr", "n"], [[8, 0.50, 0.005, 1319], [16, 0.60, 0.005, 1319]])
    found = answered(capsys, written(tmp_path, "t.csv", text), "--margin", "0.02")
    assert found["decision"] == "inconclusive"
    assert noted(found, "not that of the training seed")


def test_one_run_has_no_standard_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = comma(["rank", "loss", "std", "n"], [[8, 1.0, 0.0, 1], [16, 0.5, 0.0, 1]])
    assert "one run has no standard deviation" in refused(capsys, written(tmp_path, "t.csv", text), "--margin", "0.1")


def test_two_columns_can_distinguish_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"rank": r, "seed": s, "loss": loss, "backbone": backbone, "bits": bits}
        for backbone in ("a", "b")
        for bits in (4, 16)
        for (r, s), loss in runs().items()
    ]
    file = written(tmp_path, "t.json", json.dumps(rows))
    assert "differ in bits" in refused(capsys, file, "--margin", "0.1", "--configuration-column", "backbone")
    both = ["--configuration-column", "backbone", "--configuration-column", "BITS"]
    found = answered(capsys, file, "--margin", "0.1", *both)
    assert [one["configuration"] for one in found["configurations"]] == ["a, 4", "a, 16", "b, 4", "b, 16"]
    assert "did you mean backbone" in refused(capsys, file, "--configuration-column", "backbon")


def test_one_configuration_with_one_rank_does_not_cost_the_others_their_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"rank": r, "seed": s, "loss": loss, "model": "a"} for (r, s), loss in runs().items()]
    rows.append({"rank": 8, "seed": 1, "loss": 1.0, "model": "b"})
    found = answered(capsys, written(tmp_path, "t.json", json.dumps(rows)), "--margin", "0.1")
    assert (found["configuration"], found["recommended_rank"]) == ("a", 32)
    assert noted(found, "configuration b", "r = 8 is the only rank")


def unmatched(gain: float, noise: float, items: int = 0) -> list[dict[str, Any]]:
    rng, hard = np.random.default_rng(2), np.random.default_rng(3).normal(0, 1, max(items, 1))
    hard -= hard.mean()
    rows: list[dict[str, Any]] = []
    for r, seeds in ((8, (1, 2, 3, 4)), (16, (5, 6, 7))):
        for s in seeds:
            level = 2.0 - gain * (r == 16) + rng.normal(0, noise)
            named = [{"item": i} for i in range(items)] or [{}]
            rows += [{"rank": r, "seed": s, **one, "loss": float(level + hard[i])} for i, one in enumerate(named)]
    return rows


def test_seeds_that_are_not_shared_are_compared_by_welchs_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scipy import stats

    rows = unmatched(0.5, 0.05)
    found = answered(capsys, written(tmp_path, "t.json", json.dumps(rows)), "--margin", "0.2")
    small, large = ([row["loss"] for row in rows if row["rank"] == r] for r in (8, 16))
    # One-sided rates of 1/30 and 1/60: 95 % between the two.
    welch = stats.ttest_ind(small, large, equal_var=False)
    low, high = welch.confidence_interval(1 - 2 / 30).low, welch.confidence_interval(1 - 2 / 60).high
    [step] = found["comparisons"]
    assert (step["low"], step["high"]) == pytest.approx((low, high))
    assert found["decision"] == "continue"
    assert noted(found, "r = 8 and r = 16 share no seed", "Welch")


def test_items_stay_paired_where_seeds_are_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = unmatched(0.5, 0.05, items=30)
    found = answered(capsys, written(tmp_path, "t.json", json.dumps(rows)), "--margin", "0.2")
    means = answered(capsys, written(tmp_path, "m.json", json.dumps(unmatched(0.5, 0.05))), "--margin", "0.2")
    # The items' difficulty is 20 times the noise and cancels.
    assert found["comparisons"][0]["low"] == pytest.approx(means["comparisons"][0]["low"], abs=1e-6)


def test_noise_of_runs_is_not_counted_again_as_noise_of_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scipy import stats

    rng = np.random.default_rng(5)
    losses = {r: rng.normal(2, 1, (8, 200)) for r in (8, 16)}
    rows = [
        {"rank": r, "seed": s + r, "item": i, "loss": float(loss)}
        for r, of in losses.items()
        for (s, i), loss in np.ndenumerate(of)
    ]
    found = answered(capsys, written(tmp_path, "t.json", json.dumps(rows)), "--margin", "0.2")
    means = [of.mean(axis=1) for of in losses.values()]
    expected = stats.ttest_ind(*means, equal_var=False).confidence_interval(0.95)
    [step] = found["comparisons"]
    # The items' part of the variance is 0 but for chance; not subtracting the runs' part would double the variance.
    assert (step["high"] - step["low"]) / (expected.high - expected.low) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (((1, 2, 3), (3, 4, 5)), "share one seed only"),
        (((1, 2, 3), (2, 3, 4)), "share 2 of their seeds (3 and 3 runs): only these are paired"),
    ],
)
def test_partly_shared_seeds_are_said_and_never_asked_for_again(
    seeds: tuple[tuple[int, ...], tuple[int, ...]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(3)
    rows = [[r, s, round(r / 100 + rng.normal(0, 0.5), 6)] for r, of in zip((8, 16), seeds, strict=True) for s in of]
    found = answered(capsys, written(tmp_path, "t.csv", comma(["rank", "seed", "loss"], rows)), "--margin", "0.1")
    assert found["decision"] == "inconclusive"
    assert found["comparisons"][0]["low"] is not None
    assert noted(found, words)
    assert "more than one seed a rank" not in found["sentence"]


def test_one_run_against_several_asks_for_runs_of_the_rank_that_lacks_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[8, 1, 1.0], [8, 2, 1.1], [8, 3, 1.05], [16, 9, 0.5]]
    found = answered(capsys, written(tmp_path, "t.csv", comma(["rank", "seed", "loss"], rows)), "--margin", "0.1")
    assert found["comparisons"][0]["low"] is None
    assert "at least two runs of each rank; r = 16 has one" in found["sentence"]


@pytest.mark.parametrize(("margin", "decision"), [("0.05", "inconclusive"), ("0.1", "stop"), ("1", "stop")])
@pytest.mark.parametrize("shared", [True, False])
def test_equal_rounded_scores_have_an_interval_of_their_rounding(
    margin: str, decision: str, shared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[r, s + (0 if shared else r), "73.4"] for r in (8, 16) for s in SEEDS]
    found = answered(capsys, written(tmp_path, "t.csv", comma(["rank", "seed", "accuracy"], rows)), "--margin", margin)
    [step] = found["comparisons"]
    assert (step["gain"], step["low"], step["high"]) == pytest.approx((0, -0.1, 0.1))
    assert found["decision"] == decision
    assert noted(found, "written to 0.1", "what rounding can change")
    if decision == "inconclusive":
        assert "more decimals" in found["sentence"]


@pytest.mark.parametrize(("margin", "near"), [("0.3", True), ("0.5", False)])
def test_rounding_is_mentioned_near_the_margin_only(
    margin: str, near: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[r, s, round(70 + r / 8 + s + 0.3 * (r * s % 5), 1)] for r in (8, 16) for s in SEEDS]
    found = answered(capsys, written(tmp_path, "t.csv", comma(["rank", "seed", "accuracy"], rows)), "--margin", margin)
    assert noted(found, "written to 0.1", "rounded") == near


def clustered(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Items in groups; a group's items have nearly the same difference between the ranks."""
    rng = np.random.default_rng(4)
    effects = rng.normal(0.1, 0.3, len(sizes))
    rows = []
    for group, size in enumerate(sizes):
        for item in range(size):
            hard = rng.normal(0, 1)
            rows += [
                {"rank": r, "seed": s, "item": f"{group}-{item}", "document": f"d{group}"}
                | {"loss": float(2 + hard - effects[group] * (r == 16) + rng.normal(0, 0.01))}
                for r in (8, 16)
                for s in SEEDS
            ]
    return rows


@pytest.mark.parametrize("sizes", [(5,) * 12, (1, 9, 3, 7, 5, 5, 2, 8, 4, 6, 5, 5)], ids=["equal", "unequal"])
def test_groups_of_items_count_as_one_observation_each(
    sizes: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clustered(sizes)
    file = written(tmp_path, "items.json", json.dumps(rows))
    alone = answered(capsys, file, "--margin", "0.1")["comparisons"][0]
    found = answered(capsys, file, "--margin", "0.1", "--group-column", "document")
    grouped = found["comparisons"][0]
    # Five items of a group tell no more than one: the interval is about √5 as wide.
    assert 1.7 < (grouped["high"] - grouped["low"]) / (alone["high"] - alone["low"]) < 3
    means = [
        {"rank": r, "seed": s, "item": d}
        | {"loss": float(np.mean([x["loss"] for x in rows if (x["rank"], x["seed"], x["document"]) == (r, s, d)]))}
        for r in (8, 16)
        for s in SEEDS
        for d in dict.fromkeys(row["document"] for row in rows)
    ]
    averaged = answered(capsys, written(tmp_path, "means.json", json.dumps(means)), "--margin", "0.1")
    assert grouped == pytest.approx(averaged["comparisons"][0])
    assert noted(found, "60 items in 12 groups")
    assert noted(found, "unequal sizes") == (len(set(sizes)) > 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"document": "d0"}, "all items are in the group 'd0': one group shows no noise"),
        ({"document": ""}, "column document is missing"),
        ({"item": "0-0"}, "has two scores"),
    ],
)
def test_groups_that_group_nothing_are_refused(
    change: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, **change} for row in clustered((2, 2))]
    file = written(tmp_path, "t.json", json.dumps(rows))
    assert words in refused(capsys, file, "--margin", "0.1", "--group-column", "document")


def test_a_run_that_lacks_an_item_of_a_group_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "t.json", json.dumps(clustered((3, 3))[1:]))
    message = refused(capsys, file, "--margin", "0.1", "--group-column", "document")
    assert "r = 8, seed 1 lacks some of the 3 items of d0" in message
    file = written(tmp_path, "t.json", json.dumps(clustered((1, 3, 3))[1:]))
    message = refused(capsys, file, "--margin", "0.1", "--group-column", "document")
    assert "r = 8, seed 1 lacks some of the 3 items" in message


def test_an_item_in_two_groups_and_groups_without_items_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clustered((2, 2))
    rows[0]["document"] = "d1"
    file = written(tmp_path, "t.json", json.dumps(rows))
    message = refused(capsys, file, "--margin", "0.1", "--group-column", "document")
    assert "item 0-0 is in the groups d1 and d0" in message
    for row in rows:
        del row["item"]
    file = written(tmp_path, "t.json", json.dumps(rows))
    assert "need items" in refused(capsys, file, "--margin", "0.1", "--group-column", "document")
    assert "did you mean document" in refused(capsys, file, "--margin", "0.1", "--group-column", "documents")


def test_rows_of_several_files_are_named_with_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path, "one.csv", "rank,seed,loss\n8,1,1.0\n16,1,0.9\n")
    two = written(tmp_path, "two.csv", "rank,seed,loss\n8,1,1.0\n16,1,bad\n")
    assert f"{two}, line 3" in refused(capsys, one, two, "--margin", "0.1")
    two.write_text("rank,seed,loss\n8,1,1.0\n16,1,0.8\n")
    message = refused(capsys, one, two, "--margin", "0.1")
    assert f"{one}, line 2 and {two}, line 2" in message
    assert "differ in file" in message
    found = answered(capsys, one, two, "--margin", "0.1", "--configuration-column", "file")
    assert [one["configuration"] for one in found["configurations"]] == [str(one), str(two)]
    assert "given twice" in refused(capsys, one, one, "--margin", "0.1")
    assert "no such file" in refused(capsys, one, tmp_path / "three.csv", "--margin", "0.1")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.md", "no table\n", "no table"),
        ("t.md", markdown(["a"], [[1]]) + "\n" + markdown(["b"], [[1]]), "2 tables have different columns"),
        ("t.md", "| rank | loss |\n|---|---|\n| 8 |\n", "line 3 doesn't have the 2 columns"),
        ("t.csv", "my rank,LoRA Rank 2,loss\n8,8,1\n16,4,2\n", "several columns could be the rank"),
        ("t.csv", "local_rank,mean_reciprocal_rank,loss\n0,0.5,1\n1,0.6,2\n", "no column with the rank"),
        ("t.json", lm_eval_result(0.5), "lm-eval's files don't have it"),
        ("t.csv", "rank,eval_acc,dev_acc\n8,1,2\n16,2,3\n", "several columns could be the score: eval_acc, dev_acc"),
        ("t.csv", "rank,seed,loss,model_id\n8,1,1,a\n16,1,2,b\n", "aren't comparable: model_id is a, b"),
    ],
)
def test_what_can_not_be_read_is_one_sentence(
    name: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, written(tmp_path, name, text), "--margin", "0.1")


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        *[(name, True) for name in ("Test NLL", "eval/loss", "validation_loss", "PPL", "test/perplexity", "WER (%)")],
        *[(name, True) for name in ("bits/byte", "error rate", "nll_per_token", "Score ↓", "neg log likelihood")],
        *[
            (name, False)
            for name in ("Test Acc.", "test_f1", "eval_rougeL", "rouge1", "EM", "exact_match,strict-match")
        ],
        *[(name, False) for name in ("BLEU score", "macro F1", "acc_norm,none", "win rate", "pass@1", "Loss ↑")],
    ],
)
def test_the_direction_follows_from_the_words_of_a_name(
    name: str, lower: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "t.csv", comma(["rank", name], [[8, 1.0], [16, 2.0]]))
    found = answered(capsys, file, "--margin", "0.5")
    assert found["comparisons"][0]["gain"] == pytest.approx(-1.0 if lower else 1.0)
    assert noted(found, f"{'Lower' if lower else 'Higher'} counts as better, inferred from the name {name!r}")


def test_runs_without_an_adapter_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[list[Any]] = [[r, s, loss] for (r, s), loss in runs().items()]
    rows += [["full fine-tuning", 1, 0.1], ["", 1, 3.0]]
    found = answered(capsys, written(tmp_path, "t.csv", comma(["rank", "seed", "loss"], rows)), "--margin", "0.1")
    assert found["recommended_rank"] == 32
    assert noted(found, "2 rows without a rank are left out", "line 14")
