"""The report's section on instruct or base: the paragraph, the 2 × 2, the prompts' parts, every contrast."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_exp.analysis import figures
from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration
from qlora_exp.analysis.contrasts import ItemScores
from qlora_exp.analysis.instruct_base import AFTER, BEFORE, InstructBase, VariantCell, compare_variants, verdict
from qlora_exp.analysis.instruct_base_words import paragraph, settled
from qlora_exp.analysis.report_content import DisplayedValue, Section, Table, value_table
from qlora_exp.records.types import Baselines, RunRecord


def instruct_section(
    configurations: Sequence[Configuration],
    items: ItemScores | None = None,
    margin: float | None = None,
    pilots: Sequence[RunRecord] = (),
    budgeted: Sequence[RunRecord] = (),
) -> Section | None:
    """Return the section; ``None`` if only one variant was run. Arguments: :func:`~.instruct_base.compare_variants`."""
    comparison = compare_variants(configurations, items, margin, pilots, budgeted)
    if comparison is None:
        return None
    tables = (_bits(comparison.cells), _answers(comparison.cells), _prompts(comparison.cells), _contrasts(comparison))
    accuracies = [
        (c.name, c.before_tuning.accuracy, c.few_shot.accuracy if c.few_shot else None, c.tuned.accuracy)
        for c in comparison.cells
    ]
    lines = [(name, value) for name, value in _lines(comparison.cells) if value is not None]
    figure = figures.accuracy_by_cell(accuracies, lines)
    return Section(
        *("instruct-base", "Instruct or base", (paragraph(comparison),)),
        tables=tuple(table for table in tables if table.rows),
        figures=(figure,) if figure is not None else (),
        points=tuple(_points(comparison)),
    )


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


def _answers(cells: Sequence[VariantCell]) -> Table:
    columns = (
        *(
            "cell",
            (f"accuracy {BEFORE}", "figure"),
            ("accuracy with examples", "figure"),
            (f"accuracy {AFTER}", "figure"),
        ),
        *(
            (f"exact match {BEFORE}", "figure"),
            ("exact match with examples", "figure"),
            (f"exact match {AFTER}", "figure"),
        ),
    )
    rows: list[tuple[DisplayedValue, ...]] = []
    for c in cells:
        levels = (c.before_tuning, c.few_shot, c.tuned)
        by_name = [
            [getattr(level, name) if level else None for level in levels] for name in ("accuracy", "exact_match")
        ]
        rows.append((c.name, *by_name[0], *by_name[1]))
    rows += [(name, None, None, value, None, None, None) for name, value in _lines(cells) if value is not None]
    return value_table(columns, rows, "By likelihood (accuracy) and by generation (exact match), and the baselines")


def _lines(cells: Sequence[VariantCell]) -> list[tuple[str, float | None]]:
    """Return the traditional baselines; the cells share them because they share the rows."""
    baselines = next(
        (cell_baselines for cell in cells if (cell_baselines := _baselines(cell.runs[0])) is not None), None
    )
    if baselines is None:
        return []
    return [
        (f"baseline: always {baselines.majority_label}", baselines.majority_accuracy),
        ("baseline: TF-IDF with logistic regression", baselines.tfidf_accuracy),
    ]


def _baselines(run: RunRecord) -> Baselines | None:
    scores = answering_scores(run)
    return run.baselines if run.baselines is not None and scores and run.baselines.split == scores.split else None


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


def _points(comparison: InstructBase) -> list[str]:
    points = [*comparison.notes]
    if comparison.missing:
        points.append(f"Not run: {', '.join(comparison.missing)}.")
    if len({cell.searched for cell in comparison.cells}) > 1:
        counts = ", ".join(f"{cell.searched} for {cell.name}" for cell in comparison.cells)
        points.append(f"The cells were not searched equally ({counts} tried): more tries are an advantage.")
    untrained = [c.name for c in comparison.cells if c.runs[0].data and c.runs[0].data.template_tokens_trained is False]
    if untrained:
        points.append(
            f"{', '.join(untrained)}: this checkpoint never saw the template's tokens, and LoRA leaves embeddings as"
            " they are."
        )
    if comparison.margin is None:
        points.append("No margin of equivalence was given (--equivalence): the report can't call both equivalent.")
    return points
