"""Rank doubling as a sweep: from the command to ladders, the message before training, and the answers at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from qlora_exp.config.compose import compose_raw
from qlora_exp.config.interpolations import unresolved_texts
from qlora_exp.config.overrides import override_key
from qlora_exp.config.schema import LadderConfig, SweepConfig
from qlora_exp.errors import ConfigError, raise_all
from qlora_exp.paths import StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.study.space import grid, point_overrides
from qlora_exp.study.types import Axis, LadderSettings, LadderSpec, StudySpec


def ladder_of(settings: SweepConfig, fixed: Sequence[str], others: tuple[Axis, ...]) -> LadderSpec:
    """Return one ladder for each point of the sweep's other axes.

    ``fixed``: the overrides of every trial. Its ``seed`` is the first seed, its ``training.learning_rate`` the centre
    at r_start.

    Raises:
        ConfigError, Problems: nothing was started.
    """
    from qlora_exp.rank_doubling.settings import LADDER_KEYS, RANK, SPLIT, resolve

    fixed_keys = [axis.key for axis in others if axis.key in LADDER_KEYS]
    fixed_keys += [key for text in fixed if (key := override_key(text)) in (RANK, SPLIT)]
    hint = "set sweep.ladder.r_start, r_max, seeds and lr_factors instead, or use another sampler"
    raise_all([ConfigError("the ladder sets this key itself", f"{key}=…", hint) for key in fixed_keys])
    ladders = [_ladder_at(fixed, point, settings.ladder.r_start) for point in grid(others)]
    seed = int(compose_raw(fixed).seed)
    return resolve(settings.ladder, seed, ladders)


def _ladder_at(fixed: Sequence[str], point: dict[str, Any], r_start: int) -> LadderSettings:
    """Return the ladder at ``point``, with the settings that this point's configuration has at the first rank.

    Another model may bring another learning rate, and ``lora.alpha=${lora.r}`` follows the rank: so two ranks are
    composed.
    """
    raw, doubled = (
        compose_raw([*fixed, *point_overrides(point | {"lora.r": rank})]) for rank in (r_start, 2 * r_start)
    )
    follows = raw.lora.alpha_policy != "fixed" or raw.lora.alpha != doubled.lora.alpha
    alpha = str(raw.lora.alpha_policy)
    if alpha == "fixed":
        alpha = str(unresolved_texts(raw.lora, "alpha")) if follows else f"fixed at {raw.lora.alpha}"
    return LadderSettings(
        axes=point,
        learning_rate=float(raw.training.learning_rate),
        rate_exponent=0.0 if raw.lora.rslora or not follows else -0.5,
        alpha=f"{alpha}, rsLoRA" if raw.lora.rslora else alpha,
    )


def announce(spec: StudySpec, config: LadderConfig) -> None:
    """Print before training whether the planned seeds and items can settle the margin, if there is one."""
    from qlora_exp.rank_doubling.answers import plan_sentence
    from qlora_exp.rank_doubling.settings import is_single_rank, rule_of

    assert spec.ladder is not None
    if is_single_rank(spec.ladder):
        return
    raw = compose_raw(spec.overrides)
    limits = [limit for limit in (raw.evaluation.max_items, raw.task.max_test_items) if limit is not None]
    rule, items = rule_of(spec.ladder), min(limits, default=None)
    settles, sentence = plan_sentence(rule, config.seed_sd, config.item_sd, items, spec.ladder.max_seeds)
    print(f"  {'' if settles else 'warning: '}{sentence}", file=sys.stderr, flush=True)


def conclude(opened: Any, spec: StudySpec, paths: StudyPaths) -> None:
    """Write the answers to ``ladder.json``, and print them."""
    ladder_answers = show_answers(opened, spec)
    write_json(paths.ladder, {"study": spec.name, "synthetic": spec.synthetic, "ladders": ladder_answers})
    print(f"  {paths.ladder}")


def show_answers(opened: Any, spec: StudySpec) -> list[dict[str, Any]]:
    """Print each ladder's sentence and warnings so far, and return the answers as ``ladder.json`` has them."""
    from qlora_exp.rank_doubling.answers import answers

    assert spec.ladder is not None
    ladder_answers: list[dict[str, Any]] = answers(spec.ladder, opened.ladder_trials())
    for answer in ladder_answers:
        name = ", ".join(f"{key}={value}" for key, value in answer["axes"].items())
        marks = [text for text in ("SYNTHETIC" if spec.synthetic else "", name) if text]
        print(": ".join([*marks, answer["sentence"]]))
        for warning in answer["warnings"]:
            print(f"  warning: {warning}")
    return ladder_answers
