"""Removes secrets from everything that is written, shown or sent: configurations, overrides, messages, tracebacks.

A key is secret by its name (``hub_token``, ``db.password``, ``API_KEY`` …), a text by its form (``hf_…``, a password in
a URL, ``token=…``, a private key). The values of secret environment variables are secret in any text. Settings with
similar names stay readable: ``max_new_tokens``, ``token_accuracy``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

REDACTED = "***"

SECRET_WORDS = frozenset(
    {
        *("secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd"),
        *("credential", "credentials", "apikey", "authorization", "bearer", "webhook"),
    }
)
SECRET_PAIRS = frozenset(
    {"api key", "access key", "private key", "secret key", "account key", "auth key", "session key"}
)
TOKENIZER_WORDS = frozenset(
    {
        *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "image"),
        *("next", "new", "begin", "end", "per", "last", "first", "label"),
    }
)
"""Words before ``token`` in names that aren't secret, such as ``pad_token``."""

WORKING_FOLDERS = ("PWD", "OLDPWD")
"""Variables of the shell that aren't passwords. Redacting them would hide every path under the current folder."""

MIN_SECRET_LENGTH = 8
"""Characters. Redacting shorter values (``test``, ``1234``) would hide ordinary words."""

TOKEN_SHAPES = re.compile(
    r"""
    \bhf_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{8,} | \bhf_[A-Za-z0-9]{16,}      # Hugging Face
  | \bapi_org_[A-Za-z0-9]{16,}
  | \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}  # forges
  | \bsk-[A-Za-z0-9_-]{16,} | \bAIza[\w-]{30,} | \bxox[abprs]-[\w-]{10,}      # providers
  | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b | \bdapi[0-9a-f]{32}\b
  | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                                         # JSON web token
  | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
URL_PASSWORD = re.compile(r"(?P<before>\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/:@'\"]*):(?P<secret>[^\s/'\"]+)@")
URL_SIGNATURE = re.compile(
    r"(?P<before>[?&](?:sig|signature|x-amz-signature|x-amz-security-token|code|key)=)[^&\s'\"]+", re.I
)
AUTHORIZATION = re.compile(r"\b(?P<scheme>Bearer|Basic)\s+[A-Za-z0-9+/._~=-]{8,}", re.I)
ASSIGNMENT = re.compile(
    r"""(?P<quote>["']?)(?P<key>[A-Za-z_][\w.-]*)(?P=quote)(?P<middle>\s*[=:]\s*)"""
    r"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;&(){}\[\]"']+)"""
)


def is_secret_key(key: str) -> bool:
    """Return whether a setting with this name holds a secret. Only the last part counts: ``headers.authorization``."""
    last = key.replace("+", "").replace("~", "").split(".")[-1]
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", last)]
    if not words:
        return False
    if SECRET_WORDS.intersection(words):
        return True
    if any(f"{first} {second}" in SECRET_PAIRS for first, second in pairwise(words)):
        return True
    return words[-1] == "token" and not TOKENIZER_WORDS.intersection(words[:-1])


def redact(value: Any, key: str = "", secrets: Sequence[str] | None = None) -> Any:
    """Return a copy of plain JSON types without secrets.

    Values of a secret key become ``***``, except ``None``, booleans and empty texts. Other texts go through
    :func:`redact_text`. ``secrets``: :func:`environment_secrets`, if they are known already.
    """
    secrets = environment_secrets() if secrets is None else secrets
    if is_secret_key(key) and value not in (None, "", True, False) and not isinstance(value, Mapping):
        return REDACTED
    if isinstance(value, Mapping):
        return {name: redact(entry, str(name), secrets) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact(entry, "", secrets) for entry in value]
    if isinstance(value, str):
        return redact_text(value, secrets)
    return value


def redact_text(text: str, secrets: Sequence[str] | None = None) -> str:
    """Return ``text`` (a message, a traceback, a URL) without secrets; ``secrets`` as for :func:`redact`."""
    for secret in environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, REDACTED)
    text = TOKEN_SHAPES.sub(REDACTED, text)
    text = URL_PASSWORD.sub(rf"\g<before>:{REDACTED}@", text)
    text = URL_SIGNATURE.sub(rf"\g<before>{REDACTED}", text)
    text = AUTHORIZATION.sub(rf"\g<scheme> {REDACTED}", text)
    return _redact_assignments(text)


def redact_overrides(overrides: Iterable[str]) -> list[str]:
    """Return Hydra overrides without secrets: ``+hub_token=abc`` gives ``+hub_token=***``."""
    redacted = []
    for override in overrides:
        key, equals, value = override.partition("=")
        hidden = equals and is_secret_key(key) and value not in ("", "null")
        redacted.append(f"{key}={REDACTED}" if hidden else redact_text(override))
    return redacted


def environment_secrets() -> list[str]:
    """Return the values of secret environment variables (``HF_TOKEN``, ``MLFLOW_TRACKING_PASSWORD`` …).

    The longest come first, so that a secret that contains another is replaced as a whole.
    """
    names = (name for name in os.environ if is_secret_key(name) and name not in WORKING_FOLDERS)
    values = {os.environ.get(name, "") for name in names}  # another thread may remove a variable meanwhile
    return sorted((value for value in values if len(value) >= MIN_SECRET_LENGTH), key=len, reverse=True)


def _redact_assignments(text: str) -> str:
    """Redact ``key=value`` if :func:`is_secret_key`. The value of any other key is searched, too: it may be a URL with
    a secret in its query."""
    parts, position = [], 0
    while match := ASSIGNMENT.search(text, position):
        replacement = _redact_assignment(match)
        unchanged = replacement == match[0]
        end = match.end("key") if unchanged else match.end()
        parts.append(text[position:end] if unchanged else text[position : match.start()] + replacement)
        position = end
    return "".join(parts) + text[position:]


def _redact_assignment(match: re.Match[str]) -> str:
    key, middle, value = match["key"], match["middle"], match["value"]
    # In prose, "unexpected token: x" isn't an assignment; with a quoted or compound key it is.
    prose = ":" in middle and not match["quote"] and "_" not in key and key.lower() == "token"
    if (
        prose
        or not is_secret_key(key)
        or value.lower() in ("null", "none", "true", "false")
        or value.startswith(REDACTED)
    ):
        return match[0]
    mark = value[0] if value[0] in "\"'" else ""
    return f"{match['quote']}{key}{match['quote']}{middle}{mark}{REDACTED}{mark}"
