"""``plan``: memory, time, cost and disk before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import Source, complete_overrides, complete_sweeps, examples
from qlora_exp.cli.settings_file import combined_overrides

if TYPE_CHECKING:
    from qlora_exp.estimate.planner import PlannedRun
    from qlora_exp.estimate.recommended import NothingFits, Recommended

DEVICE_KEY = "plan.device="


def add_to(app: typer.Typer) -> None:
    app.command(
        "plan",
        epilog=examples(
            "qlora-exp plan model=llama3_1_8b quantization=nf4 lora.r=16",
            "qlora-exp plan model=qwen3_8b quantization=bf16,int8,nf4 lora.r=8,16,32 --device rtx4090",
            "qlora-exp plan demo                                    # a sweep in sweeps/",
            "qlora-exp plan demo budget.tokens=1000000              # how many trials a budget is enough for",
            "qlora-exp plan --fit 24GB model=llama3_1_8b            # what to start with in 24 GB",
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
            help="Recommend one configuration for a size (24GB) or a card (rtx4090, a100_80gb …), as a command, then "
            "list what else fits, best first. Keys that are set stay fixed; a task sets the sequence length",
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
    import json
    import sys
    from dataclasses import replace

    from qlora_exp.config.compose import compose
    from qlora_exp.errors import raise_all
    from qlora_exp.estimate.budget import affordable_trials
    from qlora_exp.estimate.candidates import search_space
    from qlora_exp.estimate.device import device_by_name, size_bytes
    from qlora_exp.estimate.largest import by_preference, print_fitting, with_precision, with_search_axes
    from qlora_exp.estimate.planner import Planner
    from qlora_exp.estimate.preflight import check_a_base_fits
    from qlora_exp.estimate.recommended import recommend
    from qlora_exp.estimate.tables import plan_as_json, print_plan, print_sizes, sizes_of, summary_lines, write_page
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import EndedRuns
    from qlora_exp.records.schema import to_dict
    from qlora_exp.runs.process import silence_libraries
    from qlora_exp.system.cards import CARDS

    silence_libraries()
    overrides, device_name = _overrides(source, arguments, device)
    if device_name is None and fit in CARDS:
        device_name = fit
    chosen = device_by_name(device_name) if device_name is not None else None
    fit_bytes = size_bytes(fit) if fit is not None else None
    if sizes:
        _check_alone("--sizes", {"--fit": fit is not None, "--html": html is not None})
        weights = sizes_of(compose(overrides), Planner(chosen))
        if as_json:
            print(json.dumps(to_dict(weights), indent=1, ensure_ascii=False))
        else:
            print_sizes(weights)
        return 0
    requested = list(overrides) if fit is None else with_precision(overrides, chosen)
    added = requested[len(overrides) :]
    if fit is not None:
        overrides = with_search_axes(requested, chosen)
    space = search_space(overrides)
    for text in space.fixed_axes:
        print(f"{text} on the command line fixes an axis of the sweep", file=sys.stderr)
    configs = [point.config for point in space.points if point.config is not None]
    ended = EndedRuns(OutputPaths.of(configs[0].output_root)).records() if configs else ()
    counter = RowCounter() if fit is None else None  # --fit is about sequence lengths, not one task's rows
    is_sweep = fit is None and (space.sampled or len(space.points) > 1)  # --fit lists single runs
    planner = Planner(chosen, fit_bytes, ended, counter, hosts=is_sweep)
    runs = [planner.plan(point) for point in space.points]
    raise_all(planner.problems)
    if fit is None:
        pairs = zip(runs, space.points, strict=True)
        planned = [point.config for run, point in pairs if run.memory is not None and point.config is not None]
        limits = [config.budget.memory_bytes for config in planned if config.budget.memory_bytes is not None]
        if len(limits) == len(planned):  # without a limit everything fits; the largest limit counts
            check_a_base_fits(planner, planned, max(limits, default=None))
    if is_sweep and all(config.budget == configs[0].budget for config in configs):
        affordable = affordable_trials(runs, configs[0].budget, space.trials)  # the budget covers all trials
        runs = [replace(run, budget=affordable) for run in runs]
    if html is not None:
        write_page(runs, "Plan", summary_lines(runs, space), html)
    found: Recommended | NothingFits | None = None
    if fit_bytes is not None and not any(text.startswith("sweeps=") for text in requested):
        typed = [text for text in [*(arguments or []), *added] if not text.startswith(DEVICE_KEY)]
        found = recommend(requested, typed, str(source) if source is not None else None, planner, ended, fit_bytes)
    if as_json and fit is None:
        print(json.dumps(plan_as_json(runs), indent=1, ensure_ascii=False))
    elif as_json:
        print(json.dumps(_fitting_as_json(by_preference(runs), found), indent=1, ensure_ascii=False))
    elif fit is None:
        print_plan(runs, space)
    else:
        print_fitting(runs, fit, found)
    return 0


def _fitting_as_json(runs: Sequence[PlannedRun], found: Recommended | NothingFits | None) -> list[dict[str, Any]]:
    """Return one object per configuration that fits: first the recommended one, with its ``command``."""
    from qlora_exp.estimate.recommended import Recommended, json_fields
    from qlora_exp.estimate.tables import plan_as_json

    objects = [{**plain, "recommended": False, "command": None} for plain in plan_as_json(runs)]
    if not isinstance(found, Recommended):
        return objects
    return [{**plan_as_json([found.run])[0], **json_fields(found)}, *objects]


def _check_alone(option: str, others: dict[str, bool]) -> None:
    """Raise ConfigError if the command has another option, which ``option`` would ignore."""
    from qlora_exp.errors import ConfigError

    for other_option in (name for name, is_set in others.items() if is_set):
        problem = f"{option} lists the weights in every quantization; {other_option} has no effect on it"
        raise ConfigError(problem, f"{option} {other_option}", f"use {option} and {other_option} in separate commands")


def _overrides(source: Path | None, arguments: list[str] | None, option: str | None) -> tuple[list[str], str | None]:
    """Return the overrides (the sweep's name as ``sweeps=NAME``) without ``plan.device=``, and the device's name, from
    ``plan.device=`` or ``--device``.

    Raises:
        ConfigError: both are set, and differ.
    """
    from qlora_exp.errors import ConfigError

    typed = list(arguments or [])
    name = typed.pop(0) if typed and "=" not in typed[0] else None
    overrides = [*([f"sweeps={name}"] if name else []), *combined_overrides(source, typed, sweep=name)]
    devices = [text.removeprefix(DEVICE_KEY) for text in overrides if text.startswith(DEVICE_KEY)]
    device = devices[-1] if devices else None
    if option is not None and device is not None and option != device:
        problem = f"a plan is for one device, not for both {option} and {device}"
        raise ConfigError(problem, f"--device {option} {DEVICE_KEY}{device}", "leave one of them out")
    return [text for text in overrides if not text.startswith(DEVICE_KEY)], option if option is not None else device
