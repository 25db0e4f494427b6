from __future__ import annotations

from dataclasses import replace

import synthetic

from qlora_exp.records.model_card import model_card
from qlora_exp.records.types import Forgetting, Scores, Status
from qlora_exp.tracking import fields


def test_every_axis_is_a_parameter() -> None:
    record = synthetic.completed("a", "targets.modules=[q_proj,v_proj]", "lora.r=16", seed=7)
    params = fields.run_params(record)
    expected = {
        "model.family": "embedded",
        "model.variant": "base",
        "quantization.mode": "nf4",
        "lora.r": "16",
        "lora.alpha": "32",
        "targets": "q_proj,v_proj",
        "task.name": "embedded",
        "training.learning_rate": str(f"{record.config['training']['learning_rate']:g}"),
        "seed": "7",
    }
    assert {key: params[key] for key in expected} == expected
    assert len(params) <= 40
    assert "None" not in params.values()


def test_a_run_without_plan_still_has_its_configured_axes() -> None:
    params = fields.run_params(synthetic.running().replace(plan=None))
    assert params["lora.r"] == "8"
    assert "lora.alpha" not in params


def test_no_run_has_more_than_thirty_metric_keys_and_all_are_grouped() -> None:
    full = synthetic.completed()
    scores = Scores("validation", 5, *([0.5] * 14), other={f"hub_{n}": 0.1 for n in range(20)})
    gone = Forgetting(1.2, 1.3, 0.1, 0.05, 0.2, 9, "general text")
    full = full.replace(
        scores=type(full.scores)(before=scores, after=scores, test=scores, forgetting=gone, forgetting_chat=gone)
    )
    keys = set(fields.run_metrics(full)) | set(fields.CURVE_KEYS.values())
    assert len(keys) == fields.MAX_METRIC_KEYS
    assert all("/" in key for key in keys)
    assert {"score/accuracy", "score/loss_per_item", "score/hub_0"} <= keys


def test_what_was_forgotten_is_shown_for_text_and_for_chats() -> None:
    text, chat = (
        Forgetting(1.2, 1.3, difference, 0.05, 0.2, 9, name, 70)
        for difference, name in ((0.1, "general text"), (0.15, "answers in general chats"))
    )
    record = synthetic.completed()
    record = record.replace(scores=replace(record.scores, forgetting=text, forgetting_chat=chat))
    shown = fields.run_metrics(record)
    assert (shown["score/forgetting_nats_per_byte"], shown["score/forgetting_chat_nats_per_byte"]) == (0.1, 0.15)
    for page in (fields.run_note(record).lower(), model_card(record).lower()):
        assert "loss on general text" in page
        assert "loss on answers in general chats" in page


def test_what_was_not_measured_is_no_metric() -> None:
    assert fields.run_metrics(synthetic.running()) == {}
    nan = synthetic.completed()
    nan = nan.replace(scores=type(nan.scores)(after=Scores("validation", 5, loss=float("nan"), accuracy=0.5)))
    assert "score/loss" not in fields.run_metrics(nan)
    assert fields.run_metrics(nan)["score/accuracy"] == 0.5


def test_curve_points_have_the_same_identity_at_every_delivery() -> None:
    record = synthetic.running()
    first, again = (fields.curve_metrics(record, synthetic.curve(4)) for _ in range(2))
    assert first == again
    assert {row.key for row in first} == {"train/loss", "train/learning_rate", "train/gradient_norm"}
    assert first[-1].timestamp - fields.milliseconds(record.started_at) == 3200


def test_the_note_says_before_and_after_and_hides_secrets() -> None:
    text = fields.run_note(synthetic.completed(after=0.61))
    assert text.startswith("accuracy on validation: 0.2 → **0.61**")
    assert "| accuracy | 0.2 | 0.61 |" in text
    leak = synthetic.failed("x", Status.FAILED, "no access with token=hf_Canary0123456789abcdef")
    assert "Canary" not in fields.run_note(leak)
    assert "**RuntimeError** in train" in fields.run_note(leak)


def test_every_status_has_an_honest_counterpart() -> None:
    assert set(fields.MLFLOW_STATUS) == set(Status)
    finished = {status for status, shown in fields.MLFLOW_STATUS.items() if shown == "FINISHED"}
    assert finished == {Status.COMPLETED}


def test_the_dataset_names_its_source() -> None:
    entry = fields.dataset_input(
        synthetic.completed("a", "task=local", "task.path=/data/x.jsonl", "task.kind=generation")
    )
    assert entry is not None
    assert (entry.dataset.source_type, entry.dataset.digest) == ("local", "abababababab")
    assert "/data/x.jsonl" in entry.dataset.source


def test_the_model_card_claims_only_what_was_measured() -> None:
    card = model_card(synthetic.completed(after=0.61))
    assert card.startswith("---\n")
    assert "| accuracy | 0.2 | 0.61 |" in card
    assert "rouge" not in card.lower()
    assert "did not complete" not in card
    bare = model_card(synthetic.failed("x").replace(plan=None))
    assert "Not measured." in bare
    assert "did not complete: FAILED" in bare
