"""docs/findings.md, written from the runs' figures alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from findings_answers import (
    DRAWS,
    LAW_EXPONENT,
    LITTLE,
    MARGIN,
    CurvesAnswer,
    Estimate,
    ModelAnswers,
    RatesAnswer,
    answers,
)
from findings_runs import CENTRE_RANK, FIXED_ALPHA, MODELS, Run, planned

POLICY_NAMES = {"fixed": f"alpha = {FIXED_ALPHA}", "2r": "alpha = 2r"}
LAW_NAMES = {"fixed": "one rate for all ranks", "2r": "rate ∝ r^−½"}

HEAD = """# Published findings, measured again

`python tests/benchmarks/findings.py --from docs/findings.csv --page docs/findings.md` wrote this page from the figures
of {runs} runs in [findings.csv](findings.csv){other}. `make findings` trains them again.

Do published findings about LoRA and QLoRA hold on small models, in short trainings on a CPU? Each finding is a
claim with a margin. The margins were chosen before results were compared, but after six runs that timed the machine,
and no record of that time proves it: read them as round numbers. *Holds* and *does not hold* mean that the whole 95 %
confidence interval lies on one side of the margin. Otherwise the claim is *not decided*: the interval says what is left
open.

{summary}

"""
QUANTIZATION = """## nf4 with double quantization against 16 bit

**Published**: 4-bit nf4 with double quantization matches 16-bit tuning (QLoRA: Dettmers et al. 2023,
[arXiv:2305.14314](https://arxiv.org/abs/2305.14314)).

**Claim here**: nf4 changes the test loss by less than {margin} of the loss of bf16. Both modes train fp32 adapters and
compute in bf16; only the storage of the base's weights differs. r = 16, alpha = 32, one run of each mode a seed.

{table}

A positive difference means that nf4 is worse. *Seed sd* is the standard deviation of the loss between bf16 runs that
differ in their seed only. The interval is over seeds and items, paired by both.

{sentences}

"""
CURVES = """## Learning curves of ranks below capacity

**Published**: below the capacity of the adapter, all ranks have the same learning curve ("LoRA Without Regret":
Schulman et al. 2025, [thinkingmachines.ai](https://thinkingmachines.ai/blog/lora/)). There the update is scaled by
alpha / r with a fixed alpha, and all ranks have one learning rate.

**Claim here**: the smallest and the largest rank differ by less than {margin} in the test loss, and by less than
{margin} in the training loss, averaged over the logged steps. Between r = 4 and r = 64 this is 0.25 % per doubling. The
rates follow the sweeps' law: {laws}.
The published claim is about a fixed alpha; alpha = 2r is the default of this tool.

{table}

Differences are shares of the largest rank's loss; positive: the smaller rank is worse. The interval of the test loss is
over seeds and items, that of the training loss over seeds. *Largest gap* is the largest difference between the mean
training curves at a logged step after the first. *Bits per parameter* is an upper limit of what the training can teach.
It is the loss of the untuned model, summed over all trained labels, in bits per trained parameter. Schulman et al.
assume a capacity of 2 bits per parameter. Both kinds of alpha train the same parameters on the same rows: what differs
between them isn't capacity.

{sentences}

"""
RATES = """## The best learning rate and the rank

**Published**: under a fixed alpha the best learning rate hardly depends on the rank (Schulman et al. 2025). Under
alpha = 2r the factor alpha / r doesn't shrink as the rank grows, so the best rate should fall. This second part is a
conclusion, not a published measurement; the sweeps' law is rate ∝ r^−½ there.

**Claim here**: fit best rate ∝ r^e. Under a fixed alpha, e is within ± {little}: 16 times the rank moves the best rate
by less than a factor of 2. Under alpha = 2r, e is below 0.

{table}

The best rate of a rank is the minimum of a parabola through the lowest mean test loss and its two neighbours, over the
logarithm of the rate. The rates of a rank are a factor of 2 apart and centred on the law's rate. Where the best one is
at the edge of the grid, one rate beyond it is run. The standard errors are a bootstrap's with {draws:,} draws over
seeds and items. The intervals have t with the degrees of freedom of the seeds, which are few: a single rank's interval
is wide. If more than 2.5 % of a rank's draws have their best rate at an edge, the grid is too narrow, and the claim is
not decided. At r = 8 both kinds of alpha share their runs.

{sentences}

{grids}

"""
TAIL = """## How it was measured

{settings}

All runs train adapters on all linear layers with AdamW, a cosine schedule and 5 % warm-up. The task is the embedded
one: the category of a WordNet definition. The loss is the sum over an answer's tokens, in nats per test item. Each run
has one CPU thread.

{versions}

## What it does not say

* Nothing about large models or other tasks: these models have 2.6 and 135 million parameters.
* Nothing about long trainings. The trainings here have 8 or 40 steps; a training that is longer may reach the capacity
  of the small ranks.
* Nothing about accuracy: only losses are compared, because they are less noisy.
* An interval over two or three seeds is wide, and it relies on differences between seeds being normal. A bootstrap over
  so few seeds is rough.
* The findings of one model share seeds, test items and some runs: their answers aren't independent.
* The margins ({margin} of the loss, ± {little} for the exponent) are choices. With other margins the words change, the
  intervals don't.

**Left out**

{left_out}
"""


@dataclass(frozen=True)
class Part:
    """What other runs add to the page: rows of its first table, and a section."""

    rows: tuple[Sequence[object], ...]
    text: str


def page(runs: Sequence[Run], other: Part | None = None, other_runs: int = 0) -> str:
    """Return the whole page; models without runs are named as left out."""
    found = [each for model in MODELS if (each := answers(model, runs)).runs]
    margin = f"{100 * MARGIN:g} %"
    text = HEAD.format(runs=len(runs), other=_of_other(other_runs), summary=_summary(found, other))
    text += QUANTIZATION.format(
        margin=margin, table=_quantization_table(found), sentences=paragraph(_quantization_words(found))
    )
    laws = "; ".join(f"{LAW_NAMES[policy]} under {name}" for policy, name in POLICY_NAMES.items())
    text += CURVES.format(
        margin=margin, laws=laws, table=_curves_table(found), sentences=paragraph(_curves_words(found))
    )
    text += RATES.format(
        little=LITTLE,
        draws=DRAWS,
        table=_rates_table(found),
        sentences=paragraph(_rates_words(found)),
        grids=_grids(found),
    )
    text += other.text if other is not None else ""
    return text + TAIL.format(
        settings=_settings(found, runs),
        versions=_versions(runs),
        margin=margin,
        little=LITTLE,
        left_out="\n".join(_left_out(runs)),
    )


def percent(value: float) -> str:
    return f"{100 * value:+.2f} %" if math.isfinite(value) else "unknown"


def percent_interval(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def number_interval(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def table(titles: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def paragraph(text: str) -> str:
    """Return the text in lines of 120 characters; a number stays with its sign."""
    joined = text.replace(" %", "\u00a0%").replace("× ", "×\u00a0").replace("r = ", "r\u00a0=\u00a0")
    return textwrap.fill(joined, 120, break_long_words=False, break_on_hyphens=False).replace("\u00a0", " ")


def _name(found: ModelAnswers) -> str:
    return found.model.title


def _of_other(count: int) -> str:
    return f"\nand of {count} in [findings_methods.csv](findings_methods.csv)" if count else ""


def _summary(found: Sequence[ModelAnswers], other: Part | None) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for each in found:
            if each.quantization is not None:
                answer = each.quantization
                what = f"nf4 with double quantization is within {100 * MARGIN:g} % of the loss of 16 bit"
                yield what, _name(each), f"**{answer.verdict}**", f"nf4 − bf16: {percent_interval(answer.difference)}"
        for each in found:
            for curves in each.curves:
                what = f"Curves of ranks coincide below capacity, {POLICY_NAMES[curves.policy]}"
                first, last = curves.curves[0], curves.curves[-1]
                assert first.test_difference is not None
                figure = f"r = {first.rank} − r = {last.rank}, test loss: {percent_interval(first.test_difference)}"
                yield what, _name(each), f"**{curves.verdict}**", figure
        for policy, what in (
            ("fixed", f"The best rate hardly depends on the rank, {POLICY_NAMES['fixed']}"),
            ("2r", f"The best rate falls with the rank, {POLICY_NAMES['2r']}"),
        ):
            for each in found:
                for rates in each.rates:
                    if rates.policy == policy:
                        narrow = "" if rates.resolved else "; the grid of rates is too narrow"
                        figure = f"exponent {number_interval(rates.exponent)}{narrow}"
                        yield what, _name(each), f"**{rates.verdict}**", figure
        yield from other.rows if other is not None else ()

    return table(("finding", "model", "here", "estimate (95 % CI)"), rows())


# (a)


def _quantization_table(found: Sequence[ModelAnswers]) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for each in found:
            if (answer := each.quantization) is not None:
                yield (
                    *(_name(each), answer.seeds, each.model.items, f"{answer.reference_loss:.3f}"),
                    *(percent_interval(answer.difference), f"{100 * answer.seed_sd:.2f} %", answer.verdict),
                )

    titles = ("model", "seeds", "items", "loss of bf16, nats per item", "nf4 − bf16 (95 % CI)", "seed sd", "claim")
    return table(titles, rows())


def _quantization_words(found: Sequence[ModelAnswers]) -> str:
    sentences = []
    for each in found:
        if (answer := each.quantization) is None:
            continue
        low, high = answer.difference.low, answer.difference.high
        if low > 0:
            measured = f"nf4 is worse than bf16, by {100 * low:.2f} to {100 * high:.2f} % of the loss"
        elif high < 0:
            measured = f"nf4 is better than bf16, by {-100 * high:.2f} to {-100 * low:.2f} % of the loss"
        else:
            measured = "no difference between nf4 and bf16 is seen"
        size = "smaller" if abs(answer.difference.value) < answer.seed_sd else "larger"
        sentences.append(f"On {_name(each)} {measured}; the estimated difference is {size} than the seed sd.")
        if answer.lost:
            sentences.append(f"{answer.lost} of its seeds are left out, because a run diverged.")
    return " ".join(sentences)


# (b)


def _curves_table(found: Sequence[ModelAnswers]) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for each in found:
            for answer in each.curves:
                for curve in answer.curves:
                    start = (
                        _name(each),
                        POLICY_NAMES[answer.policy],
                        curve.rank,
                        f"{curve.learning_rate:g}",
                        curve.seeds,
                    )
                    known = (f"{curve.test_loss:.3f}", f"{curve.bits_per_parameter:.2g}")
                    if curve.test_difference is None or curve.curve_difference is None or curve.largest_gap is None:
                        yield *start, *known, "–", "–", "–"
                        continue
                    gaps = (percent_interval(curve.curve_difference), f"{100 * curve.largest_gap:.1f} %")
                    yield *start, *known, percent_interval(curve.test_difference), *gaps

    titles = ("model", "alpha", "r", "learning rate", "seeds", "test loss, nats per item", "bits per parameter")
    return table((*titles, "test loss (95 % CI)", "training loss (95 % CI)", "largest gap"), rows())


def _curves_words(found: Sequence[ModelAnswers]) -> str:
    return " ".join(_curves_sentence(each, answer) for each in found for answer in each.curves)


def _curves_sentence(each: ModelAnswers, answer: CurvesAnswer) -> str:
    first, last = answer.curves[0], answer.curves[-1]
    assert first.test_difference is not None
    difference = first.test_difference
    where = f"On {_name(each)} with {POLICY_NAMES[answer.policy]},"
    if difference.low > 0:
        said = f"{where} r = {first.rank} is worse than r = {last.rank}"
    elif difference.high < 0:
        said = f"{where} r = {first.rank} is better than r = {last.rank}"
    else:
        said = f"{where} the test loss shows no difference between r = {first.rank} and r = {last.rank}"
    lost = f" {answer.lost} runs that diverged are left out." if answer.lost else ""
    return f"{said} ({percent(difference.value)}): the claim {_verb(answer.verdict)}.{lost}"


def _verb(verdict: str) -> str:
    return "is not decided" if verdict == "not decided" else verdict


# (c)


def _rates_table(found: Sequence[ModelAnswers]) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for each in found:
            for answer in each.rates:
                ranks = ", ".join(str(best.rank) for best in answer.ranks)
                seeds = "–".join(map(str, sorted({best.seeds for best in answer.ranks})))
                law = LAW_EXPONENT if answer.policy == "2r" else 0.0
                inside = "yes" if answer.exponent.low <= law <= answer.exponent.high else "no"
                start = (_name(each), POLICY_NAMES[answer.policy], ranks, seeds)
                yield *start, number_interval(answer.exponent), f"{law:g}: {inside}", answer.verdict

    titles = ("model", "alpha", "ranks", "seeds", "exponent e (95 % CI)", "product's exponent inside the interval?")
    return table((*titles, "claim"), rows())


def _rates_words(found: Sequence[ModelAnswers]) -> str:
    sentences = [_rates_sentence(each, answer) for each in found for answer in each.rates]
    return " ".join([*sentences, *(_lowest_sentence(each) for each in found if each.rates)])


def _lowest_sentence(each: ModelAnswers) -> str:
    """Return the lowest losses at the largest rank: they show what alpha does at the best rate."""
    rank = max(best.rank for answer in each.rates for best in answer.ranks)
    lowest = [
        f"{min(best.losses):.3f} with {POLICY_NAMES[answer.policy]}"
        for answer in each.rates
        for best in answer.ranks
        if best.rank == rank
    ]
    return f"On {_name(each)} the lowest loss of r = {rank} is {' and '.join(lowest)}."


def _rates_sentence(each: ModelAnswers, answer: RatesAnswer) -> str:
    first, last = answer.ranks[0], answer.ranks[-1]
    factor = last.best.value / first.best.value
    said = (
        f"On {_name(each)} with {POLICY_NAMES[answer.policy]}, the best rate goes from {first.best.value:.2g} at "
        f"r = {first.rank} to {last.best.value:.2g} at r = {last.rank} (× {factor:.2f}): "
        f"the claim {_verb(answer.verdict)}."
    )
    edges = [str(best.rank) for best in answer.ranks if not best.resolved]
    return said + (f" The grid is too narrow for the best rate's interval at r = {', '.join(edges)}." if edges else "")


def _grids(found: Sequence[ModelAnswers]) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for each in found:
            for answer in each.rates:
                for best in answer.ranks:
                    cells = zip(best.rates, best.losses, strict=True)
                    grid = ", ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in cells)
                    interval = f"{best.best.value:.2g} ({best.best.low:.2g} to {best.best.high:.2g})"
                    lowest = f"{min(best.losses):.3f}"
                    yield _name(each), POLICY_NAMES[answer.policy], best.rank, best.seeds, grid, lowest, interval

    titles = ("model", "alpha", "r", "seeds", "rate: mean test loss, nats per item", "lowest", "best rate (95 % CI)")
    return table(titles, rows())


# The rest.


def _settings(found: Sequence[ModelAnswers], runs: Sequence[Run]) -> str:
    def rows() -> Iterator[Sequence[object]]:
        for each in found:
            model, own = each.model, [run for run in runs if run.point.model == each.model.name]
            minutes = sum(run.train_seconds or 0.0 for run in own) / 60
            diverged = sum(run.losses is None for run in own)
            rate = f"{model.centre:g}"
            yield _name(each), model.steps, model.batch_size, model.items, rate, len(own), diverged, f"{minutes:.0f}"

    centre = f"rate at r = {CENTRE_RANK}, alpha = {FIXED_ALPHA}"
    titles = (
        "model",
        "steps",
        "rows a step",
        "test items",
        centre,
        "runs",
        "diverged",
        "minutes of training on shared cores",
    )
    return table(titles, rows())


def _versions(runs: Sequence[Run]) -> str:
    days = sorted({run.measured for run in runs})
    between = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return paragraph(f"Measured {between} with {'; '.join(sorted({run.versions for run in runs}))}.")


def _left_out(runs: Sequence[Run]) -> Iterator[str]:
    yield "* A grid of rates on the embedded instruct model, and learning curves under alpha = 2r on SmolLM2."
    yield "* nf4 without double quantization, rsLoRA."
    for model in MODELS:
        own = {run.point for run in runs if run.point.model == model.name}
        points = planned(model, runs)
        missing = [point for point in points if point not in own]
        if missing:
            yield f"* {len(missing)} of {len(points)} planned runs of {model.title}, for lack of time."
