"""Which of a run's items are shown to a person, and how their texts fit into a few columns."""

from __future__ import annotations

import hashlib
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_exp.formatting import UNKNOWN_CELL

ItemRow = Mapping[str, Any]
"""One item, as :func:`qlora_exp.records.items.read_items` returns it."""

CUT = "…"
NEWLINE = "⏎"
RIGHT, WRONG = "✓", "✗"
SHORT_ANSWER = 24
"""Columns of the longest answers that stand in a table; longer ones get a line each."""
MIN_PROMPT = 24
GAP = 2


def same_items(rows: Sequence[ItemRow], count: int) -> list[ItemRow]:
    """Return ``count`` items at random by their ids, in the rows' order: the same ones for every run on these items."""
    names = {row["id"] for row in sorted(rows, key=_at_random)[:count]}
    return [row for row in rows if row["id"] in names]


def chosen_items(rows: Sequence[ItemRow], count: int, wrong: bool = False) -> list[ItemRow]:
    """Return ``count`` items, the same at every call: drawn at random by their ids, in the rows' order.

    Right and wrong answers of the tuned model are drawn in proportion, and at least one of each if there are both and
    ``count`` is more than one. Items without an answer come last. ``wrong``: only wrong answers.
    """
    drawn = sorted(rows, key=_at_random)
    is_wrong = [row for row in drawn if row["correct"] is False]
    if wrong:
        chosen = is_wrong[:count]
    else:
        is_right = [row for row in drawn if row["correct"]]
        unrated = sorted((row for row in drawn if row["correct"] is None), key=lambda row: row["answer"] is None)
        rated = min(count, len(is_right) + len(is_wrong))
        share = len(is_right) / max(len(is_right) + len(is_wrong), 1)
        number = round(rated * share)
        if rated > 1 and is_right and is_wrong:
            number = min(max(number, 1), rated - 1)
        chosen = [*is_right[:number], *is_wrong[: rated - number], *unrated[: count - rated]]
    names = {row["id"] for row in chosen}
    return [row for row in rows if row["id"] in names]


def _at_random(row: ItemRow) -> bytes:
    return hashlib.sha256(str(row["id"]).encode()).digest()


def shown_prompts(rows: Sequence[ItemRow]) -> dict[str, str | None]:
    """Return item id → prompt without what all prompts share at their beginning and end: template and instructions.

    ``None``: the prompt isn't known. Give all rows of a run, not only the shown ones.
    """
    texts = sorted({row["prompt"] for row in rows if row["prompt"]})
    start = _beginning(texts) if len(texts) > 1 else 0
    end = _beginning(sorted(text[start:][::-1] for text in texts)) if len(texts) > 1 else 0
    return {
        row["id"]: None if row["prompt"] is None else row["prompt"][start : len(row["prompt"]) - end].strip()
        for row in rows
    }


def _beginning(texts: Sequence[str]) -> int:
    """Return how many characters all of the sorted texts share at their beginning, up to a space: no word is cut."""
    first, last = texts[0], texts[-1]  # these two share the least
    shared = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return max((first.rfind(space, 0, shared) + 1 for space in " \n\t"), default=0)


def one_line(text: str) -> str:
    """Return a text from a file or a model on one line. Control characters, which a terminal would obey, are shown as
    ``�``."""
    text = NEWLINE.join(line.strip() for line in text.strip().splitlines())
    return "".join(" " if c == "\t" else "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def without_end(text: str, limit: int) -> str:
    """Return at most ``limit`` characters of the text, with ``…`` if something is left out."""
    return text if len(text) <= limit else text[: limit - 1] + CUT


def cut(text: str | None, width: int) -> str:
    """Return the text on one line of at most ``width`` columns, with ``…`` if something is left out; unknown is
    ``–``."""
    from rich.cells import cell_len, set_cell_size

    if text is None:
        return UNKNOWN_CELL
    line = one_line(text[: 4 * width + 100])
    if cell_len(line) <= width and len(text) <= 4 * width + 100:
        return line
    return set_cell_size(line, max(width - 1, 0)).rstrip() + CUT


def heading(rows: Sequence[ItemRow], shown: Sequence[ItemRow], wrong: bool = False) -> str:
    """Return which items are shown, and what their answers are."""
    right, missed = (sum(row["correct"] is value for row in shown) for value in (True, False))
    split = rows[0]["split"]
    which = f"{len(shown)} of {len(rows):,} {split} items"
    if wrong:
        which = f"{len(shown)} of {sum(row['correct'] is False for row in rows):,} wrong answers on {split}"
    drawn = ", drawn at random" if len(shown) < len(rows) else ""
    counted = f": {right} right, {missed} wrong" if right + missed == len(shown) and not wrong else ""
    return f"{which}{drawn}{counted}. {answer_words(rows, shows_generated(shown))}"


def answer_words(rows: Sequence[ItemRow], with_generated: bool = True) -> str:
    """Return a sentence on what an answer is. ``with_generated``: what the model writes instead of a label is shown."""
    kind = next((row["answer_kind"] for row in rows if row["answer_kind"]), None)
    if not any(row["answer"] is not None or row["base_answer"] is not None for row in rows):
        if any(row["correct"] is not None for row in rows):
            return "The answers' texts were not kept (evaluation.keep_texts=false)."
        return "No answer is known: nothing was generated (evaluation.generate=false), and there are no labels."
    if kind == "label":
        writes = (
            "“Tuned writes” is the text that the tuned model generates."
            if with_generated and shows_generated(rows)
            else ""
        )
        if not _has(rows, "generated"):
            writes = "Nothing was generated (evaluation.generate=false)."
        return f"An answer is the label with the largest likelihood. {writes}".rstrip()
    if not any(row["correct"] is not None for row in rows):
        return "Generated only to be shown, not scored (evaluation.generate=false)."
    return "Answers are generated; one is right if it matches exactly."


def answer_lines(rows: Sequence[ItemRow], shown: Sequence[ItemRow], width: int) -> list[str]:
    """Return the items as lines of at most ``width`` columns: prompt, right answer, base model, tuned model.

    Short answers stand in a table, one line an item. Long ones get a line each below their prompt.
    """
    answers = [
        {
            "right answer": row["expected"],
            "base": marked(row["base_answer"], row["base_correct"]),
            "tuned": marked(row["answer"], row["correct"]),
        }
        for row in shown
    ]
    if shows_generated(shown):
        answers = [cells | {"tuned writes": row["generated"]} for cells, row in zip(answers, shown, strict=True)]
    return _lines(rows, shown, answers, width)


def two_answer_lines(rows: Sequence[ItemRow], shown: Sequence[ItemRow], width: int) -> list[str]:
    """Return items of two runs as lines, as :func:`answer_lines` does; ``shown``: those of
    :class:`~qlora_exp.analysis.item_differences.ItemComparison`."""
    answers = [
        {
            "right answer": row["expected"],
            "A": marked(row["first_answer"], row["first_correct"]),
            "B": marked(row["second_answer"], row["second_correct"]),
        }
        for row in shown
    ]
    return _lines(rows, shown, answers, width)


def _lines(
    rows: Sequence[ItemRow], shown: Sequence[ItemRow], answers: Sequence[Mapping[str, str | None]], width: int
) -> list[str]:
    from rich.cells import cell_len

    known = shown_prompts(rows)
    prompts = [known.get(row["id"]) or row["id"] for row in shown]
    main = [text for cells in answers for text in list(cells.values())[:3] if text]
    longest = max((cell_len(one_line(text)) for text in main), default=0)
    return (_blocks if longest > SHORT_ANSWER else _table)(prompts, answers, width)


def marked(answer: str | None, is_correct: bool | None) -> str | None:
    """Return the answer with a mark if it is known to be right or wrong."""
    mark = {True: RIGHT, False: WRONG, None: ""}[is_correct]
    if answer is None:
        return mark or None
    return f"{mark} {answer}" if mark else answer


def shows_generated(rows: Sequence[ItemRow]) -> bool:
    """Return whether what the tuned model generates must be shown besides its labels, because it differs."""
    return any(
        row["answer_kind"] == "label" and row["generated"] is not None and row["generated"] != row["answer"]
        for row in rows
    )


def _has(rows: Sequence[ItemRow], key: str) -> bool:
    return any(row[key] is not None for row in rows)


def _table(prompts: Sequence[str | None], answers: Sequence[Mapping[str, str | None]], width: int) -> list[str]:
    from rich.cells import cell_len, set_cell_size

    names = list(answers[0]) if answers else []
    sizes = {
        name: min(max([len(name), *(cell_len(cut(cells[name], SHORT_ANSWER)) for cells in answers)]), SHORT_ANSWER)
        for name in names
    }
    left = width - sum(sizes.values()) - GAP * len(sizes)
    longest = max((cell_len(one_line(prompt or UNKNOWN_CELL)) for prompt in prompts), default=0)
    size = max(min(longest, left), MIN_PROMPT)
    space = " " * GAP

    def line(prompt: str | None, cells: Mapping[str, str | None]) -> str:
        texts = [cut(cells[name], sizes[name]) for name in names]
        parts = [set_cell_size(cut(prompt, size), size)]
        parts += [set_cell_size(text, sizes[name]) for name, text in zip(names, texts, strict=True)]
        return space.join(parts).rstrip()

    return [line("prompt", {name: name for name in names}), *map(line, prompts, answers)]


def _blocks(prompts: Sequence[str | None], answers: Sequence[Mapping[str, str | None]], width: int) -> list[str]:
    lines = []
    for number, (prompt, cells) in enumerate(zip(prompts, answers, strict=True), start=1):
        name_width = max(map(len, cells)) + GAP
        lines.append(f"{number:>3}  {cut(prompt, width - 5)}")
        lines += [f"     {name:{name_width}}{cut(text, width - 5 - name_width)}" for name, text in cells.items()]
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Return a sentence in lines of at most ``width`` columns."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
