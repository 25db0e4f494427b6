"""Column names of common data sets, and the settings that read them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_TEXTS = ("text", "sentence", "prompt", "review", "content", "title", "comment_text", "tweet")
_TWO_TEXTS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)
_LABELS = ("label", "labels", "category", "intent", "sentiment", "class", "target", "label_text")


def columns_hint(columns: Collection[str]) -> str | None:
    """Return the settings that read rows with these columns, ready to type; ``None`` if the columns are not known."""
    conversation = next((name for name in _CONVERSATIONS if name in columns), None)
    if conversation:
        return f"the rows hold messages: set task.columns.messages={conversation}"
    if {"chosen", "rejected"} <= set(columns):
        return "the rows hold preferences (chosen, rejected): write the answer to learn as text into a separate column"
    if {"data", "annotations"} <= set(columns):
        return "the rows seem to be Label Studio's JSON: export JSON-MIN or CSV there, which have a column per field"
    for context in ("input", "context"):
        for answer in ("output", "response"):
            if {"instruction", context, answer} <= set(columns):
                return f"set {_templates(('instruction', context), answer)}"
    if {"context", "question", "answer"} <= set(columns):
        return f"set {_templates(('context', 'question'), 'answer')}"
    if {"context", "question", "answers"} <= set(columns):
        templates = _templates(("context", "question"), "answer")
        return f"write the answer to learn (answers holds several) as text into a column answer; then set {templates}"
    for prompt, completion in _PAIRS:
        if {prompt, completion} <= set(columns):
            return f"set task.columns.prompt={prompt} task.columns.completion={completion}"
    text = next((name for name in _TEXTS if name in columns), None)
    label = next((name for name in _LABELS if name in columns), None)
    texts = next((pair for pair in _TWO_TEXTS if {*pair} <= set(columns)), None)
    if texts and label:
        return f"set task.kind=classification {_template('prompt', texts)} task.columns.label={label}"
    if text and label:
        return f"set task.kind=classification task.columns.prompt={text} task.columns.label={label}"
    if list(columns) == ["text"]:
        return "the rows hold whole texts: divide each into a prompt and a completion, in two columns"
    return None


def _templates(prompt: Sequence[str], completion: str) -> str:
    """Return both templates, quoted for Hydra and again for the shell."""
    return f"{_template('prompt', prompt)} {_template('completion', [completion])}"


def _template(key: str, columns: Sequence[str]) -> str:
    text = "\\n".join(f"{{{column}}}" for column in columns)
    return f"'task.{key}=\"{text}\"'"
