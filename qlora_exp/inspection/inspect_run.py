"""Inspects one prompt: the tuned model's steps, and the base model's own answer."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_exp.errors import RecordError
from qlora_exp.inspection.model_pair import ModelPair
from qlora_exp.inspection.page import Inspection
from qlora_exp.inspection.prompts import item_prompt, own_prompt
from qlora_exp.inspection.sampling import Sampling
from qlora_exp.inspection.steps import answer_of, generate_steps, option_scores, shown_token
from qlora_exp.inspection.subject import Subject


def inspect_prompt(
    subject: Subject,
    prompt: str | None,
    item: str | None,
    steps: int | None,
    top: int,
    sampling: Sampling | None,
    branches: Mapping[int, str],
) -> Inspection:
    """Inspect ``prompt`` or ``item`` (one of them is given) with the models of ``subject``.

    Raises:
        ConfigError, DataError, ModelError, RecordError: before the weights are loaded, where that is possible.
    """
    tokenizer = subject.tokenizer
    if item is None:
        start = own_prompt(subject.config, subject.record, tokenizer, [("user", prompt or "")])
    elif subject.record is None:
        raise RecordError("the file's run isn't known, so there are no items", f"--item {item}", "give a PROMPT")
    else:
        start = item_prompt(subject.config, subject.record, tokenizer, item)
    longest_label = max(map(len, (start.options or {}).values()), default=0)
    limit = steps if steps is not None else start.stop.max_new_tokens
    models = subject.models(len(start.ids) + max(limit, longest_label))
    found = generate_steps(models, tokenizer, start, steps=steps, top=top, sampling=sampling, branches=branches)
    base = None
    # The base answers by itself, too: after the tuned model's tokens it only says how likely it finds them.
    if models.has_base:
        with models.as_base() as model:
            base = generate_steps(ModelPair(model, None), tokenizer, start, steps=steps, top=1)
    return Inspection(
        run_id=subject.record.run_id if subject.record is not None else None,
        prompt=start.text,
        prompt_tokens=tuple((token, shown_token(token, tokenizer)) for token in start.ids),
        expected=(start.item.label or start.item.answer) if start.item is not None else None,
        answer=answer_of(found, tokenizer),
        base_answer=answer_of(base, tokenizer) if base is not None else None,
        options=tuple(option_scores(models, tokenizer, start)) if start.options else (),
        steps=tuple(found),
        file=subject.file,
        notes=subject.notes,
    )
