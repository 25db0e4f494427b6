"""A ladder's answer as the report shows it: the rank to use, gains as a share of the loss, what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.analysis.comparable import answering_scores, finished_runs, finite_score, is_pilot
from qlora_exp.analysis.configurations import known_mean
from qlora_exp.analysis.margin import Levels, TaskSlope, margin_units, margin_words, task_slope
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.records.types import RunRecord


@dataclass(frozen=True)
class LadderStep:
    """One comparison of two ranks. Gains are per item in nats, or shares of the loss: see :class:`LadderView`."""

    from_rank: int
    to_rank: int
    doublings: int
    gain: float
    low: float | None
    high: float | None
    decision: str

    @property
    def name(self) -> str:
        return f"{self.from_rank} → {self.to_rank}"


@dataclass(frozen=True)
class LadderView:
    """A ladder that compares ranks, and its runs."""

    name: str
    """The values of its axes, e.g. ``base``."""
    study: str
    answer: Mapping[str, Any]
    """Its object in ``ladder.json``, of this version or an earlier one."""
    runs: tuple[RunRecord, ...]
    """Its finished runs that decide; pilots aren't among them."""
    loss: float | None
    """Nats per item at the smallest rank, mean over runs; ``None`` is unknown. Shares of the loss refer to it."""
    tokens_per_item: float | None
    """Tokens with a loss."""
    slope: TaskSlope | None

    @property
    def decision(self) -> str:
        return str(self.answer.get("decision") or "open")

    @property
    def settled(self) -> bool:
        return self.decision in ("continue", "stop") and self.answer.get("status", "decided") == "decided"

    @property
    def raw_steps(self) -> list[Mapping[str, Any]]:
        """Return the comparisons with a gain, as ``ladder.json`` has them."""
        return [raw for raw in self.answer.get("comparisons") or [] if raw.get("gain") is not None]

    @property
    def steps(self) -> list[LadderStep]:
        """Return the comparisons in nats per item."""
        return [_step(raw, 1.0) for raw in self.raw_steps]

    @property
    def use_rank(self) -> int | None:
        """Return the rank to use now; ``None`` before two ranks have been compared.

        Records of earlier versions lack ``use_rank``. If their ladder is inconclusive, the smaller rank of the step
        that isn't settled is used: what that may cost is the step's upper bound.
        """
        for key in ("use_rank", "recommended_rank"):
            if self.answer.get(key) is not None:
                return int(self.answer[key])
        unsettled = [step for step in self.steps if step.decision != "continue"]
        return unsettled[0].from_rank if unsettled else None

    @property
    def shares(self) -> list[LadderStep]:
        """Return the comparisons as shares of the loss; as nats per item if the loss is unknown."""
        return [_step(raw, self.scale) for raw in self.raw_steps]

    @property
    def scale(self) -> float:
        return 1.0 / self.loss if self.loss else 1.0

    @property
    def unit(self) -> str:
        return "of the loss" if self.loss else "nats per item"

    @property
    def deciding_step(self) -> LadderStep | None:
        """Return the comparison that says most about the rank to use, as a share: with the next larger rank, else with
        the next smaller one."""
        larger = [step for step in self.shares if step.from_rank == self.use_rank]
        smaller = [step for step in self.shares if step.to_rank == self.use_rank]
        either = min(larger, key=lambda step: step.to_rank, default=None)
        return either or max(smaller, key=lambda step: step.from_rank, default=None)

    @property
    def regret(self) -> tuple[float, int | None] | None:
        """Return the most that the rank to use may cost, as a share, and the rank that it is compared with; ``None`` is
        unknown."""
        bound, against = self.answer.get("regret_bound"), self.answer.get("regret_rank")
        if bound is not None:
            return max(0.0, bound * self.scale), against
        if "regret_bound" in self.answer:
            return None
        step = self.deciding_step
        if step is None or step.from_rank != self.use_rank or step.high is None:
            return None
        return max(0.0, step.high), step.to_rank

    @property
    def margin(self) -> float | None:
        """Return the margin per doubling as a share."""
        margin = self.answer.get("margin")
        return None if margin is None else margin * self.scale

    @property
    def half_zone(self) -> float | None:
        zone = self.answer.get("half_zone")
        return None if zone is None else zone * self.scale

    @property
    def margin_in_units(self) -> str | None:
        """Return the margin in all units that are known, e.g. ``0.25% of the loss = 0.0071 nats per item``."""
        margin = self.answer.get("margin")
        if margin is None:
            return None
        levels = Levels(self.loss, self.tokens_per_item) if self.loss else None
        return margin_words(str(self.answer.get("margin_text") or ""), margin_units(margin, levels, self.slope))

    def text(self, gain: float) -> str:
        """Return a gain as text, e.g. ``2.1 %``; its unit is :attr:`unit`."""
        return f"{percent_text(gain)} %" if self.loss else f"{gain:.3g}"


def percent_text(share: float) -> str:
    """Return a share as percent with one decimal, or two significant digits below 1 %: ``0.25``, ``1.0``, ``-12.3``."""
    percent = 100 * share
    return f"{percent:.1f}" if abs(percent) >= 0.95 else f"{percent:.2g}"


def ladder_views(studies: Sequence[StudyInfo], records: Sequence[RunRecord]) -> list[LadderView]:
    """Return each ladder that compares ranks, with its runs."""
    views = []
    several = sum("decision" in answer for study in studies for answer in study.ladders) > 1
    for study in studies:
        of_study = [
            record for record in records if record.trial is not None and record.trial.study in (study.name, None)
        ]
        for answer in study.ladders:
            if "decision" not in answer:
                continue
            axes = answer.get("axes") or {}
            runs = [
                record
                for record in finished_runs(of_study)
                if record.trial is not None and not is_pilot(record) and axes.items() <= record.trial.params.items()
            ]
            values = ", ".join(str(value) for value in axes.values())
            views.append(_view(values or (study.name if several else "ladder"), study.name, answer, runs))
    return views


def ladder_rank_of(views: Sequence[LadderView]) -> Callable[[RunRecord], int | None]:
    """Return a function that gives the rank to use of the ladder to which a run belongs; ``None``: it has none."""
    ranks = {run.run_id: view.use_rank for view in views for run in view.runs}
    return lambda run: ranks.get(run.run_id)


def _view(name: str, study: str, answer: Mapping[str, Any], runs: Sequence[RunRecord]) -> LadderView:
    first = min((step["from_rank"] for step in answer.get("comparisons") or []), default=None)
    losses, tokens = [], []
    for run in runs:
        scores = answering_scores(run)
        per_item, per_token = finite_score(scores, "loss_per_item"), finite_score(scores, "loss")
        if run.config["lora"]["r"] == first:
            losses.append(per_item)
        if per_item and per_token:
            tokens.append(per_item / per_token)
    loss = known_mean(losses)
    return LadderView(
        name=name,
        study=study,
        answer=answer,
        runs=tuple(runs),
        loss=loss if loss is not None and loss > 0 else None,
        tokens_per_item=known_mean(tokens),
        slope=task_slope(runs),
    )


def _step(raw: Mapping[str, Any], scale: float) -> LadderStep:
    low, high = (None if raw.get(end) is None else raw[end] * scale for end in ("low", "high"))
    from_rank, to_rank = int(raw["from_rank"]), int(raw["to_rank"])
    doublings = int(raw.get("doublings") or max(1, round(to_rank / from_rank).bit_length() - 1))
    return LadderStep(from_rank, to_rank, doublings, raw["gain"] * scale, low, high, str(raw.get("decision")))
