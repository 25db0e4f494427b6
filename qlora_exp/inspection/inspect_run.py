"""Loads a run's model and inspects one prompt: the tuned model's steps, and the base model's own answer."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_exp.export.tuned_model import load_tuned_model
from qlora_exp.inspection.page import Inspection
from qlora_exp.inspection.prompts import item_prompt, own_prompt
from qlora_exp.inspection.sampling import Sampling
from qlora_exp.inspection.steps import answer_of, generate_steps, option_scores, shown_token
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.models.tuning import without_tuning
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_record
from qlora_exp.runs.entry_points import config_from_plain


def inspect_prompt(
    paths: RunPaths,
    prompt: str | None,
    item: str | None,
    steps: int | None,
    top: int,
    sampling: Sampling | None,
    branches: Mapping[int, str],
) -> Inspection:
    """Inspect ``prompt`` or ``item`` (one of them is given) with the model of the run in ``paths``.

    Raises:
        ConfigError, DataError, ModelError, RecordError: before the weights are loaded, where that is possible.
    """
    record = read_record(paths.record)
    config = config_from_plain(record.config)
    tokenizer = load_tokenizer(config.model)
    if item is not None:
        start = item_prompt(config, record, tokenizer, item)
    else:
        start = own_prompt(config, record, tokenizer, [("user", prompt or "")])
    model, tokenizer = load_tuned_model(record, paths, "auto")
    found = generate_steps(model, tokenizer, start, steps=steps, top=top, sampling=sampling, branches=branches)
    # The base answers by itself, too: after the tuned model's tokens it only says how likely it finds them.
    with without_tuning(model):
        base = generate_steps(model, tokenizer, start, steps=steps, top=1)
    return Inspection(
        run_id=record.run_id,
        prompt=start.text,
        prompt_tokens=tuple((token, shown_token(token, tokenizer)) for token in start.ids),
        expected=(start.item.label or start.item.answer) if start.item is not None else None,
        answer=answer_of(found, tokenizer),
        base_answer=answer_of(base, tokenizer),
        options=tuple(option_scores(model, tokenizer, start)) if start.options else (),
        steps=tuple(found),
    )
