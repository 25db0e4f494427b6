"""What CUDA and bitsandbytes raise on a GPU, raised on a CPU: memory that ran out is OUT_OF_MEMORY wherever it is
raised, and no trial runs in a process whose CUDA context is broken."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from transformers import core_model_loading

from qlora_exp import run
from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.estimate.memory_fit import corrections
from qlora_exp.models import adapters, causality
from qlora_exp.models.base import Base, load_base
from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.orchestration.worker import run_worker
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.fit_types import Fit
from qlora_exp.records.types import SCHEMA_VERSION, Device, Memory, RunRecord, Status
from qlora_exp.system.environment import probe_without_torch
from qlora_exp.training.outcome import Diverged, status_of
from tests.workers.small_study import SmallStudy, outcome_of, paths_of, spec_of, workers_of

Kept = pytest.MonkeyPatch
QUICK = (
    *("training.device=cpu", "training.max_steps=1", "evaluation=quick", "evaluation.max_items=4", "tracking=off"),
    *("evaluation.cache=false", "evaluation.baselines=false"),
)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of …")
GB = 10**9
BROKEN = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def cublas(status: str, call: str = "cublasCreate(handle)") -> RuntimeError:
    return RuntimeError(f"CUDA error: {status} when calling `{call}`")


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried …"),
        RuntimeError("std::bad_alloc"),
        cublas("CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    ],
    ids=str,
)
def test_every_error_of_a_full_memory_is_out_of_memory(error: BaseException) -> None:
    assert status_of(error) is Status.OUT_OF_MEMORY
    wrapped = RuntimeError("the backward pass failed")
    wrapped.__cause__ = error
    assert status_of(wrapped) is Status.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "error",
    [
        BROKEN,
        cublas("CUBLAS_STATUS_EXECUTION_FAILED", "cublasGemmEx(…)"),
        ValueError("the row's text: out of memory"),
        OSError(28, "No space left on device"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
    ],
    ids=str,
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert status_of(error) is Status.FAILED
    assert status_of(Diverged("the loss", 3)) is Status.DIVERGED


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "cublasLt ran into an error!\n\tshapeA=(4, 4)",
    ],
)
def test_a_library_that_cannot_start_is_out_of_memory_on_a_full_gpu_only(message: str, monkeypatch: Kept) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for free_bytes, status in ((100 * 2**20, Status.OUT_OF_MEMORY), (20 * 2**30, Status.FAILED)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free_bytes: (free, 24 * 2**30))
        assert status_of(RuntimeError(message)) is status


def fails_at(call: int, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """Return ``function``, whose call number ``call`` and all later ones raise ``error``."""
    calls = 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise error
        return function(*arguments, **named)

    return failing


@pytest.mark.parametrize(("error", "status"), [(NO_MEMORY, Status.OUT_OF_MEMORY), (BROKEN, Status.FAILED)], ids=str)
@pytest.mark.parametrize(
    ("mode", "where", "name", "call"),
    [
        ("nf4", bitsandbytes.nn.Params4bit, "to", 10),
        ("int8", bitsandbytes.nn.Int8Params, "to", 10),
        ("fp32", core_model_loading, "_materialize_copy", 5),
        ("fp32", causality, "_logits", 1),
        ("fp32", peft, "get_peft_model", 1),
    ],
)
def test_the_gpu_is_to_blame_for_what_fails_before_the_first_step(
    mode: str, where: Any, name: str, call: int, error: Exception, status: Status, tmp_path: Path, monkeypatch: Kept
) -> None:
    """Quantizing, copying, the first forward pass, and PEFT: none of them is told as wrong input."""
    monkeypatch.setattr(where, name, fails_at(call, getattr(where, name), error))
    record = run(*QUICK, f"quantization={mode}", f"output_root={tmp_path}")
    assert record.status is status
    assert record.failure is not None
    assert record.failure.message == str(error)
    assert record.failure.hint is not None
    assert ("micro_batch_size" if status is Status.OUT_OF_MEMORY else "new process") in record.failure.hint


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (adapters, "load_file", OSError(12, "Cannot allocate memory")),
        (peft.PeftModel, "from_pretrained", NO_MEMORY),
        (peft.PeftModel, "from_pretrained", BROKEN),
    ],
)
def test_an_adapter_that_the_gpu_cannot_load_is_not_damaged(
    owner: Any, name: str, error: Exception, tmp_path: Path, monkeypatch: Kept
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(adapters, "load_file", lambda file: {"lora_A": torch.zeros(1)})
    monkeypatch.setattr(adapters, "clone_sharing_weights", lambda base: base)
    monkeypatch.setattr(owner, name, fails_at(1, getattr(owner, name), error))
    with pytest.raises(type(error)) as raised:
        adapters.load_adapter(Base.__new__(Base), tmp_path)
    assert raised.value is error


def test_a_weight_that_does_not_fit_is_still_wrong_input(tmp_path: Path, monkeypatch: Kept) -> None:
    refused = fails_at(3, bitsandbytes.nn.Params4bit.to, RuntimeError("shape '[3]' is invalid for input of size 4"))
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", refused)
    with pytest.raises(ModelError, match="weights can't be loaded"):
        load_base(compose([*QUICK, "quantization=nf4", f"output_root={tmp_path}"]), "cpu")


def test_loading_leaves_transformers_as_it_was(monkeypatch: Kept) -> None:
    """After a failure, too, and if a version lacks the private function that is wrapped."""
    original = core_model_loading.log_conversion_errors
    with contextlib.suppress(MemoryError), quiet_loading():
        assert core_model_loading.log_conversion_errors is not original
        raise MemoryError
    assert core_model_loading.log_conversion_errors is original
    monkeypatch.delattr(core_model_loading, "log_conversion_errors")
    with quiet_loading():
        pass
    assert not hasattr(core_model_loading, "log_conversion_errors")


IN_A_TRIAL_PROCESS = """
import sys
if any("trial_main" in argument for argument in sys.orig_argv):
    import ctypes, dataclasses, os, signal
    from qlora_exp.runs import sleep_engine
    from qlora_exp.system import environment

    cpu = environment._cpu_device
    environment._cpu_device = lambda: dataclasses.replace(cpu(), kind="cuda", name="NVIDIA H200")
    libc = ctypes.CDLL(None)
    broken = []

    def sticky(config, step):
        if config.lora.r == 2 or broken:
            broken.append(step)
            raise RuntimeError("CUDA error: device-side assert triggered")

    def exits(config, step):
        training = config.training
        if config.lora.r == 2 and (training.micro_batch_size or training.batch_size) == training.batch_size:
            libc.dprintf(2, b"Error out of memory at line 62 in file /src/csrc/ops.cu\\n")
            libc.exit(1)

    def exits_for_another_reason(config, step):
        if config.lora.r == 2:
            libc.dprintf(2, b"Error an illegal memory access was encountered at line 62 in file /src/csrc/ops.cu\\n")
            libc.exit(1)

    def exits_and_another_is_killed(config, step):
        exits(config, step)
        if config.lora.r == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    sleep_engine._simulate_fault = FAULT
"""


def sweep_on_a_mocked_gpu(fault: str, tmp_path: Path, monkeypatch: Kept, **changes: Any) -> SmallStudy:
    """A sweep of three trials whose process believes that it trains on a GPU, and fails as ``fault`` does."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(IN_A_TRIAL_PROCESS.replace("FAULT", fault))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    spec = spec_of(tmp_path, 3, "training.sleep_seconds=0.1", "training.batch_size=16", **changes)
    study = SmallStudy(spec, [("lora.r=2",), ("lora.r=4",), ("lora.r=8",)])
    run_worker(spec, paths_of(tmp_path), workers_of(), study=study, outcome_of=outcome_of)
    return study


def record_of(study: SmallStudy, number: int) -> RunRecord:
    return read_record(OutputPaths.of(study.spec.output_root).run(study.run_ids[number]).record)


def test_a_process_with_a_broken_cuda_context_is_replaced(tmp_path: Path, monkeypatch: Kept) -> None:
    study = sweep_on_a_mocked_gpu("sticky", tmp_path, monkeypatch)
    statuses = [study.told[number].status for number in range(3)]
    assert statuses == [Status.FAILED, Status.COMPLETED, Status.COMPLETED]


@pytest.mark.parametrize("retries", [0, 1])
def test_bitsandbytes_exit_for_lack_of_memory_is_out_of_memory(retries: int, tmp_path: Path, monkeypatch: Kept) -> None:
    study = sweep_on_a_mocked_gpu("exits", tmp_path, monkeypatch, out_of_memory_retries=retries)
    assert study.told[0].status is (Status.COMPLETED if retries else Status.OUT_OF_MEMORY)
    assert study.requeued == []
    record = record_of(study, 0)
    assert record.config["training"]["micro_batch_size"] == (8 if retries else None)
    failure = record.earlier_failures[0] if retries else record.failure
    assert failure is not None
    assert "bitsandbytes" in failure.message
    assert [study.told[number].status for number in (1, 2)] == [Status.COMPLETED, Status.COMPLETED]


def test_another_exit_of_bitsandbytes_is_told_with_its_reason(tmp_path: Path, monkeypatch: Kept) -> None:
    study = sweep_on_a_mocked_gpu("exits_for_another_reason", tmp_path, monkeypatch, max_attempts=1)
    assert [study.told[number].status for number in range(3)] == [Status.FAILED, Status.COMPLETED, Status.COMPLETED]
    failure = record_of(study, 0).failure
    assert failure is not None
    assert "an illegal memory access was encountered" in failure.message


def test_an_earlier_exit_of_bitsandbytes_is_not_the_reason_of_a_later_death(tmp_path: Path, monkeypatch: Kept) -> None:
    """The trials of a slot share a log."""
    study = sweep_on_a_mocked_gpu("exits_and_another_is_killed", tmp_path, monkeypatch, max_attempts=1)
    assert [study.told[number].status for number in range(3)] == [
        Status.OUT_OF_MEMORY,
        Status.FAILED,
        Status.COMPLETED,
    ]
    failure = record_of(study, 1).failure
    assert failure is not None
    assert "bitsandbytes" not in failure.message


IN_A_RUN = """
import ctypes, os, sys
from qlora_exp.runs import sleep_engine

def ends(config, step):
    if config.lora.r == 2:
        ctypes.CDLL(None).exit(1)

sleep_engine._simulate_fault = ends
if sys.argv[1:]:
    from qlora_exp.cli import main
    code = main(sys.argv[1:])
    assert code == 0, code
"""


@pytest.mark.parametrize("multirun", [False, True])
def test_a_run_whose_process_a_library_ends_has_a_last_record(
    multirun: bool, tmp_path: Path, monkeypatch: Kept
) -> None:
    """bitsandbytes' kernels call exit(1). The run after it is not affected."""
    sleep = ("training.engine=sleep", "training.sleep_seconds=0.1", "tracking=off", f"output_root={tmp_path}/outputs")
    environment = {**os.environ}
    if multirun:  # each run has a process, which is started by its module's name
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            'import sys\nif any("runs.job" in part for part in sys.orig_argv):\n    '
            + IN_A_RUN.split("if sys.argv")[0].strip().replace("\n", "\n    ")
        )
        environment["PYTHONPATH"] = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "qlora_exp.cli", "run", "-m", "hydra/sweeper=basic", *sleep, "lora.r=2,4"]
        codes = [subprocess.run(command, env=environment, timeout=120, check=False).returncode]
    else:
        codes = [
            subprocess.run(
                [sys.executable, "-c", IN_A_RUN, "run", *sleep, f"lora.r={r}"],
                env=environment,
                timeout=120,
                check=False,
            ).returncode
            for r in (2, 4)
        ]
    assert codes == ([1] if multirun else [1, 0])
    records = [read_record(path) for path in (tmp_path / "outputs" / "runs").glob("*/record.json")]
    ended = {record.config["lora"]["r"]: record for record in records}
    assert {r: record.status for r, record in ended.items()} == {2: Status.FAILED, 4: Status.COMPLETED}
    failure = ended[2].failure
    assert failure is not None
    assert failure.kind == "ProcessExit"
    assert "bitsandbytes" in failure.message
    assert ended[2].process is None


def test_a_neighbour_that_fills_the_gpu_does_not_correct_later_predictions() -> None:
    """A run that was predicted to need half of the card ran out of memory because another process had the rest."""

    def out_of_memory(outside_allocator_bytes: int | None) -> RunRecord:
        fit = Fit(10 * GB, 1 * GB, 11 * GB, 24 * GB, 0.5, 0)
        return dataclasses.replace(
            failed_record(),
            fit=fit,
            memory=Memory(outside_allocator_bytes=outside_allocator_bytes, source="cuda_allocated"),
        )

    def learnt(outside_allocator_bytes: int | None) -> tuple[float, int | None]:
        [correction] = corrections([out_of_memory(outside_allocator_bytes)], None)
        return correction.ratio, correction.ran_out_bytes

    assert learnt(16 * GB) == (1.0, None)
    assert learnt(1 * GB) == learnt(None) == (2.3, 10 * GB)  # CUDA's context alone; a record of an earlier version
    assert learnt(2 * GB) == learnt(None)  # a display takes this much


def failed_record() -> RunRecord:
    device = Device("cuda", "NVIDIA A10", 1, 24 * GB, "8.6", "580", bf16=True)
    config = {"model": {"family": "llama", "variant": "base"}, "quantization": {"mode": "nf4"}}
    environment = dataclasses.replace(probe_without_torch(), device=device)
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        run_id="run",
        name="run",
        status=Status.OUT_OF_MEMORY,
        started_at="",
        ended_at=None,
        config=config,
        environment=environment,
    )
