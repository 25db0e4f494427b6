"""What the terminal shows at the end of a single run: answers, what they have to beat, cost, and what to do next."""

from __future__ import annotations

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.errors import RecordError
from qlora_exp.formatting import bytes_text
from qlora_exp.paths import OutputPaths
from qlora_exp.records.items import read_items
from qlora_exp.records.labels import short_id
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.tracking.state import root_option

ANSWERS_SHOWN = 5


def answers_at_the_end(record: RunRecord, outputs: OutputPaths, width: int) -> list[str]:
    """Return a few items, answered before and after tuning, as lines; empty if the run has no answers."""
    from qlora_exp.analysis.shown_items import answer_lines, chosen_items, heading, wrapped

    try:
        rows = read_items(outputs.run(record.run_id).folder)
    except RecordError:
        return []
    if record.status is not Status.COMPLETED or all(row["answer"] is None for row in rows):
        return []
    shown = chosen_items(rows, ANSWERS_SHOWN)
    return [*wrapped(heading(rows, shown), width), *answer_lines(rows, shown, width), ""]


def cost_and_next(record: RunRecord, outputs: OutputPaths, width: int) -> list[str]:
    """Return baselines, goal, memory, time and cost, and the commands to go on with; unknown figures are left out."""
    if record.status is not Status.COMPLETED:
        return []
    lines = [f"  {line}" for line in (_baselines(record), _goal(record), _cost(record)) if line]
    run = short_id(record.run_id, (folder.name for folder in outputs.runs.iterdir()))
    root = root_option(outputs)
    scores = answering_scores(record)
    right = (scores.accuracy if scores.accuracy is not None else scores.exact_match) if scores else None
    wrong = right is not None and right < 1 and _keeps_texts(record)
    more = f"qlora-exp show {run} --items 20{' --wrong' if wrong else ''}{root}"
    why = "its wrong answers" if wrong else "more of its answers"
    commands = [(more, why), (f"qlora-exp export {run}{root}", "use it in other programs")]
    size = max(len(command) for command, _ in commands)
    for number, (command, why) in enumerate(commands):
        line = f"  {'' if number else 'next:':6}{command:{size}}  # {why}"
        lines.append(line if len(line) <= width else line.partition("  # ")[0].rstrip())
    return lines


def _keeps_texts(record: RunRecord) -> bool:
    return bool((record.config.get("evaluation") or {}).get("keep_texts", True))


def _baselines(record: RunRecord) -> str | None:
    baselines = record.baselines
    if baselines is None:
        return None
    parts = []
    if baselines.majority_accuracy is not None:
        parts.append(f"{baselines.majority_accuracy:.3f} (always {baselines.majority_label!r})")
    if baselines.tfidf_accuracy is not None:
        parts.append(f"{baselines.tfidf_accuracy:.3f} (TF-IDF with logistic regression)")
    return f"accuracy to beat: {', '.join(parts)}" if parts else None


def _goal(record: RunRecord) -> str | None:
    goal = record.goal
    if goal is None:
        return None
    bounds = "" if goal.low is None or goal.high is None else f", 95 % bounds {goal.low:.3g} and {goal.high:.3g}"
    answer = {"yes": "met", "no": "not met"}.get(goal.answer, "not shown")
    return f"goal {goal.text}: {answer}{bounds}"


def _cost(record: RunRecord) -> str:
    speed, peak = record.speed, record.memory.peak_train_bytes
    parts = [f"peak memory {bytes_text(peak)}"] if peak is not None else []
    if speed.total_seconds is not None:
        training = f" ({_duration(speed.train_seconds)} of training)" if speed.train_seconds is not None else ""
        parts.append(f"time {_duration(speed.total_seconds)}{training}")
    if speed.cost_usd is not None:
        parts.append(f"cost ${speed.cost_usd:,.2f}" if speed.cost_usd >= 0.01 else "cost below $0.01")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """Return e.g. ``31.0 s``, ``12:05 min`` or ``3:02:10 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
