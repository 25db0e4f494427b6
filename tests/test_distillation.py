"""A student learns from a teacher's probabilities: the loss is TRL's, and a teacher is asked once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from qlora_exp.architecture.run_plan import trainable_parameters
from qlora_exp.config.compose import compose, compose_run
from qlora_exp.config.enums import DistillationMode, Divergence
from qlora_exp.config.shipping import DistillationConfig
from qlora_exp.data.load import load_data
from qlora_exp.errors import QloraExpError
from qlora_exp.models.base import load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.models.tuning import merged_tuned
from qlora_exp.orchestration.command import study_spec
from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import find_run
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs import ask_teacher as teachers
from qlora_exp.runs.execute import execute
from qlora_exp.runs.prepare import prepare
from qlora_exp.runs.teacher_answers import agreement_of, consult, rewritten_rows
from qlora_exp.system.environment import probe
from qlora_exp.training.distillation import divergences, top_log_probs
from tests.conftest import save_tiny_model

QUICK = [
    *("tracking=off", "training.device=cpu", "training.max_steps=4", "training.batch_size=8", "seed=1"),
    *("task.max_train_items=48", "evaluation=quick", "evaluation.max_items=8", "evaluation.baselines=false"),
    *("training.learning_rate=1e-3", "evaluation.before=false", "quantization=fp32", "method=full"),
]
STUDENT = "model.layers=[0,3]"


@pytest.fixture(scope="module")
def bases() -> BaseCache:
    return BaseCache()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distillation") / "outputs"


def run(bases: BaseCache, output: Path, *given: str) -> RunRecord:
    record = execute(compose([*QUICK, *given, f"output_root={output}"]), bases=bases)
    assert record.status is Status.COMPLETED, record.failure
    return record


@pytest.fixture(scope="module")
def teacher(bases: BaseCache, output: Path) -> RunRecord:
    return run(bases, output)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)])
def test_the_divergence_over_the_whole_vocabulary_is_that_of_trl(
    divergence: str, beta: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(7, 50, generator=generator) * 3 for _ in range(2))
    settings = DistillationConfig(None, None, DistillationMode.offline, Divergence[divergence], temperature, 0.5, 50)
    tokens, log_probs = top_log_probs(teacher, 50, temperature)
    found = divergences(student, tokens, log_probs, settings) / temperature**2
    wanted = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    assert float(found.sum()) == pytest.approx(float(wanted), rel=1e-4)


def test_fewer_kept_probabilities_give_a_lower_bound_that_grows_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(20, 60, generator=generator) * 2 for _ in range(2))
    found = []
    for k in (1, 4, 16, 60):
        settings = DistillationConfig(None, None, DistillationMode.offline, Divergence.forward, 1.0, 0.5, k)
        found.append(float(divergences(student, *top_log_probs(teacher, k, 1.0), settings).sum()))
    assert found == sorted(found)
    assert found[0] > 0


def test_a_teacher_is_asked_once_and_its_weight_changes_what_is_learned(
    bases: BaseCache, output: Path, teacher: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = teachers.asked
    monkeypatch.setattr(teachers, "asked", lambda *args: asked.append(len(args[1])) or original(*args))
    chosen = f"distillation.teacher={teacher.run_id}"
    alone = run(bases, output, STUDENT)
    gold = run(bases, output, STUDENT, chosen, "distillation.gold_weight=1")
    both = run(bases, output, STUDENT, chosen)
    cut = run(bases, output, STUDENT, chosen, "training.micro_batch_tokens=128")
    padded = run(bases, output, STUDENT, chosen, "training.padding_free=off")
    assert asked == [48, 8]  # training and validation rows, once
    assert gold.scores.after is not None
    assert gold.scores.after == alone.scores.after  # the rows' answers alone
    assert both.scores.after is not None
    assert both.scores.after.loss != alone.scores.after.loss if alone.scores.after else False
    for same in (cut, padded):  # micro-batches and padding change rounding alone
        assert same.scores.after is not None
        assert same.scores.after.loss == pytest.approx(both.scores.after.loss, rel=1e-3)
    assert both.teacher is not None
    assert teacher.scores.after is not None
    assert (both.teacher.run_id, both.teacher.loss) == (teacher.run_id, teacher.scores.after.loss)


def test_last_is_the_run_before_the_student(bases: BaseCache, output: Path, teacher: RunRecord) -> None:
    before = find_run("last", OutputPaths.of(output)).folder.name
    student = run(bases, output, STUDENT, "distillation.teacher=last", "training.max_steps=1")
    assert student.teacher is not None
    assert student.teacher.run_id == student.config["distillation"]["teacher"] == before != student.run_id
    chosen = ["sweeps=distill", "distillation.teacher=last", f"output_root={output}"]
    assert study_spec(chosen).spec.fixed["distillation.teacher"] == student.run_id
    with pytest.raises(QloraExpError, match="another run in each trial"):
        study_spec(["sweeps=distill", "distillation.teacher=null,last", f"output_root={output}"])


def test_the_teacher_is_read_at_each_learned_token(bases: BaseCache, output: Path, teacher: RunRecord) -> None:
    config = compose([*QUICK, f"distillation.teacher={teacher.run_id}", f"output_root={output}"])
    prepared = prepare(config, probe(config.training.device))
    found = teachers.find_teacher(config, prepared.plan.format, load_tokenizer(config.model))
    assert found is not None
    items = prepared.splits.train[:5]
    targets = teachers.asked(teachers.LoadedTeacher(found, "cpu"), items, 8, 1.0)
    assert found.paths is not None
    model, _ = merged_tuned(found.config, found.paths.weights)
    for number, item in enumerate(items):
        with torch.no_grad():
            logits = model(torch.tensor([item.ids])).logits[0]
        places = [place - 1 for place, learned in enumerate(item.completion_mask) if learned]
        tokens, log_probs = top_log_probs(logits[places], 8, 1.0)
        own = targets.of([number])
        assert torch.equal(own["teacher_tokens"], tokens)
        assert torch.allclose(own["teacher_log_probs"], log_probs, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_pruned_model_is_the_kept_layers_of_the_whole_one(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / family)
    given = ["model=local", f"model.path={folder}", "quantization=fp32"]
    whole, last = compose(given), compose([*given, "model.layers=last:1"])
    kept = load_base(last, "cpu").model
    of_whole: dict[str, Any] = dict(load_base(whole, "cpu").model.named_parameters())
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, of_whole[name.replace(".0.", ".1.", 1)])
    architecture = describe(last.model)
    assert architecture.layers == kept.config.num_hidden_layers == 1
    assert architecture.total_parameters == sum(parameter.numel() for parameter in kept.parameters())
    everything = compose([*given, "model.layers=last:1", "method=full"])
    assert trainable_parameters(architecture, (), everything) == architecture.total_parameters
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(kept.generate(**prompt), kept.generate(**prompt, use_cache=False))  # its cache fits its layers


def test_what_cannot_teach_is_refused(bases: BaseCache, output: Path, teacher: RunRecord) -> None:
    for given, what in (
        (["distillation.teacher=nobody"], "isn't found"),
        (["distillation.teacher=model:nobody"], "isn't found"),
        ([f"distillation.teacher={teacher.run_id}", "distillation.teacher_quantization=nf4"], "weights are its own"),
        ([f"distillation.teacher={teacher.run_id}", "model.variant=instruct"], "other tokens|format"),
    ):
        with pytest.raises(QloraExpError, match=what):
            execute(compose([*QUICK, *given, f"output_root={output}"]))
    for given in (["model.layers=[0,0]"], ["distillation.temperature=0"], ["distillation.gold_weight=2"]):
        with pytest.raises(QloraExpError):
            compose([*QUICK, *given])
    for given in (["distillation.mode=answers"], ["distillation=teacher"], ["distillation.divergence=reverse"]):
        with pytest.raises(QloraExpError, match="without a teacher"):
            compose_run([*QUICK, *given])
    compose_run([*QUICK, "distillation.mode=offline", "distillation.teacher=null"])
    assert len(list(OutputPaths.of(output).runs.iterdir())) < 20  # refused before there was a folder


def test_an_untuned_model_teaches_too_and_is_scored_on_the_students_items(bases: BaseCache, output: Path) -> None:
    chosen = ["distillation.teacher=model:embedded", "distillation.gold_weight=0"]
    whole = run(bases, output, "evaluation.before=true", "training.max_steps=1")
    student = run(bases, output, STUDENT, *chosen)
    assert student.teacher is not None
    assert whole.scores.before is not None
    assert (student.teacher.run_id, student.teacher.name) == (None, "embedded")
    assert student.teacher.loss == whole.scores.before.loss
    in_nf4 = run(bases, output, STUDENT, *chosen, "distillation.teacher_quantization=nf4")
    assert in_nf4.teacher is not None
    assert in_nf4.teacher.loss != student.teacher.loss
    assert in_nf4.teacher.fingerprint != student.teacher.fingerprint


def test_a_student_that_is_its_teacher_agrees_in_everything(bases: BaseCache, output: Path, teacher: RunRecord) -> None:
    config = compose([*QUICK, f"distillation.teacher={teacher.run_id}", f"output_root={output}"])
    prepared = prepare(config, probe(config.training.device))
    found = teachers.find_teacher(config, prepared.plan.format, prepared.tokenizer)
    assert found is not None
    assert found.paths is not None
    consulted = consult(found, config, prepared.splits, prepared.tokenizer, "cpu", output / "cache", trains=False)
    answered = pq.read_table(found.paths.items("after", "validation"))
    loaded = teachers.LoadedTeacher(found, "cpu")
    same = agreement_of(loaded.model, consulted, answered, prepared.splits, config)
    assert (same.items, same.equal_answers) == (8, 1.0)
    assert same.kl_nats_per_token == pytest.approx(0.0, abs=1e-5)
    untuned = agreement_of(load_base(config, "cpu").model, consulted, answered, prepared.splits, config)
    assert untuned.kl_nats_per_token > 0.05
    assert untuned.tokens == same.tokens == sum(sum(item.completion_mask) for item in prepared.splits.validation[:8])


def test_a_student_learns_the_teachers_own_texts(bases: BaseCache, output: Path, teacher: RunRecord) -> None:
    chosen = [STUDENT, f"distillation.teacher={teacher.run_id}", "distillation.mode=answers"]
    first, again = run(bases, output, *chosen), run(bases, output, *chosen)
    files = list(OutputPaths.of(output).cache.glob("teacher/*.jsonl"))
    assert len(files) == 1  # asked once
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 48
    assert any(row["teacher"] != row["answer"] for row in rows)
    assert first.scores.after is not None
    assert again.scores.after is not None
    assert again.scores.after.loss == first.scores.after.loss
    gold = run(bases, output, STUDENT)
    assert gold.scores.after is not None
    assert gold.scores.after.loss != first.scores.after.loss
    assert first.agreement is not None
    assert first.agreement.items == 8


@pytest.mark.parametrize("variant", ["base", "instruct"])
def test_written_rows_are_tokenized_like_a_file_with_these_answers(tmp_path: Path, variant: str) -> None:
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {n + n}."} for n in range(30)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {row["prompt"]: f"I would say {row['completion']}" for row in rows}
    answered.write_text("".join(json.dumps({**row, "completion": texts[row["prompt"]]}) + "\n" for row in rows))
    given = [f"model.variant={variant}", "task=local", "evaluation.generate=false"]
    config, other = (compose([*given, f"task.path={file}"]) for file in (asked, answered))
    tokenizer = load_tokenizer(config.model)
    splits, expected = (load_data(one, tokenizer, 64) for one in (config, other))
    prompts = {
        item.item_id: next(text for prompt, text in texts.items() if prompt in item.prompt) for item in splits.train
    }
    left_out = splits.train[3].item_id
    written = rewritten_rows(config, tokenizer, splits, {**prompts, left_out: "  "})
    wanted = {item.prompt: item.ids for item in expected.train}
    assert {item.prompt: item.ids for item in written}.items() <= wanted.items()
    assert len(written) == len(splits.train) - 1
