"""The verb that counts before anything is loaded: ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import Source, complete_overrides, complete_sweeps, examples
from qlora_exp.cli.settings_file import given_overrides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_exp.config.schema import Config
    from qlora_exp.estimate.device import PlanDevice
    from qlora_exp.estimate.estimator import PlannedRun, Planner
    from qlora_exp.estimate.sweep import SearchSpace
    from qlora_exp.records.types import RunRecord

DEVICE_KEY = "plan.device="


def add_to(app: typer.Typer) -> None:
    app.command(
        "plan",
        epilog=examples(
            "qlora-exp plan model=llama3_1_8b quantization=nf4 lora.r=16",
            "qlora-exp plan model=qwen3_8b quantization=bf16,int8,nf4 lora.r=8,16,32 --device rtx4090",
            "qlora-exp plan demo                                    # a sweep in sweeps/",
            "qlora-exp plan demo budget.tokens=1000000              # how many trials a budget is enough for",
            "qlora-exp plan --fit 24GB model=llama3_1_8b            # what fits into 24 GB, best first",
            "qlora-exp plan --sizes model=llama3_1_8b lora.r=32     # size of the weights at 32, 16, 8, 4 bits",
            "qlora-exp plan model=local model.path=FOLDER/config.json --json",
        ),
    )(plan)


def _complete(incomplete: str) -> list[str]:
    return [*complete_sweeps(incomplete), *complete_overrides(incomplete)]


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SWEEP] [KEY=VALUE]...",
            help="Name of a file in sweeps/, and Hydra overrides; key=a,b,c is an axis",
            autocompletion=_complete,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of JSON objects, in bytes, seconds and US dollars")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the plan as an HTML page")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="List what fits into a size (24GB) or on a card (rtx4090, a100_80gb …), best first: larger precision, "
            "then rank, then sequence length, then adapted layers, then micro-batch. Keys that are set stay fixed",
        ),
    ] = None,
    sizes: Annotated[
        bool,
        typer.Option("--sizes", help="Show only the size of the weights in every quantization, and of the adapters"),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, cuda or a card (rtx4090, a100_80gb …); same as plan.device=DEVICE. Default: cuda for models "
            "from the Hub, cpu for embedded and local models",
        ),
    ] = None,
    source: Source = None,
) -> int:
    """Predict memory, time, cost and disk of a run or a sweep, before anything is loaded.

    The command loads neither weights nor torch. It downloads nothing for the families that come with the package.
    """
    import sys

    from qlora_exp.errors import raise_all
    from qlora_exp.estimate.device import CARDS, device_by_name, size_bytes
    from qlora_exp.estimate.estimator import Planner
    from qlora_exp.estimate.sweep import search_space
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.runs.process import silence_libraries

    silence_libraries()
    overrides, named = _overrides(source, arguments)
    named = _one_device(device, named)
    if named is None and fit in CARDS:
        named = fit
    chosen = device_by_name(named) if named is not None else None
    fit_bytes = size_bytes(fit) if fit is not None else None
    if sizes:
        _alone("--sizes", {"--fit": fit is not None, "--html": html is not None})
        return _sizes(overrides, chosen, as_json)
    if fit is not None:
        from qlora_exp.estimate.largest import with_search_axes

        overrides = with_search_axes(overrides, chosen)
    asked = search_space(overrides)
    for text in asked.fixed_axes:
        print(f"{text} on the command line fixes an axis of the sweep", file=sys.stderr)
    counter = RowCounter() if fit is None else None  # what fits a card is asked for lengths, not for one task's rows
    a_sweep = fit is None and (asked.sampled or len(asked.points) > 1)  # of what fits, each is a run by itself
    planner = Planner(chosen, fit_bytes, _ended_runs(asked), counter, hosts=a_sweep)
    runs = [planner.plan(point) for point in asked.points]
    raise_all(planner.problems)
    if fit is None:
        planned = zip(runs, asked.points, strict=True)
        _check_a_base_fits(planner, [point.config for run, point in planned if run.memory and point.config], chosen)
    if a_sweep:
        runs = _with_trials_bought(runs, asked)
    if html is not None:
        _write(runs, _told(runs, asked), html)
    if as_json:
        return _print_json(runs if fit is None else _fitting(runs))
    return _show(runs, asked) if fit is None else _show_fitting(runs, fit)


def _alone(option: str, given: dict[str, bool]) -> None:
    """Raises:
    ConfigError: an option was given, too, that would not be heeded."""
    from qlora_exp.errors import ConfigError

    for other in (name for name, is_given in given.items() if is_given):
        what = f"{option} lists the weights in every quantization, and {other} says nothing to that"
        raise ConfigError(what, f"{option} {other}", f"one call for {option}, another for {other}")


def _one_device(option: str | None, override: str | None) -> str | None:
    """Raises:
    ConfigError: both are there, and differ."""
    from qlora_exp.errors import ConfigError

    if option is not None and override is not None and option != override:
        what = f"a plan is for one device, not for both {option} and {override}"
        raise ConfigError(what, f"--device {option} {DEVICE_KEY}{override}", "leave one of them out")
    return option if option is not None else override


def _overrides(source: Path | None, arguments: list[str] | None) -> tuple[list[str], str | None]:
    """Overrides, a sweep's name among them as ``sweeps=NAME``, and the device that they name."""
    typed = list(arguments or [])
    name = typed.pop(0) if typed and "=" not in typed[0] else None
    given = [*([f"sweeps={name}"] if name else []), *given_overrides(source, typed, sweep=name)]
    devices = [text.removeprefix(DEVICE_KEY) for text in given if text.startswith(DEVICE_KEY)]
    return [text for text in given if not text.startswith(DEVICE_KEY)], devices[-1] if devices else None


def _ended_runs(asked: SearchSpace) -> Sequence[RunRecord]:
    """By which the next one's seconds are told."""
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import EndedRuns

    config = next((point.config for point in asked.points if point.config is not None), None)
    return EndedRuns(OutputPaths.of(config.output_root)).records() if config is not None else ()


def _check_a_base_fits(planner: Planner, configs: Sequence[Config], device: PlanDevice | None) -> None:
    """Of several bounds the largest counts; what has none fits as far as can be said here."""
    from qlora_exp.estimate.smallest_base import check_a_base_fits

    bounds = [config.budget.memory_bytes for config in configs]
    known = [bound for bound in bounds if bound is not None]
    if len(known) == len(bounds):
        check_a_base_fits(planner, configs, max(known, default=None), device)


def _with_trials_bought(runs: Sequence[PlannedRun], asked: SearchSpace) -> list[PlannedRun]:
    """A sweep's budget is for all of its trials together; where configurations have different ones, nothing is said."""
    from dataclasses import replace

    from qlora_exp.estimate.affordable_trials import affordable_trials

    budgets = [point.config.budget for point in asked.points if point.config is not None]
    if any(budget != budgets[0] for budget in budgets):
        return list(runs)
    bought = affordable_trials(runs, budgets[0], asked.trials)
    return [replace(run, budget=bought) for run in runs]


def _told(runs: Sequence[PlannedRun], asked: SearchSpace) -> list[str]:
    """How many there are, how many of them fit, what they cost, and what the budget buys."""
    from qlora_exp.estimate.tables import cost_summary, plan_summary

    cost = cost_summary(runs, asked.trials if asked.sampled else None) if asked.trials is not None else None
    bought = [one.told for one in runs[0].budget]
    return [plan_summary(runs, asked.trials, asked.sampled), *([cost] if cost is not None else []), *bought]


def _show(runs: Sequence[PlannedRun], asked: SearchSpace) -> int:
    from qlora_exp.estimate.tables import LEGEND, notes, plan_table, reasons, row_notes
    from qlora_exp.formatting import print_table

    print_table(plan_table(runs))
    print()
    for told in _told(runs, asked):
        print(told)
    for reason in reasons(runs):
        print(f"  {reason}")
    print(LEGEND, *notes(runs), *row_notes(runs), sep="\n")
    return 0


def _show_fitting(runs: Sequence[PlannedRun], fit: str) -> int:
    from qlora_exp.errors import ConfigError
    from qlora_exp.estimate.largest import BEST, by_preference, pareto_front
    from qlora_exp.estimate.tables import LEGEND, candidate_name, notes, plan_table, row_notes
    from qlora_exp.formatting import print_table

    found = by_preference(runs)
    if not found:
        least = min((run for run in runs if run.memory is not None), key=_needed)
        what = f"nothing fits: the smallest, {candidate_name(least)}, {least.reason}"
        raise ConfigError(what, f"--fit {fit}", "a smaller model, or a larger card")
    best = pareto_front(found)
    print_table(plan_table(best))
    near = sum(run.near_the_edge for run in found)
    edge = f" ({near:,} of them near the edge)" if near else ""
    print(f"\n{len(found):,} of {len(runs):,} fit into {fit}{edge}; shown are those that no other beats in everything")
    print(f"best first: {BEST}")
    print(LEGEND, *notes(best), *row_notes(best), sep="\n")
    return 0


def _needed(run: PlannedRun) -> int:
    assert run.memory is not None
    return run.memory.peak_bytes


def _fitting(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    from qlora_exp.estimate.largest import by_preference

    return by_preference(runs)


def _print_json(runs: Sequence[PlannedRun]) -> int:
    from qlora_exp.estimate.tables import plan_as_json

    return _dump(plan_as_json(runs))


def _dump(value: Any) -> int:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))
    return 0


def _write(runs: Sequence[PlannedRun], words: Sequence[str], file: Path) -> None:
    from qlora_exp.errors import ConfigError
    from qlora_exp.estimate.tables import write_page

    try:
        write_page(runs, "Plan", words, file)
    except OSError as error:
        raise ConfigError(f"the page can't be written: {error.strerror}", f"--html {file}", "name a file") from None


def _sizes(overrides: list[str], device: PlanDevice | None, as_json: bool) -> int:
    from qlora_exp.config.compose import compose
    from qlora_exp.estimate.device import device_of
    from qlora_exp.estimate.weight_tables import adapters_text, sizes_of, sizes_table
    from qlora_exp.formatting import print_table
    from qlora_exp.records.schema import to_dict

    config = compose(overrides)
    sizes = sizes_of(config, device or device_of(config))
    if as_json:
        return _dump(to_dict(sizes))
    print(f"{sizes.model} on {sizes.device}: {sizes.total_parameters:,} parameters")
    print_table(sizes_table(sizes))
    print(f"\n{adapters_text(sizes)}")
    return 0
