"""Of several visible GPUs a process takes one, before torch is imported, with NVML and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from qlora_exp import run
from qlora_exp.config.schema import DeviceChoice, Engine
from qlora_exp.orchestration.devices import assign_slots
from qlora_exp.records.types import Status
from qlora_exp.system import gpus
from qlora_exp.system.gpus import cards, use_one_gpu

GIB = 2**30
Kept = pytest.MonkeyPatch


class NVMLError(Exception):
    pass


def nvml(*machine: dict[str, Any]) -> ModuleType:
    """A stand-in for the driver's library: ``machine`` has each GPU's uuid, name, free bytes and MIG instances."""
    module = ModuleType("pynvml")

    def mig(handle: dict[str, Any], number: int) -> Any:
        if number >= len(handle.get("mig", ())):
            raise NVMLError
        return handle["mig"][number]

    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(machine),
        nvmlDeviceGetHandleByIndex=lambda index: machine[index],
        nvmlDeviceGetUUID=lambda handle: handle["uuid"],
        nvmlDeviceGetName=lambda handle: handle.get("name", "H200"),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=handle.get("free", GIB)),
        nvmlDeviceGetMigMode=lambda handle: (int("mig" in handle), 0),
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=mig,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
    )
    return module


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: Kept, tmp_path: Path) -> Path:
    """No NVML, no nvidia-smi, no driver; returns the folder of the driver's files."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gpus, "DRIVER_FILES", tmp_path / "proc")
    monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path / "dev")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "bin").mkdir()
    return tmp_path


def with_nvml(monkeypatch: Kept) -> None:
    three = ({"uuid": f"GPU-{name}", "free": free * GIB} for name, free in (("aaa", 1), ("bbb", 9), ("ccc", 5)))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(*three))


def with_nvidia_smi(folder: Path) -> None:
    lines = "0, GPU-aaa, 1024, H200\\n1, GPU-bbb, 9216, H200\\n2, GPU-ccc, [N/A], H200\\n"
    (folder / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    (folder / "bin" / "nvidia-smi").chmod(0o755)


def with_driver_files(folder: Path) -> None:
    for slot, name in (("0000:3b:00.0", "aaa"), ("0000:86:00.0", "bbb")):
        (folder / "proc" / slot).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{name}\nDevice Minor: \t 0\n"
        (folder / "proc" / slot / "information").write_text(text)


def with_device_files(folder: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (folder / "dev" / name).touch()


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (None, "GPU-bbb"),
        ("0,2", "GPU-ccc"),
        ("2,1,0", "GPU-bbb"),
        ("GPU-ccc,GPU-aaa", "GPU-ccc"),
        ("0, 9, 1", "0, 9, 1"),
        ("1", "1"),
        ("GPU-aaa", "GPU-aaa"),
        ("", ""),
        ("-1", "-1"),
        ("MIG-x", "MIG-x"),
        ("MIG-x,MIG-y", "MIG-x"),
    ],
)
def test_the_visible_gpu_with_the_most_free_memory_is_taken(given: str | None, chosen: str, monkeypatch: Kept) -> None:
    with_nvml(monkeypatch)
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    use_one_gpu(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == chosen


def test_numbers_are_not_looked_up_where_cuda_may_count_other_cards_first(monkeypatch: Kept) -> None:
    old, new = {"uuid": "GPU-aaa", "name": "T4", "free": 9 * GIB}, {"uuid": "GPU-bbb", "name": "H200", "free": GIB}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(old, new))
    for order, chosen in ((None, "0"), ("PCI_BUS_ID", "GPU-aaa")):
        environment = {"CUDA_VISIBLE_DEVICES": "0,1"} | ({"CUDA_DEVICE_ORDER": order} if order else {})
        use_one_gpu(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == chosen


def test_an_instance_of_a_partitioned_gpu_is_a_gpu(monkeypatch: Kept) -> None:
    parts = [{"uuid": "MIG-1", "free": GIB}, {"uuid": "MIG-2", "free": 2 * GIB}]
    monkeypatch.setitem(sys.modules, "pynvml", nvml({"uuid": "GPU-aaa", "mig": parts}))
    environment: dict[str, str] = {}
    assert use_one_gpu(environment) == environment["CUDA_VISIBLE_DEVICES"] == "MIG-2"


@pytest.mark.parametrize("found_by", ["nvidia-smi", "driver", "devices"])
def test_without_nvml_a_process_takes_one_gpu_and_a_sweep_spreads_its_trials(
    found_by: str, bare_machine: Path, monkeypatch: Kept
) -> None:
    prepare = {"nvidia-smi": with_nvidia_smi, "driver": with_driver_files, "devices": with_device_files}[found_by]
    prepare(bare_machine)
    names = [card.uuid for card in cards()]
    assert names == (["0", "1"] if found_by == "devices" else ["GPU-aaa", "GPU-bbb", "GPU-ccc"][: len(names)])
    assert assign_slots(Engine.sft, DeviceChoice.auto, len(names)) == tuple(names)
    assert assign_slots(Engine.sft, DeviceChoice.cpu, 2) == (None, None)
    environment: dict[str, str] = {}
    use_one_gpu(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ("GPU-bbb" if found_by == "nvidia-smi" else names[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert assign_slots(Engine.sft, DeviceChoice.auto, 3) == (names[1], names[0], names[1])


def test_a_sweep_gives_each_trial_the_instance_that_the_user_named(monkeypatch: Kept) -> None:
    with_nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert assign_slots(Engine.sft, DeviceChoice.auto, None) == ("MIG-1", "MIG-2")


def test_a_machine_without_gpus_stays_as_it_is() -> None:
    for given in ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}):
        environment = dict(given)
        assert use_one_gpu(environment) is None
        assert environment == given
    assert assign_slots(Engine.sft, DeviceChoice.auto, 2) == (None, None)


def test_a_run_limits_itself_before_torch_is_imported(bare_machine: Path, monkeypatch: Kept) -> None:
    """A command in a process of its own, on a machine whose driver's tool names three GPUs."""
    with_nvidia_smi(bare_machine)
    look = (
        "import os, sys, builtins, json\n"
        "sys.modules['pynvml'] = None\n"
        "seen = []\n"
        "def audit(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'torch' and not seen:\n"
        "        seen.append(os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
        "sys.addaudithook(audit)\n"
        "from qlora_exp.cli import main\n"
        "main(sys.argv[1:])\n"
        "print(json.dumps(seen))\n"
    )
    given = ["run", "training.max_steps=1", "tracking=off", "evaluation=quick", "evaluation.max_items=4"]
    given.append(f"output_root={bare_machine / 'outputs'}")
    done = subprocess.run([sys.executable, "-c", look, *given], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["GPU-bbb"], done.stderr
    (record,) = bare_machine.glob("outputs/runs/*/record.json")
    assert json.loads(record.read_text())["environment"]["cuda_visible_devices"] == "GPU-bbb"


def test_a_training_that_sees_two_gpus_too_late_uses_one(tmp_path: Path, monkeypatch: Kept) -> None:
    """CUDA may have begun in a notebook. transformers then counts two GPUs, and TRL would refuse to split batches."""
    monkeypatch.undo()
    settings = transformers.TrainingArguments
    once = vars(settings)["_setup_devices"]
    set_up = once.func

    def sees_two(self: Any) -> torch.device:
        device: torch.device = set_up(self)
        self._n_gpu = 2
        return device

    monkeypatch.setattr(once, "func", sees_two)
    record = run(
        *("training.device=cpu", "training.max_steps=1", "evaluation=quick", "evaluation.max_items=4"),
        *("tracking=off", f"output_root={tmp_path}"),
    )
    assert record.status is Status.COMPLETED, record.failure
