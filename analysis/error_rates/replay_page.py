"""The replay as a page: docs/replay.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from qlora_exp.analysis.error_rates.replay import COMMAND, HALVES, PLAN, ReferenceGrid, Row, all_seeds, noise_of
from qlora_exp.analysis.rank import RankAnswer
from qlora_exp.analysis.rank_rule import StepVerdict

HEADINGS = (
    *(
        "r_start",
        "margin",
        "planned half-width / w",
        "the grid says",
        "(b) decided",
        "(a) compatible",
        "in halves",
        "not judged",
    ),
    *(
        "(c) same answer",
        "two grids agree",
        "regret, median / p90",
        "(d) priced regret, median / p90",
        "bound holds",
        "(e) FLOPs of the grid's, median / p90",
    ),
    *("of one's own grid's", "seeds a rank", "reached"),
)
COMPATIBLE, DECIDED, FLOPS_MEDIAN = 0.95, 0.80, 0.20
REGRET_MEDIAN, REGRET_P90 = 1.0, 2.0
"""The goals; those of the priced regret in margins."""


def document(reference: ReferenceGrid, rows: Sequence[Row], draws: int, seed: int) -> str:
    return (
        "\n".join(
            [_head(reference, draws, seed), *_table(rows), "", *_summary(rows), *_noise(reference), _how(reference)]
        )
        + "\n"
    )


def reached(row: Row) -> str:
    """Return the letters of the goals that a row misses, "yes" if none, "(a) unknown" if no ladder could be judged."""
    holds = {
        "a": row.compatible is None or row.compatible >= COMPATIBLE,
        "b": row.decided >= DECIDED,
        "d": within_regret(row, row.priced_regret),
        "e": row.flops[0] <= FLOPS_MEDIAN,
    }
    missed = [letter for letter, held in holds.items() if not held]
    verdict = [f"**no: {', '.join(missed)}**"] if missed else [] if row.compatible is None else ["yes"]
    return "; ".join(verdict + (["(a) unknown"] if row.compatible is None else []))


def within_regret(row: Row, regret: tuple[float, float] | None) -> bool:
    """Return whether a regret, median and 90th percentile, is within its goals; False if it is unknown."""
    return regret is not None and regret[0] <= REGRET_MEDIAN * row.margin and regret[1] <= REGRET_P90 * row.margin


def said(found: RankAnswer) -> str:
    if found.recommended_rank is None:
        last = next(c for c in found.comparisons if c.decision.verdict is StepVerdict.INCONCLUSIVE)
        return f"inconclusive at {last.from_rank} → {last.to_rank}"
    return f"{found.verdict} at {found.recommended_rank}"


def _head(reference: ReferenceGrid, draws: int, seed: int) -> str:
    _, grid_seeds, items = reference.grid.shape
    return f"""# The rank decision replayed against a reference grid

`{COMMAND} --draws {draws} --seed {seed} --output docs/replay.md` (`make replay`) wrote this page
from the runs in [replay.npz](replay.npz); `make replay-measure` makes those runs again. The rule is in
[statistics.md](statistics.md), its error rates in simulation are in [calibration.md](calibration.md).

Does a ladder give the answer that a whole grid would give, for less computation? The **grid** has ranks
{reference.ranks[0]} to {reference.ranks[-1]} with {grid_seeds} seeds each and {items} test items. The **pool** has
{reference.pool.shape[1]} other seeds at every rank. Each row of the table decides {draws} ladders from the pool,
with its seeds in random order and its items drawn with replacement. The seeds that a ladder would add are in the pool
already, so only the decision is replayed. m is the margin, w the half-zone.

* **(a) compatible**, goal ≥ 95 % of the decided ladders that can be judged: the grid allows every step of the ladder.
  If the grid's interval of the gain lies within m ± w, it allows either answer. A step at which the grid itself is
  inconclusive can't be judged (*not judged*, a share of the decided). This is strict: if the grid says *continue* with
  an interval that reaches beyond m + w, a *stop* counts as incompatible, although the true gain may lie in the zone.
  The draws of a row share one pool. So *in halves* repeats the comparison with {HALVES} ladders: each has another
  random half of all seeds as its pool and the rest as its grid. The column says how many of those that can be judged
  are compatible.
* **(b) decided**, goal ≥ 80 %. If the *planned half-width* is above 1, it is known before training that the plan can't
  settle every gain.
* **(c) same answer**: the share of the decided ladders with the grid's own verdict and rank. *Two grids agree* is the
  share for two grids, each with one of those halves; (c) can't be much higher, so it has no goal.
* **Regret**: nats per item by which a decided ladder's rank is worse than the grid's best rank from r_start on. It may
  be many margins: doublings that each gain less than the margin may gain far more than that together, and a margin per
  doubling says that this isn't worth it. **(d) priced regret** takes the margin at its word, and all ladders, undecided
  ones included: each doubling costs one margin, so the rank to use should minimize loss + m · doublings. It is the
  difference to that minimum; goal: median ≤ m, p90 ≤ 2 m. *Bound holds*: the share of all ladders in which the rank to
  use costs at most `regret_bound` against the ranks that the ladder ran, by the grid's means.
* **(e)** floating-point operations of training and scoring, pilot runs included, as a share of the whole grid's; goal:
  median ≤ 20 %. Pilots that are behind count until they
  are stopped. *One's own grid* has {PLAN.first} seeds at every rank from
  r_start, and the same pilot runs (median).
"""


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|" + "---|" * len(HEADINGS)
    for row in rows:
        yield "| " + " | ".join(cells(row)) + " |"


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("## What it shows", "")
    for name, some in (
        ("The plan can settle (planned half-width ≤ w)", [row for row in rows if row.planned <= 1]),
        ("The plan can't settle", [row for row in rows if row.planned > 1]),
    ):
        known = [row.compatible for row in some if row.compatible is not None]
        halves = [sum(counts) for counts in zip(*(row.in_halves for row in some), strict=True)] or [0, 0]
        yield f"* {name}: {len(some)} rows."
        yield f"  (b) is reached in {_reached([row.decided for row in some], DECIDED)},"
        yield f"  (a) in {_reached(known, COMPATIBLE)} of the rows that can be judged."
        yield f"  In halves, {halves[0]} of {halves[1]} ladders are compatible."
    cheap = sum(row.flops[0] <= FLOPS_MEDIAN for row in rows)
    raw = [row for row in rows if row.regret is not None]
    priced = sum(within_regret(row, row.priced_regret) for row in rows)
    unpriced = sum(within_regret(row, row.regret) for row in rows)
    yield f"* (d) is reached in {priced} of {len(rows)} rows. Without"
    yield f"  the price of a doubling the same goal is reached in {unpriced} of"
    yield f"  {len(raw)}: slow gains of many doublings add up. The bound holds in"
    holds = [row.bound_holds for row in rows]
    yield f"  {_percent(min(holds))} to {_percent(max(holds))} of the ladders of a row."
    yield f"* (e) is reached in {cheap} of {len(rows)} rows, by median{_range([row.flops[0] for row in rows])} and 90th"
    yield f"  percentile{_range([row.flops[1] for row in rows])} of the ladders; of one's own grid the medians are"
    yield f" {_range([row.flops_of_own for row in rows])}."
    yield ""


def _reached(shares: Sequence[float], goal: float) -> str:
    return f"{sum(share >= goal for share in shares)} of {len(shares)}{_range(shares)}"


def _range(shares: Sequence[float]) -> str:
    return f" ({_percent(min(shares))} to {_percent(max(shares))})" if shares else ""


def cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.r_start),
        f"{row.margin:g}",
        f"{row.planned:.2f}",
        said(row.grid),
        _percent(row.decided),
        _percent(row.compatible),
        "{} of {}".format(*row.in_halves),
        _percent(row.unjudged),
        _percent(row.exact),
        _percent(row.grids_agree),
        "–" if row.regret is None else f"{row.regret[0]:.3f} / {row.regret[1]:.3f}",
        f"{row.priced_regret[0]:.3f} / {row.priced_regret[1]:.3f}",
        _percent(row.bound_holds),
        f"{_percent(row.flops[0])} / {_percent(row.flops[1])}",
        _percent(row.flops_of_own),
        f"{row.seeds_per_rank:.1f}",
        reached(row),
    )


def _noise(reference: ReferenceGrid) -> Iterator[str]:
    together = all_seeds(reference)
    levels = np.nanmean(together, axis=(1, 2))
    yield from (
        "## Noise, measured",
        "",
        f"These standard deviations are of all {together.shape[1]} seeds together. *Seed sd*: of one seed's mean",
        "difference of two ranks. *Item sd*: of the true difference, over items. If you give them as",
        "`sweep.ladder.seed_sd` and `sweep.ladder.item_sd`, a sweep says before training whether its plan can settle",
        "the margin.",
        "",
        "| doubling | learning rates | gain, nats per item | share of the whole gain | seed sd | item sd |",
        "|---|---|---|---|---|---|",
    )
    rates = reference.provenance["learning_rates"]
    for step, (smaller, larger) in enumerate(pairwise(reference.ranks)):
        noise, gain = noise_of(together[step : step + 2]), levels[step] - levels[step + 1]
        share = gain / (levels[0] - levels.min())
        learning_rates = f"{rates[str(smaller)]:g} → {rates[str(larger)]:g}"
        yield (
            f"| {smaller} → {larger} | {learning_rates} | {gain:+.4f} | {_percent(share)} | {noise.seed_sd:.4f} |"
            f" {noise.item_sd:.3f} |"
        )
    yield ""


def _how(reference: ReferenceGrid) -> str:
    kept, pool = reference.provenance, reference.pool.shape[1]
    pilots = ", ".join(f"{float(rate):g}: {loss:.3f}" for rate, loss in kept["pilot_losses"].items())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(kept["versions"].items()))
    few = f"\n* The pool has {pool} seeds, so no ladder can add more than these." if pool < PLAN.most else ""
    whole, stopped = kept["pilots_of_a_ladder"]
    grid_seeds, pool_seeds = _list(kept["grid_seeds"]), _list(kept["replay_seeds"])
    return f"""## How it was measured

{kept["model"]}, {kept["quantization"]}, {kept["targets"]}, alpha = 2r; {kept["steps"]} steps of {kept["batch_size"]}
examples; {kept["device"]}. Seeds of the grid: {grid_seeds}; of the pool: {pool_seeds}.
Pilots at r = {kept["pilot_rank"]} chose the learning rate, with seeds {_list(kept["pilot_seeds"])} and
{kept["pilot_items"]} validation items (mean loss in nats per item: {pilots}). In a ladder
{whole} of them run to their end and {stopped} are stopped half-way. All ranks use the best rate
∝ r^−½, as `sweep.ladder.lr_policy=carry` does.
Measured {kept["measured"]} with {versions}.

## What it does not say

* It covers one task, one model of 2.5 million parameters and one short budget: with longer training, seeds may differ
  less.
* Every ladder uses the grid's learning rates: other pilot seeds, and pilots at another rank, aren't replayed.
* The draws share a pool of {pool} seeds and aren't independent: a share describes this pool against this grid.{few}"""


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
