"""The branches that a run takes on a GPU, taken on a CPU: the device and torch.cuda's meters are mocked, bfloat16
autocast is on, and the training is real."""

from __future__ import annotations

import ctypes
import gc
import io
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate.utils import operations
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim.optimizer import Optimizer8bit

from qlora_exp.config.compose import compose
from qlora_exp.config.enums import DeviceChoice
from qlora_exp.errors import ConfigError
from qlora_exp.estimate import budget as checked_budget
from qlora_exp.models import base as base_module
from qlora_exp.models.adapters import attach_adapters, autocast_casts_inputs
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.optimizers import bitsandbytes_optimizers
from qlora_exp.records.types import Device, RunRecord, Status
from qlora_exp.runs import record_figures
from qlora_exp.runs.execute import execute
from qlora_exp.runs.prepare import prepare
from qlora_exp.system import environment
from qlora_exp.system.cards import DENSE_FLOPS_PER_SECOND
from qlora_exp.training import callbacks, trainer
from qlora_exp.training.meter import Meter
from qlora_exp.training.outcome import PruneCheck, no_pruning

Kept = pytest.MonkeyPatch
QUICK = (
    *("training.max_steps=2", "training.batch_size=4", "evaluation=quick", "evaluation.max_items=4", "tracking=off"),
    *("evaluation.cache=false", "evaluation.baselines=false", "evaluation.before=false"),
)
ALLOCATED_BYTES = 1_000_000_000
H200 = Device("cuda", "NVIDIA H200", 1, 150_754_820_096, "9.0", "580", bf16=True)
T4 = Device("cuda", "Tesla T4", 1, 15_843_721_216, "7.5", "580", bf16=False)


@pytest.fixture
def gpu(monkeypatch: Kept) -> None:
    """A machine that says that it has an H200, whose tensors are on the CPU."""
    monkeypatch.setattr(environment, "_device", lambda choice: H200)
    monkeypatch.setattr(base_module, "_device", lambda kind: torch.device("cpu"))
    for name, result in {
        **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache")),
        "max_memory_allocated": ALLOCATED_BYTES,
        "max_memory_reserved": ALLOCATED_BYTES,
        "is_bf16_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result, **__: result)
    settings = trainer.SFTConfig
    on_cpu = {"use_cpu": True, "dataloader_pin_memory": False}
    monkeypatch.setattr(trainer, "SFTConfig", lambda **given: settings(**{**given, **on_cpu}))


def run(tmp_path: Path, *overrides: str, report: PruneCheck = no_pruning) -> RunRecord:
    record = execute(compose([*QUICK, f"output_root={tmp_path}", *overrides]), report=report)
    assert record.status is Status.COMPLETED, record.failure
    return record


def test_a_validation_pass_by_item_makes_no_logits_of_a_whole_batch(
    gpu: None, tmp_path: Path, monkeypatch: Kept
) -> None:
    """Under autocast accelerate copies what the model returns to float32."""
    converted: list[torch.Size] = []
    convert = operations.convert_to_fp32

    def spy(outputs: Any) -> Any:
        converted.extend(value.shape for value in outputs.values() if isinstance(value, torch.Tensor))
        return convert(outputs)

    monkeypatch.setattr(operations, "convert_to_fp32", spy)
    items: list[Any] = []
    report = PruneCheck(lambda step, value, nats: bool(items.append(nats)), per_item=True)
    run(tmp_path, "quantization=nf4", "training.evaluate_every_steps=1", report=report)
    assert len(items[0]) == 4
    assert converted
    assert {len(shape) for shape in converted} <= {0, 2}


def test_a_warm_process_keeps_nothing_of_an_earlier_base(tmp_path: Path) -> None:
    """transformers registers the embeddings of a training with an 8-bit optimizer in a list that nothing shortens."""
    bases, embeddings = BaseCache(), []
    for variant in ("base", "instruct"):
        overrides = [*QUICK, "training.device=cpu", "training.optimizer=adamw_8bit", f"output_root={tmp_path}"]
        config = compose([*overrides, f"model.variant={variant}"])
        assert execute(config, bases=bases).status is Status.COMPLETED
        embeddings.append(weakref.ref(bases.get(config, "cpu").model.get_input_embeddings().weight))
    gc.collect()
    assert embeddings[0]() is None
    assert embeddings[1]() is not None


class ManagedMemory:
    """Stands in for bitsandbytes' library on CUDA: the runtime's functions, and managed memory of ``free_bytes``."""

    compiled_with_cuda = True

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.blocks: dict[int, Any] = {}
        self.error = 0
        self._lib = self

    def cudaMallocManaged(self, pointer: Any, size: ctypes.c_size_t, flags: ctypes.c_uint) -> int:
        if sum(map(ctypes.sizeof, self.blocks.values())) + size.value > self.free_bytes:
            self.error = 2
            return self.error
        block = ctypes.create_string_buffer(size.value)
        self.blocks[ctypes.addressof(block)] = block
        pointer._obj.value = ctypes.addressof(block)
        return 0

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        del self.blocks[pointer.value]
        return 0

    def cudaGetLastError(self) -> int:
        error, self.error = self.error, 0
        return error

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int:
        address = ctypes.c_void_p()
        assert self.cudaMallocManaged(ctypes.byref(address), size, ctypes.c_uint(1)) == 0, "bitsandbytes calls exit(1)"
        return address.value


def test_managed_memory_that_runs_out_is_raised_and_a_trainings_is_freed(monkeypatch: Kept) -> None:
    """bitsandbytes ends the process where a paged optimizer's allocation fails, and never frees one."""
    memory, functional = ManagedMemory(free_bytes=10_000), bitsandbytes.functional
    monkeypatch.setattr(functional, "lib", memory)
    for _ in range(3):
        with bitsandbytes_optimizers():
            state = functional.get_paged(2, 1000, dtype=torch.float32, device=torch.device("cuda", 0))
            GlobalPageManager.get_instance().paged_tensors.append(state)
            assert len(memory.blocks) == 1
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                functional.get_paged(1000, 1000, dtype=torch.uint8, device=torch.device("cuda", 0))
            assert memory.error == 0
        assert memory.blocks == {}
    assert GlobalPageManager.get_instance().paged_tensors == []


def test_a_resumed_paged_optimizer_is_still_paged(monkeypatch: Kept) -> None:
    """bitsandbytes loads the states of a checkpoint as ordinary tensors, which it moves to the GPU."""
    managed: list[torch.Tensor] = []

    def is_managed(tensor: torch.Tensor) -> bool:
        return any(tensor is one for one in managed)

    def paged(self: Any, parameter: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        state = torch.zeros_like(parameter, dtype=dtype)
        if self.is_paged and parameter.numel() >= 1e5:
            vars(state)["is_paged"] = True
            managed.append(state)
        return state

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda tensor, to_cpu=False: None)
    parameters = [torch.nn.Parameter(torch.zeros(400, 400)), torch.nn.Parameter(torch.zeros(4))]
    gradients = [torch.full_like(parameter, 0.5) for parameter in parameters]

    def step(optimizer: Any) -> dict[str, Any]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
        return loaded

    with bitsandbytes_optimizers():
        saved = step(bitsandbytes.optim.PagedAdamW32bit(parameters))
        resumed = bitsandbytes.optim.PagedAdamW32bit(parameters)
        resumed.load_state_dict(saved)
        for number, parameter in enumerate(parameters):
            state = resumed.state[parameter]
            for name in ("state1", "state2"):
                assert is_managed(state[name]) == (number == 0)
                kept = saved["state"][number][Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY][name]
                assert torch.equal(state[name], kept)
        again = step(resumed)
        assert again["state"][0]["step"] == 2
        plain = bitsandbytes.optim.AdamW32bit(parameters)
        plain.load_state_dict(saved)
        assert not is_managed(plain.state[parameters[0]]["state1"])


def test_paged_states_belong_to_what_training_needs(gpu: None, tmp_path: Path, monkeypatch: Kept) -> None:
    buffer = Optimizer8bit.get_state_buffer

    def paged(self: Any, parameter: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        state: torch.Tensor = buffer(self, parameter, dtype=dtype)
        vars(state)["is_paged"] = True
        return state

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda tensor, to_cpu=False: None)
    memory = run(tmp_path, "training.optimizer=paged_adamw_32bit").memory
    assert memory.adapter_bytes
    assert memory.peak_train_bytes == ALLOCATED_BYTES
    assert memory.train_working_set_bytes == ALLOCATED_BYTES + 2 * memory.adapter_bytes


def test_a_phase_reserves_what_it_needs_and_not_what_an_earlier_one_did(gpu: None, monkeypatch: Kept) -> None:
    reserved = 0

    def release() -> None:
        nonlocal reserved
        reserved = 0

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", release)
    meter = Meter("cuda")
    for phase, needed in (("base", 5), ("train", 3)):
        with meter.phase(phase):
            reserved = max(reserved, needed)
    assert meter.of("train").reserved_bytes == 3


def test_a_step_lasts_from_its_batches_to_its_end_without_logging_saving_and_evaluation(
    tmp_path: Path, monkeypatch: Kept
) -> None:
    """On a GPU, collating and copying the batches is where it waits. The clock stands still elsewhere."""
    now = 0.0

    def takes(seconds: float, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now))
    takes(1.0, trainer._MeteredTrainer, "get_batch_samples")
    for number, name in enumerate(("evaluate", "_save_checkpoint", "log")):
        takes(10.0 ** (2 + number), trainer._MeteredTrainer, name)
    every = ("training.max_steps=8", "training.evaluate_every_steps=2", "training.save_every_steps=2")
    speed = run(tmp_path, "training.device=cpu", "training.logging_steps=1", *every).speed
    assert (speed.step_seconds_p50, speed.step_seconds_p95) == (1.0, 1.0)


def test_utilisation_counts_what_the_model_needs_and_not_its_embedding_table(gpu: None, tmp_path: Path) -> None:
    record = run(tmp_path, "quantization=nf4", "training.gradient_checkpointing=on")
    speed, plan = record.speed, record.plan
    assert plan is not None
    assert plan.train_flops_per_token is not None
    assert speed.train_tokens_per_second is not None
    assert speed.model_flops_utilisation is not None
    per_token = speed.model_flops_utilisation * DENSE_FLOPS_PER_SECOND["H200"] / speed.train_tokens_per_second
    assert 0.3 * plan.train_flops_per_token < per_token < plan.train_flops_per_token, "without recomputation"
    assert per_token < 0.9 * 4 * plan.total_parameters, "a third of the parameters is a table of 4096 words"


def test_a_gpus_energy_is_shared_by_its_processes(gpu: None, monkeypatch: Kept) -> None:
    joules, users = 100.0, [object()]
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: joules * 1000,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: users,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="aaa"))
    meter = Meter("cuda")
    for phase, processes, shared in (("base", 1, 40.0), ("train", 2, 20.0), ("evaluate", 0, 40.0)):
        users[:] = [object()] * processes
        with meter.phase(phase):
            joules += 40.0
        assert meter.of(phase).energy_joules == shared


@pytest.mark.parametrize(("budget", "readings"), [((), 0), (("budget.kwh=1",), 4)], ids=["no limit", "budget.kwh"])
def test_a_step_asks_for_the_gpus_energy_only_if_a_budget_needs_it(
    budget: tuple[str, ...], readings: int, gpu: None, tmp_path: Path, monkeypatch: Kept
) -> None:
    counts: Counter[str] = Counter()
    in_step = False

    def joules(handle: str) -> int:
        counts["energy in steps"] += in_step
        return 1000

    nvml = ModuleType("pynvml")
    vars(nvml).update(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: counts.update(["handles"]) or uuid,
        nvmlDeviceGetTotalEnergyConsumption=joules,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="aaa"))
    monkeypatch.setattr(checked_budget, "has_energy_counter", lambda: True)
    monkeypatch.setattr(record_figures, "RECORD_SECONDS", float("inf"))  # the record isn't written within the steps
    on_step_end = callbacks.Budget.on_step_end

    def step_end(*arguments: Any, **named: Any) -> None:
        nonlocal in_step
        in_step = True
        on_step_end(*arguments, **named)
        in_step = False

    monkeypatch.setattr(callbacks.Budget, "on_step_end", step_end)
    assert run(tmp_path, "training.max_steps=4", *budget).speed.energy_joules == 0.0
    assert (counts["handles"], counts["energy in steps"]) == (1, readings)


@pytest.mark.parametrize(
    ("device", "mode", "optimizer", "used"),
    [
        ("cuda", "nf4", "adamw_torch", "adamw_torch_fused"),
        ("cuda", "fp16", "adamw_torch", "adamw_torch"),
        ("cuda", "nf4", "adamw_8bit", "adamw_8bit"),
        ("cpu", "nf4", "adamw_torch", "adamw_torch"),
    ],
)
def test_a_gpu_has_the_fused_optimizer_and_copies_that_it_does_not_wait_for(
    device: str, mode: str, optimizer: str, used: str, tmp_path: Path, monkeypatch: Kept
) -> None:
    """With fp16's loss scaler a fused optimizer hides which steps were skipped."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(trainer, "SFTConfig", lambda **named: given.update(named) or SimpleNamespace(n_gpu=1))
    machine = environment.probe(DeviceChoice.cpu)
    config = compose([*QUICK, f"quantization={mode}", f"training.optimizer={optimizer}"])
    kind = H200 if device == "cuda" else machine.device
    trainer.trainer_arguments(prepare(config, replace(machine, device=kind)).plan, config, tmp_path)
    copies = {"non_blocking": True} if device == "cuda" else None
    assert (given["optim"], given["accelerator_config"]) == (used, copies)
    assert given["dataloader_pin_memory"] is (device == "cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_of_a_16_bit_base_read_its_numbers_as_they_are(dropout: float, monkeypatch: Kept) -> None:
    """Under autocast, PEFT's cast to float32 and autocast's cast back change nothing but the time and memory."""
    config = compose([*QUICK, "quantization=bf16", "training.device=cpu", f"lora.dropout={dropout}"])
    ready = prepare(config, environment.probe(DeviceChoice.cpu))
    base = load_base(config, "cpu")
    found, saved = [], []
    for active in (False, True):
        model = attach_adapters(clone_sharing_weights(base), config, ready.modules).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape)
        ids = torch.arange(40).reshape(2, 20)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            autocast_casts_inputs(model, active),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        saved.append(sum(kept.values()))
        found.append([loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    if not dropout:  # with it, the two draw other masks: random numbers depend on the dtype
        assert len(found[0]) > 2
        assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert saved[1] < saved[0]


@pytest.mark.parametrize(
    ("device", "mode", "adapters", "optimizer", "refused"),
    [
        (H200, "fp16", "float16", "adamw_8bit", True),
        (H200, "fp16", "bfloat16", "adamw_torch", True),
        (H200, "nf4", "float16", "adamw_8bit", False),
        (T4, "nf4", "float16", "adamw_8bit", True),
        (T4, "nf4", "float32", "adamw_8bit", False),
    ],
)
def test_16_bit_adapters_are_refused_where_the_loss_is_scaled(
    device: Device, mode: str, adapters: str, optimizer: str, refused: bool
) -> None:
    """torch: "Attempting to unscale FP16 gradients", at the first step."""
    overrides = [*QUICK, f"quantization={mode}", f"lora.dtype={adapters}", f"training.optimizer={optimizer}"]
    machine = environment.probe(DeviceChoice.cpu)
    checked = [lambda: prepare(compose(overrides), machine.__class__(**{**vars(machine), "device": device}))]
    if mode == "fp16":  # then the configuration alone says it
        checked.append(lambda: compose([*overrides, "training.device=cuda"]))
    for check in checked:
        if refused:
            with pytest.raises(ConfigError, match="scales the loss"):
                check()
        else:
            check()
