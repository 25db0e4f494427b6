"""One run from the command line to its record: complete when it completes, and complete when it doesn't."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qlora_exp import load_run, run
from qlora_exp.errors import ConfigError, DataError
from qlora_exp.paths import EMBEDDED
from qlora_exp.records.files import write_json
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.system.cards import read_prices
from qlora_exp.system.environment import process_identity
from tests import processes

QUICK = [
    "training.device=cpu",
    "training.max_steps=4",
    "training.batch_size=4",
    "training.max_length=64",
    "training.logging_steps=1",
    "evaluation.max_items=12",
    "evaluation.forgetting_documents=3",
]


def overrides(output: Path, *more: str) -> list[str]:
    return [*QUICK, f"output_root={output}", *more]


def local(model: Path, task: Path) -> list[str]:
    return ["model=local", f"model.path={model}", "task=local", "task.kind=classification", f"task.path={task}"]


def door(*arguments: str, check: bool = False, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return processes.run(
        [sys.executable, "-m", "qlora_exp", *arguments], text=True, capture_output=True, check=check, **kwargs
    )


def mlflow_statuses(output: Path) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{output.parent / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return sorted(found.info.status for found in client.search_runs(experiments))


@pytest.fixture(scope="module")
def completed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("completed")
    task = write_colour_task(folder / "colours.jsonl")
    output = folder / "outputs"
    goal = ["task.goal='accuracy >= 0.5'", "quantization=nf4", "budget.usd_per_hour=2", "training.save_every_steps=2"]
    return run(*overrides(output, *local(tiny_models["llama"], task), *goal)), output


def test_a_completed_record_has_every_figure(completed: tuple[RunRecord, Path]) -> None:
    record, output = completed
    assert record.status is Status.COMPLETED, record.failure
    assert load_run(record.run_id, str(output)) == record
    memory, speed = record.memory, record.speed
    for value in (memory.base_weight_bytes, memory.quantization_state_bytes, memory.adapter_bytes):
        assert value is not None
        assert value > 0
    assert memory.gradient_bytes == memory.adapter_bytes
    assert memory.optimizer_bytes is not None
    assert memory.adapter_bytes is not None
    assert 2 * memory.adapter_bytes <= memory.optimizer_bytes < 2.1 * memory.adapter_bytes
    for seconds in (speed.load_seconds, speed.train_seconds, speed.evaluation_seconds, speed.total_seconds):
        assert seconds is not None
        assert seconds > 0
    assert speed.train_tokens is not None
    assert speed.loss_tokens is not None
    assert 0 < speed.loss_tokens < speed.train_tokens
    assert speed.cost_usd is not None
    assert record.plan is not None
    assert record.plan.trainable_parameters * 4 == memory.adapter_bytes
    assert record.goal is not None
    assert record.goal.answer in ("yes", "no", "not shown")
    assert record.scores.forgetting is not None
    assert record.baselines is not None


def test_per_item_results_add_up_to_the_scores(completed: tuple[RunRecord, Path]) -> None:
    record, output = completed
    items = pq.read_table(output / "runs" / record.run_id / "items_after_validation.parquet").to_pydict()
    after = record.scores.after
    assert after is not None
    assert sum(items["correct"]) / len(items["correct"]) == pytest.approx(after.accuracy)
    assert sum(items["loss_sum_nats"]) / len(items["loss_sum_nats"]) == pytest.approx(after.loss_per_item)


def test_the_adapter_is_safetensors_and_no_pickle_is_left(completed: tuple[RunRecord, Path]) -> None:
    record, output = completed
    names = {path.name for path in (output / "runs" / record.run_id).rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_what_does_not_change_is_computed_once(completed: tuple[RunRecord, Path], tiny_models: dict[str, Path]) -> None:
    first, output = completed
    task = output.parent / "colours.jsonl"
    again = run(*overrides(output, *local(tiny_models["llama"], task), "quantization=nf4", "lora.r=2"))
    other = run(*overrides(output, *local(tiny_models["llama"], task), "quantization=fp32"))
    assert again.speed.base_scores_cached
    assert again.scores.before == first.scores.before
    assert not other.speed.base_scores_cached
    assert other.scores.before != first.scores.before


def test_the_same_seed_gives_the_same_scores(completed: tuple[RunRecord, Path], tiny_models: dict[str, Path]) -> None:
    first, output = completed
    task = output.parent / "colours.jsonl"
    again = run(*overrides(output, *local(tiny_models["llama"], task), "quantization=nf4"))
    other = run(*overrides(output, *local(tiny_models["llama"], task), "quantization=nf4", "seed=2"))
    assert again.scores.after == first.scores.after
    assert other.scores.after != first.scores.after


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
@pytest.mark.parametrize("quantization", ["fp16", "int8"])
def test_other_architectures_run_to_a_record(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, family: str, quantization: str
) -> None:
    given = [*local(tiny_models[family], colour_task), f"quantization={quantization}", "targets=all_linear"]
    record = run(*overrides(tmp_path / "outputs", *given))
    assert record.status is Status.COMPLETED, record.failure
    assert record.plan is not None
    assert record.plan.adapted_modules == {"gpt2": 8, "phi3": 8}[family]


def test_a_run_in_the_chat_format_is_also_measured_on_held_out_chats(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    template = f"model.chat_template={EMBEDDED / 'instruct' / 'chat_template.jinja'}"
    chat = [*local(tiny_models["llama"], colour_task), "task.format=chat", template, "evaluation.baselines=false"]
    first, again = (run(*overrides(tmp_path / "outputs", *chat)) for _ in range(2))
    assert first.status is Status.COMPLETED, first.failure
    on_text, on_chats = first.scores.forgetting, first.scores.forgetting_chat
    assert on_text is not None
    assert on_chats is not None
    assert (on_text.documents, on_chats.documents) == (3, 3)
    assert on_text.tokens is not None
    assert on_chats.tokens is not None
    assert 0 < on_chats.tokens < on_text.tokens
    assert on_chats.difference != on_text.difference != 0
    assert again.speed.base_scores_cached
    assert again.scores == first.scores
    plain = run(*overrides(tmp_path / "outputs", *local(tiny_models["llama"], colour_task)))
    assert plain.scores.forgetting_chat is None


@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_a_row_longer_than_the_models_context_is_refused_before_there_is_a_run(
    tiny_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    task = tmp_path / "task.jsonl"
    rows = [{"prompt": f"number {number} is", "completion": ("odd", "even")[number % 2]} for number in range(40)]
    if kind == "generation":
        rows[3]["completion"] = "1 2 3 " * 240
    else:
        rows[3]["prompt"] = "1 2 3 " * 240 + "is"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*local(tiny_models["gpt2"], task), f"task.kind={kind}", "training.max_length=2000"]
    with pytest.raises(DataError) as caught:
        run(*overrides(tmp_path / "outputs", *given))
    assert "the model takes 512" in caught.value.what
    assert caught.value.where == "task.jsonl, row 4"
    assert ("training.max_length=512" in caught.value.hint) == (kind == "generation")
    assert not list((tmp_path / "outputs").glob("runs/*"))


def test_a_diverged_run_is_told_as_such(tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path) -> None:
    given = [*local(tiny_models["llama"], colour_task), "training.learning_rate=1e30", "training.max_steps=40"]
    result = door(*overrides(tmp_path / "outputs", *given))
    assert result.returncode == 1, result.stderr
    [path] = (tmp_path / "outputs" / "runs").glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "DIVERGED"
    assert record["failure"]["phase"] == "train"
    assert record["plan"]["max_steps"] == 40
    assert record["scores"]["before"] is not None
    assert mlflow_statuses(tmp_path / "outputs") == ["FAILED"]
    assert "learning_rate" in result.stdout


def test_a_model_that_its_last_step_spoiled_is_no_completed_run(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    last = ["training.max_steps=1", "training.warmup_ratio=0", "training.learning_rate=1e30", "quantization=fp32"]
    record = run(*overrides(tmp_path / "outputs", *local(tiny_models["llama"], colour_task), *last))
    assert record.status is Status.DIVERGED
    assert record.failure is not None
    assert record.failure.phase == "evaluate"
    assert record.scores.after is None


def test_wrong_data_ends_with_exit_code_2_and_no_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    rows = [{"prompt": f"item {number}", "completion": "ab"[number % 2]} for number in range(40)]
    rows[1]["completion"] = ""
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for mode in ([], ["-m"]):
        result = door(*mode, *overrides(tmp_path / "outputs", *local(tiny_models["llama"], task)))
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "task.jsonl" in result.stderr
        assert "row 2" in result.stderr or "line 2" in result.stderr
    assert not list((tmp_path / "outputs").glob("runs/*"))


def test_another_models_tokenizer_is_told_before_a_run_exists(colour_task: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer) // 2, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=f"vocabulary ends at {len(tokenizer) // 2 - 1}") as caught:
        run(*overrides(tmp_path / "outputs", *local(tmp_path / "model", colour_task)))
    assert caught.value.where.startswith("colours.jsonl, row ")
    assert not (tmp_path / "outputs" / "runs").exists()


def test_an_output_folder_that_can_not_be_made_is_told(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output folder can't be made") as caught:
        run(*overrides(tmp_path / "file", *local(tiny_models["llama"], colour_task)))
    assert "output_root" in str(caught.value.hint)


def hear_hangups() -> None:
    """In a child: the tests may have been started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_saves_and_the_resumed_one_ends_like_an_undisturbed_one(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "outputs"
    long = [*local(tiny_models["llama"], colour_task), "training.max_steps=100", "evaluation=quick"]
    command = [sys.executable, "-m", "qlora_exp", *overrides(output, *long)]
    child = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_hangups
    )
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in output.glob("runs/*/curve.jsonl")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    os.kill(child.pid, number)
    shown, _ = child.communicate(timeout=120)
    assert child.returncode == 130
    [folder] = output.glob("runs/*")
    record = load_run(str(folder))
    assert record.status is Status.INTERRUPTED
    assert f"--resume {folder}" in shown
    assert mlflow_statuses(output) == ["KILLED"]

    resumed = processes.run(
        [sys.executable, "-m", "qlora_exp.cli", "run", "--resume", str(folder)],
        text=True,
        capture_output=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    finished = load_run(str(folder))
    assert finished.training is not None
    assert finished.training.steps == 100
    assert finished.training.resumed_from_step
    assert mlflow_statuses(output) == ["FINISHED"]
    undisturbed = run(*overrides(tmp_path / "other", *long))
    assert finished.scores.after == undisturbed.scores.after


@pytest.mark.parametrize(
    ("given", "hourly", "source"),
    [([], read_prices()["cpu"], "conf/prices.yaml: cpu"), (["budget.usd_per_hour=2"], 2.0, "budget.usd_per_hour")],
)
def test_a_runs_cost_is_by_the_price_that_a_plan_counts_with(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, given: list[str], hourly: float, source: str
) -> None:
    quick = ["evaluation=quick", "quantization=fp32", "training.max_steps=1", "tracking=off", *given]
    record = run(*overrides(tmp_path / "outputs", *local(tiny_models["llama"], colour_task), *quick))
    assert record.plan is not None
    assert record.speed.total_seconds is not None
    assert (record.plan.usd_per_hour, record.plan.usd_per_hour_from) == (hourly, source)
    assert record.speed.cost_usd == pytest.approx(record.speed.total_seconds / 3600 * hourly)


def test_no_secret_reaches_a_record_or_the_tracking_database(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    canary = "hf_" + "canaryCANARYcanaryCANARYcanary1234"
    given = [*local(tiny_models["llama"], colour_task), f"name='{canary}'", "training.save_every_steps=2"]
    environment = os.environ | {"HF_TOKEN": canary}
    result = door(*overrides(tmp_path / "outputs", *given), env=environment)
    assert result.returncode == 0, result.stderr
    assert canary not in result.stdout + result.stderr
    holding = [str(p) for p in tmp_path.rglob("*") if p.is_file() and canary.encode() in p.read_bytes()]
    assert holding == []


@pytest.mark.faults
def test_the_basic_sweeper_leaves_one_finished_run_a_point_each_in_a_process_of_its_own(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    output = tmp_path / "outputs"
    axes = ["quantization=glob([nf4,fp32])", "lora.r=2"]
    given = [*overrides(output, *local(tiny_models["llama"], colour_task), *axes), "evaluation=quick"]
    result = door("-m", "hydra/sweeper=basic", *given)
    assert result.returncode == 0, result.stderr
    records = [load_run(str(path)) for path in output.glob("runs/*")]
    points = {(record.config["quantization"]["mode"], record.config["lora"]["r"]) for record in records}
    assert points == {("nf4", 2), ("fp32", 2)}
    assert mlflow_statuses(output) == ["FINISHED"] * 2
    assert all(not record.memory.process_reused for record in records)
    assert all(record.memory.peak_train_bytes for record in records)


@pytest.fixture
def interrupted(tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path) -> Path:
    """The folder of a run that was told to stop at its third step of twelve; its settings say not to resume."""
    given = [*local(tiny_models["llama"], colour_task), "evaluation=quick", "quantization=fp32"]
    saved = ["training.max_steps=12", "training.save_every_steps=2", "training.resume=false", "tracking=off"]
    command = processes.program(STOPPED_AT_STEP_3, *overrides(tmp_path / "outputs", *given, *saved))
    processes.run(command, check=False, capture_output=True)
    [folder] = (tmp_path / "outputs").glob("runs/*")
    assert load_run(str(folder)).status is Status.INTERRUPTED
    return folder


STOPPED_AT_STEP_3 = """
import os, signal, sys
from qlora_exp.runs.execute import execute
from qlora_exp.config.compose import compose
from qlora_exp.training.outcome import NullObserver

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup

class StopAtStep3(NullObserver):
    def step(self, step, total, metrics):
        if step == 3:
            for _ in range(2):  # a closed terminal: the kernel and the shell send one each
                os.kill(os.getpid(), signal.SIGHUP)

execute(compose(sys.argv[1:]), StopAtStep3())
"""


def resume(folder: Path) -> subprocess.CompletedProcess[str]:
    verb = [sys.executable, "-m", "qlora_exp.cli", "run", "--resume", str(folder)]
    return processes.run(verb, text=True, capture_output=True, check=False)


def test_the_verb_resumes_whatever_the_settings_say(interrupted: Path) -> None:
    done = resume(interrupted)
    assert done.returncode == 0, done.stderr
    training = load_run(str(interrupted)).training
    assert training is not None
    assert training.resumed_from_step


def test_a_run_is_executed_by_one_process_at_a_time(interrupted: Path) -> None:
    verb = [sys.executable, "-m", "qlora_exp.cli", "run", "--resume", str(interrupted)]
    first = processes.Popen(verb, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (interrupted / ".lock").read_text().startswith(f"process {first.pid} on "):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it holds the run, and hasn't written its record yet
    refused = resume(interrupted)
    first.kill()
    first.communicate()
    assert refused.returncode == 2
    assert f"process {first.pid} on {process_identity().host} executes this run" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert resume(interrupted).returncode == 0  # the kernel has let go of it, though the lock's file is still there


def test_a_run_left_by_another_host_can_be_resumed_where_nobody_holds_it(interrupted: Path) -> None:
    gone = replace(process_identity(), host="another-host")
    record = load_run(str(interrupted))
    write_json(interrupted / "record.json", record.replace(status=Status.RUNNING, process=gone))
    assert resume(interrupted).returncode == 0
    assert load_run(str(interrupted)).status is Status.COMPLETED


def test_a_quantized_run_says_nothing_of_bitsandbytes_optional_kernels(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    given = [*local(tiny_models["llama"], colour_task), "evaluation=quick", "quantization=nf4", "tracking=off"]
    given = overrides(tmp_path / "outputs", *given, "training.max_steps=1")
    command = [sys.executable, "-m", "qlora_exp", *given]  # a new interpreter: it is imported there
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr


@pytest.mark.faults
def test_a_run_interrupted_while_it_is_scored_keeps_its_training(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    """A run is stopped in its last phase by TERM; resumed, it evaluates the adapter that it had trained."""
    output = tmp_path / "outputs"
    given = overrides(output, *local(tiny_models["llama"], colour_task), "evaluation.max_items=null")
    once = ["evaluation.batch_size=1", "evaluation.before=false", "evaluation.baselines=false"]
    command = [sys.executable, "-m", "qlora_exp", *given, "training.max_steps=8", *once]
    child = processes.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(output.glob("runs/*/trained.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)
    child.terminate()
    child.communicate(timeout=60)
    [folder] = output.glob("runs/*")
    stopped = load_run(str(folder))
    assert child.returncode == 130, stopped.status
    assert stopped.status is Status.INTERRUPTED
    assert stopped.training is not None
    assert stopped.training.steps == 8
    assert stopped.memory.peak_train_bytes
    verb = [sys.executable, "-m", "qlora_exp.cli", "run", "--resume", str(folder)]
    resumed = processes.run(verb, text=True, capture_output=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    finished = load_run(str(folder))
    assert finished.training == stopped.training
    assert finished.scores.after is not None
