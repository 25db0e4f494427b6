"""The product's commands, as a user calls them, and the records that they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_kit.inputs import Kit
from gpu_kit.runner import ROOT


def sweep_command(name: str, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "qlora_exp", "-m", *overrides, f"sweep.name={name}"]


def sweep(name: str, overrides: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a sweep to its end; return its exit code and, after a failure, the end of what it printed."""
    return command(sweep_command(name, overrides), environment)


def command(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Output goes to a file, not a pipe: a process that is left can't keep this one waiting."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.run(
            list(arguments),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    return f"exit code {process.returncode}" + (f": {text[-400:]}" if process.returncode else "")


def train(overrides: Sequence[str], bases: Any) -> tuple[Any, str]:
    """Run one configuration in this process; return its record and status, with the reason of a failure.

    The record is ``None`` if the configuration was refused, e.g. because it is predicted not to fit.
    """
    from qlora_exp.config.compose import compose
    from qlora_exp.errors import QloraExpError
    from qlora_exp.runs.execute import execute

    try:
        record = execute(compose(list(overrides)), bases=bases)
    except QloraExpError as error:
        return None, f"refused: {error}"
    failure = f": {record.failure.message[:300]}" if record.failure is not None else ""
    return record, f"{record.status}{failure}"


def run_records(outputs: Path) -> list[Any]:
    """Return the records of the runs in an output root, by trial."""
    from qlora_exp.records.files import read_record

    records = [read_record(file) for file in sorted((outputs / "runs").glob("*/record.json"))]
    return sorted(records, key=lambda record: record.trial.number if record.trial is not None else -1)


def card_used_bytes(kit: Kit) -> int:
    """Return what is used on this process's card, by NVML: without a CUDA context in this process."""
    if kit.rehearse:
        return 0
    import pynvml

    pynvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    by_uuid = visible.startswith(("GPU-", "MIG-"))
    handle = pynvml.nvmlDeviceGetHandleByUUID(visible) if by_uuid else pynvml.nvmlDeviceGetHandleByIndex(int(visible))
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
