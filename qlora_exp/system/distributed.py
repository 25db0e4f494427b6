"""Refuses launchers of distributed training, because one process trains one run.

`torchrun`, `accelerate launch`, MPI and `srun` start the same command several times, as ranks. Each rank would train
and record the whole run. This module is light: of this package it imports only the errors.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from qlora_exp.errors import ConfigError

WORLD_SIZE_VARIABLES = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate, DeepSpeed
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PALS_NRANKS"),  # MPI
    *("SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"),  # the step, not the allocation
)
"""Variables with the number of processes that were started together. SLURM_NTASKS is left out: a batch job also has
it, for the tasks that it may start."""
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "GROUP_RANK"),
)
"""Variables with this process's rank; the first process has 0."""
TORCH_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
)
LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_")
"""Prefixes of variables with which accelerate changes precision, device or gradient accumulation."""


def check_single_rank(environment: MutableMapping[str, str] = os.environ) -> None:
    """Refuse to run as one of several ranks. For a single rank, remove the variables that would make its training
    distributed or override the configuration.

    Raises:
        ConfigError: a launcher started this command several times.
    """
    variable = _above(WORLD_SIZE_VARIABLES, 1, environment) or _above(RANK_VARIABLES, 0, environment)
    if variable is not None:
        name, value = variable
        started = f"a launcher started several processes of this command ({name}={value})"
        hint = (
            "start it once, without torchrun, accelerate launch, mpirun or srun -n: one process trains on one GPU, "
            f"and qlora-exp sweep uses several; if {name} is a leftover: unset {name}"
        )
        raise ConfigError(f"{started}, and each would train the full run", name, hint)
    for name in [name for name in environment if name in TORCH_VARIABLES or name.startswith(LAUNCHER_SETTINGS)]:
        del environment[name]


def _above(names: tuple[str, ...], limit: int, environment: MutableMapping[str, str]) -> tuple[str, str] | None:
    """Return the first of ``names`` with a value above ``limit``, and the value."""
    for name in names:
        value = environment.get(name, "")
        if value.strip().isdecimal() and int(value) > limit:
            return name, value
    return None
