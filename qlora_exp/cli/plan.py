"""``plan``: memory, time, cost and disk before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import Source, complete_overrides, complete_sweeps, examples
from qlora_exp.cli.settings_file import combined_overrides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_exp.config.schema import Config
    from qlora_exp.estimate.candidates import SearchSpace
    from qlora_exp.estimate.device import PlanDevice
    from qlora_exp.estimate.estimator import PlannedRun, Planner
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
    from qlora_exp.estimate.candidates import search_space
    from qlora_exp.estimate.device import device_by_name, size_bytes
    from qlora_exp.estimate.estimator import Planner
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.runs.process import silence_libraries
    from qlora_exp.system.hardware import CARDS

    silence_libraries()
    overrides, device_name = _overrides(source, arguments)
    device_name = _device_name(device, device_name)
    if device_name is None and fit in CARDS:
        device_name = fit
    chosen = device_by_name(device_name) if device_name is not None else None
    fit_bytes = size_bytes(fit) if fit is not None else None
    if sizes:
        _check_alone("--sizes", {"--fit": fit is not None, "--html": html is not None})
        return _sizes(overrides, chosen, as_json)
    if fit is not None:
        from qlora_exp.estimate.largest import with_search_axes

        overrides = with_search_axes(overrides, chosen)
    space = search_space(overrides)
    for text in space.fixed_axes:
        print(f"{text} on the command line fixes an axis of the sweep", file=sys.stderr)
    counter = RowCounter() if fit is None else None  # --fit is about sequence lengths, not one task's rows
    is_sweep = fit is None and (space.sampled or len(space.points) > 1)  # --fit lists single runs
    planner = Planner(chosen, fit_bytes, _ended_runs(space), counter, hosts=is_sweep)
    runs = [planner.plan(point) for point in space.points]
    raise_all(planner.problems)
    if fit is None:
        pairs = zip(runs, space.points, strict=True)
        _check_a_base_fits(planner, [point.config for run, point in pairs if run.memory and point.config], chosen)
    if is_sweep:
        runs = _with_affordable_trials(runs, space)
    if html is not None:
        _write(runs, _summary_lines(runs, space), html)
    if as_json:
        return _print_json(runs if fit is None else _fitting(runs))
    return _show(runs, space) if fit is None else _show_fitting(runs, fit)


def _check_alone(option: str, others: dict[str, bool]) -> None:
    """Raise ConfigError if the command has another option, which ``option`` would ignore."""
    from qlora_exp.errors import ConfigError

    for other_option in (name for name, is_set in others.items() if is_set):
        problem = f"{option} lists the weights in every quantization; {other_option} has no effect on it"
        raise ConfigError(problem, f"{option} {other_option}", f"use {option} and {other_option} in separate commands")


def _device_name(option: str | None, override: str | None) -> str | None:
    """Return the device's name, from ``--device`` or ``plan.device=``.

    Raises:
        ConfigError: both are set, and differ.
    """
    from qlora_exp.errors import ConfigError

    if option is not None and override is not None and option != override:
        problem = f"a plan is for one device, not for both {option} and {override}"
        raise ConfigError(problem, f"--device {option} {DEVICE_KEY}{override}", "leave one of them out")
    return option if option is not None else override


def _overrides(source: Path | None, arguments: list[str] | None) -> tuple[list[str], str | None]:
    """Return the overrides (the sweep's name as ``sweeps=NAME``), without ``plan.device=``, and that device's name."""
    typed = list(arguments or [])
    name = typed.pop(0) if typed and "=" not in typed[0] else None
    overrides = [*([f"sweeps={name}"] if name else []), *combined_overrides(source, typed, sweep=name)]
    devices = [text.removeprefix(DEVICE_KEY) for text in overrides if text.startswith(DEVICE_KEY)]
    return [text for text in overrides if not text.startswith(DEVICE_KEY)], devices[-1] if devices else None


def _ended_runs(space: SearchSpace) -> Sequence[RunRecord]:
    """Return the recorded runs from which the throughput is predicted."""
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import EndedRuns

    config = next((point.config for point in space.points if point.config is not None), None)
    return EndedRuns(OutputPaths.of(config.output_root)).records() if config is not None else ()


def _check_a_base_fits(planner: Planner, configs: Sequence[Config], device: PlanDevice | None) -> None:
    """Raise an error if no configuration's base fits. The largest memory limit counts; without a limit everything
    fits."""
    from qlora_exp.estimate.smallest_base import check_a_base_fits

    budgets = [config.budget.memory_bytes for config in configs]
    limits = [limit for limit in budgets if limit is not None]
    if len(limits) == len(budgets):
        check_a_base_fits(planner, configs, max(limits, default=None), device)


def _with_affordable_trials(runs: Sequence[PlannedRun], space: SearchSpace) -> list[PlannedRun]:
    """Return the runs with the number of trials that the budget is enough for. A sweep's budget covers all its trials;
    if the configurations have different budgets, the runs stay as they are."""
    from dataclasses import replace

    from qlora_exp.estimate.affordable_trials import affordable_trials

    budgets = [point.config.budget for point in space.points if point.config is not None]
    if any(budget != budgets[0] for budget in budgets):
        return list(runs)
    affordable = affordable_trials(runs, budgets[0], space.trials)
    return [replace(run, budget=affordable) for run in runs]


def _summary_lines(runs: Sequence[PlannedRun], space: SearchSpace) -> list[str]:
    """Return how many configurations there are and fit, what they cost, and what the budget is enough for."""
    from qlora_exp.estimate.tables import cost_summary, plan_summary

    cost = cost_summary(runs, space.trials if space.sampled else None) if space.trials is not None else None
    affordable = [limit.message for limit in runs[0].budget]
    return [plan_summary(runs, space.trials, space.sampled), *([cost] if cost is not None else []), *affordable]


def _show(runs: Sequence[PlannedRun], space: SearchSpace) -> int:
    from qlora_exp.estimate.tables import LEGEND, notes, plan_table, reasons, row_notes
    from qlora_exp.formatting import print_table

    print_table(plan_table(runs))
    print()
    for line in _summary_lines(runs, space):
        print(line)
    for reason in reasons(runs):
        print(f"  {reason}")
    print(LEGEND, *notes(runs), *row_notes(runs), sep="\n")
    return 0


def _show_fitting(runs: Sequence[PlannedRun], fit: str) -> int:
    from qlora_exp.errors import ConfigError
    from qlora_exp.estimate.largest import BEST, by_preference, pareto_front
    from qlora_exp.estimate.tables import LEGEND, candidate_name, notes, plan_table, row_notes
    from qlora_exp.formatting import print_table

    fitting = by_preference(runs)
    if not fitting:
        smallest = min((run for run in runs if run.memory is not None), key=_peak_bytes)
        problem = f"nothing fits: the smallest, {candidate_name(smallest)}, {smallest.reason}"
        raise ConfigError(problem, f"--fit {fit}", "choose a smaller model or a larger card")
    best = pareto_front(fitting)
    print_table(plan_table(best))
    borderline = sum(run.borderline for run in fitting)
    note = f" ({borderline:,} of them borderline)" if borderline else ""
    print(f"\n{len(fitting):,} of {len(runs):,} fit into {fit}{note}; shown: the Pareto front")
    print(f"best first: {BEST}")
    print(LEGEND, *notes(best), *row_notes(best), sep="\n")
    return 0


def _peak_bytes(run: PlannedRun) -> int:
    """Return the predicted peak memory of a run in bytes."""
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


def _write(runs: Sequence[PlannedRun], sentences: Sequence[str], file: Path) -> None:
    from qlora_exp.errors import ConfigError
    from qlora_exp.estimate.tables import write_page

    try:
        write_page(runs, "Plan", sentences, file)
    except OSError as error:
        raise ConfigError(
            f"the page can't be written: {error.strerror}", f"--html {file}", "choose a file that can be written"
        ) from None


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
