"""What the models of a run answered: kept with its items, shown at its end, by ``show`` and ``diff``, and left out
where nobody may read it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.items import read_items
from tests.analysis import made_up
from tests.conftest import write_colour_task
from tests.contracts import store

ITEMS = 40


def write_answers(
    outputs: OutputPaths,
    number: int,
    right: Mapping[int, bool],
    *,
    prompts: Sequence[str] | None = None,
    text: str = "",
    rows: str | None = None,
    items: int = ITEMS,
) -> str:
    """A made-up run that answers items with labels; ``right``: item → whether the tuned model is right, else it is
    wrong. Returns its id."""
    record = made_up.run(number, seed=number)
    assert record.data is not None
    record = record.replace(data=replace(record.data, rows_fingerprint=rows))
    paths = outputs.run(record.run_id)
    write_json(paths.record, record)
    names = [f"test.jsonl:{item + 1}" for item in range(items)]
    for moment, correct in (("before", {}), ("after", right)):
        table = [
            {
                "item_id": name,
                "label": "plant",
                "answer": "plant",
                "loss_sum_nats": 2.0 + item % 3,
                "tokens": 2,
                "predicted": "plant" if correct.get(item) else "food",
                "correct": correct.get(item, False),
                "generated": f"{text}plant",
            }
            for item, name in enumerate(names)
        ]
        pq.write_table(pa.Table.from_pylist(table), paths.items(moment, "test"))
    if prompts is not None:
        texts = [{"item_id": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)]
        pq.write_table(pa.Table.from_pylist(texts), paths.texts("test"))
    return record.run_id


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OutputPaths:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return OutputPaths.of("outputs")


def test_a_few_items_have_right_and_wrong_answers_and_are_the_same_each_time(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    write_answers(outputs, 1, {39: True})
    found = json.loads(shown(capsys, "show", "last", "--items", "5", "--json"))
    assert sorted(row["correct"] for row in found) == [False] * 4 + [True]
    assert json.loads(shown(capsys, "show", "last", "--items", "5", "--json")) == found
    wrong = json.loads(shown(capsys, "show", "last", "--items", "99", "--wrong", "--json"))
    assert len(wrong) == ITEMS - 1
    assert not any(row["correct"] for row in wrong)
    assert len(json.loads(shown(capsys, "show", "last", "--items", "99", "--json"))) == ITEMS


def test_long_and_hostile_texts_stay_within_the_terminal_and_obey_nothing(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"Say it: \x1b[31mred\x1b[0m\r{item} {'漢字 ' * 60}\nDone:" for item in range(ITEMS)]
    write_answers(outputs, 1, {0: True}, prompts=prompts, text="long " * 40)
    text = shown(capsys, "show", "last", "--items", "8")
    assert not any(character in text for character in "\x1b\r")
    assert "…" in text
    assert "Say it" not in text  # what all prompts share
    assert max(map(cell_len, text.splitlines())) <= 100


def test_two_runs_are_shown_side_by_side_where_they_disagree_first(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"question {item} here" for item in range(ITEMS)]
    first = write_answers(outputs, 1, {0: True, 1: True, 2: True}, prompts=prompts)
    second = write_answers(outputs, 2, {2: True, 3: True}, prompts=prompts)
    text = shown(capsys, "diff", first, second, "--items", "--limit", "4")
    assert "both right 1, only A 2, only B 1, neither 36" in text
    assert "40 items alone" in text
    assert {line.split()[0] for line in text.splitlines()[-4:-1]} == {"0", "1", "3"}
    found = json.loads(shown(capsys, "diff", first, second, "--items", "--json"))
    assert (found["both"], found["only_first"], found["only_second"], found["neither"]) == (1, 2, 1, 36)
    assert found["accuracy_difference"] == pytest.approx(-1 / 40)
    assert found["accuracy_difference_low"] < found["accuracy_difference"] < found["accuracy_difference_high"]
    disagree = [row["first_correct"] != row["second_correct"] for row in found["items"]]
    assert disagree == [True] * 3 + [False] * 37


@pytest.mark.parametrize(("items", "rows"), [(ITEMS - 1, "a"), (ITEMS, "b")])
def test_runs_on_different_items_are_not_compared(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str], items: int, rows: str
) -> None:
    first = write_answers(outputs, 1, {}, rows="a")
    second = write_answers(outputs, 2, {}, rows=rows, items=items)
    error = shown(capsys, "diff", first, second, "--items", code=2)
    assert "the runs were scored on different items" in error
    assert "qlora-exp rerun" in error


def test_a_run_that_was_not_scored_says_so(outputs: OutputPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(outputs.run("unscored").record, made_up.run(1).replace(run_id="unscored"))
    assert "the run has no items" in shown(capsys, "show", "unscored", "--items", "3", code=2)


def test_runs_of_the_first_version_show_their_answers_without_prompts(
    outputs: OutputPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = OutputPaths.of(store.unpacked("v1", tmp_path / "earlier") / "outputs")
    trained = [file.parent for file in earlier.runs.glob("*/items_before_*.parquet")]
    assert trained
    for folder in trained:
        rows = read_items(folder)
        assert rows
        assert all(row["prompt"] is None and row["expected"] is not None for row in rows)
        assert rows[0]["id"] in shown(capsys, "show", str(folder), "--items", "999")


def test_the_report_shows_what_the_best_configuration_and_the_next_say_and_runs_nothing_in_it(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = [
        f"<script>alert({item})</script> [link](http://evil) ![](http://evil) | `x` {item}" for item in range(ITEMS)
    ]
    ids = [write_answers(outputs, number, {number: True}, prompts=hostile) for number in (1, 2)]
    for number, run_id in enumerate(ids):
        file = outputs.run(run_id).record
        record = read_record(file)
        lora = {**record.config["lora"], "r": 8 * (number + 1)}
        write_json(file, record.replace(config={**record.config, "lora": lora}))
    shown(capsys, "report")
    page, plain = ((outputs.root / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert '<details class="section" id="what-it-says">' in page
    section = page[page.index('id="what-it-says"') :].partition("</details>")[0]
    assert section.count("&lt;script&gt;alert(") == 24
    assert "<script" not in section
    assert all(run_id in section for run_id in ids)
    assert "## What the tuned model says" in plain
    assert "alert(" in plain
    assert not any(markup in plain for markup in ("<script", " [link](", " ![]("))
    assert "8 more are in report.html" in plain


def with_losses(outputs: OutputPaths, run_id: str, moment: str, nats: dict[int, float]) -> None:
    """Give items another loss, in nats over their two tokens."""
    file = outputs.run(run_id).items(moment, "test")
    rows = pq.read_table(file).to_pylist()
    for item, value in nats.items():
        rows[item]["loss_sum_nats"] = value
    pq.write_table(pa.Table.from_pylist(rows), file)


def with_rank(outputs: OutputPaths, run_id: str, rank: int) -> None:
    file = outputs.run(run_id).record
    record = read_record(file)
    write_json(file, record.replace(config={**record.config, "lora": {**record.config["lora"], "r": rank}}))


def test_the_report_shows_the_items_on_which_each_configuration_changed_most(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"Say it. {item} is a <b>thing{item}</b> here" for item in range(ITEMS)]
    ids = [write_answers(outputs, number, {7: True}, prompts=prompts) for number in (1, 2)]
    for number, run_id in enumerate(ids):
        with_rank(outputs, run_id, 8 * (number + 1))
    # Nats over two tokens: before they are 2, 3 or 4, and after the same but for these.
    with_losses(outputs, ids[0], "after", {3: 40.0, 5: 30.0, 6: 0.5, 7: 0.0, 9: 2.5, 12: 60.0})
    with_losses(outputs, ids[1], "after", {3: 0.25, 5: 0.0, 7: 0.5, 9: 0.0, 12: 0.5, 30: 2.25, 31: 3.5})
    shown(capsys, "report")
    page, plain = ((outputs.root / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    section = plain.partition("## Where tuning changed the model most")[2].partition("\n## ")[0]
    first, second = (section.partition(f"({run_id})")[2].partition("**")[0] for run_id in ids)
    lines = {name: [line.split("|") for line in text.splitlines() if line.startswith("| test")]
             for name, text in (("first", first.partition(ids[1])[0]), ("second", second))}  # fmt: skip
    cells = [(line[1].strip(), *(cell.strip() for cell in line[-4:-1])) for line in lines["first"]]
    assert cells == [
        ("test.jsonl:13", "1", "30", "29"),
        ("test.jsonl:4", "1", "20", "19"),
        ("test.jsonl:6", "2", "15", "13"),
        ("test.jsonl:8", "1.5", "0", "-1.5"),
        ("test.jsonl:7", "1", "0.25", "-0.75"),
    ]
    # Five items on which the right answer became likelier, and the one on which it became less likely most.
    assert [line[1].strip() for line in lines["second"]][-1] == "test.jsonl:32"
    assert len(lines["second"]) == 6
    assert "less likely on 2 of 40 items, the last row has the worst of them" in second
    assert "less likely on 4 of 40 items:" in first
    assert "12 is a &lt;b>thing12&lt;/b> |" in first
    assert "Say it" not in section
    assert 'id="changed-most"' in page
    assert "<b>thing" not in page


def test_the_report_shows_the_same_items_as_each_configuration_answers_them(
    outputs: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = [f"[link](http://evil) `x` {item}" for item in range(ITEMS)]
    ids = [write_answers(outputs, number, dict.fromkeys(range(ITEMS), True) if number == 2 else {}, prompts=hostile)
           for number in range(1, 31)]  # fmt: skip
    for number, run_id in enumerate(ids):
        with_rank(outputs, run_id, number + 1)
    shown(capsys, "report")
    page, plain = ((outputs.root / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    section = plain.partition("## What every configuration answers")[2].partition("\n## ")[0]
    tables = section.split("\n\n|")[1:]
    assert len(tables) == 3
    assert "2 more tables are in report.html" in section
    assert "5 configurations that are worse on validation are left out" in section
    for table in tables:
        rows = [line for line in table.splitlines() if "r " in line and line.startswith("| ")]
        assert len(rows) == 25
        assert sum("✓ plant" in row for row in rows) <= 1
    assert " [link](" not in plain
    on_page = page[page.index('id="samples"') : page.index('id="changed-most"')]
    assert on_page.count('<details class="table">') == 2
    # Runs without answers have no such section.
    for run_id in ids:
        outputs.run(run_id).items("before", "test").unlink()
    shown(capsys, "report")
    assert "changed-most" not in (outputs.root / "report.html").read_text(encoding="utf-8")


# Runs that train.

MARK = "quokka"
"""A word that only the rows have."""
TINY = (
    *("training.device=cpu", "training.max_steps=2", "training.batch_size=4", "training.max_length=64"),
    *("evaluation.forgetting=false", "quantization=fp32", "evaluation.max_items=12"),
)


def write_free_task(path: Path) -> Path:
    rows = [{"prompt": f"The {MARK} {number} says", "completion": f"{MARK} {number % 7}"} for number in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(model: Path, task: Path, *more: str) -> list[str]:
    return ["run", "model=local", f"model.path={model}", "task=local", f"task.path={task}", *TINY, *more]


def test_a_run_that_generates_nothing_has_five_answers_of_each_model(
    outputs: OutputPaths, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    task = write_free_task(tmp_path / "free.jsonl")
    text = shown(capsys, *train(tiny_models["llama"], task, "evaluation.generate=false", "tracking=off"))
    [folder] = outputs.runs.iterdir()
    rows = read_items(folder)
    assert sum(row["answer"] is not None and row["base_answer"] is not None for row in rows) == 5
    assert all(row["correct"] is None and MARK in row["prompt"] for row in rows)
    assert "Generated only to be shown, not scored (evaluation.generate=false)." in " ".join(text.split())
    assert sum(row["expected"] in text for row in rows if row["answer"] is not None) == 5
    record = read_record(folder / "record.json")
    assert record.scores.after is not None
    assert record.scores.after.exact_match is None
    for words in ("time ", f"next: qlora-exp show {folder.name[-4:]} --items 20"):
        assert words in text


def test_a_labelled_run_says_what_an_answer_is_and_what_it_has_to_beat(
    outputs: OutputPaths, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    task = write_colour_task(tmp_path / "colours.jsonl")
    labels = ("task.kind=classification", "evaluation.generate=false", "tracking=off")
    text = shown(capsys, *train(tiny_models["llama"], task, *labels))
    assert "An answer is the label with the largest likelihood. Nothing was generated" in " ".join(text.split())
    assert "accuracy to beat: " in text
    rows = read_items(next(outputs.runs.iterdir()))
    assert all(row["answer"] in ("red", "yellow", "green", "blue") and row["generated"] is None for row in rows)


def texts_in(folder: Path) -> str:
    """All that can be read in the folder's files, Parquet files included."""
    found = []
    for file in folder.rglob("*"):
        if file.suffix == ".parquet":
            found.append(str(pq.read_table(file).to_pydict()))
        elif file.is_file():
            found.append(file.read_bytes().decode("utf-8", errors="replace"))
    return "\n".join(found)


def test_texts_that_are_not_kept_are_written_nowhere(
    outputs: OutputPaths, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    task = write_free_task(tmp_path / "free.jsonl")
    few_shot = ("evaluation.few_shots=1", "evaluation.few_shot_draws=1")
    given = [*few_shot, f"output_root={store / 'outputs'}"]
    shown(capsys, *train(tiny_models["llama"], task, "evaluation.keep_texts=false", *given))
    assert main(["report", "--output-root", str(store / "outputs")]) == 0
    assert (store / "mlflow.db").exists()
    assert MARK not in texts_in(store)
    [folder] = (store / "outputs" / "runs").iterdir()
    rows = read_items(folder)
    assert all(row["expected"] is None and row["answer"] is None and row["correct"] is not None for row in rows)
    assert "were not kept" in shown(capsys, "show", str(folder), "--items", "3")
    # The next run may keep them: the cached scores of the first one, which lack texts, aren't used for it.
    shown(capsys, *train(tiny_models["llama"], task, *given))
    kept = [read_items(path) for path in (store / "outputs" / "runs").iterdir() if path != folder]
    assert all(row["base_answer"] is not None for row in kept[0])
    assert MARK in texts_in(store)


def test_runs_that_agree_on_every_item_may_still_differ_on_others() -> None:
    from qlora_exp.analysis.item_differences import compare_items

    row = {"prompt": None, "expected": "a", "answer": "a", "generated": None, "loss": 1.0, "group": None}
    rows = [{**row, "id": f"i{n}", "correct": n % 2 == 0, "answer_kind": "label"} for n in range(20)]
    same = compare_items(rows, rows).accuracy
    assert same is not None
    assert same.value == 0
    assert same.low == pytest.approx(-same.high)
    assert 0.05 < same.high < 0.2
