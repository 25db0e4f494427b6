"""``confirm``: train a search's finalists with fresh seeds, score them on test, and decide between them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import Force, OutputRoot, Overrides, Storage, Study, examples, forced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_exp.orchestration.finalists import ConfirmPlan, ConfirmPoints, Contender
    from qlora_exp.paths import StudyPaths
    from qlora_exp.records.types import RunRecord
    from qlora_exp.study.types import StudySpec

OF_THE_STUDY = ("sweep.name", "sweep.max_failures", "sweep.storage", "workers", "tracking", "budget", "hydra")
"""Overrides that don't change what is trained or how it is scored."""
TWO_SEEDS = (
    "note: two seeds find only large leads. Where one finalist's seeds are much noisier than the others', the answer"
    " errs more often than 5 %: docs/confirm.md has the rates"
)


def add_to(app: typer.Typer) -> None:
    app.command(
        "confirm",
        epilog=examples(
            "qlora-exp confirm lora_search",
            "qlora-exp confirm lora_search --dry-run           # the finalists, and what it would cost",
            "qlora-exp confirm lora_search --seeds 6           # later: the same finalists with three more seeds",
            "qlora-exp confirm pareto --trials 3,7,12          # a Pareto front: name the trials yourself",
            "qlora-exp confirm methods --each method           # of each method, the best learning rate",
        ),
    )(confirm)


def confirm(
    study: Study,
    overrides: Overrides = None,
    top: Annotated[
        int | None,
        typer.Option("--top", min=1, help="Number of finalists: the best distinct configurations; default: 3"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=2, max=64, help="New seeds for each finalist; default: 3. More can be added later"),
    ] = None,
    trials: Annotated[
        str | None, typer.Option("--trials", metavar="N,N…", help="Trials to confirm, instead of the best ones")
    ] = None,
    each: Annotated[
        str | None,
        typer.Option("--each", metavar="AXIS", help="The best configuration for each value of an axis, e.g. method"),
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option(
            "--margin",
            metavar="MARGIN",
            help="Finalists that differ by less count as equal, e.g. 0.5% (of the loss). Fix it beforehand; default:"
            " 0.25%",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the finalists and what it would cost")] = False,
    storage: Storage = None,
    output_root: OutputRoot = None,
    force: Force = False,
) -> int:
    """Confirm the best of a search: its finalists get new seeds and are scored on the test split.

    This is a study of its own, STUDY-confirm. Repeat the command to continue it. It decides between all finalists with
    intervals that hold together (95 %), and says what to use: the winner, or the cheapest while none is shown to win.
    """
    from qlora_exp.cli.sweep import _find_study, _read_study
    from qlora_exp.orchestration.finalists import confirm_name, read_plan

    spec, paths = _find_study(study, output_root)
    changes = [*(overrides or []), *forced(force)]
    if each is not None and (top is not None or trials is not None):
        from qlora_exp.errors import ConfigError

        other = "--top" if top is not None else "--trials"
        raise ConfigError(f"{other} is set, too: finalists are chosen in one way", f"--each {each}", "leave one out")
    name = _name(changes) or confirm_name(spec.name)
    if (of_itself := read_plan(paths)) is not None:  # a study that confirms: its search is meant
        name = spec.name
        spec, paths = _find_study(of_itself.study, output_root)
    own = paths.outputs.study(name)
    plan = read_plan(own)
    if own.created.exists():
        _check_continues(spec, own, plan, name, top, trials, margin)
        assert plan is not None
        return _continue(plan, own, name, seeds, dry_run, changes, storage, output_root)
    return _start(
        spec, _read_study(spec, paths, storage), own, name, changes, top, seeds, trials, each, margin, dry_run
    )


def _name(changes: Sequence[str]) -> str | None:
    from qlora_exp.config.overrides import override_key, override_value

    names = [str(override_value(text)) for text in changes if override_key(text) == "sweep.name"]
    return names[-1] if names else None


def _start(
    spec: StudySpec,
    opened: Any,
    own: StudyPaths,
    name: str,
    changes: Sequence[str],
    top: int | None,
    seeds: int | None,
    trials: str | None,
    each: str | None,
    margin: str | None,
    dry_run: bool,
) -> int:
    """Choose the finalists, and start the study that confirms them."""
    from qlora_exp.analysis.margin import MarginUnit, parse_margin
    from qlora_exp.orchestration.finalists import (
        DEFAULT_SEEDS,
        DEFAULT_TOP,
        ConfirmPlan,
        best_of_each,
        choose_finalists,
        confirm_overrides,
        confirm_points,
        enqueued,
        finalist_records,
        fresh_seeds,
        ranked,
        score_of,
        write_plan,
    )
    from qlora_exp.orchestration.hydra_app import main
    from qlora_exp.orchestration.study_end import confirm_command
    from qlora_exp.records.find import read_runs

    _check_can_be_confirmed(spec)
    _check_changes(changes)
    written = margin or "0.25%"
    size = parse_margin(written, MarginUnit.SCORE, "--margin")
    rows = opened.trials()
    records = {record.run_id: record for record in read_runs(own.outputs)[0]} if not trials else {}
    if each is not None:
        finalists = best_of_each(ranked(rows, spec), each, spec.name)
    else:
        finalists = choose_finalists(rows, spec, top or DEFAULT_TOP, _numbers(trials), records)
    recorded = finalist_records(finalists, own.outputs)
    points = confirm_points(recorded)
    _check_compared(points.axes, spec.name)
    if size.unit is MarginUnit.SHARE_OF_TUNING_GAIN:
        _check_scored_before(recorded, written)
    command = confirm_command(spec.name, own.outputs)
    command += "" if _name(changes) is None else f" {shlex.quote(f'sweep.name={name}')}"
    plan = ConfirmPlan(
        study=spec.name,
        study_id=spec.id,
        objective=spec.objectives[0],
        score=str(score_of(spec)),
        margin=written,
        seeds=fresh_seeds(rows, spec, seeds or DEFAULT_SEEDS),
        trials=tuple(one.row.number for one in finalists),
        runs=tuple(record.run_id for record in recorded),
        values=tuple(one.value for one in finalists),
        chosen_from=len(ranked(rows, spec)),
        command=command,
    )
    all_overrides = [*confirm_overrides(plan, points, name, own.outputs), *_without_name(changes)]
    counts = opened.counts()
    if not counts.is_complete:
        ended = f"{counts.finished} of {counts.total} trials of {spec.name} have ended"
        print(f"the search isn't complete: {ended}", file=sys.stderr)
    _print_finalists(plan, finalists, points)
    if dry_run:
        _print_cost(all_overrides, enqueued(points.points, plan.seeds), len(finalists))
        return 0
    write_plan(plan, own)
    return main(["--multirun", *all_overrides])


def _check_compared(axes: Mapping[str, Any], study: str) -> None:
    """Refuse finalists that differ in what a comparison holds equal: they would count as one configuration."""
    from qlora_exp.analysis.configurations import IGNORED_KEYS
    from qlora_exp.errors import ConfigError

    compared = [key for key in axes if key not in IGNORED_KEYS and key.partition(".")[0] not in IGNORED_KEYS]
    differing = [key for key in axes if key not in compared and key != "seed"]
    if differing:
        what = f"the finalists differ in {', '.join(differing)}, and configurations are compared on one task"
        hint = f"--trials with finalists that share it; qlora-exp trials {shlex.quote(study)}"
        raise ConfigError(what, f"study {study}", hint)


def _check_scored_before(finalists: Sequence[RunRecord], margin: str) -> None:
    """Refuse a share of the tuning gain if the base model isn't scored: the margin would have no size at the end."""
    from qlora_exp.errors import ConfigError

    if any((record.config.get("evaluation") or {}).get("before") is False for record in finalists):
        what = f"the margin {margin} needs scores before tuning, and the finalists have evaluation.before=false"
        raise ConfigError(what, f"--margin {margin}", "--margin 0.25% (of the loss), or 0.1 (nats per item)")


def _continue(
    plan: ConfirmPlan,
    own: StudyPaths,
    name: str,
    seeds: int | None,
    dry_run: bool,
    changes: Sequence[str],
    storage: str | None,
    output_root: str | None,
) -> int:
    """Continue the study that confirms: with more seeds, if ``seeds`` asks for more than it has."""
    from dataclasses import replace

    from qlora_exp.cli.sweep import resume
    from qlora_exp.errors import ConfigError
    from qlora_exp.orchestration.finalists import SEED, enqueue_overrides, enqueued, write_plan
    from qlora_exp.study.spec import read_spec

    _check_changes(changes)
    spec = read_spec(own)
    # What the study has: confirm.json may be ahead of it, if a larger --seeds failed before it began.
    count = len(spec.enqueue) // len(plan.trials)
    looks = tuple(look for look in plan.earlier_seeds if look < count)
    stored, plan = plan, replace(plan, seeds=plan.seeds[:count], earlier_seeds=looks)
    present = plan
    if seeds is not None and seeds < count:
        hint = f"--seeds {count} or more, or another study: sweep.name=NAME"
        raise ConfigError(f"{name} has {count} seeds already, and keeps them", f"--seeds {seeds}", hint)
    without_seed = [{key: value for key, value in point.items() if key != SEED} for point in spec.enqueue]
    points, more = without_seed[: len(plan.trials)], list[str]()
    if seeds is not None and seeds > count:
        longer = tuple(range(plan.seeds[0], plan.seeds[0] + seeds))
        more = enqueue_overrides(points, longer)
        # Only complete answers were looks at the finalists.
        plan = replace(plan, seeds=longer, earlier_seeds=(*looks, *([count] if plan.is_answered else [])))
    if dry_run:
        new_seeds = plan.seeds[count:] or plan.seeds
        print(f"{name}: {len(points)} finalists, seeds {new_seeds[0]} to {new_seeds[-1]}", file=sys.stderr)
        _print_cost(spec.overrides, enqueued(points, new_seeds), len(points))
        return 0
    if plan != stored:
        write_plan(plan, own)
    try:
        return resume(name, [*more, *_without_name(changes)], storage=storage, output_root=output_root)
    finally:
        if more and len(read_spec(own).enqueue) == len(spec.enqueue):  # the larger study never began
            write_plan(present, own)


def _without_name(changes: Sequence[str]) -> list[str]:
    from qlora_exp.config.overrides import override_key

    return [text for text in changes if override_key(text) != "sweep.name"]


def _numbers(trials: str | None) -> list[int]:
    """Return the numbers in e.g. ``3,7,12``.

    Raises:
        ConfigError: it isn't a list of whole numbers.
    """
    from qlora_exp.errors import ConfigError

    try:
        return [int(number) for number in trials.split(",")] if trials else []
    except ValueError:
        raise ConfigError(
            f"{trials!r} is no list of trials", f"--trials {trials}", "for example --trials 3,7"
        ) from None


def _check_can_be_confirmed(spec: StudySpec) -> None:
    """Raise an error that says what to do instead, if this study isn't one to confirm."""
    from qlora_exp.analysis.configurations import MEASURES
    from qlora_exp.errors import ConfigError, StudyError
    from qlora_exp.orchestration.finalists import score_of

    name = shlex.quote(spec.name)
    if spec.ladder is not None:
        what = "a ladder needs no confirm: several seeds, scored on test, decide it with known error rates"
        raise StudyError(what, f"study {spec.name}", f"qlora-exp best {name}, or qlora-exp report {name}")
    if score_of(spec) is None:
        scores = ", ".join(f"scores.after.{score}" for score in MEASURES)
        what = "confirm decides by a score on test, and this study's first objective is none"
        raise ConfigError(what, f"sweep.objectives: {spec.objectives[0]}", f"a study that searches one of {scores}")


def _check_continues(
    spec: StudySpec,
    own: StudyPaths,
    plan: ConfirmPlan | None,
    name: str,
    top: int | None,
    trials: str | None,
    margin: str | None,
) -> None:
    """Check that the existing study ``name`` confirms this study, with the finalists that are asked for.

    Raises:
        ConfigError: it doesn't; what was fixed before its first run stays.
    """
    from qlora_exp.errors import ConfigError

    hint = "another study: sweep.name=NAME"
    if plan is None or plan.study_id != spec.id:
        raise ConfigError(f"the study {name} exists and doesn't confirm {spec.name}", str(own.folder), hint)
    where = ", ".join(f"trial {number}" for number in plan.trials)
    if top is not None and top != len(plan.trials):
        raise ConfigError(f"{name} has {len(plan.trials)} finalists already ({where})", f"--top {top}", hint)
    if trials is not None and tuple(_numbers(trials)) != plan.trials:
        raise ConfigError(f"{name} has other finalists already ({where})", f"--trials {trials}", hint)
    if margin is not None and margin != plan.margin:
        raise ConfigError(
            f"{name} has the margin {plan.margin}, fixed before its first run", f"--margin {margin}", hint
        )


def _check_changes(changes: Sequence[str]) -> None:
    """Raise ConfigError if an override would change what was found best."""
    from qlora_exp.config.overrides import override_key
    from qlora_exp.errors import ConfigError

    for text in changes:
        key = override_key(text)
        if not any(key == allowed or key.startswith((f"{allowed}.", f"{allowed}/")) for allowed in OF_THE_STUDY):
            what = f"{key} belongs to the configurations that are confirmed, which stay as they were searched"
            raise ConfigError(what, text, f"settings of this study alone: {', '.join(OF_THE_STUDY)}")


def _print_finalists(plan: ConfirmPlan, finalists: Sequence[Contender], points: ConfirmPoints) -> None:
    """Print the finalists with their scores in the search, and how much is run."""
    from qlora_exp.analysis.confirmation import MIN_SEEDS_TO_DECIDE
    from qlora_exp.formatting import figure, plain_table, print_table
    from qlora_exp.orchestration.finalists import mean_seconds
    from qlora_exp.orchestration.study_end import duration_words

    keys = list(points.axes)
    rows = [
        (f"trial {one.row.number}", figure(one.value), str(one.seeds), *(_cell(point[key]) for key in keys))
        for one, point in zip(finalists, points.points, strict=True)
    ]
    field = plan.objective.split(maxsplit=1)[1]
    print_table(plain_table(("finalist", field, "seeds", *keys), rows), sys.stderr)
    runs, seconds = len(finalists) * len(plan.seeds), mean_seconds(finalists)
    time = "" if seconds is None else f", about {duration_words(seconds * runs)} one after the other"
    seed_words = f"seeds {plan.seeds[0]} to {plan.seeds[-1]}"
    print(
        f"{len(finalists)} of {plan.chosen_from} configurations, {seed_words}, scored on test: {runs} runs{time}\n"
        f"the margin within which they count as equal: {plan.margin}",
        file=sys.stderr,
        flush=True,
    )
    if len(plan.seeds) == MIN_SEEDS_TO_DECIDE:
        print(TWO_SEEDS, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    """Return an axis's value for people: four digits of a number that isn't whole."""
    from qlora_exp.config.overrides import hydra_value

    return f"{value:.4g}" if isinstance(value, float) else hydra_value(value)


def _print_cost(overrides: Sequence[str], points: Sequence[dict[str, Any]], finalists: int) -> None:
    """Print the plan of one run of each finalist, and what all runs cost.

    Args:
        overrides: of the study; its axes and its own settings are left out.
        points: one a run: axis → value, seed by seed.
    """
    from qlora_exp.config.overrides import is_hydra, is_swept, override_key
    from qlora_exp.errors import raise_all
    from qlora_exp.estimate.candidates import listed_space
    from qlora_exp.estimate.planner import Planner
    from qlora_exp.estimate.tables import cost_summary, plan_table
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.formatting import print_table
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import EndedRuns
    from qlora_exp.runs.process import silence_libraries

    silence_libraries()
    fixed = [text for text in overrides if not (is_swept(text) or is_hydra(override_key(text)))]
    fixed = [text for text in fixed if not override_key(text).startswith(("sweep.", "workers."))]
    space = listed_space(fixed, points)
    configs = [point.config for point in space.points if point.config is not None]
    ended = EndedRuns(OutputPaths.of(configs[0].output_root)).records() if configs else ()
    planner = Planner(records=ended, counter=RowCounter(), hosts=True)
    runs = [planner.plan(point) for point in space.points]
    raise_all(planner.problems)
    print_table(plan_table(runs[:finalists]))
    print(f"all {len(runs)} runs: {cost_summary(runs)}")
