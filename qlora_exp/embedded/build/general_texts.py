"""Held-out texts on which forgetting is measured: prose for both models, chats for the instruct model."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_exp.embedded.build.near_duplicates import near_duplicates, normalise, units, word_grams
from qlora_exp.embedded.build.training_texts import Message

DOCUMENT_WORDS = 120  # a word is at least one token, so a document has at least as many tokens
_SHORT_WORDS = 4  # any two chats may share short answers such as "a noun", "warm", "2"


def general_documents(sentences: list[str], trained: frozenset[str]) -> list[str]:
    """Return documents of at least DOCUMENT_WORDS words, a sentence a line, without near duplicates in training."""
    owned_units = [(unit, sentence) for sentence in sentences for unit in sorted(units(sentence))]
    pairs = near_duplicates([unit for unit, _ in owned_units], sorted(trained), word_grams)
    near = {owned_units[i][1] for i, _ in pairs}
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
    """Return the chats without an answer that is a training text or a part of one; short answers don't count."""
    return [
        chat
        for chat in chats
        if not any(
            units(m["content"]) & trained
            for m in chat
            if m["role"] == "assistant" and len(normalise(m["content"]).split()) >= _SHORT_WORDS
        )
    ]
