"""Write MODEL_CARD.md from the measurements in build.json and from the task's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer

from qlora_exp.embedded.build.splits import CATEGORIES, LEFT_OUT

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_SECTION_MARKS = ("<!-- base scores -->", "<!-- curve -->")
"""Later measurements stand between such a mark and the next heading. A rebuild of the card keeps them."""


def write_card(out: Path) -> dict[str, Any]:
    """Write MODEL_CARD.md, from measured values only. Return the baselines and each label's tokens."""
    rows = {split: read_rows(out / "task" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    facts = {
        "one_nearest_neighbour_accuracy": nearest_neighbour_accuracy(rows["train"], rows["test"]),
        "tfidf_logistic_regression_accuracy": logistic_regression_accuracy(rows["train"], rows["test"]),
        "label_tokens": label_tokens(out / "base" / "tokenizer.json"),
    }
    build = json.loads((out / "build.json").read_text("utf-8"))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    text = template.render(**(build | {"card": facts}), left_out=sorted(LEFT_OUT), categories=CATEGORIES)
    card = out / "MODEL_CARD.md"
    old_card = card.read_text("utf-8") if card.exists() else ""
    for mark in _SECTION_MARKS:
        text = text.replace(mark, mark + _section_after(mark, old_card))
    card.write_text(text.rstrip("\n") + "\n", "utf-8")
    return facts


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def nearest_neighbour_accuracy(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    """Return the accuracy of copying the category of the training gloss with the greatest TF-IDF cosine similarity."""
    model = make_pipeline(TfidfVectorizer(), KNeighborsClassifier(n_neighbors=1, metric="cosine", algorithm="brute"))
    return _accuracy(model, train, test)


def logistic_regression_accuracy(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    """Return the accuracy of a traditional classifier (TF-IDF of words and word pairs, C = 30) on the same rows."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return _accuracy(make_pipeline(vectors, LogisticRegression(C=30, max_iter=1000)), train, test)


def label_tokens(tokenizer_file: Path) -> dict[str, list[str]]:
    """Return each label's tokens, including the space before it (shown as a space)."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return {c: [token.replace("Ġ", " ") for token in tokenizer.encode(f" {c}").tokens] for c in CATEGORIES}


def _accuracy(model: Any, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    model.fit([row["definition"] for row in train], [row["category"] for row in train])
    score = model.score([row["definition"] for row in test], [row["category"] for row in test])
    return round(float(score), 4)


def _section_after(mark: str, text: str) -> str:
    _, separator, rest = text.partition(mark)
    return rest.split("\n## ")[0].rstrip("\n") + "\n" if separator else ""
