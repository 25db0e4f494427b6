"""The answer of a study that confirms finalists, in words: the report's first lines, its card, its section."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.analysis.configurations import Configuration, known_mean
from qlora_exp.analysis.confirmation import LOST, MIN_SEEDS_TO_DECIDE, Confirmation, ConfirmVerdict, FinalistPair
from qlora_exp.analysis.recommendation import ComparisonVerdict, cost_words, interval_words, size_words
from qlora_exp.analysis.report_choice import trainable_state_bytes
from qlora_exp.analysis.report_content import AnswerCard, CardStatus, Section, value_table
from qlora_exp.formatting import bytes_text
from qlora_exp.records.types import RunRecord, Status

QUESTION = "Which finalist?"


@dataclass(frozen=True)
class ConfirmedSearch:
    """What ``confirm.json`` says about the study whose finalists are confirmed. ``None`` is unknown."""

    study: str
    command: str
    """``qlora-exp confirm STUDY``, as it can be typed where the report is read."""
    chosen_from: int | None = None
    """Configurations of the search that had a score."""
    objective: str | None = None
    earlier_seeds: tuple[int, ...] = ()
    """Numbers of seeds with which an answer was given before."""
    values: tuple[float, ...] = ()
    """The finalists' mean scores in the search, in the order of the trials that confirm them."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ConfirmedSearch:
        """Return it from ``confirm.json``'s content."""
        study = str(content.get("study"))
        return cls(
            study,
            str(content.get("command") or f"qlora-exp confirm {study}"),
            content.get("chosen_from"),
            content.get("objective"),
            tuple(content.get("earlier_seeds") or ()),
            tuple(content.get("values") or ()),
        )

    def value_of(self, finalist: Configuration) -> float | None:
        """Return the finalist's mean score in the search. Trials take the finalists in turn, seed by seed."""
        trial = finalist.first.trial
        return self.values[trial.number % len(self.values)] if trial is not None and self.values else None


def confirmation_lines(found: Confirmation, search: ConfirmedSearch) -> tuple[str, ...]:
    """Return the answer: what to use with its score and cost, how sure that is, what it may cost, what would settle
    it."""
    lines = [_first_line(found), _evidence(found)]
    if len(found.finalists) > 1:
        lines.append(_cost(found))
    lines += [text for text in (_settle(found, search), *_notes(found, search)) if text is not None]
    return tuple(lines)


def confirmation_card(found: Confirmation, search: ConfirmedSearch) -> AnswerCard:
    verdict = {
        ConfirmVerdict.WINNER: f"{found.use.label} wins",
        ConfirmVerdict.EQUAL: f"Equal within the margin: {found.use.label}, the cheapest",
        ConfirmVerdict.OPEN: f"Not separable: {found.use.label}, the cheapest, for now",
        ConfirmVerdict.ALONE: f"{found.use.label}, the only finalist",
    }[found.verdict]
    is_open = found.verdict is ConfirmVerdict.OPEN
    if is_open and len(found.finalists) == 1:
        verdict = f"Not compared: {found.use.label}"
    if found.pending:
        verdict = f"Not finished, {_runs(found.pending)} to come"
    return AnswerCard(
        "confirm",
        QUESTION,
        CardStatus.OPEN if is_open else CardStatus.SETTLED,
        verdict,
        (_evidence(found), *_notes(found, search)),
        _cost(found) if len(found.finalists) > 1 else None,
        _settle(found, search),
        settle_command(found, search),
        "confirmation",
    )


def confirmation_section(found: Confirmation, search: ConfirmedSearch) -> Section:
    """Return the finalists with their scores and costs, and every pair's difference."""
    losses = found.measure.is_loss
    finalists = [
        (
            *(c.label + (" ← use" if c is found.use else ""), len(c.runs)),
            *(c.quality.mean if c.quality is not None else None, *_score_cells(found, c)),
            *(known_mean(found.measure.of(run.scores.after) for run in c.runs), search.value_of(c)),
            *(c.memory_bytes, known_mean(trainable_state_bytes(run) for run in c.runs)),
            *(c.train_seconds, c.cost_usd),
        )
        for c in found.finalists
    ]
    name = (found.score(found.use) or (found.measure.words,))[0]
    columns = (
        *("finalist", ("seeds", "integer"), (f"{found.measure.unit} on test", "figure")),
        *((name, "figure"), (f"{name}, low", "figure"), (f"{name}, high", "figure")),
        *((f"{found.measure.unit} on validation", "figure"), ("in the search", "figure")),
        *(("memory", "bytes"), ("trainable state", "bytes"), ("training", "seconds"), ("cost", "usd")),
    )
    scale = found.level if losses and found.level else 1.0
    kind = "share" if losses and found.level else "figure"
    differences = [
        (
            *(f"{pair.first.label} against {pair.second.label}", pair.difference.value / scale),
            *(None if end is None else end / scale for end in (pair.difference.low, pair.difference.high)),
            str(pair.verdict),
        )
        for pair in found.pairs
    ]
    unit = "share of the loss" if kind == "share" else found.measure.words
    tables = [value_table(columns, finalists, "Finalists, the best on test first; intervals as in the first line")]
    if differences:
        caption = f"How much better the first is ({unit}); the 95 % intervals hold together"
        tables.append(value_table(("pair", ("better by", kind), ("low", kind), ("high", kind), "verdict"), differences,
                                  caption))  # fmt: skip
    paragraphs = (
        f"The finalists of {search.study} were trained with {found.seeds} new seeds, which the search didn't use, and"
        f" scored on {found.items:,} test items. All pairs are compared by seed and item.",
    )
    return Section("confirmation", "Finalists, confirmed", paragraphs, tuple(tables), folded=False)


def settle_command(found: Confirmation, search: ConfirmedSearch) -> str | None:
    """Return the command that would settle what is open; ``None`` if nothing is, or seeds don't settle it."""
    if found.pending:
        return search.command
    if found.lost and len(found.finalists) == 1:
        return retry_command([run for configuration, _ in found.lost for run in configuration.runs], search)
    seeds = found.seeds_advised
    if found.verdict is ConfirmVerdict.OPEN and found.seeds < MIN_SEEDS_TO_DECIDE:
        seeds = 3
    return f"{search.command} --seeds {seeds}" if seeds is not None else None


def retry_command(runs: Sequence[RunRecord], search: ConfirmedSearch) -> str | None:
    """Return the command that runs the lost ones of ``runs`` again; ``None`` if there are none, or all diverged: a
    diverged run diverges again.

    If some failed and others ran out of memory, it is that of the failed ones; the next answer has the other one.
    """
    statuses = {run.status for run in runs}
    study = next((run.trial.study for run in runs if run.trial is not None), None)
    again = next((status for status in LOST if status in statuses and status is not Status.DIVERGED), None)
    if again is None or study is None:
        return None
    written = shlex.split(search.command)
    option = "--output-root"
    place = f" {option} {shlex.quote(written[written.index(option) + 1])}" if option in written else ""
    return f"qlora-exp resume {shlex.quote(study)} --retry {again.value.lower()}{place}"


def unanswered_sentence(runs: Sequence[RunRecord], finalists: int, search: ConfirmedSearch) -> str:
    """Return why none of ``finalists`` can be chosen yet, and what to do if each lost a run."""
    lost = [run for run in runs if run.status in LOST]
    if len({run.trial.number % finalists for run in lost if run.trial is not None}) < finalists:
        return f"No finalist {'that lost no run ' if lost else ''}has a score yet."
    command = retry_command(lost, search)
    if command is not None:
        return f"Every finalist lost a run: {command}"
    return f"Every finalist lost a run: they diverged. To confirm others: {search.command} --trials N,N sweep.name=NAME"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _first_line(found: Confirmation) -> str:
    label = found.use.label
    many = len(found.contenders)
    lead = {
        ConfirmVerdict.WINNER: f"Use {label}: it is the winner among {len(found.finalists)} finalists",
        ConfirmVerdict.EQUAL: f"Use {label}: {many} finalists are equal within the margin of {found.margin_text}, and"
        " it is the cheapest",
        ConfirmVerdict.OPEN: f"Not separable: take the cheapest of {many} finalists for now, {label}",
        ConfirmVerdict.ALONE: f"Use {label}: it is the only finalist",
    }[found.verdict]
    if found.verdict is ConfirmVerdict.OPEN and len(found.finalists) == 1:
        lead = f"Not compared: {label} is the only finalist with a score so far"
    if found.pending:
        if many == 1 and len(found.finalists) > 1:
            lead = f"{label} is ahead among {len(found.finalists)} finalists"
        lead = f"Not finished, {_runs(found.pending)} to come. So far: {lead[0].lower()}{lead[1:]}"
    parts = [lead]
    score = found.score(found.use)
    if score is not None:
        name, mean, low, high = score
        seeds = f"{found.seeds} new seed{'s' * (found.seeds != 1)}"
        interval = f"no interval: {seeds}"
        if low is not None and high is not None:
            # A task metric's interval has the items' part; the measure's own is the spread over seeds.
            has_items = found.metric is not None and found.metric.words == name
            items = f" and {found.items:,} items" if has_items else f", these {found.items:,} items"
            interval = f"95 % CI {low:.3g} to {high:.3g}, {seeds}{items}"
        parts.append(f"{name} on test {mean:.3g} ({interval})")
    parts += _costs(found.use)
    return f"{'; '.join(parts)}."


def _costs(configuration: Configuration) -> list[str]:
    costs = []
    if configuration.memory_bytes is not None:
        costs.append(f"{bytes_text(configuration.memory_bytes)} of memory")
    if configuration.train_seconds is not None:
        costs.append(f"{configuration.train_seconds:,.3g} s of training")
    if configuration.cost_usd is not None:
        costs.append(f"${configuration.cost_usd:.2g} a run")
    return costs


def _evidence(found: Confirmation) -> str:
    if not found.pairs:
        return "It is compared with nothing: one finalist has scores."
    if len(found.contenders) == 1:
        nearest = min(found.pairs_of(found.use), key=lambda pair: pair.difference.low or 0.0)
        than = "the other finalist" if len(found.finalists) == 2 else f"each of the {len(found.finalists) - 1} others"
        if found.verdict is ConfirmVerdict.WINNER:
            return f"It is shown to be better than {than}: {_against(found, nearest)}."
        return f"Its lead isn't final: {_against(found, nearest)}."
    rivals = [p for p in found.pairs_of(found.use) if any(p.second is c for c in found.contenders)]
    nearest = max(rivals, key=lambda pair: -(pair.difference.low if pair.difference.low is not None else 0.0))
    beaten = len(found.finalists) - len(found.contenders)
    worse = f" {beaten} other{'s are' if beaten > 1 else ' is'} shown to be worse." if beaten else ""
    if found.verdict is ConfirmVerdict.EQUAL:
        return f"{_capital(_against(found, nearest))}: within the margin of {found.margin_text}.{worse}"
    return f"No one of them is shown to be better: {_against(found, nearest)}.{worse}"


def _against(found: Confirmation, pair: FinalistPair) -> str:
    """Return e.g. ``against X it gains 0.4 % of the loss (95 % CI 0.1 to 0.7 %, 3 seeds and 300 items)``."""
    value, level = pair.difference.value, found.level
    verb, sign = ("gains", 1.0) if value >= 0 else ("costs", -1.0)
    size = size_words(abs(value), found.measure, level)
    return (
        f"against {pair.second.label} it {verb} {size} ({interval_words(pair.difference, found.measure, level, sign)})"
    )


def _cost(found: Confirmation) -> str:
    against = found.regret_against.label if found.regret_against is not None else None
    why = "one seed can't show the noise" if found.seeds < MIN_SEEDS_TO_DECIDE else "no interval is known"
    return cost_words(found.regret_bound, against, lambda x: size_words(x, found.measure, found.level), why)


def _settle(found: Confirmation, search: ConfirmedSearch) -> str | None:
    if found.pending:
        have = "has" if found.pending == 1 else "have"
        return f"{_runs(found.pending)} {have} not ended. To continue: {search.command}"
    if found.lost and len(found.finalists) == 1:
        command = settle_command(found, search)
        return f"The other finalists lost runs. To run these again: {command}" if command is not None else None
    if found.verdict is not ConfirmVerdict.OPEN:
        return None
    if found.seeds < MIN_SEEDS_TO_DECIDE:
        return "With one seed nothing can be decided: run three."
    if found.seeds_advised is not None:
        more = f"{found.seeds_advised} seeds"
        return (
            f"About {more} would settle it, if difference and noise stay as they are: {settle_command(found, search)}"
        )
    return "64 seeds would not settle it: score more test items, set a larger margin, or take the cheapest."


def _notes(found: Confirmation, search: ConfirmedSearch) -> list[str]:
    notes = []
    for configuration, failed in found.lost:
        notes.append(
            f"{configuration.label} lost {failed} of {len(configuration.runs)} runs: it isn't compared and can't be"
            " chosen."
        )
    if search.objective is not None and "scores.test" in search.objective:
        notes.append("The search itself used the test split: the seeds are new, but the test items are not.")
    if found.margin is None and len(found.finalists) > 1:
        notes.append(f"The margin {found.margin_text} has no size in {found.measure.words}: equality isn't concluded.")
    if (other := _best_in_metric(found)) is not None:
        notes.append(other)
    if search.earlier_seeds:
        counts, answers = ", ".join(map(str, search.earlier_seeds)), len(search.earlier_seeds) + 1
        notes.append(
            f"An answer was given before, with {counts} seeds. That one of the {answers} answers is wrong has a"
            f" probability of at most {5 * answers} %."
        )
    if any(pair.verdict is ComparisonVerdict.EQUIVALENT for pair in found.pairs) and (
        found.verdict is ConfirmVerdict.OPEN
    ):
        notes.append("Some pairs are equal within the margin; the table of pairs shows which.")
    return notes


def _best_in_metric(found: Confirmation) -> str | None:
    """Return a sentence if another finalist is better in the task's own metric, which isn't what decides."""
    own = found.metric.tuned(found.use) if found.metric is not None else None
    if found.metric is None or own is None or found.metric.name == found.measure.name:
        return None
    means = [(estimate.mean, c) for c in found.finalists if (estimate := found.metric.tuned(c)) is not None]
    mean, best = max(means, key=lambda pair: pair[0])
    if mean <= own.mean or best is found.use:
        return None
    return (
        f"In {found.metric.words}, {best.label} has more: {mean:.3g} against {own.mean:.3g}. The search's objective,"
        f" {found.measure.words}, decides."
    )


def _score_cells(found: Confirmation, configuration: Configuration) -> tuple[float | None, float | None, float | None]:
    score = found.score(configuration)
    return (None, None, None) if score is None else score[1:]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
