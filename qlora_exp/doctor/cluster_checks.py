"""Checks of a cluster: a small job on each worker, started by the launcher that the sweep will use."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_exp.config.compose import check_hydra
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.overrides import is_hydra, override_key
from qlora_exp.config.schema import register
from qlora_exp.doctor.machine_checks import Check
from qlora_exp.errors import QloraExpError, raise_all
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.launchers import prepare_launcher
from qlora_exp.paths import CONF
from qlora_exp.study.spec import STORAGE_VARIABLE
from qlora_exp.study.storage import sqlite_file
from qlora_exp.version import __version__

COMPARED = ("torch", "transformers", "peft", "trl", "bitsandbytes", "optuna", "hydra-core", "mlflow", "numpy")
MAX_SKEW_SECONDS = 5.0
"""Leases compare no clocks, but records and MLflow show times of several machines."""


def cluster_checks(overrides: Sequence[str], output_root: str | None) -> Iterator[Check]:
    """Start the launcher's jobs and yield what they report.

    Args:
        overrides: those of the sweep: ``hydra/launcher=slurm workers.jobs=2 …``.

    Raises:
        QloraExpError: the launcher isn't installed, its cluster doesn't answer, or its machines can't share
            the storage.
    """
    raise_all(problems_of(overrides, multirun=True))
    check_hydra(overrides)
    root = [f"output_root={output_root}"] if output_root else []
    command = study_spec([*overrides, *root])
    folder = command.paths.outputs.root.absolute() / f".cluster-check-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        (folder / "word").write_text(folder.name)
        with FileLock(folder / "lock"):
            here = worker_view(folder)
            try:
                with contextlib.redirect_stdout(sys.stderr):  # launchers log; --json prints JSON alone
                    there = _launch(overrides, root, command, folder)
            except QloraExpError:
                raise
            except Exception as error:  # every launcher raises its own exception
                reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                fix = f"the launcher's logs are under {command.paths.outputs.root}/.submitit or in ray's session folder"
                yield Check("workers", False, f"a worker could not be started: {reason}", fix)
                return
        yield Check("workers", True, f"{len(there)} started on {', '.join(sorted({w['host'] for w in there}))}")
        yield _shared_files(folder, there)
        yield _locks(there)
        yield _versions(here, there)
        yield _clocks(here, there)
        if sqlite_file(command.spec.storage) is None:
            for worker in there:
                worker["storage"] = worker["storage"] or _unset(worker)
        yield _reached("storage", there, f"set {STORAGE_VARIABLE} to a URL that the workers' machines reach")
        yield _reached("tracking", there, "set tracking.uri to a server that the workers' machines reach")
    finally:
        for file in folder.glob("*"):
            file.unlink(missing_ok=True)
        folder.rmdir()


def _launch(overrides: Sequence[str], root: Sequence[str], command: Any, folder: Path) -> list[dict[str, Any]]:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins
    from hydra.initialize import initialize_config_dir
    from hydra.types import HydraContext, RunMode

    fixed = [text for text in overrides if is_hydra(override_key(text)) or override_key(text) == "workers.jobs"]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", [*fixed, *root], RunMode.MULTIRUN)
        earlier = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=run_probe, config=config
        )
        prepare_launcher(launcher, command.spec, config.hydra.launcher)
        tracked = [f"tracking.uri={command.tracking.uri}"] if command.tracking.uri else []
        if command.sweep.storage is not None:  # as in a sweep's jobs; the variable reaches workers by itself
            tracked.append(f"sweep.storage='{command.spec.storage}'")
        jobs = [[*root, *tracked, f"name={folder}", f"workers.job={job}"] for job in range(command.workers.jobs)]
        try:
            return [dict(result.return_value) for result in launcher.launch(jobs, initial_job_idx=0)]
        finally:
            HydraConfig.instance().cfg = earlier


def run_probe(raw: Any) -> dict[str, Any]:
    """Hydra's task function of a check."""
    seen = worker_view(Path(str(raw.name)))
    url = raw.sweep.storage or os.environ.get(STORAGE_VARIABLE)
    seen["has_storage"], seen["storage"] = url is not None, storage_problem(url)
    seen["tracking"] = tracking_problem(raw.tracking.uri)
    return seen


def worker_view(folder: Path) -> dict[str, Any]:
    """Return what this process sees of the machine and of the shared folder."""
    seen: dict[str, Any] = {"host": socket.gethostname(), "python": platform.python_version()}
    seen["versions"] = {"qlora-exp": __version__, **{name: _version(name) for name in COMPARED}}
    try:
        seen["word"] = (folder / "word").read_text()
        own = folder / f"{seen['host']}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        own.write_text(folder.name)
        # The file system's clock is common to all machines.
        seen["file"], seen["clock"] = own.name, time.time() - own.stat().st_mtime
    except OSError as error:
        seen["unseen"] = f"{folder.parent}: {error.strerror}"
        return seen
    try:
        FileLock(folder / "lock", timeout=0, thread_local=False).acquire().lock.release()
        seen["locked"] = False
    except Timeout:
        seen["locked"] = True
    return seen


def storage_problem(url: str | None) -> str | None:
    """Return why this process can't open the study's storage; ``None``: it can, or it is a file of the output root."""
    if url is None or url.startswith("sqlite"):
        return None
    import sqlalchemy

    try:
        sqlalchemy.create_engine(url, connect_args={"connect_timeout": 5}).connect().close()
    except Exception as error:  # every driver raises its own
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def tracking_problem(uri: str | None) -> str | None:
    """Return why this process can't reach the tracking server; ``None``: it can, or it is a file."""
    import urllib.error
    import urllib.request

    if uri is None or not uri.startswith(("http://", "https://")):
        return None
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:  # it answers; it may want a password
        return None
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shared_files(folder: Path, there: Sequence[dict[str, Any]]) -> Check:
    fix = "set output_root to a folder of a file system that all machines mount at the same path"
    for worker in there:
        if "unseen" in worker:
            return Check("shared files", False, f"{worker['host']} can't use {worker['unseen']}", fix)
        if not (folder / worker["file"]).is_file():
            return Check("shared files", False, f"{worker['host']} writes to another {folder.parent}", fix)
    return Check("shared files", True, f"{folder.parent} is the same folder for all workers")


def _locks(there: Sequence[dict[str, Any]]) -> Check:
    wrong = [worker["host"] for worker in there if worker.get("locked") is False]
    if wrong:
        fix = "mount the file system with locks (NFS: nfsvers=4, without nolock; Lustre: flock)"
        return Check("file locks", False, f"{wrong[0]} could take a lock that this process holds", fix)
    return Check("file locks", True, "a worker can't take a lock that this process holds")


def _versions(here: dict[str, Any], there: Sequence[dict[str, Any]]) -> Check:
    own = {"python": here["python"].rpartition(".")[0], **here["versions"]}
    for worker in there:
        seen = {"python": worker["python"].rpartition(".")[0], **worker["versions"]}
        other = [f"{name} {own[name]} here, {seen[name]} there" for name in own if own[name] != seen[name]]
        if other:
            fix = "install the same environment on all machines, or share one"
            return Check("versions", False, f"{worker['host']}: {'; '.join(other)}", fix)
    return Check("versions", True, f"qlora-exp {__version__}, torch {own['torch']}, Python {own['python']} everywhere")


def _clocks(here: dict[str, Any], there: Sequence[dict[str, Any]]) -> Check:
    skews = {worker["host"]: worker["clock"] - here["clock"] for worker in there if "clock" in worker}
    if not skews or "clock" not in here:
        return Check("clocks", None, "not compared: there is no shared folder")
    host = max(skews, key=lambda name: abs(skews[name]))
    detail = f"{host} differs by {abs(skews[host]):.1f} s"
    if abs(skews[host]) > MAX_SKEW_SECONDS:
        return Check("clocks", False, detail, "synchronize the clocks (chrony, systemd-timesyncd)")
    return Check("clocks", True, detail)


def _unset(worker: dict[str, Any]) -> str | None:
    return None if worker["has_storage"] else f"{STORAGE_VARIABLE} isn't set there"


def _reached(name: str, there: Sequence[dict[str, Any]], fix: str) -> Check:
    for worker in there:
        if worker[name] is not None:
            return Check(name, False, f"{worker['host']} can't reach it: {worker[name]}", fix)
    return Check(name, True, "each worker reaches it")
