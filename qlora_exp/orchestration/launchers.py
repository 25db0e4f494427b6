"""What a launcher needs before it starts workers: a cluster that answers, secrets, and a storage that all machines
reach."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from qlora_exp.errors import ConfigError, StudyError
from qlora_exp.study.spec import STORAGE_VARIABLE
from qlora_exp.study.storage import sqlite_file
from qlora_exp.study.types import StudySpec

SECRET_VARIABLES = (
    STORAGE_VARIABLE,
    *("HF_TOKEN", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "MLFLOW_TRACKING_TOKEN",
)
"""Variables that a worker reads and no file contains."""
ANSWER_SECONDS = 5.0
SINFO_SECONDS = 30.0


def prepare_launcher(launcher: Any, spec: StudySpec, settings: Any) -> None:
    """Check that the launcher's cluster answers and that its machines can share the study's storage.

    Slurm passes this process's environment on. Ray doesn't, so this process joins the cluster here, with the variables
    that the workers need. They don't become a part of the launcher's configuration, which Hydra prints.

    Args:
        settings: the launcher's configuration (``hydra.launcher``).

    Raises:
        ConfigError: the cluster doesn't answer.
        StudyError: the study is in an SQLite file, and workers run on other machines.
    """
    kind = type(launcher).__name__
    if kind == "RayLauncher":
        machines = _join_ray(launcher.ray_cfg.init, spec)
    elif kind == "SlurmLauncher":
        machines = _slurm_machines(settings)
    else:
        return
    check_shared_storage(spec, machines)


def check_shared_storage(spec: StudySpec, machines: Iterable[str]) -> None:
    """Raise :class:`StudyError` if the study is an SQLite file and one of ``machines`` isn't this one."""
    own = socket.gethostname().partition(".")[0]
    others = sorted({name.partition(".")[0] for name in machines} - {own, "localhost"})
    file = sqlite_file(spec.storage)
    if file is None or not others:
        return
    what = f"SQLite can't be shared by workers on several machines ({', '.join([own, *others[:3]])})"
    hint = f"use a PostgreSQL server: export {STORAGE_VARIABLE}=postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
    raise StudyError(what, str(file), hint)


def worker_variables(texts: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that workers need: secrets, and those that overrides refer to (``${oc.env:NAME}``)."""
    referred = {name for text in texts for name in re.findall(r"oc\.env:\s*'?(\w+)", text)}
    return {name: environment[name] for name in sorted({*SECRET_VARIABLES, *referred}) if name in environment}


def ray_settings(init: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of ``ray.init``: those of the configuration, and ``variables`` for the workers.

    hydra-ray-launcher sets ``object_store_memory``, which Ray refuses if it joins a cluster.
    """
    settings = {"object_store_memory": None, **init}
    runtime = dict(settings.get("runtime_env") or {})
    runtime["env_vars"] = {**variables, **(runtime.get("env_vars") or {})}
    return {**settings, "runtime_env": runtime}


def _join_ray(init: Any, spec: StudySpec) -> list[str]:
    """Join the Ray cluster, or start one, and return the names of its machines."""
    import ray

    given: Any = OmegaConf.to_container(init, resolve=True)
    if not ray.is_initialized():
        address = str(given.get("address") or os.environ.get("RAY_ADDRESS") or "")
        where = f"hydra.launcher.ray.init.address={given.get('address')}"
        hint = "ray status shows the cluster; ray start --head starts one; RAY_ADDRESS=HOST:PORT names another"
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS", address)
        _check_answers(address, where, hint)
        try:
            ray.init(**ray_settings(given, worker_variables(spec.overrides, os.environ)))
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the Ray cluster can't be joined: {reason}", where, hint) from None
    return [str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]]


def _check_answers(address: str, where: str, hint: str) -> None:
    """Raise :class:`ConfigError` if nothing listens at ``HOST:PORT``: Ray itself would wait for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^\]/]+?)\]?:(?P<port>\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}", where, hint) from None


def _slurm_machines(settings: Any) -> list[str]:
    """Return the names of the nodes on which Slurm may start the workers."""
    partition = settings.get("partition")
    where = "hydra/launcher=slurm"
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        hint = "start the sweep where sbatch and srun are found, usually on a login node"
        raise ConfigError("Slurm's commands aren't installed here", where, hint)
    command = ["sinfo", "--noheader", "--Node", "--format=%n", *([f"--partition={partition}"] if partition else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SINFO_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        message = str(getattr(error, "stderr", None) or error).strip().splitlines()[0]
        raise ConfigError(f"Slurm doesn't answer: {message}", where, "sinfo and scontrol ping say why") from None
    names = sorted(set(done.stdout.split()))
    if not names:
        hint = "sinfo lists the partitions; hydra.launcher.partition=NAME chooses one"
        raise ConfigError("Slurm has no node for the workers", f"partition {partition or '(default)'}", hint)
    return names
