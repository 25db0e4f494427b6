"""Does the answer still hold if both sides are trained on equally many tokens?

Equal examples are not equal tokens: a chat template adds its tokens to every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.analysis.comparable import Group, Protocol
from qlora_exp.analysis.configurations import mean
from qlora_exp.analysis.contrasts import Difference, ItemScores, Side, contrast_sentence, difference
from qlora_exp.records.types import RunRecord

EQUAL_SHARE = 0.05
"""Two sides count as equal if their processed tokens differ by at most this share."""
DOCUMENTED = "sweeps/instruct_or_base.yaml"


@dataclass(frozen=True)
class TokenCheck:
    """``done``: both sides processed equally many tokens, or one was trained again until they did."""

    done: bool
    difference: Difference | None
    """Instruct against base at equal tokens; ``None`` if that wasn't run, or isn't needed."""
    sentence: str


def processed_tokens(runs: Sequence[RunRecord]) -> float | None:
    """Return the unpadded tokens processed in training, mean over runs."""
    return mean(run.speed.train_tokens for run in runs)


def token_groups(groups: Sequence[Group]) -> tuple[list[Group], list[RunRecord]]:
    """Return the groups to compare within, and the runs that repeat the first group with a token budget.

    Those runs differ from the first group only in their training's end: ``training.max_tokens`` instead of steps.
    """
    if not groups or groups[0].protocol.max_tokens is not None:
        return list(groups), []
    budgeted = [g for g in groups[1:] if g.protocol.max_tokens is not None and _unbudgeted(g) == _unbudgeted(groups[0])]
    return [g for g in groups if g not in budgeted], [record for g in budgeted for record in g.records]


def check_equal_tokens(
    instruct: Sequence[RunRecord],
    base: Sequence[RunRecord],
    budgeted: Sequence[RunRecord],
    items: ItemScores | None,
) -> TokenCheck:
    """Return the primary contrast at equal tokens.

    Args:
        budgeted: runs of the same protocol, of any cell, that were trained to a number of tokens.
    """
    tokens = {"instruct": processed_tokens(instruct), "base": processed_tokens(base)}
    if tokens["instruct"] is None or tokens["base"] is None:
        return TokenCheck(False, None, "Equal-token check: not done, because the processed tokens are unknown.")
    fewer, more = sorted(tokens, key=lambda side: tokens[side] or 0.0)
    fewer_tokens, more_tokens = tokens[fewer] or 0.0, tokens[more] or 0.0
    counted = f"training processed {tokens['instruct']:,.0f} tokens for instruct and {tokens['base']:,.0f} for base"
    if more_tokens <= fewer_tokens * (1 + EQUAL_SHARE):
        return TokenCheck(True, None, f"Equal examples are equal tokens here: {counted}.")
    sides = {"instruct": tuple(instruct), "base": tuple(base)}
    repeated = [
        run for run in budgeted if _same_cell(run, sides[fewer][0]) and _near(run.speed.train_tokens, more_tokens)
    ]
    if not repeated:
        command = f"training.max_steps=null training.max_tokens={more_tokens:.0f}"
        next_step = f"To check, train {fewer} again with {command} ({DOCUMENTED} says how)"
        return TokenCheck(False, None, f"Equal-token check: not done. At equal examples, {counted}. {next_step}.")
    sides[fewer] = tuple(repeated)
    contrast = difference(Side(sides["instruct"], "after"), Side(sides["base"], "after"), "bits_per_byte", items)
    return TokenCheck(
        contrast is not None,
        contrast,
        f"At equal tokens ({fewer} trained to {more_tokens:,.0f}): {contrast_sentence(contrast)}.",
    )


def _near(tokens: int | None, target: float) -> bool:
    return tokens is not None and target / (1 + EQUAL_SHARE) <= tokens <= target * (1 + EQUAL_SHARE)


def _same_cell(run: RunRecord, other: RunRecord) -> bool:
    return cell_of(run) == cell_of(other)


def cell_of(run: RunRecord) -> tuple[str, str]:
    """Return (variant, format), e.g. ``("instruct", "chat")``."""
    variant = str((run.config.get("model") or {}).get("variant"))
    return variant, run.plan.format if run.plan is not None else "plain"


def _unbudgeted(group: Group) -> Protocol:
    """Return the protocol without its length of training."""
    return replace(group.protocol, max_steps=0, max_tokens=None)
