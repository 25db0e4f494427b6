"""What a person sees in the MLflow UI of a finished comparison, read from the pages that Chromium has drawn."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

import synthetic

from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.labels import run_name
from qlora_exp.records.types import RunRecord, Status, Trial
from qlora_exp.tracking.state import read_state
from qlora_exp.tracking.sync import sync_runs
from qlora_exp.tracking.ui import answers_url, charts_url, compare_url, runs_url

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        shutil.which("chromium") is None,
        reason="Chromium is needed for these tests: install it so that 'chromium' is found",
    ),
]

START_SECONDS = 180
PAGE_SECONDS = 120
TRIES = 4
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=3000,2400"),
    *("--virtual-time-budget=40000", "--dump-dom"),
)
"""Wide and high: the table draws only the columns, and the charts only the cards, that are in view."""

CONFIGURATIONS = (("base", "fp16", 8), ("base", "nf4", 16), ("instruct", "nf4", 32))


TRIAL = "r8 dropout0.05"
"""The name of a trial in MLflow: the values of its study's axes."""


@dataclass(frozen=True)
class Ui:
    """``runs``: MLflow run ids by name."""

    address: str
    experiment_id: str
    runs: dict[str, str]


def records() -> Iterator[RunRecord]:
    for number, (variant, mode, rank) in enumerate(CONFIGURATIONS):
        overrides = (f"model.variant={variant}", f"quantization={mode}", f"lora.r={rank}")
        yield synthetic.completed(f"run-{number}", *overrides, after=0.51 + 0.1 * number)
    trial = Trial("which-rank", 0, 1, {"lora.r": 8, "lora.dropout": 0.05})
    yield synthetic.completed("run-trial").replace(name="a name of the record", trial=trial)
    yield synthetic.failed("run-failed", Status.OUT_OF_MEMORY).replace(name="out of memory")


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """``qlora-exp ui`` over a fresh store; its whole process group ends with the tests."""
    output = OutputPaths.of(tmp_path_factory.mktemp("store") / "outputs")
    definition = {"name": "which-rank", "objectives": ["maximize scores.after.accuracy"]}
    write_json(output.study("which-rank").spec, definition)
    for record in records():
        write_answers(synthetic.write_run(output, record), record)
    assert sync_runs(output.root).failed == {}
    states = {run_name(record): read_state(output.run(record.run_id)) for record in records()}
    runs = {name: str(state.mlflow_run_id) for name, state in states.items() if state is not None}
    experiment_id = str(next(state.experiment_id for state in states.values() if state is not None))
    port = free_port()
    command = [sys.executable, "-m", "qlora_exp.cli", "ui", "--port", str(port), "--output-root", str(output.root)]
    log = output.root / "ui.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_it_answers(address, server, log)
        lines = log.read_text().splitlines()
        assert {runs_url(address, experiment_id), charts_url(address, experiment_id)} <= set(lines)  # each on its own
        assert any(line.startswith(f"{address}/#/compare-runs?") for line in lines)
        yield Ui(address, experiment_id, runs)
    finally:
        end_group(server)


def write_answers(paths: RunPaths, record: RunRecord) -> None:
    """One item's answer: of r = 32 the right one."""
    if record.status is not Status.COMPLETED:
        return
    right = record.config["lora"]["r"] == 32
    row = {
        "item_id": "validation.jsonl:1",
        "label": "plant",
        "predicted": "plant" if right else "food",
        "correct": right,
        "loss_sum_nats": 1.0,
        "tokens": 1,
    }
    pq.write_table(pa.Table.from_pylist([row]), paths.items("after", "validation"))
    prompt = {"item_id": row["item_id"], "prompt": "a tree with needles"}
    pq.write_table(pa.Table.from_pylist([prompt]), paths.texts("validation"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_it_answers(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the UI did not start:\n{log.read_text()[-3000:]}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The server and its workers; nothing of it may outlive the test."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def drawn(url: str, profile: Path) -> str:
    """The page's DOM once its scripts have run; empty where Chromium did not get that far in time."""
    shutil.rmtree(profile, ignore_errors=True)
    browser = subprocess.Popen(
        ["chromium", *FLAGS, f"--user-data-dir={profile}", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return browser.communicate(timeout=PAGE_SECONDS)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        return ""
    finally:
        end_group(browser)


def text_of(dom: str) -> str:
    """What can be read on the page, one blank between the pieces."""
    visible = re.sub(r"<(script|style|option)\b.*?</\1>", " ", dom, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", visible).split())


def assert_seen(url: str, tmp_path: Path, *wanted: str) -> str:
    """The page's text, which holds all that is wanted: a slow machine's page gets a few tries."""
    text = ""
    for attempt in range(TRIES):
        text = text_of(drawn(url, tmp_path / f"profile-{attempt}"))
        if all(piece in text for piece in wanted):
            return text
    missing = [piece for piece in wanted if piece not in text]
    raise AssertionError(f"{url}: {missing} not seen in: {text[:4000]}")


def test_the_table_names_every_run_its_axes_and_its_scores(ui: Ui, tmp_path: Path) -> None:
    columns = ("lora.r", "model.variant", "quantization.mode", "score/accuracy", "memory/peak_train_mib")
    names = [name for name in ui.runs if name != TRIAL]
    url = runs_url(ui.address, ui.experiment_id)
    text = assert_seen(url, tmp_path, *names, *columns, "which-rank", "6 matching runs", "0.51", "0.61", "0.71")
    assert TRIAL not in text  # folded away beneath its study


def test_the_charts_open_on_the_axes_and_on_quality_memory_and_speed(ui: Ui, tmp_path: Path) -> None:
    titles = ("Axes and accuracy", "Axes and loss", "Axes and memory", "Quality, memory, speed")
    text = assert_seen(charts_url(ui.address, ui.experiment_id), tmp_path, *ui.runs, *titles, "score/accuracy")
    order = [text.index(title) for title in titles]
    assert order == sorted(order)


def test_the_comparison_shows_names_axes_and_scores_side_by_side(ui: Ui, tmp_path: Path) -> None:
    shown = [name for name in ui.runs if name not in ("out of memory", TRIAL)]
    url = compare_url(ui.address, ui.experiment_id, [ui.runs[name] for name in shown])
    axes = ("model.variant", "quantization.mode", "lora.r", "lora.alpha", "targets", "training.learning_rate")
    text = assert_seen(url, tmp_path, "Comparing 3 Runs", *shown, *axes, "score/accuracy", "0.51", "0.61", "0.71")
    assert "out of memory" not in text


def test_a_run_says_how_it_ended_and_what_changed(ui: Ui, tmp_path: Path) -> None:
    address = f"{ui.address}/#/experiments/{ui.experiment_id}/runs"
    tuned = "base nf4 r16"
    assert_seen(f"{address}/{ui.runs[tuned]}", tmp_path, tuned, "Finished", "accuracy on validation: 0.2", "0.61")
    failed = ui.runs["out of memory"]
    text = assert_seen(f"{address}/{failed}", tmp_path, "out of memory", "Failed", "RuntimeError")
    assert "Finished" not in text


def test_a_run_shows_its_files_and_no_pickle(ui: Ui, tmp_path: Path) -> None:
    run = ui.runs["base fp16 r8"]
    url = f"{ui.address}/#/experiments/{ui.experiment_id}/runs/{run}/artifacts"
    text = assert_seen(url, tmp_path, "adapter", "config.yaml", "record.json")
    assert "training_args.bin" not in text


def test_the_answers_of_the_runs_stand_side_by_side_next_to_the_right_one(ui: Ui, tmp_path: Path) -> None:
    wanted = ("answers.json", "prompt → right answer", "a tree with needles", "→ plant", "✓ plant", "✗ food")
    assert_seen(answers_url(ui.address, ui.experiment_id), tmp_path, *wanted)
