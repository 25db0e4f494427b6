"""Named checks of this machine and installation: ok or a problem, and how to fix it. Nothing is changed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from qlora_exp.config.enums import Quantization
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.calibration import calibration_flops_per_second
from qlora_exp.paths import EMBEDDED, PACKAGE, OutputPaths
from qlora_exp.system import environment
from qlora_exp.system.cards import card_of, data_sheet_flops

if TYPE_CHECKING:
    from qlora_exp.orchestration.devices import Gpu
    from qlora_exp.records.types import Device

OLDEST_PYTHON = (3, 11)
LOW_DISK_BYTES = 2 * 10**9
"""An adapter is small, but checkpoints, the MLflow store and a downloaded model are not."""
BUSY_GPU_BYTES = 10**9
"""More than a desktop session uses. Another training would distort memory and speed figures."""
COMMAND_SECONDS = 20.0
MEASURED_SECONDS = 1.0
MEASURED_SIZES = {"cuda": 8192, "cpu": 1024}
"""Square matrices large enough that the multiplication is timed, not the memory."""
MIN_MATMUL_SHARE = 0.5
"""Share of the data sheet's figure. Large matrix products reach about 0.6 to 0.9 of it on an idle card."""
MIN_CALIBRATED_SHARE = 0.1
"""Share of the data sheet's figure that the calibration's training steps reach: they do more than multiply. An
assumption, not measured on a card."""
MAX_SHARE = 1.05


@dataclass(frozen=True)
class Check:
    """``ok`` is ``None`` if the check does not apply here (``detail`` says why). ``fix`` is set only with a problem."""

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None


def checks(output_root: str | Path, self_test: bool = True) -> Iterator[Check]:
    """Yield the result of each check as soon as it is done. A check that itself fails is a problem, not a crash.

    Args:
        self_test: also measure the machine's speed, and train through every quantization mode (some seconds).
    """
    outputs = OutputPaths.of(output_root)
    plain: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("python", python_version),
        ("packages", package_ranges),
        ("torch", torch_device),
        ("bf16", bf16_support),
        ("threads", threads),
        ("cuda driver", cuda_driver),
        ("gpu memory", gpu_neighbours),
        ("calibration", calibration),
        ("disk", lambda: disk_space(outputs)),
        ("output_root", lambda: writable(outputs)),
        ("mlflow database", lambda: tracking_database(outputs)),
        ("git", git),
        ("embedded model", embedded_assets),
    )
    for name, check in plain:
        yield _guarded(name, check)
    if self_test:
        yield _guarded("matmul rate", matmul_rate)
        for mode in Quantization:
            yield _guarded(f"train in {mode.value}", partial(_self_test, mode))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Return the check's result; an exception in the check becomes a problem, so that the other checks still run."""
    try:
        return check()
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        return Check(name, False, f"the check itself failed: {type(error).__name__}: {message}", "report this")


def python_version() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("python", False, version, f"create the environment with Python {oldest} or newer")
    return Check("python", True, f"{version} at {sys.executable}")


def package_ranges() -> Check:
    """Compare installed versions with the ranges that this package declares."""
    try:
        declared = importlib.metadata.requires("qlora-exp") or []
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", None, "qlora-exp runs from files that were not installed, so it declares no ranges")
    wrong, counted = [], 0
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        counted += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check("packages", False, "; ".join(wrong), "pip install -c constraints.txt qlora-exp")
    return Check("packages", True, f"{counted} packages within the declared ranges")


def torch_device() -> Check:
    import torch

    device = environment.probe().device
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    size = f", {device.memory_bytes / 1e9:.0f} GB" if device.memory_bytes else ""
    return Check("torch", True, f"{torch.__version__} ({built}); {device.count} × {device.kind}: {device.name}{size}")


def bf16_support() -> Check:
    device = environment.probe().device
    if device.bf16:
        return Check("bf16", True, f"in the {device.kind}'s hardware")
    what = "runs would compute in float16" if device.kind == "cuda" else "runs compute in float32"
    return Check("bf16", None, f"this {device.kind} doesn't support it; {what}")


def threads() -> Check:
    """Compare OpenMP threads with cores: more threads slow every run, many times over if runs share the machine."""
    import torch

    cores, used = environment.available_cores(), torch.get_num_threads()
    if cores is not None and used > cores:
        return Check("threads", False, f"torch uses {used} threads on {cores} cores", f"export OMP_NUM_THREADS={cores}")
    return Check("threads", True, f"{used} of {cores} cores; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}")


def cuda_driver() -> Check:
    """Find a card that torch can't use: a CPU build of torch, or a driver older than torch's CUDA."""
    import torch

    query = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if query is None:
        return Check("cuda driver", None, "there is no NVIDIA driver on this machine")
    card = query.splitlines()[0]
    if torch.cuda.is_available():
        return Check("cuda driver", True, f"{card}; torch is built for CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        fix = "reinstall torch from a CUDA index: pip install --force-reinstall torch --index-url … (see pytorch.org)"
        return Check("cuda driver", False, f"{card}, but torch {torch.__version__} is a CPU build", fix)
    fix = f"update the driver to one for CUDA {torch.version.cuda}, or check CUDA_VISIBLE_DEVICES"
    return Check("cuda driver", False, f"{card}, but torch finds no CUDA device", fix)


def gpu_neighbours() -> Check:
    """Find other processes on a card: they distort measured peaks and speed."""
    from qlora_exp.orchestration.devices import inventory, nvml_works

    if _output("nvidia-smi", "-L") is None:
        return Check("gpu memory", None, "there is no NVIDIA driver on this machine")
    gpus = inventory()
    if not any(gpu.users for gpu in gpus) and not nvml_works():
        return Check("gpu memory", None, "the processes on the GPUs can't be listed: pip install nvidia-ml-py")
    return _neighbours(gpus)


def _neighbours(gpus: Sequence[Gpu]) -> Check:
    others = [
        f"GPU {gpu.index} by process {user.pid}{f' {user.name}' if user.name else ''}"
        + (f" ({user.memory_bytes / 1e9:.1f} GB)" if user.memory_bytes is not None else "")
        for gpu in gpus
        for user in gpu.users
        if user.pid != os.getpid() and (user.memory_bytes is None or user.memory_bytes >= BUSY_GPU_BYTES)
    ]
    if others:
        return Check("gpu memory", False, f"in use: {', '.join(others)}", "wait for it, or set CUDA_VISIBLE_DEVICES")
    return Check("gpu memory", True, "no other process holds much of it")


def calibration() -> Check:
    """Check the rate that plans use for this machine, in the 16 bits of data sheets (on a CPU in fp32)."""
    machine = environment.probe()
    device = machine.device
    mode = Quantization.fp32 if device.kind == "cpu" else Quantization.bf16 if device.bf16 else Quantization.fp16
    rate = calibration_flops_per_second(machine, mode)
    if rate is None:
        detail = "none for this device and number of threads: plans have no seconds (run qlora-exp calibrate)"
        return Check("calibration", None, detail)
    fix = "qlora-exp calibrate, with nothing else on the card"
    what = f"of training in {mode.value}"
    return against_datasheet("calibration", what, device, rate, MIN_CALIBRATED_SHARE, too_slow=fix, too_fast=fix)


def matmul_rate() -> Check:
    """Measure the rate of matrix products for a second, in 16 bits on a GPU and in fp32 on a CPU."""
    device = environment.probe().device
    rate = measure_flops_per_second(device.kind)
    if device.kind == "cpu":
        what = "measured in fp32 with the threads above (no data sheet for CPUs)"
        return Check("matmul rate", True, f"{rate / 1e12:.3g} TFLOP/s {what}")
    too_slow = "nvidia-smi -q -d PERFORMANCE says why (another process, heat, a power limit, a part of a card)"
    too_fast = f"the data sheet's figure for {card_of(device.name or '')} is wrong: report it"
    what = "measured in 16 bits"
    return against_datasheet("matmul rate", what, device, rate, MIN_MATMUL_SHARE, too_slow, too_fast)


def against_datasheet(
    check: str, what: str, device: Device, rate: float, min_share: float, too_slow: str, too_fast: str
) -> Check:
    """Compare ``rate`` in FLOP/s with the card's data sheet: a wrong rate makes predicted seconds and dollars wrong.

    ``min_share``: the share of the data sheet's figure that the rate should reach. ``too_slow``, ``too_fast``: the
    fixes.
    """
    detail = f"{rate / 1e12:.3g} TFLOP/s {what}"
    sheet = data_sheet_flops(device.name) if device.kind == "cuda" else None
    if sheet is None:
        whose = "CPUs" if device.kind == "cpu" else device.name
        return Check(check, None, f"{detail}; whether it agrees is unknown: no data sheet for {whose}")
    share = rate / sheet
    detail = f"{detail}, {share:.0%} of the data sheet's {sheet / 1e12:.4g}"
    if min_share <= share <= MAX_SHARE:
        return Check(check, True, detail)
    return Check(check, False, detail, too_slow if share < min_share else too_fast)


def measure_flops_per_second(kind: str) -> float:
    """Return the rate of square matrix products over a second, at 2 n³ operations a product."""
    import torch

    size = MEASURED_SIZES[kind]
    dtype = torch.float32
    if kind == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    left, right = (torch.randn(size, size, device=kind, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    _wait(kind)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_SECONDS:
        left @ right
        products += 1
        _wait(kind)
    return products * 2.0 * size**3 / (time.perf_counter() - started)


def _wait(kind: str) -> None:
    if kind == "cuda":
        import torch

        torch.cuda.synchronize()


def disk_space(outputs: OutputPaths) -> Check:
    free = shutil.disk_usage(nearest_folder(outputs.root)).free
    detail = f"{free / 1e9:.1f} GB free for {outputs.root}"
    if free < LOW_DISK_BYTES:
        return Check("disk", False, detail, "free disk space, or set output_root to another disk")
    return Check("disk", True, detail)


def writable(outputs: OutputPaths) -> Check:
    folder = nearest_folder(outputs.root)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "run in a folder that you can write to, or set output_root=DIR"
        return Check("output_root", False, f"{folder} can't be written: {error.strerror}", fix)
    return Check("output_root", True, f"{outputs.root} can be written")


def tracking_database(outputs: OutputPaths) -> Check:
    """Open the database as a run would; the first run creates it if it is missing."""
    from qlora_exp.config.schema import TrackingConfig
    from qlora_exp.tracking.store import locate, open_store

    if not outputs.mlflow_database.is_file():
        return Check("mlflow database", None, f"none yet at {outputs.mlflow_database}; the first run creates it")
    try:
        open_store(locate(TrackingConfig(enabled=True, uri=None, experiment="qlora-exp", timeout_seconds=5.0), outputs))
    except QloraExpError as error:
        fix = error.hint or f"move {outputs.mlflow_database} away; qlora-exp sync fills a new one from the records"
        return Check("mlflow database", False, error.what, fix)
    return Check("mlflow database", True, f"{outputs.mlflow_database} opens")


def git() -> Check:
    commit, dirty = environment.git_state(PACKAGE)
    if commit is None:
        return Check("git", None, "the code is not in a git checkout; records will name the version only")
    if dirty:
        return Check("git", True, f"{commit[:12]} with changes not committed (records will say so)")
    return Check("git", True, commit[:12])


def embedded_assets(assets: Path = EMBEDDED) -> Check:
    """Compare every file of the embedded pair with the hashes that its build wrote."""
    import hashlib

    listing = assets / "SHA256SUMS"
    fix = "reinstall qlora-exp, or in a checkout: git restore qlora_exp/embedded"
    if not listing.is_file():
        return Check("embedded model", False, f"{listing} is missing", fix)
    wrong, entries = [], listing.read_text(encoding="utf-8").splitlines()
    for entry in entries:
        digest, _, name = entry.partition("  ")
        path = assets / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    if wrong:
        return Check("embedded model", False, f"not as built: {', '.join(wrong)}", fix)
    return Check("embedded model", True, f"{len(entries)} files as built")


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or its first parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _self_test(mode: Quantization) -> Check:
    """Train one small layer through ``mode``: the gradient after an evaluation must equal the one before."""
    from qlora_exp.models.self_test import quantization_self_test

    result = quantization_self_test(mode, environment.probe().device.kind)
    fix = None if result.ok else f"don't use quantization={mode.value} on this machine; update bitsandbytes and torch"
    return Check(f"train in {mode.value}", result.ok, result.detail, fix)


def _output(*command: str) -> str | None:
    """Return a command's standard output, which may be empty; ``None`` if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
