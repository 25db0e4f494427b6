"""Recognise common layouts of data files by their columns: Alpaca, Dolly, ShareGPT, preference pairs, whole texts …

A layout only fills in settings that the user left open. The result is the same task with ``task.prompt``,
``task.columns.…`` set, and one line that says so. A file that fits several layouts is refused with all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_exp.config.enums import Learn, TaskKind, TaskSource
from qlora_exp.config.schema import TaskConfig
from qlora_exp.data.files import IGNORED_COLUMNS, DataFile
from qlora_exp.data.rows import check_column
from qlora_exp.data.templates import template_setting
from qlora_exp.errors import DataError

ANSWER_MARK = "####"
"""GSM8K writes its final number after this mark."""
SAMPLED_ROWS = 50
"""Rows whose values are looked at; columns are those of all rows."""
MIN_ROWS_FOR_LABELS, MAX_LABELS, ROWS_PER_LABEL = 20, 50, 5
"""A file has labels rather than free texts if it has so many rows, and at most so many distinct completions, each of
which occurs several times in the mean."""

MIN_GROUPS = 30
"""Texts that SQuAD's questions are about: with fewer, a tenth of the rows may be about one text."""

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "input", "instruction", "problem", "user")
CHOICE_COLUMNS = ("choices", "options")
"""Columns of multiple-choice rows."""
ANSWERS = ("completion", "answer", "response", "output", "target", "solution", "reply", "assistant")
_PAIRS = (
    *((prompt, answer) for prompt in PROMPTS for answer in ANSWERS),
    *(("source", "target"), ("input_text", "target_text"), ("text", "summary")),
    *(("article", "highlights"), ("document", "summary"), ("dialogue", "summary")),
)
_INPUTS = (("instruction", "input", "Alpaca"), ("instruction", "context", "Dolly"), ("context", "question", "question"))
"""Two columns of a prompt, the second or first of which may be empty, and the layout's name."""
_TEXTS = (
    *("text", "sentence", "utterance", "message", "review", "content", "comment_text", "tweet", "query", "question"),
    *("input", "prompt", "title"),
)
_TWO_TEXTS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2")),
    *(("text1", "text2"), ("question", "sentence")),
)
_LABELS = ("label_text", "label", "labels", "category", "intent", "sentiment", "class", "target")
"""A column ``label_text`` has the names of the numbers in ``label``."""


@dataclass(frozen=True)
class Layout:
    """One way to read a file. ``settings``: keys below ``task``, e.g. ``columns.prompt``, and their values."""

    name: str
    """How users call such rows, e.g. ``Alpaca``."""
    settings: Mapping[str, str]
    used: frozenset[str]
    tier: int
    """Layouts of a lower tier are read only if none of a higher one (a smaller number) fits."""
    remark: str = ""
    """What a reader should know: which part is learned, how it is scored."""
    change: str = ""
    """The settings that read the file in another way."""

    @property
    def as_settings(self) -> str:
        """Return the settings as they are typed in a shell."""
        return " ".join(template_setting(key, value) for key, value in self.settings.items())

    def describe(self) -> str:
        """Return which columns are read as what, on one line."""
        texts = {key: value.replace("\n", "\\n") for key, value in self.settings.items()}
        if messages := texts.get("columns.messages"):
            return f"messages = {messages}"
        prompt, completion = (texts.get(f"columns.{part}", texts.get(part)) for part in ("prompt", "completion"))
        return ", ".join(f"{name} = {text}" for name, text in (("prompt", prompt), ("completion", completion)) if text)


@dataclass(frozen=True)
class Reading:
    """A task whose rows can be read. ``layout``: what was recognised; ``None``: the user's settings say everything."""

    task: TaskConfig
    layout: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """The settings that were filled in, e.g. ``{"task.columns.prompt": "question"}``."""
    line: str | None = None
    """What was recognised and how to change it."""

    @property
    def whole_texts(self) -> bool:
        """Return whether rows have no prompt: the whole text is learned."""
        return self.task.prompt == "" and not self.task.columns.messages


def recognise(task: TaskConfig, raw: DataFile) -> Reading:
    """Return how the rows of ``raw`` (the training split) are read: as ``task`` says, or as their columns suggest.

    Raises:
        DataError: the columns fit no layout, or several; or a setting doesn't fit the layout.
    """
    reading = _filled_in(task, raw) if task.source is not TaskSource.embedded and raw.rows else Reading(task)
    if task.learn is Learn.all and not reading.task.columns.messages:
        hint = "task.columns.messages=COLUMN, or task.learn=last"
        raise DataError("only conversations have several answers to learn", "task.learn = all", hint)
    if reading.whole_texts and task.kind is TaskKind.classification:
        what = f"{raw.name} is read as whole texts, which have no label"
        hint = "task.kind=generation; or task.columns.prompt=COLUMN task.columns.label=COLUMN"
        raise DataError(what, "task.kind = classification", hint)
    return reading


def label_note(completions: Sequence[str], task: TaskConfig) -> str | None:
    """Return a note with the setting that reads few distinct completions as labels; ``None`` if they are many.

    A run isn't switched by itself: scores of generated answers and of labels are different measures.
    """
    distinct = len(set(completions))
    if (
        task.kind is TaskKind.classification
        or len(completions) < MIN_ROWS_FOR_LABELS
        or not 2 <= distinct <= min(MAX_LABELS, len(completions) // ROWS_PER_LABEL)
    ):
        return None
    return (
        f"{distinct} distinct completions in {len(completions)} rows: task.kind=classification scores them as labels"
        " (accuracy, baselines); now they are generated as free text"
    )


def _filled_in(task: TaskConfig, raw: DataFile) -> Reading:
    columns = task.columns
    has_prompt = task.prompt is not None or columns.prompt is not None
    has_label = task.kind is TaskKind.classification and columns.label is not None
    has_completion = task.completion is not None or columns.completion is not None
    if columns.messages or (has_prompt and has_completion):
        return Reading(task)
    for part in ("prompt", "completion"):
        check_column(getattr(columns, part), f"task.columns.{part}", raw)
    layouts = list(_layouts(raw))
    best = _best(layouts)
    if not has_prompt and not has_completion and not has_label:
        if len(best) != 1:
            raise _not_recognised(raw, best)
        return _read_as(best[0], task, raw)
    missing = [part for part, given in (("prompt", has_prompt), ("completion", has_completion)) if not given]
    if has_label and "completion" in missing and not any(layout.tier == 0 for layout in best):
        missing.remove("completion")  # the label is the answer
    settings: dict[str, str] = {}
    for part in missing:
        choices = _choices(part, task, raw, layouts)
        if len(choices) != 1:
            raise _part_not_found(part, raw, choices)
        settings |= dict(choices)
    if not settings:
        return Reading(task)
    found = " ".join(template_setting(key, value) for key, value in settings.items())
    line = f"{raw.name}: {' and '.join(missing)} by the column names: {found}"
    return Reading(_with(task, settings), None, {f"task.{key}": value for key, value in settings.items()}, line)


def _choices(part: str, task: TaskConfig, raw: DataFile, layouts: Sequence[Layout]) -> list[tuple[str, str]]:
    """Return the settings that could read ``part`` (prompt or completion), if the user has named the other part."""
    if part in raw.columns:
        return [(f"columns.{part}", part)]
    other = "completion" if part == "prompt" else "prompt"
    column, template = getattr(task.columns, other), getattr(task, other)
    if part == "completion" and template == "" and "text" in raw.columns:
        return [("columns.completion", "text")]
    keys = (part, f"columns.{part}")
    fitting = [layout for layout in layouts if layout.settings.get(f"columns.{other}") == column or column is None]
    choices = {(key, layout.settings[key]) for layout in fitting for key in keys if layout.settings.get(key)}
    if not choices:
        names = ANSWERS if part == "completion" else PROMPTS
        choices = {(f"columns.{part}", name) for name in names if name in raw.columns and name != column}
    unused = {(key, value) for key, value in choices if f"{{{value}}}" not in (template or "")}
    return sorted(unused)


def _read_as(layout: Layout, task: TaskConfig, raw: DataFile) -> Reading:
    if layout.settings.get("prompt") == "" and task.system:
        what = "whole texts have no system message"
        raise DataError(what, "task.system", "task.system=null; or name a prompt: task.columns.prompt=COLUMN")
    settings = dict(layout.settings)
    if task.columns.group is not None:
        settings.pop("columns.group", None)
    unread = [column for column in raw.columns if column not in layout.used and column not in IGNORED_COLUMNS]
    change = layout.change or "task.prompt=… task.completion=…"
    parts = [f"read as {layout.name}: {layout.describe()}", *([layout.remark] if layout.remark else [])]
    parts += [f"not read: {', '.join(unread[:5])}{' …' if len(unread) > 5 else ''}"] if unread else []
    line = "; ".join([*parts, f"to change it: {change}"])
    return Reading(_with(task, settings), layout.name, {f"task.{key}": value for key, value in settings.items()}, line)


def _with(task: TaskConfig, settings: Mapping[str, str]) -> TaskConfig:
    """Return ``task`` with ``settings``. A column and a template for the same text exclude each other."""
    columns = {key.removeprefix("columns."): value for key, value in settings.items() if key.startswith("columns.")}
    others: dict[str, Any] = {key: value for key, value in settings.items() if not key.startswith("columns.")}
    return replace(task, columns=replace(task.columns, **columns), **others)


def _best(layouts: Sequence[Layout]) -> list[Layout]:
    """Return the layouts of the highest tier, without those that read a part of the columns of another one."""
    first = min((layout.tier for layout in layouts), default=0)
    tier = [layout for layout in layouts if layout.tier == first]
    return [layout for layout in tier if not any(layout.used < other.used for other in tier)]


def _layouts(raw: DataFile) -> Iterator[Layout]:
    """Yield every layout that the columns and the first values fit."""
    names: dict[str, str] = {}
    for column in raw.columns:
        if column not in IGNORED_COLUMNS:
            names.setdefault(column.strip().lower(), column)
    sample = _Sample(raw, names)
    yield from _conversations(sample)
    yield from _preferences(sample)
    yield from _questions(sample)
    yield from _pairs(sample)
    yield from _labelled(sample)
    if (text := names.get("text")) and sample.is_text(text):
        remark = (
            "continued pretraining: the whole text is learned and scored (loss, bits per byte), nothing is generated"
        )
        change = "task.columns.prompt=… task.columns.completion=…"
        settings = {"prompt": "", "columns.completion": text}
        yield Layout("whole texts", settings, frozenset({text}), 3, remark, change)


@dataclass(frozen=True)
class _Sample:
    """The file's columns, by their names in lower case, and the values of its first rows."""

    raw: DataFile
    names: Mapping[str, str]

    def values(self, column: str) -> list[Any]:
        return [row.values[column] for row in self.raw.rows[:SAMPLED_ROWS] if row.values.get(column) is not None]

    def is_text(self, column: str) -> bool:
        return any(isinstance(value, str) for value in self.values(column))

    def messages(self, column: str) -> list[dict[str, Any]]:
        """Return the messages of the first value that is a list of messages, or the JSON text of one; else ``[]``."""
        for value in self.values(column):
            if isinstance(value, str) and value.lstrip().startswith("["):
                try:
                    value = json.loads(value)
                except (ValueError, RecursionError):
                    continue
            is_list = isinstance(value, list) and value and isinstance(value[0], dict)
            if is_list and ("role" in value[0] or {"from", "value"} <= set(value[0])):
                return list(value)
        return []

    def answer(self, column: str) -> dict[str, str]:
        """Return the setting for an answer's column. A whole number is text inside a template only."""
        values = self.values(column)
        numbers = values and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
        return {"completion": f"{{{column}}}"} if numbers else {"columns.completion": column}

    def find(self, *columns: str) -> list[str] | None:
        """Return the file's names of ``columns``; ``None`` if it lacks one."""
        return [self.names[column] for column in columns] if set(columns) <= set(self.names) else None


def _conversations(sample: _Sample) -> Iterator[Layout]:
    change = "task.columns.messages=…"
    for name in CONVERSATIONS:
        column = sample.names.get(name)
        if column is None or not (messages := sample.messages(column)):
            continue
        kind = "ShareGPT conversations" if "from" in messages[0] else "OpenAI messages"
        optional = {sample.names[other] for other in ("tools", "chat_template_kwargs") if other in sample.names}
        yield Layout(kind, {"columns.messages": column}, frozenset({column, *optional}), 1, change=change)


def _preferences(sample: _Sample) -> Iterator[Layout]:
    found = sample.find("chosen", "rejected")
    if found is None:
        return
    chosen, rejected = found
    prompt = next((sample.names[name] for name in PROMPTS if name in sample.names), None)
    remark = f"SFT on the chosen answers, {rejected} is not used"
    used = frozenset({chosen, rejected, *([prompt] if prompt else [])})
    if messages := sample.messages(chosen):
        alone = len(messages) == 1 and prompt is not None
        settings = {"columns.messages": f"{prompt}+{chosen}" if alone else chosen}
        yield Layout("preference pairs", settings, used, 1, remark, "task.columns.messages=…")
    elif prompt is not None:
        settings = {"columns.prompt": prompt, "columns.completion": chosen}
        yield Layout("preference pairs", settings, used, 1, remark)


def _questions(sample: _Sample) -> Iterator[Layout]:
    """Yield SQuAD's layout: a text, a question about it, and an object of answers."""
    found = sample.find("context", "question", "answers")
    if found is None:
        return
    context, question, answers = found
    objects = [value for value in sample.values(answers) if isinstance(value, Mapping)]
    if not any({"text", "answer_start"} <= set(value) for value in objects):
        return
    settings = {"prompt": f"{{{context}}}\n{{{question}}}", "columns.completion": answers}
    remark = f"the first of {answers}.text is learned"
    if MIN_GROUPS <= len({str(row.values.get(context)) for row in sample.raw.rows}) < len(sample.raw.rows):
        settings["columns.group"] = context
        remark += f", and rows of one {context} count as one observation"
    yield Layout("SQuAD rows", settings, frozenset(found), 1, remark)


def _pairs(sample: _Sample) -> Iterator[Layout]:
    for first, second, name in _INPUTS:
        for answer in ANSWERS:
            if found := sample.find(first, second, answer):
                settings = {"prompt": f"{{{found[0]}}}\n{{{found[1]}}}", **sample.answer(found[2])}
                yield Layout(f"{name} rows", settings, frozenset(found), 1)
    for prompt, answer in _PAIRS:
        found = sample.find(prompt, answer)
        if found is None:
            continue
        if any(name in sample.names for name in CHOICE_COLUMNS) and "completion" in sample.answer(found[1]):
            continue  # the answer is a number or letter of a choice, and would be learned without the choices
        tier = 0 if (prompt, answer) == ("prompt", "completion") else 1
        texts = sample.values(found[1])
        if sample.messages(found[0]) and sample.messages(found[1]):
            settings = {"columns.messages": "+".join(found)}
            name = f"{prompt}/{answer} conversations"
            yield Layout(name, settings, frozenset(found), tier, change="task.columns.messages=…")
        elif texts and all(isinstance(text, str) and ANSWER_MARK in text for text in texts):
            settings = {"columns.prompt": found[0], "columns.completion": found[1], "answer_after": ANSWER_MARK}
            remark = f"exact match compares what follows the last {ANSWER_MARK}"
            change = f"task.columns.prompt={found[0]} task.columns.completion={found[1]}"
            yield Layout("GSM8K rows", settings, frozenset(found), tier, remark, change)
        else:
            # prompt and completion are our own names: a file that has numbers there is as likely to have labels
            learned = {"columns.completion": found[1]} if tier == 0 else sample.answer(found[1])
            settings = {"columns.prompt": found[0], **learned}
            yield Layout(f"{prompt}/{answer} rows", settings, frozenset(found), tier)


def _labelled(sample: _Sample) -> Iterator[Layout]:
    labels = [name for name in _LABELS if name in sample.names]
    if "label_text" in labels and "label" in labels:
        labels.remove("label")
    for label in labels:
        column = sample.names[label]
        two = next((pair for names in _TWO_TEXTS if (pair := sample.find(*names))), None)
        text = next((sample.names[name] for name in _TEXTS if name in sample.names and name != label), None)
        prompt = {"prompt": "\n".join(f"{{{name}}}" for name in two)} if two else {"columns.prompt": text or ""}
        if two or text:
            used = frozenset({*(two or [str(text)]), column})
            name = f"{'/'.join(two or [str(text)])}/{label} rows"
            yield Layout(name, {**prompt, **sample.answer(column)}, used, 2)


def _not_recognised(raw: DataFile, candidates: Sequence[Layout]) -> DataError:
    columns = [column for column in raw.columns if column not in IGNORED_COLUMNS]
    where = f"{raw.name} (columns: {', '.join(columns[:12])}{' …' if len(columns) > 12 else ''})"
    if candidates:
        ways = "; ".join(f"{layout.name}: {layout.as_settings}" for layout in candidates)
        return DataError(f"the rows can be read in {len(candidates)} ways", where, f"choose one: {ways}")
    what = "the columns are none that are recognised: no setting says which text is the prompt"
    hint = "task.columns.prompt=COLUMN task.columns.completion=COLUMN, or templates: 'task.prompt=\"{COLUMN} …\"'"
    if {"data", "annotations"} <= set(columns):
        hint = "the rows seem to be Label Studio's JSON: export JSON-MIN or CSV there, which have a column per field"
    elif {"chosen", "rejected"} <= set(columns):
        hint = "the rows hold preferences without a prompt: write the prompt and the answer to learn as two columns"
    elif "paragraphs" in columns:
        hint = "the rows are SQuAD's articles: write one row for each question, with context, question and answers"
    return DataError(what, where, hint)


def _part_not_found(part: str, raw: DataFile, choices: Sequence[tuple[str, str]]) -> DataError:
    columns = [column for column in raw.columns if column not in IGNORED_COLUMNS]
    hint = f"task.columns.{part}=COLUMN, or 'task.{part}=\"{{COLUMN}}\"'; columns: {', '.join(columns)}"
    if choices:
        hint = " or ".join(template_setting(key, value) for key, value in choices)
    return DataError(f"no setting says which text is the {part}", f"{raw.name} (task.columns.{part})", hint)
