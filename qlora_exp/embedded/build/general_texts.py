"""Held-out text on which forgetting is measured: running text for both models, chats for the instruct model."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_exp.embedded.build.near_duplicates import near_duplicates, normalise, units, word_grams
from qlora_exp.embedded.build.training_texts import Message

DOCUMENT_WORDS = 120  # a word is at least one token, so a document has at least as many tokens
_SHORT_WORDS = 4  # "a noun", "warm", "2": answers that any two chats may share


def general_documents(sentences: list[str], trained: frozenset[str]) -> list[str]:
    """Sentences that are not nearly in a training text, a line each, in documents of at least DOCUMENT_WORDS words."""
    mine = [(unit, sentence) for sentence in sentences for unit in sorted(units(sentence))]
    found = near_duplicates([unit for unit, _ in mine], sorted(trained), word_grams)
    near = {mine[i][1] for i, _ in found}
    documents: list[str] = []
    lines: list[str] = []
    for sentence in sentences:
        if sentence not in near:
            lines.append(sentence)
        if sum(len(line.split()) for line in lines) >= DOCUMENT_WORDS:
            documents.append("\n".join(lines))
            lines = []
    return documents


def unseen_chats(chats: Iterable[list[Message]], trained: frozenset[str]) -> list[list[Message]]:
    """The chats none of whose answers, but for short ones, is a training text or a part of one."""
    return [
        chat
        for chat in chats
        if not any(
            units(m["content"]) & trained
            for m in chat
            if m["role"] == "assistant" and len(normalise(m["content"]).split()) >= _SHORT_WORDS
        )
    ]
