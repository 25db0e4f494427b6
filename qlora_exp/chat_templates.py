"""Chat templates by themselves: parsed and rendered as transformers renders them, without importing it (or torch)."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """Parses ``{% generation %}``, which marks the assistant's words in transformers' chat templates."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def rendered(
    template: str, conversation: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *, generation_prompt: bool
) -> str:
    """``conversation`` (role, content) as ``template`` writes it. ``tokens``: ``bos_token``, ``eos_token`` …

    Raises:
        jinja2.TemplateError: the template is no valid Jinja, or refuses the conversation.
    """
    given = {"messages": conversation, "tools": None, "documents": None, "add_generation_prompt": generation_prompt}
    try:
        return _compiled(template).render(**given, **tokens)
    except (ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
