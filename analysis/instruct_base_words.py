"""Instruct or base in words and tables: the report's paragraph and section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_exp.analysis import figures
from qlora_exp.analysis.comparable import answering_scores, finite_score
from qlora_exp.analysis.configurations import Configuration, mean
from qlora_exp.analysis.contrasts import INTERVAL
from qlora_exp.analysis.instruct_base import AFTER, BEFORE, InstructBase, VariantCell, VariantContrast, verdict
from qlora_exp.analysis.report_choice import task_metric_of
from qlora_exp.analysis.report_content import DisplayedValue, Section, Table, formatted_value, value_table


def paragraph(comparison: InstructBase) -> str:
    """Return the sentences on the primary contrast, and what follows from the secondary contrasts."""
    more = _secondary_sentences(comparison)
    end = "This says nothing about instruct models in general."
    return " ".join([primary_lead(comparison), primary_sentence(comparison), *more, end])


def settled(contrast: VariantContrast) -> bool:
    """Return whether the contrast holds after adjustment for all secondary contrasts."""
    return contrast.adjusted_p is not None and contrast.adjusted_p <= 1 - INTERVAL


def primary_lead(comparison: InstructBase) -> str:
    """Return the answer in one sentence: which model is better after tuning, and by how much."""
    tuned = comparison.tuned
    answer = verdict(tuned, comparison.margin)
    if tuned is not None and tuned.low is not None and tuned.high is not None and answer in ("better", "worse"):
        model = "instruct" if answer == "better" else "base"
        low, high = sorted((abs(tuned.low), abs(tuned.high)))
        return (
            f"After tuning, the {model} model is better: {abs(tuned.value):.3g} bits per byte"
            f" (90 % CI {low:.3g}–{high:.3g}, {tuned.over})."
        )
    if answer == "not settled":
        return "After tuning, it is not settled which model is better."
    return f"After tuning, both models are {answer} bits per byte."


def primary_sentence(comparison: InstructBase) -> str:
    first = comparison.instruct.configuration.first
    task = first.data.task if first.data is not None else "this task"
    where = task if first.scores.test is not None else f"{task} (its validation split)"
    cells = (comparison.instruct, comparison.base)
    names = [f"({cell.name})" for cell in cells]
    if len({cell.configuration.rank for cell in cells}) > 1:
        names = [f"({cell.name}, r = {cell.configuration.rank})" for cell in cells]
    return (
        f"On {where}, this pair of checkpoints is compared: {names[0]} with {names[1]}, chosen {comparison.chosen_by}."
        " In bits per byte of the answer (above 0: instruct is better), the difference is"
        f" {comparison.before_tuning or 'unknown'} before tuning and {comparison.tuned or 'unknown'} after tuning."
        f" Tuning changes it by {comparison.gain or 'unknown'}."
    )


def baseline_note(configuration: Configuration) -> str | None:
    """Say whether the configuration beats the traditional baselines on the same split; ``None`` if there are none."""
    scores, baselines = answering_scores(configuration.first), configuration.first.baselines
    accuracy = mean(finite_score(answering_scores(run), "accuracy") for run in configuration.runs)
    if scores is None or baselines is None or accuracy is None or baselines.split != scores.split:
        return None
    majority, linear = baselines.majority_accuracy, baselines.tfidf_accuracy
    if majority is not None and accuracy <= majority:
        baseline = f"always answering {baselines.majority_label!r} ({majority:.3f} on {baselines.split})"
        return f"Its accuracy of {accuracy:.3f} does not even beat {baseline}."
    if linear is None:
        return None
    baseline = f"TF-IDF with logistic regression ({linear:.3f} on {baselines.split})"
    if accuracy > linear:
        return f"Its accuracy of {accuracy:.3f} is above that of {baseline}."
    return f"Its accuracy of {accuracy:.3f} does not beat {baseline}, which costs almost nothing."


def _secondary_sentences(comparison: InstructBase) -> Iterator[str]:
    by_name = {contrast.name: contrast for contrast in comparison.secondary}
    cells = (comparison.instruct, comparison.base)

    # Accuracy may disagree with bits per byte.
    accuracy = [
        f"{by_name[name].difference} {when}"
        for when in (BEFORE, AFTER)
        if (name := f"instruct over base, {when}, by likelihood") in by_name
    ]
    if accuracy:
        yield f"In accuracy (above 0: instruct is better), the difference is {' and '.join(accuracy)}."
    for when in (AFTER, BEFORE):
        chat = [
            f"{variant} {by_name[name].difference}"
            for variant in ("base", "instruct")
            if (name := f"chat over plain, {variant}, {when}") in by_name
        ]
        if chat:
            yield (
                f"Gain of the chat format over the plain one {when}, in bits per byte (below 0: a loss):"
                f" {', '.join(chat)}."
            )
    base = comparison.base
    if base.few_shot is not None and base.few_shot.accuracy is not None:
        levels = [("without", base.before_tuning.accuracy), ("tuned", base.tuned.accuracy)]
        others = ", ".join(f"{name} {value:.3f}" for name, value in levels if value is not None)
        accuracy_with = f"{base.few_shot.accuracy:.3f}"
        yield f"With {base.shots} examples in the prompt, base has accuracy {accuracy_with} before tuning ({others})."
    kept = by_name.get("instruct over base, general text kept")
    if kept is not None:
        more = "Base" if kept.difference.value > 0 else "Instruct"
        who = f"{more} forgets more" if settled(kept) else "Which model forgets more is not settled"
        if kept.adjusted_p is not None:
            who += f", adjusted p = {formatted_value(kept.adjusted_p, 'p')}"
        yield f"{who}. Base − instruct, in nats per byte of general text: {kept.difference}."
    spread = [
        f"{cell.variant} {cell.seed_sd:.2g} (90 % CI {cell.seed_sd_low:.2g}–{cell.seed_sd_high:.2g})"
        for cell in cells
        if cell.seed_sd is not None
    ]
    if spread:
        yield f"Standard deviation of the tuned score over seeds, in bits per byte: {', '.join(spread)}."
    for cell in cells:
        if note := baseline_note(cell.configuration):
            yield f"{cell.name.capitalize()}: {note[0].lower()}{note[1:]}"
    yield comparison.tokens.sentence


def instruct_section(comparison: InstructBase) -> Section:
    """Return the paragraph, the 2 × 2, the prompts' parts and every contrast."""
    cells, baselines = comparison.cells, _baselines(comparison.cells)
    metric = task_metric_of([c.configuration for c in cells])
    accuracies = [
        (c.name, (metric.before(c.configuration), metric.with_examples(c.configuration), metric.tuned(c.configuration)))
        for c in cells
        if metric is not None and metric.name == "accuracy"
    ]
    tables = (_bits(cells), _answers(cells, baselines), _prompts(cells), _contrasts(comparison))
    figure = figures.accuracy_by_cell(accuracies, baselines)
    points = [*comparison.notes]
    if comparison.missing:
        points.append(f"Not run: {', '.join(comparison.missing)}.")
    if len({cell.searched for cell in cells}) > 1:
        counts = ", ".join(f"{cell.searched} for {cell.name}" for cell in cells)
        points.append(f"The cells were not searched equally ({counts} tried): more tries are an advantage.")
    untrained = [c.name for c in cells if c.runs[0].data and c.runs[0].data.template_tokens_trained is False]
    if untrained:
        points.append(
            f"{', '.join(untrained)}: this checkpoint never saw the template's tokens, and LoRA leaves embeddings as"
            " they are."
        )
    if comparison.margin is None:
        points.append("No margin of equivalence was given (--equivalence): the report can't call both equivalent.")
    return Section(
        *("instruct-base", "Instruct or base", (paragraph(comparison),)),
        tables=tuple(table for table in tables if table.rows),
        figures=(figure,) if figure is not None else (),
        points=tuple(points),
    )


def _baselines(cells: Sequence[VariantCell]) -> list[tuple[str, float]]:
    """Return the traditional baselines; the cells share them because they share the rows."""
    for cell in cells:
        scores, baselines = answering_scores(cell.runs[0]), cell.runs[0].baselines
        if baselines is not None and scores and baselines.split == scores.split:
            named = {
                f"baseline: always {baselines.majority_label}": baselines.majority_accuracy,
                "baseline: TF-IDF with logistic regression": baselines.tfidf_accuracy,
            }
            return [(name, value) for name, value in named.items() if value is not None]
    return []


def _bits(cells: Sequence[VariantCell]) -> Table:
    columns = (
        *("cell", (BEFORE, "figure"), ("with examples", "figure"), (AFTER, "figure")),
        *(("sd over seeds", "figure"), ("sd, low", "figure"), ("sd, high", "figure"), ("seeds", "integer")),
        ("forgetting, nats/byte", "figure"),
    )
    rows = [
        (
            *(c.name, c.before_tuning.bits_per_byte, c.few_shot.bits_per_byte if c.few_shot else None),
            *(c.tuned.bits_per_byte, c.seed_sd, c.seed_sd_low, c.seed_sd_high, len(c.runs)),
            c.forgetting,
        )
        for c in cells
    ]
    return value_table(
        columns, rows, "Bits per byte of the answer, lower is better; sd: standard deviation with its 90 % CI"
    )


def _answers(cells: Sequence[VariantCell], baselines: Sequence[tuple[str, float]]) -> Table:
    moments = (BEFORE, "with examples", AFTER)
    columns = [(f"{score} {moment}", "figure") for score in ("accuracy", "exact match") for moment in moments]
    rows: list[tuple[DisplayedValue, ...]] = []
    for c in cells:
        levels = (c.before_tuning, c.few_shot, c.tuned)
        accuracies = [level.accuracy if level else None for level in levels]
        rows.append((c.name, *accuracies, *(level.exact_match if level else None for level in levels)))
    rows += [(name, None, None, value, None, None, None) for name, value in baselines]
    caption = "By likelihood (accuracy) and by generation (exact match), and the baselines"
    return value_table(["cell", *columns], rows, caption)


def _prompts(cells: Sequence[VariantCell]) -> Table:
    columns = (
        *("cell", "configuration", ("configurations tried", "integer"), ("prompt tokens, mean", "figure")),
        *(("template tokens", "integer"), "template seen in pretraining"),
        *(("truncated items", "integer"), ("tokens in training", "integer")),
    )
    rows: list[tuple[DisplayedValue, ...]] = []
    for c in cells:
        data = c.runs[0].data
        if data is not None:
            trained = {True: "yes", False: "no", None: None}[data.template_tokens_trained]
            chosen = (c.name, c.configuration.label, c.searched)
            prompt = (data.mean_prompt_tokens, data.template_tokens, trained, data.truncated_items, c.tokens)
            rows.append((*chosen, *prompt))
    return value_table(columns, rows, "What was chosen, and what the prompts are made of")


def _contrasts(comparison: InstructBase) -> Table:
    columns = (
        *("contrast", "unit", ("gain", "figure"), ("low", "figure"), ("high", "figure"), "over"),
        *(("p", "p"), ("p, adjusted", "p"), "holds"),
    )
    rows: list[tuple[DisplayedValue, ...]] = []
    if comparison.tuned is not None:
        d = comparison.tuned
        name = f"primary: {comparison.instruct.name} over {comparison.base.name}, {AFTER}"
        rows.append((name, "bits/byte", d.value, d.low, d.high, d.over, d.p, None, verdict(d, comparison.margin)))
    for contrast in comparison.secondary:
        d, holds = contrast.difference, "yes" if settled(contrast) else "not shown"
        rows.append((contrast.name, contrast.unit, d.value, d.low, d.high, d.over, d.p, contrast.adjusted_p, holds))
    caption = (
        "Above 0, the side named first is better; low and high: 90 % CI. The p of the"
        f" {len(comparison.secondary)} secondary contrasts are adjusted together (Holm)"
    )
    return value_table(columns, rows, caption)
