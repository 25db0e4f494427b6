"""A rehearsal's GPU: the device and torch.cuda's meters are mocked, tensors are on the CPU, the rest is real."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

ALLOCATED_BYTES = 1_000_000_000
TOTAL_BYTES = 150_754_820_096
JOULES_PER_READING = 10.0
UUID = "GPU-00000000-0000-0000-0000-000000000000"


def install() -> None:
    """Make this process believe that it has an H200. bfloat16 autocast is on, as on CUDA.

    ``torch.cuda.is_available()`` stays false: torch's own code must not try to use CUDA.
    """
    import torch
    from trl import SFTConfig

    from qlora_exp.models import base
    from qlora_exp.records.types import Device
    from qlora_exp.system import environment

    device = Device("cuda", "NVIDIA H200", 1, TOTAL_BYTES, "9.0", "rehearsal", bf16=True)
    environment._device = lambda choice: device
    base._device = lambda kind: torch.device("cpu")
    results: dict[str, Any] = {
        **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache")),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "memory_reserved"), ALLOCATED_BYTES),
        "memory_allocated": 0,
        "is_bf16_supported": True,
        "current_device": 0,
        "get_device_properties": SimpleNamespace(uuid=UUID),
        "mem_get_info": (TOTAL_BYTES - ALLOCATED_BYTES, TOTAL_BYTES),
    }
    for name, result in results.items():
        setattr(torch.cuda, name, lambda *_, result=result, **__: result)
    sys.modules["pynvml"] = _nvml()
    prepare = SFTConfig.__post_init__

    def on_cpu(self: Any) -> None:
        self.use_cpu, self.dataloader_pin_memory = True, False
        prepare(self)

    SFTConfig.__post_init__ = on_cpu


def _nvml() -> ModuleType:
    readings = [0.0]

    def energy(handle: object) -> float:
        readings[0] += JOULES_PER_READING
        return readings[0] * 1000.0

    module = ModuleType("pynvml")
    vars(module).update(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: UUID,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUUID=lambda handle: UUID,
        nvmlDeviceGetName=lambda handle: "NVIDIA H200",
        nvmlDeviceGetMigMode=lambda handle: (0, 0),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
            free=TOTAL_BYTES - ALLOCATED_BYTES, total=TOTAL_BYTES, used=ALLOCATED_BYTES
        ),
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetPowerUsage=lambda handle: 400_000,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
    )
    return module
