"""Writes Ollama's Modelfile of an exported GGUF file: its chat template in Ollama's language, and its stop token.

Ollama doesn't read the Jinja template in a GGUF file, and guesses one from a list. This module derives the template
from what the tokenizer's own template renders, and compares the two on a conversation before it writes one.
https://docs.ollama.com/modelfile
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jinja2
from transformers import PreTrainedTokenizerBase

SYSTEM, FIRST, ANSWER, SECOND = "qsystemq", "qfirstq", "qanswerq", "qsecondq"
"""Contents that no template has by itself."""
PROBE_QUESTION = (("user", FIRST),)


@dataclass(frozen=True)
class OllamaTurns:
    """A chat template, cut into the texts around its contents."""

    before_user: str
    after_user: str
    """It ends with the generation prompt."""
    after_answer: str
    before_system: str = ""
    after_system: str = ""
    """Both are empty if no text around a system message is known."""
    default_system: str | None = None
    """The system message that the template adds where there is none."""

    def render(self, first: str, answer: str | None = None, second: str = "", system: str | None = None) -> str:
        """Return a conversation as Ollama renders it: turn after turn, the system message in the first."""
        system = system if system is not None else self.default_system
        text = f"{self.before_system}{system}{self.after_system}" if system is not None else ""
        text += f"{self.before_user}{first}{self.after_user}"
        if answer is None:
            return text
        return text + f"{answer}{self.after_answer}{self.before_user}{second}{self.after_user}"


def modelfile(
    file: str,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    end_token: int | None,
    answer_prefix: str | None = None,
    system: str | None = None,
) -> str:
    """Return the Modelfile's content.

    Args:
        file: the name of the GGUF file, in the same folder.
        chat: whether the run's prompts were rendered by the chat template.
        end_token: the token that ended the answers in training.
        answer_prefix: text between the generation prompt and the answers in training.
        system: the run's system message.
    """
    template = _template(tokenizer, chat, answer_prefix or "", system)
    return "\n".join([f"FROM ./{file}", *template, *_stop(tokenizer, end_token)]) + "\n"


def _stop(tokenizer: PreTrainedTokenizerBase, end_token: int | None) -> Iterator[str]:
    if end_token is not None:
        yield f"PARAMETER stop {_quoted(str(tokenizer.decode([end_token], skip_special_tokens=False)))}"
    yield "PARAMETER temperature 0"


def _template(tokenizer: PreTrainedTokenizerBase, chat: bool, answer_prefix: str, system: str | None) -> Iterator[str]:
    if not chat:
        yield "# The run's prompts are plain text: type them as they were in training."
        yield 'TEMPLATE """{{ .Prompt }}"""'
        return
    turns = turns_of(tokenizer, answer_prefix)
    if turns is None:
        yield "# The chat template can't be written in Ollama's language: Ollama uses the one that it knows, if any."
        return
    if not _same(tokenizer, turns, [("user", FIRST), ("assistant", ANSWER), ("user", SECOND)], answer_prefix):
        yield "# The template holds for the first question. Later ones are rendered otherwise than in training."
    parts = (turns.before_system, turns.after_system, turns.before_user, turns.after_user, turns.after_answer)
    before_system, after_system, before_user, after_user, after_answer = map(_literal, parts)
    has_system = bool(before_system or after_system)
    system_part = (
        f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{after_system}{{{{ end }}}}" if has_system else ""
    )
    question = f"{before_user}{{{{ .Prompt }}}}{after_user}"
    yield f'TEMPLATE """{system_part}{question}{{{{ .Response }}}}{after_answer}"""'
    system = system if system is not None else turns.default_system
    if system is not None:
        yield f"SYSTEM {_quoted(system)}"


def turns_of(tokenizer: PreTrainedTokenizerBase, answer_prefix: str = "") -> OllamaTurns | None:
    """Return the parts of the tokenizer's chat template; ``None`` if it can't be cut, or renders something else."""
    plain = _rendered(tokenizer, PROBE_QUESTION)
    both = _rendered(tokenizer, [("user", FIRST), ("assistant", ANSWER), ("user", SECOND)])
    if plain is None or both is None or plain.count(FIRST) != 1:
        return None
    start, _, after_user = plain.partition(FIRST)
    if both.count(ANSWER) != 1 or both.count(SECOND) != 1 or not after_user:
        return None
    between = both.partition(ANSWER)[2].partition(SECOND)[0]
    closed = _rendered(tokenizer, [("user", FIRST), ("assistant", ANSWER)], generation_prompt=False) or ""
    after_answer = closed.partition(ANSWER)[2]
    before_user = between.removeprefix(after_answer)
    if not (between.startswith(after_answer) and start.endswith(before_user)):
        return None
    bare = OllamaTurns(before_user, after_user + answer_prefix, after_answer)
    turns = _with_system(tokenizer, bare, start.removesuffix(before_user), answer_prefix)
    if turns is None or '"""' in turns.render(FIRST, ANSWER, SECOND, SYSTEM):
        return None
    return turns if _same(tokenizer, turns, PROBE_QUESTION, answer_prefix) else None


def _with_system(
    tokenizer: PreTrainedTokenizerBase, turns: OllamaTurns, default_part: str, answer_prefix: str
) -> OllamaTurns | None:
    """Return ``turns`` with the system message's place, or without one if the template puts it elsewhere.

    ``default_part``: what the template writes before the first question of a conversation without a system message.
    """
    text = _rendered(tokenizer, [("system", SYSTEM), *PROBE_QUESTION]) or ""
    before, _, rest = text.partition(SYSTEM)
    after, found, _ = rest.partition(turns.before_user + FIRST)
    placed = replace(turns, before_system=before, after_system=after) if found else turns
    if found and not _same(tokenizer, placed, [("system", SYSTEM), *PROBE_QUESTION], answer_prefix):
        placed = turns
    if not default_part:
        return placed
    if placed is turns or not (default_part.startswith(before) and default_part.endswith(after)):
        return None
    return replace(placed, default_system=default_part[len(before) : len(default_part) - len(after)])


def _same(
    tokenizer: PreTrainedTokenizerBase, turns: OllamaTurns, messages: Sequence[tuple[str, str]], answer_prefix: str
) -> bool:
    """Return whether Ollama's text of a conversation is the tokenizer's."""
    said = dict(messages)
    questions = [content for role, content in messages if role == "user"]
    ours = turns.render(questions[0], said.get("assistant"), questions[-1], said.get("system"))
    rendered = _rendered(tokenizer, messages)
    return rendered is not None and ours == rendered + answer_prefix


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], generation_prompt: bool = True
) -> str | None:
    """Return the text without BOS, which Ollama adds itself; ``None`` if the template refuses the conversation."""
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except (jinja2.TemplateError, ValueError, TypeError):
        return None
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def _literal(text: str) -> str:
    """Return a text as Go's templates read it."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
