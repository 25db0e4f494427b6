"""Instruct or base in words and tables: the report's paragraph and section."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from qlora_exp.analysis import figures
from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration, Measure
from qlora_exp.analysis.contrasts import INTERVAL, MIN_SEEDS
from qlora_exp.analysis.instruct_base import (
    AFTER,
    BEFORE,
    BITS_PER_BYTE,
    UNITS,
    InstructBase,
    VariantCell,
    VariantContrast,
)
from qlora_exp.analysis.recommendation import (
    MAX_SEEDS_ADVISED,
    SEEDS_ADVISED,
    ComparisonVerdict,
    Recommendation,
    cost_words,
    interval_words,
    margin_note,
    seeds_command,
    seeds_to_settle,
    size_words,
)
from qlora_exp.analysis.report_choice import TaskMetric, difference_from_baseline, task_metric_of
from qlora_exp.analysis.report_content import (
    DisplayedValue,
    Section,
    StudyInfo,
    Table,
    formatted_value,
    value_table,
)

_BITS = Measure(BITS_PER_BYTE, False)


def settled(contrast: VariantContrast) -> bool:
    """Return whether the contrast holds after adjustment for all secondary contrasts."""
    return contrast.adjusted_p is not None and contrast.adjusted_p <= 1 - INTERVAL


def primary_lead(comparison: InstructBase) -> str:
    """Return the answer in one sentence: which model is better after tuning, and by how much.

    E.g. ``After tuning, the base model is better: instruct costs 2.1 % of the loss (95 % CI 0.9 to 3.3 %, 3 seeds and
    300 items).``
    """
    tuned, level = comparison.tuned, comparison.base.tuned.bits_per_byte
    if tuned is None:
        return "After tuning, it is not settled which model is better: no runs can be paired."
    better = "instruct" if tuned.value > 0 else "base"
    other = "base" if tuned.value > 0 else "instruct"
    size = size_words(abs(tuned.value), _BITS, level)
    interval = interval_words(tuned, _BITS, level, 1.0 if tuned.value > 0 else -1.0)
    costs = f"{other} costs {size} against {better} ({interval})"
    match comparison.verdict:
        case ComparisonVerdict.EQUIVALENT:
            margin = size_words(comparison.margin or 0.0, _BITS, level)
            return f"After tuning, both models are equivalent within {margin}: {costs}."
        case ComparisonVerdict.OPEN:
            return f"After tuning, it is not settled which model is better: {costs}."
    return f"After tuning, the {better} model is better: {costs}."


def variant_recommendation(comparison: InstructBase, studies: Sequence[StudyInfo] = ()) -> Recommendation:
    """Return which of the two models to start from now. ``studies``: for the command that would settle it.

    It is the better one on the compared items. The bound is the end of the 95 % interval: the most by which the other
    one may be better.
    """
    tuned, verdict = comparison.tuned, comparison.verdict
    instruct_is_better = (
        tuned.value > 0 if tuned is not None else _level_of(comparison.instruct) < _level_of(comparison.base)
    )
    used, other = (
        (comparison.instruct, comparison.base) if instruct_is_better else (comparison.base, comparison.instruct)
    )
    bound = None
    if tuned is not None and tuned.seeds >= MIN_SEEDS and tuned.low is not None and tuned.high is not None:
        bound = max(0.0, -tuned.low if instruct_is_better else tuned.high)
    settle = command = None
    if verdict is ComparisonVerdict.OPEN:
        sides = [comparison.instruct.configuration, comparison.base.configuration]
        needed = seeds_to_settle(tuned, comparison.margin)
        if tuned is None or tuned.seeds < MIN_SEEDS:
            settle, command = "Three seeds of each would tell more.", seeds_command(sides, SEEDS_ADVISED, studies)
        elif needed is not None:
            settle, command = f"About {needed} seeds of each would settle it.", seeds_command(sides, needed, studies)
        else:
            settle = f"More test items or a wider margin would settle it: {MAX_SEEDS_ADVISED} seeds wouldn't."
    level = comparison.base.tuned.bits_per_byte
    why = "the two share no seed" if tuned is None else "with one seed, the variation from seed to seed is unknown"
    note = margin_note(comparison.margin, comparison.margin_text, _BITS)
    return Recommendation(
        question="Instruct or base?",
        use=used.variant,
        verdict=f"instruct is {verdict} than base" if verdict in _ORDERED else str(verdict),
        evidence=primary_lead(comparison),
        cost=cost_words(bound, other.variant, lambda size: size_words(size, _BITS, level), why),
        settle=settle,
        settle_command=command,
        regret_bound=bound,
        regret_against=other.variant,
        unit="bits per byte",
        margin=comparison.margin,
        margin_text=comparison.margin_text,
        notes=(*comparison.notes, *([note] if note else [])),
    )


_ORDERED = (ComparisonVerdict.BETTER, ComparisonVerdict.WORSE)


def _level_of(cell: VariantCell) -> float:
    return math.inf if cell.tuned.bits_per_byte is None else cell.tuned.bits_per_byte


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


def baseline_note(configuration: Configuration, metric: TaskMetric) -> str | None:
    """Say whether the configuration beats the traditional baselines on the same split, with the 95 % interval of the
    difference; ``None`` if there are none."""
    scores, baselines, tuned = (
        answering_scores(configuration.first),
        configuration.first.baselines,
        metric.tuned(configuration),
    )
    if scores is None or baselines is None or tuned is None or baselines.split != scores.split:
        return None
    if metric.name != "accuracy" or baselines.majority_accuracy is None:
        return None
    label, level = f"always answering {baselines.majority_label!r}", baselines.majority_accuracy
    if tuned.mean > level and baselines.tfidf_accuracy is not None:
        label, level = "TF-IDF with logistic regression", baselines.tfidf_accuracy
    gap = difference_from_baseline(tuned, level, scores.items)
    low, high = gap.low or 0.0, gap.high or 0.0
    verdict = "is above" if low > 0 else "is below" if high < 0 else "isn't shown to differ from"
    return (
        f"the accuracy of {tuned.mean:.3f} {verdict} that of {label} ({level:.3f} on {baselines.split}):"
        f" {100 * gap.mean:+.2g} points (95 % CI {100 * low:+.2g} to {100 * high:+.2g})."
    )


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
        f"{cell.variant} {cell.seed_sd:.2g} (95 % CI {cell.seed_sd_low:.2g}–{cell.seed_sd_high:.2g})"
        for cell in cells
        if cell.seed_sd is not None
    ]
    if spread:
        yield f"Standard deviation of the tuned score over seeds, in bits per byte: {', '.join(spread)}."
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
    plots = (_contrasts_figure(comparison), figures.accuracy_by_cell(accuracies, baselines))
    end = "This says nothing about instruct models in general."
    paragraphs = (primary_sentence(comparison), " ".join([*_secondary_sentences(comparison), end]))
    points = [*comparison.notes]
    if metric is not None:
        notes = [(cell.name, baseline_note(cell.configuration, metric)) for cell in cells]
        points += [f"{name.capitalize()}: {note}" for name, note in notes if note is not None]
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
    if note := margin_note(comparison.margin, comparison.margin_text, _BITS):
        points.append(f"{note} --equivalence sets the margin.")
    return Section(
        *("instruct-base", "Instruct or base", paragraphs),
        tables=tuple(table for table in tables if table.rows),
        figures=tuple(plot for plot in plots if plot is not None),
        points=tuple(points),
    )


def _contrasts_figure(comparison: InstructBase) -> figures.Figure | None:
    """Plot the primary contrast and the secondary ones of the same unit."""
    named = [("primary: instruct over base, after tuning", comparison.tuned)]
    named += [(c.name, c.difference) for c in comparison.secondary if c.unit == UNITS[BITS_PER_BYTE]]
    points = [figures.ContrastPoint(name, d.value, d.low, d.high) for name, d in named if d is not None]
    return figures.contrasts(points, "gain, bits per byte<br>(above 0: the first is better)")


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
        columns, rows, "Bits per byte of the answer, lower is better; sd: standard deviation with its 95 % CI"
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
        rows.append((name, "bits/byte", d.value, d.low, d.high, d.over, d.p, None, str(comparison.verdict)))
    for contrast in comparison.secondary:
        d, holds = contrast.difference, "yes" if settled(contrast) else "not shown"
        rows.append((contrast.name, contrast.unit, d.value, d.low, d.high, d.over, d.p, contrast.adjusted_p, holds))
    caption = (
        "Above 0, the side named first is better; low and high: 95 % CI. The p of the"
        f" {len(comparison.secondary)} secondary contrasts are adjusted together (Holm)"
    )
    return value_table(columns, rows, caption)
