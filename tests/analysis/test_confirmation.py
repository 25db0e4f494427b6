"""The decision between finalists: its error rate over all pairs, who wins, and what it says while nobody does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Measure
from qlora_exp.analysis.confirmation import (
    Confirmation,
    ConfirmVerdict,
    confirm_finalists,
    critical_value,
    margin_unit_of,
    pair_intervals,
)
from qlora_exp.analysis.confirmation_words import (
    ConfirmedSearch,
    confirmation_card,
    confirmation_lines,
    unanswered_sentence,
)
from qlora_exp.analysis.error_rates.confirmations import NOISE_WORLDS, NoiseWorld, confirm_rates
from qlora_exp.analysis.margin import Margin, MarginUnit, parse_margin
from qlora_exp.analysis.report import build
from qlora_exp.analysis.report_content import CardStatus, StudyInfo, to_markdown
from qlora_exp.records.types import RunRecord, Status

LOSS = Measure("loss_per_item", False)
MARGIN = parse_margin("0.25%")
SEARCH = ConfirmedSearch("lora", "qlora-exp confirm lora", 12, "minimize scores.after.loss_per_item", (), (1.4, 1.41))
ALLOWED = 0.05
LIMIT_OF_2000 = ALLOWED + 2.33 * (ALLOWED * (1 - ALLOWED) / 2000) ** 0.5
"""What 2,000 confirmations of a rule that errs in 5 % show in 1 % of the cases."""


@pytest.mark.parametrize("world", NOISE_WORLDS[:5], ids=lambda world: world.name)
@pytest.mark.parametrize(("finalists", "seeds"), [(2, 3), (3, 3), (5, 3)])
def test_all_statements_about_equal_finalists_together_err_in_at_most_5_percent(
    world: NoiseWorld, finalists: int, seeds: int
) -> None:
    rates = confirm_rates(world, [0.0] * finalists, seeds, 2000)
    assert rates.missed <= LIMIT_OF_2000
    assert rates.false_better <= rates.missed


def test_the_simulation_would_see_intervals_of_single_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_exp.analysis import confirmation

    monkeypatch.setattr(confirmation, "critical_value", lambda _, df: critical_value(2, df))
    assert confirm_rates(NOISE_WORLDS[0], [0.0] * 5, 3, 2000).false_better > 2 * ALLOWED


def test_a_clearly_better_finalist_wins_and_more_seeds_find_smaller_leads() -> None:
    assert confirm_rates(NOISE_WORLDS[1], [0.0, 8.0, 8.0], 3, 500).found > 0.95
    few, many = (confirm_rates(NOISE_WORLDS[1], [0.0, 3.0, 3.0], seeds, 500).found for seeds in (3, 8))
    assert few < 0.6 < 0.9 < many


def test_two_finalists_are_compared_by_the_paired_t_test_over_seeds() -> None:
    rng = np.random.default_rng(3)
    losses = rng.standard_normal((2, 5, 1))
    gains = (losses[1] - losses[0])[:, 0]
    half = 2.7764451051977987 * gains.std(ddof=1) / 5**0.5  # t at 97.5 %, 4 degrees of freedom
    bounds = pair_intervals(losses)
    assert bounds.low[0] == pytest.approx(gains.mean() - half)
    assert bounds.high[0] == pytest.approx(gains.mean() + half)


# From records.


def runs(losses: Mapping[int, float], noise: float, seeds: int = 3) -> list[RunRecord]:
    """Rank → true loss; what a seed does to all ranks, and to each alone."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(seeds)
    return [
        made_up.run(
            *(number,), r=r, seed=seed, loss=loss + 0.1 * float(shared[seed]) + noise * float(rng.standard_normal()),
            accuracy=0.5 + 0.01 * seed,
        )
        for number, (seed, (r, loss)) in enumerate((s, one) for s in range(seeds) for one in losses.items())
    ]  # fmt: skip


def decided(records: list[RunRecord], margin: Margin = MARGIN) -> Confirmation:
    found = confirm_finalists(records, LOSS, None, margin)
    assert found is not None
    return found


def test_the_winner_is_named_with_its_score_on_test_its_lead_and_its_cost() -> None:
    found = decided(runs({8: 1.4, 16: 1.5, 32: 1.6}, 0.004))
    assert found.verdict is ConfirmVerdict.WINNER
    assert found.use.rank == 8
    assert found.regret_bound == 0
    first, evidence, cost, *_ = confirmation_lines(found, SEARCH)
    assert "winner among 3 finalists; accuracy on test 0.51 (95 % CI" in first
    assert "3 new seeds and 1,000 items" in first
    assert "of memory" in first
    assert "better than each of the 2 others" in evidence
    assert cost == "No alternative is better (95 %)."


def test_while_none_is_shown_to_win_the_cheapest_is_used_with_a_bound_and_the_seeds_that_would_settle_it() -> None:
    found = decided(runs({32: 1.40, 8: 1.43, 64: 1.9}, 0.02))
    assert found.verdict is ConfirmVerdict.OPEN
    assert found.use.rank == 8, "r 8 needs less memory than r 32"
    assert [c.rank for c in found.contenders] == [32, 8]
    lines = confirmation_lines(found, SEARCH)
    assert lines[0].startswith("Not separable: take the cheapest of 2 finalists for now")
    assert "1 other is shown to be worse" in lines[1]
    assert found.regret_bound is not None
    assert 0.03 < found.regret_bound < 0.3
    assert found.seeds_advised is not None
    assert f"qlora-exp confirm lora --seeds {found.seeds_advised}" in lines[3]
    # That many seeds of the same noise do settle it.
    more = decided(runs({32: 1.40, 8: 1.43, 64: 1.9}, 0.02, seeds=4 * found.seeds_advised))
    assert more.verdict is ConfirmVerdict.WINNER


def test_finalists_within_the_margin_are_equal_and_the_cheapest_is_settled() -> None:
    found = decided(runs({8: 1.4, 16: 1.4005}, 0.0002), parse_margin("1%"))
    assert found.verdict is ConfirmVerdict.EQUAL
    assert found.use.rank == 8
    assert "equal within the margin of 1%" in confirmation_lines(found, SEARCH)[0]


def test_items_are_paired_and_their_noise_counts() -> None:
    """Without it, three seeds that agree by chance would decide on twenty items."""
    records = runs({8: 1.40, 16: 1.42}, 0.0)
    rng = np.random.default_rng(1)
    noise = {8: rng.standard_normal(20), 16: rng.standard_normal(20)}

    def items(record: RunRecord, moment: str, score: str) -> dict[str, float]:
        own = noise[int(record.config["lora"]["r"])]
        scores = record.scores.test
        assert scores is not None
        assert scores.loss_per_item is not None
        return {f"item-{n}": scores.loss_per_item + float(value - own.mean()) for n, value in enumerate(own)}

    alone = confirm_finalists(records, LOSS, None, MARGIN)
    paired = confirm_finalists(records, LOSS, items, MARGIN)
    assert alone is not None
    assert paired is not None
    assert (alone.verdict, paired.verdict) == (ConfirmVerdict.WINNER, ConfirmVerdict.OPEN)
    assert "3 seeds and 20 items" in paired.pairs[0].difference.over


def test_a_finalist_that_lost_a_run_is_not_chosen_and_is_named() -> None:
    records = runs({8: 1.3, 16: 1.4, 32: 1.5}, 0.002)
    lost = next(n for n, record in enumerate(records) if record.config["lora"]["r"] == 8)
    records[lost] = made_up.failed(lost).replace(config=records[lost].config, seed=records[lost].seed)
    found = decided(records)
    assert found.use.rank == 16
    assert any("r 8" in line and "lost 1 of 3 runs" in line for line in confirmation_lines(found, SEARCH))


def test_the_interval_of_a_loss_is_over_seeds_alone_and_says_so() -> None:
    """An accuracy's interval has the items' part; a loss's has only the spread over seeds."""
    records = runs({8: 1.4, 16: 1.5}, 0.004)
    assert "3 new seeds and 1,000 items)" in confirmation_lines(decided(records), SEARCH)[0]
    only_losses = [
        record.replace(scores=replace(record.scores, test=replace(record.scores.test, accuracy=None)))
        for record in records
        if record.scores.test is not None
    ]
    assert "3 new seeds, these 1,000 items)" in confirmation_lines(decided(only_losses), SEARCH)[0]


def lose(records: list[RunRecord], ranks: tuple[int, ...], status: Status) -> list[RunRecord]:
    """Return the records with the first run of each of these ranks lost."""
    lost = dict[int, int]()
    for n, record in enumerate(records):
        lost.setdefault(record.config["lora"]["r"], n)
    made = list(records)
    for r in ranks:
        n = lost[r]
        made[n] = made_up.failed(n, status).replace(config=records[n].config, seed=records[n].seed)
    return made


@pytest.mark.parametrize(("status", "retry"), [(Status.FAILED, "failed"), (Status.OUT_OF_MEMORY, "out_of_memory")])
def test_the_only_finalist_that_lost_no_run_is_not_settled_and_the_retry_is_named(status: Status, retry: str) -> None:
    search = replace(SEARCH, command="qlora-exp confirm lora --output-root 'my runs'")
    records = lose(runs({8: 1.3, 16: 1.4}, 0.002), (8,), status)
    found = decided(records)
    command = f"qlora-exp resume made-up --retry {retry} --output-root 'my runs'"
    assert (found.verdict, found.use.rank) == (ConfirmVerdict.OPEN, 16)
    assert any(line.endswith(command) for line in confirmation_lines(found, search))
    card = confirmation_card(found, search)
    assert (card.status, card.command) == (CardStatus.OPEN, command)


def test_when_every_finalist_lost_a_run_the_retry_is_named() -> None:
    records = lose(runs({8: 1.3, 16: 1.4}, 0.002), (8, 16), Status.OUT_OF_MEMORY)
    assert confirm_finalists(records, LOSS, None, MARGIN) is None
    sentence = unanswered_sentence(records, 2, SEARCH)
    assert sentence == "Every finalist lost a run: qlora-exp resume made-up --retry out_of_memory"
    diverged = lose(runs({8: 1.3, 16: 1.4}, 0.002), (8, 16), Status.DIVERGED)
    assert "--retry" not in unanswered_sentence(diverged, 2, SEARCH)
    # One lost, the other not started: nothing can be said of that one.
    one = lose(runs({8: 1.3, 16: 1.4}, 0.002), (8,), Status.FAILED)[:1]
    assert unanswered_sentence(one, 2, SEARCH) == "No finalist that lost no run has a score yet."


def test_before_all_planned_runs_have_ended_there_is_no_winner() -> None:
    records = runs({8: 1.4, 16: 1.5}, 0.004)
    complete = confirm_finalists(records, LOSS, None, MARGIN, planned=6)
    assert complete is not None
    assert (complete.verdict, complete.pending) == (ConfirmVerdict.WINNER, 0)
    for ended in (5, 4, 1):
        found = confirm_finalists(records[:ended], LOSS, None, MARGIN, planned=6)
        assert found is not None
        assert (found.verdict, found.pending) == (ConfirmVerdict.OPEN, 6 - ended)
        first, *_ = confirmation_lines(found, SEARCH)
        assert first.startswith(f"Not finished, {6 - ended} run{'s' * (ended < 5)} to come. So far: ")
        card = confirmation_card(found, SEARCH)
        assert (card.status, card.command) == (CardStatus.OPEN, SEARCH.command)
        assert "Not finished" in card.verdict


def test_order_and_winner_come_from_the_seeds_that_all_share() -> None:
    losses = {8: [1.500, 1.501, 0.9], 16: [1.400, 1.401]}
    records = [
        made_up.run(number, r=r, seed=seed, loss=loss, accuracy=0.5)
        for number, (r, seed, loss) in enumerate((r, s, x) for r, row in losses.items() for s, x in enumerate(row))
    ]
    found = decided(records)
    assert (found.verdict, found.use.rank, found.seeds) == (ConfirmVerdict.WINNER, 16, 2)
    qualities = [c.quality.mean for c in found.finalists if c.quality is not None]
    assert qualities == pytest.approx([1.4005, 1.5005])
    assert found.level == pytest.approx(1.4505)


@pytest.mark.parametrize("loss", ["loss_per_item", "loss", "bits_per_byte"])
def test_a_bare_margin_of_a_loss_is_in_nats_per_item(loss: str) -> None:
    assert parse_margin("0.1", margin_unit_of(Measure(loss, False))) == parse_margin("0.1 nats_per_item")
    assert parse_margin("0.1", margin_unit_of(Measure("accuracy", True))).unit is MarginUnit.SCORE


def test_the_report_leads_with_the_answer_and_a_search_on_validation_with_a_hedge() -> None:
    content = {
        "study": "lora",
        "score": "loss_per_item",
        "objective": "minimize scores.after.loss_per_item",
        "margin": "0.25%",
        "command": "qlora-exp confirm lora",
        "values": [1.31, 1.34, 1.36],
    }
    report = build(runs({8: 1.4, 16: 1.5, 32: 1.6}, 0.004), [StudyInfo("lora-confirm", confirmation=content)])
    assert "it is the winner among 3 finalists" in report.headline[0]
    assert report.cards[0].question == "Which finalist?"
    assert report.cards[0].status is CardStatus.SETTLED
    assert report.sections[0].name == "confirmation"
    page = to_markdown(report)
    assert "1.31" in page, "what the search saw"

    grid = [made_up.run(n, r=2**n, split="validation") for n in (2, 3, 4)]
    report = build(grid, [StudyInfo("lora", confirm_command="qlora-exp confirm lora")])
    assert report.headline[0].startswith("Best on validation, not confirmed: ")
    assert "chosen among 3 configurations with one seed each, so the score is optimistic" in report.headline[0]
    assert report.headline[0].endswith("To confirm it: qlora-exp confirm lora")
    card = next(card for card in report.cards if card.name == "configuration")
    assert card.command == "qlora-exp confirm lora"
