"""The settings of a rank ladder: ranks, seeds and learning rates, checked before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from qlora_exp.analysis.margin import Levels, Margin, MarginUnit, parse_margin
from qlora_exp.analysis.rank_rule import MAX_SEEDS, MIN_SEEDS, Rule, SeedPlan, make_rule
from qlora_exp.config.compose import compose_raw
from qlora_exp.config.enums import LrPolicy
from qlora_exp.config.interpolations import unresolved_texts
from qlora_exp.config.overrides import override_key
from qlora_exp.config.schema import LadderConfig, SweepConfig
from qlora_exp.errors import AnalysisError, ConfigError, QloraExpError, raise_all
from qlora_exp.study.space import grid, parse_axes, point_overrides
from qlora_exp.study.types import Axis, LadderSettings, LadderSpec

EDITION = 2
"""See :class:`~qlora_exp.study.types.LadderSpec`."""
EARLIER_SEED_LIMIT = 8
"""The most seeds per rank that a ladder of an earlier edition can have."""
MAX_PILOT_SEEDS = 8
RANK, SEED, RATE, SPLIT = "lora.r", "seed", "training.learning_rate", "evaluation.split"
LADDER_KEYS = (RANK, SEED, RATE, SPLIT)
"""Keys that a ladder sets in each of its trials: no other axis may use them."""
TRAINING_STEPS = "training.max_steps"
"""Also set in each trial if configurations are screened by shorter trainings."""


def ladder_of(settings: SweepConfig, fixed: Sequence[str], others: tuple[Axis, ...]) -> LadderSpec:
    """Return one ladder for each point of the sweep's other axes.

    ``fixed``: the overrides of every trial. Its ``seed`` is the first seed, its ``training.learning_rate`` the centre
    at r_start.

    Raises:
        ConfigError, Problems: nothing was started.
    """
    screens = settings.ladder.screening_steps is not None
    fixed_keys = [axis.key for axis in others if axis.key in LADDER_KEYS or (screens and axis.key == TRAINING_STEPS)]
    fixed_keys += [key for text in fixed if (key := override_key(text)) in (RANK, SPLIT)]
    hint = "set sweep.ladder.r_start, r_max, seeds and lr_factors instead, or use another sampler"
    raise_all([ConfigError("the ladder sets this key itself", f"{key}=…", hint) for key in fixed_keys])
    ladders = [_ladder_at(fixed, point, settings.ladder) for point in grid(others)]
    raw = compose_raw(fixed)
    spec = resolve(settings.ladder, int(raw.seed), ladders)
    gain = spec.margin is not None and margin_of(spec).unit is MarginUnit.SHARE_OF_TUNING_GAIN
    if gain and (not raw.evaluation.before or str(raw.training.engine) == "sleep"):
        what = f"the margin {spec.margin} has no size: these runs have no score before tuning"
        hint = "evaluation.before=true, or a margin of 0.25% (of the loss)"
        raise ConfigError(what, f"sweep.ladder.margin={spec.margin}", hint)
    return spec


def _ladder_at(fixed: Sequence[str], point: dict[str, Any], config: LadderConfig) -> LadderSettings:
    """Return the ladder at ``point``, with the settings that this point's configuration has at the first rank.

    Another model may bring another learning rate, and ``lora.alpha=${lora.r}`` follows the rank: so two ranks are
    composed.
    """
    ranks = (config.r_start, 2 * config.r_start)
    raw, doubled = (compose_raw([*fixed, *point_overrides(point | {RANK: rank})]) for rank in ranks)
    follows = raw.lora.alpha_policy != "fixed" or raw.lora.alpha != doubled.lora.alpha
    alpha = str(raw.lora.alpha_policy)
    if alpha == "fixed":
        alpha = str(unresolved_texts(raw.lora, "alpha")) if follows else f"fixed at {raw.lora.alpha}"
    if config.screening_steps is not None:
        point = {**point, TRAINING_STEPS: _steps_to_halve(raw.training.max_steps, config.screening_steps)}
    return LadderSettings(
        axes=point,
        learning_rate=float(raw.training.learning_rate),
        rate_exponent=0.0 if raw.lora.rslora or not follows else -0.5,
        alpha=f"{alpha}, rsLoRA" if raw.lora.rslora else alpha,
    )


def _steps_to_halve(max_steps: int | None, screening_steps: int) -> int:
    """Return the ladder's training steps, which screening runs are shorter than.

    Raises:
        ConfigError: there is no such number, or the screening runs are as long.
    """
    where = f"sweep.ladder.screening_steps={screening_steps}"
    if max_steps is None:
        raise ConfigError(
            "screening runs need a number of steps to be shorter than", TRAINING_STEPS, "training.max_steps=200"
        )
    if not 1 <= screening_steps < max_steps:
        what = f"screening runs must be shorter than the ladder's {max_steps} steps"
        raise ConfigError(what, where, f"from 1 to {max_steps - 1}, for example {max(1, max_steps // 4)}")
    return int(max_steps)


def resolve(config: LadderConfig, first_seed: int, ladders: Sequence[LadderSettings]) -> LadderSpec:
    """Return the checked ``sweep.ladder``.

    Raises:
        ConfigError, or Problems for several.
    """
    where = "sweep.ladder"
    errors: list[QloraExpError] = []
    single = config.r_start == config.r_max
    margin: Margin | None = None
    if config.margin is None and not single:
        what = "a ladder needs a margin, fixed before the first training"
        errors.append(
            ConfigError(
                what, f"{where}.margin", "the smallest gain worth a doubling: 0.25% (of the loss), or 0.1 nats_per_item"
            )
        )
    elif config.margin is not None:
        try:
            margin = parse_margin(config.margin, where=f"{where}.margin={config.margin}")
            make_rule(margin.number, config.half_zone)
        except AnalysisError as error:
            errors.append(ConfigError(error.what, error.where or f"{where}.margin", error.hint))
    if config.r_start < 1 or not (single or config.r_start <= config.r_max // 2):
        what = f"there is no doubling from r = {config.r_start} to {config.r_max}"
        errors.append(ConfigError(what, f"{where}.r_max={config.r_max}", f"at least {2 * max(config.r_start, 1)}"))
    if not MIN_SEEDS <= config.seeds <= MAX_SEEDS:
        what = (
            f"{config.seeds} seeds are too few"
            if config.seeds < MIN_SEEDS
            else "more seeds than the rule was tested with"
        )
        errors.append(
            ConfigError(what, f"{where}.seeds={config.seeds}", f"from {MIN_SEEDS} to {MAX_SEEDS}; 3 is usual")
        )
    elif not config.seeds <= config.max_seeds <= MAX_SEEDS:
        what = f"max_seeds={config.max_seeds} doesn't fit seeds={config.seeds}"
        hint = f"from {config.seeds} (no extra seeds) to {MAX_SEEDS}"
        errors.append(ConfigError(what, f"{where}.max_seeds={config.max_seeds}", hint))
    if not 1 <= config.pilot_seeds <= MAX_PILOT_SEEDS:
        what = f"pilots can't have {config.pilot_seeds} seeds"
        hint = f"from 1 to {MAX_PILOT_SEEDS}; 2 is usual"
        errors.append(ConfigError(what, f"{where}.pilot_seeds={config.pilot_seeds}", hint))
    elif config.pilot_seeds < 2 and config.lr_policy is LrPolicy.search:
        what = "a single pilot seed shows no noise, so search could never leave the carried rate"
        hint = f"{where}.pilot_seeds=2, or lr_policy=carry"
        errors.append(ConfigError(what, f"{where}.pilot_seeds={config.pilot_seeds}", hint))
    pilot_seeds = range(config.pilot_seed, config.pilot_seed + config.pilot_seeds)
    # Earlier versions kept 8 seeds free. Raising max_seeds into the pilots' seeds is refused when it is raised.
    kept_free = max(config.max_seeds, EARLIER_SEED_LIMIT)
    if set(pilot_seeds) & set(range(first_seed, first_seed + kept_free)):
        what = "a pilot seed is also a seed of the decision runs"
        hint = f"all {config.pilot_seeds} from it on outside {first_seed} … {first_seed + kept_free - 1}"
        errors.append(ConfigError(what, f"{where}.pilot_seed={config.pilot_seed}", hint))
    if config.screening_steps is not None and len(ladders) < 2:
        what = "there is a single configuration: nothing to choose by screening runs"
        hint = "sweep.ladder.screening_steps=null, or an axis such as quantization=nf4,int8"
        errors.append(ConfigError(what, f"{where}.screening_steps={config.screening_steps}", hint))
    factors = sorted(set(config.lr_factors))
    few = len(factors) < 2 and config.lr_policy is not LrPolicy.fixed
    if few or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        what = "a choice of learning rate needs at least two factors, all above 0"
        errors.append(ConfigError(what, f"{where}.lr_factors={config.lr_factors}", "[0.5,1,2], or lr_policy=fixed"))
    raise_all(errors)
    return LadderSpec(
        r_start=config.r_start,
        r_max=config.r_max,
        seeds=config.seeds,
        first_seed=first_seed,
        pilot_seed=config.pilot_seed,
        margin=_stored(margin),
        half_zone=config.half_zone,
        lr_policy=config.lr_policy.value,
        lr_factors=tuple(factors),
        ladders=tuple(ladders),
        max_seeds=config.max_seeds,
        stop_pilots=config.stop_pilots,
        pilot_seeds=config.pilot_seeds,
        edition=EDITION,
        screening_steps=config.screening_steps,
    )


def continued(ladder: LadderSpec, earlier: LadderSpec, keys: Collection[str]) -> LadderSpec:
    """Return ``ladder`` as the command continues the study of ``earlier``.

    Settings that are not among ``keys``, the keys on the command line, keep the study's values where another version
    had another default. A larger ``max_seeds`` than the study's raises it.
    """

    def kept(*names: str) -> dict[str, Any]:
        return {name: getattr(earlier, name) for name in names if f"sweep.ladder.{name}" not in keys}

    ladder = replace(ladder, edition=earlier.edition, raised_from=earlier.raised_from, **kept("stop_pilots"))
    if earlier.edition < EDITION:
        ladder = replace(ladder, **kept("lr_policy", "pilot_seeds", "max_seeds", "margin", "half_zone"))
    if "sweep.ladder.max_seeds" not in keys:
        ladder = replace(ladder, max_seeds=max(ladder.max_seeds, earlier.max_seeds))
    if earlier.max_seeds < ladder.max_seeds <= seed_limit(ladder):
        ladder = replace(ladder, raised_from=(*earlier.raised_from, earlier.max_seeds))
    return ladder


def seed_limit(spec: LadderSpec) -> int:
    """Return the largest ``max_seeds`` that the study can have: an earlier edition's seed axis holds no more."""
    return MAX_SEEDS if spec.edition >= EDITION else EARLIER_SEED_LIMIT


def pilot_seeds_of(spec: LadderSpec) -> range:
    return range(spec.pilot_seed, spec.pilot_seed + spec.pilot_seeds)


def doublings_of(r_start: int, r_max: int) -> int:
    """Return how often r_start can be doubled without passing r_max."""
    return (r_max // r_start).bit_length() - 1 if 1 <= r_start <= r_max else 0


def ranks_of(spec: LadderSpec) -> list[int]:
    """Return the ranks of a ladder, ascending."""
    return [spec.r_start << step for step in range(doublings_of(spec.r_start, spec.r_max) + 1)]


def _stored(margin: Margin | None) -> float | str | None:
    """Return the margin as a study stores it: nats per item as a number, as earlier versions did."""
    if margin is None:
        return None
    return margin.value if margin.unit is MarginUnit.NATS_PER_ITEM else str(margin)


def margin_of(spec: LadderSpec) -> Margin:
    assert spec.margin is not None  # resolve() requires a margin unless there is a single rank
    return parse_margin(spec.margin)


def rule_of(spec: LadderSpec, levels: Levels | None = None) -> Rule:
    """Return the decision rule that the ladder's margin gives, for one doubling, in nats per item.

    Args:
        levels: what the margin is relative to; not needed for nats per item.

    Raises:
        AnalysisError: the margin is relative to something unknown.
    """
    margin = margin_of(spec)
    size = margin.per_item(levels or Levels(math.nan))
    return make_rule(size, None if spec.half_zone is None else spec.half_zone * size / margin.number)


def rule_in_margin_units(spec: LadderSpec) -> Rule:
    """Return the rule in the terms in which the user wrote the margin, e.g. in % of the loss."""
    return make_rule(margin_of(spec).number, spec.half_zone)


def seed_plan(spec: LadderSpec) -> SeedPlan:
    return SeedPlan(spec.seeds, spec.max_seeds)


def is_single_rank(spec: LadderSpec) -> bool:
    """Return whether there is only one rank: pilots choose its learning rate, its seeds are run, and nothing is
    decided."""
    return spec.r_start == spec.r_max


def max_trials(spec: LadderSpec) -> int:
    """Return the maximum number of trials of all ladders: the pilots with all their seeds, one rate beyond the grid
    included, and the decision runs."""
    ranks = len(ranks_of(spec))
    seeds = spec.seeds if is_single_rank(spec) else spec.max_seeds  # only a doubling's decision can add seeds
    rates = 0 if spec.lr_policy == LrPolicy.fixed.value else len(spec.lr_factors) + 1
    if spec.lr_policy == LrPolicy.search.value:
        at_other_ranks = len({*spec.lr_factors, 1.0}) if spec.edition >= EDITION else len(spec.lr_factors)
        rates += (ranks - 1) * (at_other_ranks + 1)
    of_one = rates * spec.pilot_seeds + ranks * seeds
    if spec.screening_steps is None:
        return len(spec.ladders) * of_one
    return sum(left for left, _ in screening_rounds(spec)) * spec.pilot_seeds + of_one


def screening_rounds(spec: LadderSpec) -> list[tuple[int, int]]:
    """Return (configurations, training steps) of each round of halving: the steps double, up to those of the ladder."""
    rounds: list[tuple[int, int]] = []
    left, steps = len(spec.ladders), spec.screening_steps
    while steps is not None and left > 1:
        rounds.append((left, min([steps, *(int(ladder.axes[TRAINING_STEPS]) for ladder in spec.ladders)])))
        left, steps = math.ceil(left / 2), 2 * steps
    return rounds


def ladder_axes(spec: LadderSpec) -> tuple[Axis, ...]:
    """Return the axes that the ladder adds to the sweep's other axes. They don't depend on ``max_seeds``, which may be
    raised while a study continues."""
    rates = [rate for ladder in spec.ladders for rank in ranks_of(spec) for rate in rates_of(spec, ladder, rank)]
    rates += [ladder.learning_rate for ladder in spec.ladders]
    reach = max(high / low for low, high in pairwise(spec.lr_factors)) if len(spec.lr_factors) > 1 else 2.0
    low, high = round_rate(min(rates) / reach / 2), round_rate(max(rates) * reach * 2)
    if spec.lr_policy == LrPolicy.search.value:  # around the carried rate, which may be beyond the first grid itself
        low = round_rate(low * min(*spec.lr_factors, 1.0) / reach)
        high = round_rate(high * max(*spec.lr_factors, 1.0) * reach)
    seeds = (spec.first_seed, spec.first_seed + MAX_SEEDS - 1, *pilot_seeds_of(spec))
    texts = {
        RANK: ",".join(map(str, ranks_of(spec))),
        SEED: f"int(interval({min(seeds)},{max(seeds)}))",
        RATE: f"tag(log,interval({low},{high}))",
        SPLIT: "validation,test",
    }
    if spec.screening_steps is not None:
        steps = {steps for _, steps in screening_rounds(spec)} | {
            int(ladder.axes[TRAINING_STEPS]) for ladder in spec.ladders
        }
        texts[TRAINING_STEPS] = ",".join(map(str, sorted(steps)))
    return tuple(replace(axis, tags=("ladder",)) for axis in parse_axes(texts, {}))


def rates_of(spec: LadderSpec, ladder: LadderSettings, rank: int) -> list[float]:
    """Return the rank's central learning rate times the factors, ascending."""
    centre = ladder.learning_rate * lr_scale(spec, ladder, rank)
    return [round_rate(centre * factor) for factor in spec.lr_factors]


def lr_scale(spec: LadderSpec, ladder: LadderSettings, rank: int) -> float:
    """Return the factor between the rank's central learning rate and the one at r_start."""
    return float((rank / spec.r_start) ** ladder.rate_exponent)


def round_rate(rate: float) -> float:
    """Return ``rate`` rounded to four significant digits."""
    return float(f"{rate:.4g}")
