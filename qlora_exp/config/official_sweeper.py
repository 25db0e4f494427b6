"""Options of Hydra's official Optuna sweeper, and what to write here instead."""

from __future__ import annotations

from collections.abc import Collection

from qlora_exp.errors import ConfigError

SWEEPER = "hydra.sweeper"
OWN_KEYS = ("_target_", "params")
"""The keys that ``hydra/sweeper=qlora_optuna`` has."""

REPLACEMENTS = {
    "n_trials": "sweep.n_trials={value}",
    "storage": "sweep.storage={value}",
    "study_name": "sweep.name={value}",
    "n_jobs": "workers.count={value}",
    "direction": "sweep.objectives='[{value} scores.after.accuracy]'",
    "max_failure_rate": "sweep.max_failures={value}",
    "sampler": "sweep.sampler=tpe, random, grid, … and sweep.seed; its other options: sweep.sampler_options",
    "search_space": "KEY=choice(…) or KEY=interval(…) on the command line, or sweep.params={{KEY: '…'}}",
    "custom_search_space": "sweep.conditions, which says when an axis is searched",
}


def official_sweeper_problem(key: str, value: object, text: str) -> ConfigError | None:
    """Return the error for an option of the official sweeper, with what to write instead; ``None``: it isn't one."""
    if key == "hydra/sweeper" and value == "optuna":
        hint = "leave it out: python -m qlora_exp -m … searches with Optuna"
        return ConfigError("the official Optuna sweeper is not used here", text, hint)
    if key.startswith("hydra/sweeper/"):
        return _replacement_error(key.split("/")[2], value, text)
    section, _, option = key.removeprefix("hydra.").partition(".")
    name, _, rest = option.partition(".")
    if section != "sweeper" or not name or name == "_target_" or (name == "params" and not rest):
        return None
    if name == "params":
        hint = f"{rest}=VALUES on the command line, or in a file of sweeps/ sweep.params: {{{rest}: 'VALUES'}}"
        return ConfigError("an axis of the official Optuna sweeper", text, hint)
    return _replacement_error(name, value, text) if name in REPLACEMENTS else None


def official_sweeper_problems(options: Collection[str]) -> list[ConfigError]:
    """Return the errors for ``options`` that a file of sweeps/ sets under ``hydra.sweeper``."""
    return [_replacement_error(name, "VALUE", f"{SWEEPER}.{name}") for name in options if name not in OWN_KEYS]


def _replacement_error(name: str, value: object, text: str) -> ConfigError:
    shown_value = "VALUE" if value is None else value
    hint = (
        REPLACEMENTS[name].format(value=shown_value)
        if name in REPLACEMENTS
        else "python -m qlora_exp --cfg job -p sweep shows ours"
    )
    return ConfigError(f"{name} is an option of the official Optuna sweeper, which is not used here", text, hint)
