"""The replay as a page: docs/replay.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from qlora_exp.analysis.rank import Answer
from qlora_exp.analysis.replay import COMMAND, HALVES, ReferenceGrid, Row, all_seeds, noise_of
from qlora_exp.analysis.rule import FIRST_SEEDS, MOST_SEEDS, Verdict

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
    *("(c) same answer", "two grids agree", "(d) regret, median / p90", "(e) FLOPs of the grid's, median / p90"),
    *("of one's own grid's", "seeds a rank", "reached"),
)
COMPATIBLE, DECIDED, FLOPS_MEDIAN, FLOPS_P90 = 0.95, 0.80, 0.35, 0.50
"""The goals."""


def document(reference: ReferenceGrid, rows: Sequence[Row], draws: int, seed: int) -> str:
    return (
        "\n".join(
            [_head(reference, draws, seed), *_table(rows), "", *_summary(rows), *_noise(reference), _how(reference)]
        )
        + "\n"
    )


def reached(row: Row) -> str:
    """The goals that a row misses, by letter; "yes" where none, "(a) unknown" where no ladder could be judged."""
    holds = {
        "a": row.compatible is None or row.compatible >= COMPATIBLE,
        "b": row.decided >= DECIDED,
        "e": row.flops[0] <= FLOPS_MEDIAN and row.flops[1] <= FLOPS_P90,
    }
    missed = [letter for letter, held in holds.items() if not held]
    told = [f"**no: {', '.join(missed)}**"] if missed else [] if row.compatible is None else ["yes"]
    return "; ".join(told + (["(a) unknown"] if row.compatible is None else []))


def said(found: Answer) -> str:
    if found.recommended_rank is None:
        last = next(c for c in found.comparisons if c.decision.verdict is Verdict.INCONCLUSIVE)
        return f"inconclusive at {last.from_rank} → {last.to_rank}"
    return f"{found.verdict} at {found.recommended_rank}"


def _head(reference: ReferenceGrid, draws: int, seed: int) -> str:
    _, grid_seeds, items = reference.grid.shape
    return f"""# The rank decision replayed against a reference grid

Written by `{COMMAND} --draws {draws} --seed {seed} --output docs/replay.md` (`make replay`)
from the runs kept in [replay.npz](replay.npz); `make replay-measure` makes those runs again. The rule is in
[statistics.md](statistics.md), its error rates in simulation are in [calibration.md](calibration.md).

A **grid** of ranks {reference.ranks[0]} to {reference.ranks[-1]} with {grid_seeds} seeds each and {items} test items,
and a **pool** of {reference.pool.shape[1]} more seeds at every rank, none of them the grid's. {draws} ladders a row are
decided from the pool, its seeds in random order and its items drawn with replacement. What a ladder would have bought
is there already, so only the decision is replayed.

* **(a) compatible**, goal ≥ 95 % of the decided that can be judged: every step of the ladder is one that the grid
  allows. Either answer is allowed where the grid's interval of the gain lies within m ± w; a step at which the grid
  itself is inconclusive judges nobody (*not judged*, a share of the decided). That is strict: where the grid says
  *continue* with an interval that reaches beyond m + w, a *stop* counts as incompatible though the truth may lie in the
  zone. The draws of a row share one pool: *in halves*, each of {HALVES} ladders has another random half of all seeds
  as its pool and the rest as its grid; told is how many of those that can be judged are compatible.
* **(b) decided**, goal ≥ 80 %. A *planned half-width* above 1 says before training that not every gain can be settled.
* **(c) same answer**: the grid's own verdict and rank, among the decided; beside it how often *two grids agree*, each
  with one of those halves. No goal: it can't be much higher than that.
* **(d) regret**: nats per item by which the recommended rank is worse than the best rank of the grid. A margin above 0
  accepts some.
* **(e)** floating-point operations of training and scoring, pilots included, as a share of the whole grid's; goal:
  median ≤ 35 %, p90 ≤ 50 %. *One's own grid*: {FIRST_SEEDS} seeds at every rank from r_start, and the same pilots
  (median).
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
        yield f"  (b) is reached in {_reached([row.decided for row in some], DECIDED)};"
        yield f"  (a), where it can be judged, in {_reached(known, COMPATIBLE)}, over halves by"
        yield f"  {halves[0]} of {halves[1]} ladders."
    cheap = sum(row.flops[0] <= FLOPS_MEDIAN and row.flops[1] <= FLOPS_P90 for row in rows)
    yield f"* (e) is reached in {cheap} of {len(rows)} rows: medians{_range([row.flops[0] for row in rows])}, 90th"
    yield f"  percentiles{_range([row.flops[1] for row in rows])};"
    yield f"  of one's own grid{_range([row.flops_of_own for row in rows])}."
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
        f"All {together.shape[1]} seeds together. *Seed sd*: of one seed's mean difference of two ranks; *item sd*: of",
        "the true difference, over items. `sweep.ladder.seed_sd` and `item_sd` take these, and a sweep says before",
        "training whether its margin can be settled.",
        "",
        "| doubling | learning rates | gain, nats per item | share of the whole gain | seed sd | item sd |",
        "|---|---|---|---|---|---|",
    )
    rates = reference.provenance["learning_rates"]
    for step, (smaller, larger) in enumerate(pairwise(reference.ranks)):
        noise, gain = noise_of(together[step : step + 2]), levels[step] - levels[step + 1]
        share = gain / (levels[0] - levels.min())
        told = f"{rates[str(smaller)]:g} → {rates[str(larger)]:g}"
        yield (
            f"| {smaller} → {larger} | {told} | {gain:+.4f} | {_percent(share)} | {noise.seed_sd:.4f} |"
            f" {noise.item_sd:.3f} |"
        )
    yield ""


def _how(reference: ReferenceGrid) -> str:
    kept, pool = reference.provenance, reference.pool.shape[1]
    unresolved = f" Still at the edge after that: r = {_list(kept['unresolved'])}." if kept["unresolved"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(kept["versions"].items()))
    few = f"\n* The pool has {pool} seeds, and a purchase of more gets no more." if pool < MOST_SEEDS else ""
    return f"""## How it was measured

{kept["model"]}, {kept["quantization"]}, {kept["targets"]}, alpha = 2r; {kept["steps"]} steps of {kept["batch_size"]}
examples; {kept["device"]}. Seeds of the grid: {_list(kept["grid_seeds"])}; of the pool: {_list(kept["replay_seeds"])}.
Learning rates by the ladder's own code, {{½, 1, 2}} × a centre ∝ r^−½ and one beyond where the best is at the edge:
seed {kept["pilot_seed"]}, {kept["pilot_items"]} validation items.{unresolved}
Measured {kept["measured"]} with {versions}.

## What it does not say

* One task, one model of 2.5 million parameters, one short budget: with longer training seeds may differ less.
* Every ladder has the grid's learning rates: what another pilot seed would have chosen isn't replayed.
* The draws share a pool of {pool} seeds and aren't independent: a share is that of this pool against this grid.{few}"""


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
