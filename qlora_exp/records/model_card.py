"""The README.md of an adapter: base model, data, settings and scores, from the run's record alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from qlora_exp.formatting import figure
from qlora_exp.records.method_name import is_lora, method_name, saves_adapter
from qlora_exp.records.model_name import model_place
from qlora_exp.records.redaction import redact, redact_text
from qlora_exp.records.types import Data, RunRecord, Scores

CARD_MEASURES = {
    "loss": "nats per completion token",
    "loss_per_item": "nats per item, summed over its completion tokens",
    "perplexity": "exp(loss)",
    "bits_per_byte": "bits per byte of completion text",
    "token_accuracy": "teacher-forced, without the end token",
    "accuracy": "highest summed log-likelihood of all label tokens among the options",
    "accuracy_calibrated": "the same, corrected by the label marginal on validation",
    "macro_f1": "mean over all labels",
    "exact_match": "generated answer, stripped and case-folded",
    "invalid_answer_rate": "generated answers that aren't an option",
    "rouge_l": "ROUGE-L of the generated answer",
    "token_f1": "token F1 of the generated answer",
}


def model_card(record: RunRecord, library: str = "peft", chapter: str = "") -> str:
    """Return Markdown with the Hub's metadata header. Secrets are redacted.

    Args:
        library: the library that loads the model.
        chapter: Markdown to put before the settings.
    """
    from huggingface_hub import ModelCardData

    config = redact(record.config)
    model = config.get("model") or {}
    base = model_place(model)
    on_hub = base is not None and "/" in base and not base.startswith(("/", ".", "~"))
    lora = is_lora(config)
    adapter = saves_adapter(config)
    tags = ["lora" if lora else "peft" if adapter else "full-finetuning", "qlora-exp"]
    header = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        tags=tags,
    )
    lines = ["---", header.to_yaml(), "---", "", f"# {record.name}", ""]
    mode = (config.get("quantization") or {}).get("mode")
    what = "A LoRA adapter for" if lora else f"Weights tuned with method={method_name(config)} of"
    if adapter and not lora:
        what = f"An adapter ({method_name(config)}) for"
    lines.append(f"{what} `{base or model.get('family')}` ({model.get('variant')}, held in {mode}).")
    if model.get("adapter"):
        lines.append(f"Training started with the adapter in `{model['adapter']}` merged into the base's weights.")
        lines.append(
            "The files of this export contain both."
            if chapter
            else "This adapter belongs to the merged weights; qlora-exp export writes an adapter that contains both."
        )
    lines += [*_origin(record), "", *_scores(record), "", *([chapter, ""] if chapter else [])]
    lines += ["## Settings", "", *_settings(record, config), "", "## Licence and limits", "", *_limits(config)]
    return redact_text("\n".join(lines)) + "\n"


def _origin(record: RunRecord) -> Iterator[str]:
    if record.model_fingerprint:
        yield f"Base fingerprint: `{record.model_fingerprint}`."
    if record.data is not None:
        data = record.data
        yield (
            f"Trained on `{data.task}`: {data.train_items:,} items ({data.validation_items:,} validation, "
            f"{data.test_items:,} test), fingerprint `{data.fingerprint}`."
        )
        if data.dropped_rows:
            reasons = ", ".join(f"{count:,} × {reason}" for reason, count in data.dropped_reasons.items())
            yield f"{data.dropped_rows:,} rows of the data are in no split: {reasons}."
        if data.truncated_items:
            yield f"{data.truncated_items:,} items were longer than training.max_length: their end was cut."
        yield from _prompt(data)
    if record.status.value != "COMPLETED":
        yield f"\n**The run did not complete: {record.status.value}.**"


def _prompt(data: Data) -> Iterator[str]:
    """Yield what a server needs to render prompts as in training."""
    variables = data.answer_prefix_variables
    if data.answer_prefix:
        prefix = json.dumps(data.answer_prefix)
        yield f"Prompts ended in `{prefix}`, which the chat template writes before an answer without reasoning."
    if variables:
        yield f"Serve it with the chat template's variables `{json.dumps(variables)}`."
    elif data.answer_prefix:
        yield "No known variable of the template writes this text: append it to the generation prompt."
    if data.chat_date:
        yield f"The chat template asks for the date. It was given {data.chat_date}."


def _scores(record: RunRecord) -> Iterator[str]:
    yield "## Scores"
    yield ""
    table = record.scores
    for title, before, after in (("validation", table.before, table.after), ("test", table.test_before, table.test)):
        if (scores := after or before) is not None:
            yield f"On {scores.split or title}, {scores.items:,} items:"
            yield ""
            yield "| measure | before | after | how |"
            yield "|---|---:|---:|---|"
            for name, *figures in score_rows(before, after, CARD_MEASURES):
                yield f"| {name} | {' | '.join(figures)} | {CARD_MEASURES[name.replace(' ', '_')]} |"
            yield ""
    if table.before is None and table.after is None and table.test is None:
        yield "Not measured."
    yield from findings(record)


def score_rows(before: Scores | None, after: Scores | None, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, before, after) as text for those of ``names`` that either model has."""
    for name in names:
        values = [getattr(scores, name) if scores is not None else None for scores in (before, after)]
        if any(value is not None for value in values):
            yield name.replace("_", " "), figure(values[0]), figure(values[1])


def findings(record: RunRecord) -> Iterator[str]:
    """Yield a sentence for each thing that was measured beyond the scores: baselines, forgetting, goal."""
    if record.baselines is not None:
        yield (
            f"Baselines on {record.baselines.split}: majority class {figure(record.baselines.majority_accuracy)}, "
            f"TF-IDF + logistic regression {figure(record.baselines.tfidf_accuracy)} (accuracy)."
        )
    for loss in (record.scores.forgetting, record.scores.forgetting_chat):
        if loss is not None:
            yield (
                f"Loss on {loss.text} ({loss.documents} documents) changed by {figure(loss.difference)} nats per byte "
                f"(95 % interval {figure(loss.low)} to {figure(loss.high)})."
            )
    if record.goal is not None:
        yield f"Goal `{record.goal.text}` on {record.goal.split}: {record.goal.answer}."


def _settings(record: RunRecord, config: dict[str, Any]) -> Iterator[str]:
    lora, training = config.get("lora") or {}, config.get("training") or {}
    rows: dict[str, Any] = {"method": method_name(config)}
    if is_lora(config):
        rows = {"rank r": lora.get("r"), "dropout": lora.get("dropout"), "initialisation": lora.get("init")}
    if record.plan is not None:
        plan = record.plan
        rows |= {
            "alpha": f"{plan.alpha:g} (scale {plan.scale:g})" if is_lora(config) else None,
            "adapted modules": f"{plan.adapted_modules} ({', '.join(plan.target_modules)})"
            if plan.target_modules
            else None,
            "trainable parameters": f"{plan.trainable_parameters:,} of {plan.total_parameters:,}",
            "weights, computing, adapter": f"{plan.weight_dtype}, {plan.compute_dtype}, {plan.adapter_dtype}",
            "base's checkpoint": f"quantized by {plan.unpacked_from}, and unpacked" if plan.unpacked_from else None,
            "prompt format": plan.format,
            "device": plan.device,
        }
    if record.training is not None:
        rows["optimizer steps"] = record.training.steps
    names = ("batch_size", "learning_rate", "scheduler", "warmup_ratio", "weight_decay", "optimizer", "max_length")
    rows |= {name.replace("_", " "): training.get(name) for name in names}
    rows["seed"] = record.seed
    rows["run"] = record.run_id
    rows |= {name: record.environment.packages.get(name) for name in ("torch", "transformers", "peft", "trl")}
    yield "| setting | value |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows.items() if value is not None)


def _limits(config: dict[str, Any]) -> Iterator[str]:
    with_base = "The adapter works only with its base model; the" if saves_adapter(config) else "The"
    yield f"{with_base} licences of the base model and of the training"
    yield "data apply. This card was written from the run's record and claims nothing beyond the scores above."
    lora = (config.get("lora") or {}) if is_lora(config) else {}
    if lora.get("init") in ("pissa", "olora"):
        start = "PiSSA" if lora["init"] == "pissa" else "OLoRA"
        yield f"{start} changes the base weights before training. The saved adapter undoes this change, which doubles"
        yield "its rank: with the published base weights W, the trained model is W + alpha/r · B·A."
    if whole := lora.get("modules_to_save"):
        yield f"The adapter's file also has {' and '.join(whole)}, trained whole: merge it for vLLM and llama.cpp."
    if lora.get("dora"):
        yield "DoRA's magnitudes are read by PEFT; vLLM and llama.cpp refuse them. Merge the adapter for these."
    if (config.get("task") or {}).get("source") == "embedded":
        yield "The embedded task is made from WordNet 3.0 (Princeton University), used under the WordNet 3.0 licence."
