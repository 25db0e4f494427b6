"""The report's cards: a question each, with its verdict, evidence, cost, and what would settle it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Estimate
from qlora_exp.analysis.ladder_views import LadderView
from qlora_exp.analysis.recommendation import ComparisonVerdict, Recommendation
from qlora_exp.analysis.report_choice import ChosenConfiguration, TaskMetric, difference_from_baseline, gain_words
from qlora_exp.analysis.report_content import AnswerCard, CardStatus
from qlora_exp.formatting import bytes_text


def rank_card(ladders: Sequence[LadderView], choice: ChosenConfiguration | None, ranks: Sequence[int]) -> AnswerCard:
    """Answer *which rank*: the chosen ladder first, the others after it."""
    question = "Which rank?"
    if not ladders:
        sweep = "qlora-exp sweep rank_doubling"
        if len(ranks) < 2:
            verdict = f"Only r = {ranks[0]} was run" if ranks else "No rank was scored"
            return AnswerCard("rank", question, CardStatus.NOT_ASKED, verdict, command=sweep)
        many = ", ".join(map(str, ranks))
        described = (f"r = {many} were run. The plots below describe them; a ladder decides.",)
        chosen = choice.configuration.rank if choice else 0
        verdict = f"r = {chosen} for now: best on validation" if chosen else "No rank was chosen"
        return AnswerCard("rank", question, CardStatus.OPEN, verdict, described, command=sweep, section="rank")
    first = choice.ladder if choice is not None and choice.ladder is not None else ladders[0]
    ordered = [first, *(view for view in ladders if view is not first)]
    several = len(ordered) > 1
    evidence = [
        f"{view.name.capitalize()}: {_ladder_evidence(view)}" if several else _ladder_evidence(view) for view in ordered
    ]
    verdict = "; ".join(_named(view, ladder_verdict(view), several) for view in ordered)
    costs = [cost for view in ordered if (cost := _ladder_cost(view, several)) is not None]
    left = [view for view in ordered if not view.settled and view.answer.get("would_settle")]
    commands = [str(view.answer["settle_command"]) for view in left if view.answer.get("settle_command")]
    return AnswerCard(
        "rank",
        question,
        CardStatus.SETTLED if all(view.settled for view in ordered) else CardStatus.OPEN,
        verdict[0].upper() + verdict[1:],
        tuple(evidence),
        " ".join(costs) or None,
        " ".join(_named(view, str(view.answer["would_settle"]), several) for view in left) or None,
        "\n".join(dict.fromkeys(commands)) or None,
        "ladder-1",
    )


def _named(view: LadderView, text: str, several: bool) -> str:
    return f"{view.name.capitalize()}: {text}" if several else text


def ladder_verdict(view: LadderView) -> str:
    """Return e.g. ``r = 8 is enough``."""
    if view.use_rank is None:
        return "nothing is decided yet"
    if not view.settled:
        return f"r = {view.use_rank} for now"
    if view.decision == "stop":
        return f"r = {view.use_rank} is enough"
    return f"r = {view.use_rank}, the largest that was run"


def _ladder_evidence(view: LadderView) -> str:
    step = view.deciding_step
    if step is None:
        return "no two ranks have been compared."
    sentence = f"going from r = {step.from_rank} to {step.to_rank} gains {gain_words(view, step)}"
    if view.margin is not None:
        margin = f"a margin of {view.text(view.margin)}"
        sentence += f", against {margin}" + (" per doubling" if step.doublings > 1 else "")
        if view.half_zone is not None and view.decision == "stop":
            sentence += f"; it is enough because the interval ends below {view.text(view.margin + view.half_zone)}"
    return sentence[0].upper() + sentence[1:] + "."


def _ladder_cost(view: LadderView, several: bool) -> str | None:
    """Return the most that the rank to use may cost, and what it saves."""
    regret, saves = view.regret, view.answer.get("saves") or {}
    if regret is None or view.use_rank is None:
        return None
    bound, against = regret
    than = f" against r = {against}" if against is not None else ""
    sentence = f"r = {view.use_rank} costs at most {view.text(bound)} {view.unit}{than} (95 %)"
    memory = saves.get("peak_train_bytes")
    if memory is None:
        memory = saves.get("model_state_bytes")
    if memory is not None and memory > 0 and against == saves.get("against_rank"):
        sentence += f" and saves {bytes_text(memory)} of memory"
    return _named(view, f"{sentence}.", several)


def answer_card(name: str, answer: Recommendation, section: str | None) -> AnswerCard:
    """Return the card of a comparison's answer."""
    is_open = ComparisonVerdict.OPEN in answer.verdict
    verdict = f"Use {answer.use}" + (" for now" if is_open else "") if answer.use else "No answer"
    if name == "goal":
        verdict = f"{(answer.regret_against or 'the goal').removeprefix('the goal ').capitalize()}: {answer.verdict}"
    notes = [note for note in answer.notes if note]
    return AnswerCard(
        name,
        answer.question,
        CardStatus.OPEN if is_open else CardStatus.SETTLED,
        verdict,
        (answer.evidence[0].upper() + answer.evidence[1:], *notes),
        answer.cost,
        answer.settle,
        answer.settle_command,
        section,
    )


def screening_card(screening: Mapping[str, Any], study: str) -> AnswerCard:
    """Return the card of a study that chooses its configuration by successive halving."""
    chosen, use = bool(screening.get("chosen")), screening.get("use")
    name = ", ".join(map(str, use.values())) if use else None
    verdict = f"Use {name}" + ("" if chosen else " for now") if name else "Nothing has been compared yet"
    return AnswerCard(
        "screening",
        "Which configuration?",
        CardStatus.SETTLED if chosen else CardStatus.OPEN,
        verdict,
        (str(screening.get("sentence") or ""),),
        settle=None if chosen else "The study isn't finished.",
        command=None if chosen else f"qlora-exp status {study}",
    )


def not_asked_card(name: str, question: str, levels: Sequence[str], command: str) -> AnswerCard:
    """Return the card of a question that these runs can't answer, with the sweep that asks it."""
    only = f"Only {levels[0]} was run" if len(levels) == 1 else "No two runs differ in this alone"
    return AnswerCard(name, question, CardStatus.NOT_ASKED, only, command=command)


def baseline_card(choice: ChosenConfiguration, metric: TaskMetric | None) -> AnswerCard | None:
    """Compare the tuned model with the untuned one and with TF-IDF; ``None`` if there is no accuracy or baseline."""
    chosen = choice.configuration
    scores, baselines = answering_scores(chosen.first), chosen.first.baselines
    if metric is None or metric.name != "accuracy" or scores is None:
        return None
    tuned, before = metric.tuned(chosen), metric.before(chosen)
    if tuned is None or tuned.se is None or tuned.df is None or baselines is None or baselines.split != scores.split:
        return None
    linear, majority = baselines.tfidf_accuracy, baselines.majority_accuracy
    name, level = (
        ("TF-IDF with logistic regression", linear) if linear is not None else ("The majority label", majority)
    )
    if level is None:
        return None
    gap = difference_from_baseline(tuned, level, scores.items)
    low, high = gap.low or 0.0, gap.high or 0.0
    words = f"{100 * abs(gap.mean):.2g} points {'above' if gap.mean > 0 else 'below'} {name}"
    verdict = f"No: {words}" if high < 0 else f"Yes: {words}" if low > 0 else f"Not shown: {words}"
    evidence = [
        f"Accuracy {tuned.mean:.3g} against {level:.3g}: {100 * gap.mean:+.2g} points"
        f" (95 % CI {100 * low:+.2g} to {100 * high:+.2g}, {tuned.seeds} seeds and {scores.items:,} items, as if the"
        " two had other items: the interval is rather too wide)."
    ]
    if before is not None:
        evidence.append(f"Before tuning it is {with_interval_short(before)}.")
    cost = "TF-IDF trains in seconds on a CPU." if high < 0 and linear is not None else None
    status = CardStatus.SETTLED if low > 0 or high < 0 else CardStatus.OPEN
    return AnswerCard(
        "baseline", "Better than a simple baseline?", status, verdict, tuple(evidence), cost, section="instruct-base"
    )


def with_interval_short(estimate: Estimate) -> str:
    """Return e.g. ``0.19 (95 % CI 0.16 to 0.23)``."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.3g} (no interval)"
    return f"{estimate.mean:.3g} (95 % CI {max(estimate.low, 0.0):.3g} to {estimate.high:.3g})"
