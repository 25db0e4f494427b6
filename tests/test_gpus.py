"""Of several visible GPUs a process takes one, before torch is imported, with NVML and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from qlora_exp import run
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import DeviceChoice, Engine
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.budget import check_energy
from qlora_exp.orchestration.devices import assign_slots
from qlora_exp.records.types import Status
from qlora_exp.system import gpus
from qlora_exp.system.gpus import cards, use_one_gpu

GIB = 2**30
Kept = pytest.MonkeyPatch
PYNVML = """
class NVMLError(Exception): pass
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: 2
nvmlDeviceGetHandleByIndex = int
nvmlDeviceGetUUID = lambda handle: f"GPU-{handle}"
nvmlDeviceGetName = lambda handle: "H200"
nvmlDeviceGetMemoryInfo = lambda handle: type("Memory", (), {"free": 2**30, "total": 2**34})
nvmlDeviceGetMigMode = lambda handle: (0, 0)
nvmlDeviceGetComputeRunningProcesses = lambda handle: []
"""


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
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=handle.get("free", GIB), total=24 * GIB),
        nvmlDeviceGetMigMode=lambda handle: (int("mig" in handle), 0),
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=mig,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
    )
    return module


def test_a_partitioned_gpu_whose_instances_nvml_cannot_count_is_listed_whole(monkeypatch: Kept) -> None:
    module = nvml({"uuid": "GPU-aaa", "mig": ()}, {"uuid": "GPU-bbb"})

    def unsupported(handle: dict[str, Any]) -> int:
        raise NVMLError

    vars(module)["nvmlDeviceGetMaxMigDeviceCount"] = unsupported
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert [card.uuid for card in gpus.cards()] == ["GPU-aaa", "GPU-bbb"]


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
        ("0, -1, 1", "0, -1, 1"),
        ("1", "1"),
        ("GPU-aaa", "GPU-aaa"),
        ("", ""),
        ("-1", "-1"),
        ("NoDevFiles", "NoDevFiles"),
        ("none", "none"),
        ("None", "None"),
        ("void", "void"),
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


@pytest.mark.parametrize(
    ("visible", "counted"), [(None, False), ("GPU-aaa", True), ("MIG-1", False), ("0", True), ("GPU-bbb", False)]
)
def test_a_limit_of_energy_is_refused_where_the_gpu_does_not_count_it(
    visible: str | None, counted: bool, monkeypatch: Kept
) -> None:
    """An instance of a partitioned GPU has no counter: the limit would never stop a run."""
    whole: dict[str, Any] = {"uuid": "GPU-aaa"}
    part = {"uuid": "MIG-1"}
    module = nvml(whole, {"uuid": "GPU-bbb", "mig": [part]})

    def consumption(handle: dict[str, Any]) -> int:
        if handle is part:
            raise NVMLError
        return 1000

    by_uuid = {"GPU-aaa": whole, "MIG-1": part, "GPU-bbb": {"uuid": "GPU-bbb", "mig": [part]}}
    vars(module)["nvmlDeviceGetTotalEnergyConsumption"] = consumption
    vars(module)["nvmlDeviceGetHandleByUUID"] = by_uuid.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", module)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if counted:
        check_energy(compose(["budget.kwh=1"]).budget, DeviceChoice.auto)
        return
    with pytest.raises(ConfigError, match=r"energy can't be measured here: .*MIG"):
        run("budget.kwh=1", "training.device=auto", "model=local", "model.path=nowhere")


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


def test_a_sweep_gives_each_trial_an_instance_of_a_partitioned_gpu(monkeypatch: Kept) -> None:
    parts = [{"uuid": f"MIG-{number}"} for number in range(3)]
    monkeypatch.setitem(sys.modules, "pynvml", nvml({"uuid": "GPU-aaa", "mig": parts}, {"uuid": "GPU-bbb"}))
    assert assign_slots(Engine.sft, DeviceChoice.auto, None) == ("MIG-0", "MIG-1", "MIG-2", "GPU-bbb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert assign_slots(Engine.sft, DeviceChoice.auto, None) == ("MIG-1", "MIG-2")


def test_a_sweep_does_not_look_up_numbers_either_where_cuda_may_count_other_cards_first(monkeypatch: Kept) -> None:
    cards_of_two_kinds = {"uuid": "GPU-aaa", "name": "T4"}, {"uuid": "GPU-bbb", "name": "H200"}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(*cards_of_two_kinds))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert assign_slots(Engine.sft, DeviceChoice.auto, None) == ("1", "0")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert assign_slots(Engine.sft, DeviceChoice.auto, None) == ("GPU-bbb", "GPU-aaa")


@pytest.mark.parametrize(
    ("visible", "says"),
    [
        ("7", "'7' is no GPU"),
        ("0,3", "'3' is no GPU"),
        ("GPU-ddd", "'GPU-ddd' is no GPU"),
        ("GPU-", "'GPU-' is more than one GPU"),
        ("MIG-1", "'MIG-1' is no GPU"),
        ("all", "'all' is no GPU"),
        ("1.0", "'1.0' is no GPU"),
        ("1,GPU-bbb", "'GPU-bbb' is a GPU that is named before"),
    ],
)
def test_a_gpu_that_is_not_there_is_wrong_input(visible: str, says: str, monkeypatch: Kept) -> None:
    with_nvml(monkeypatch)
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(ConfigError, match=says) as error:
        use_one_gpu(environment)
    assert error.value.where == f"CUDA_VISIBLE_DEVICES={visible}"
    assert "2 (GPU-ccc)" in str(error.value.hint)
    assert environment == {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=says):
        assign_slots(Engine.sft, DeviceChoice.auto, None)


@pytest.mark.parametrize("visible", ["MIG-7", "MIG-GPU-aaa/1/0", "GPU-aaa"])
def test_what_cannot_be_looked_up_is_left_to_cuda(visible: str, bare_machine: Path, monkeypatch: Kept) -> None:
    """Without NVML, nobody lists instances; with instances, nobody lists their GPU."""
    if visible == "MIG-7":
        with_nvidia_smi(bare_machine)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", nvml({"uuid": "GPU-aaa", "mig": [{"uuid": "MIG-1"}]}))
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    assert use_one_gpu(environment) is None
    assert environment == {"CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.parametrize(
    ("command", "visible", "says"),
    [
        (["run"], "7", "'7' is no GPU"),
        (["run", "training.device=cuda"], "", "CUDA_VISIBLE_DEVICES=''"),
        (["sweep", "lora_search", "sweep.n_trials=1"], "MIG-7,0", "'MIG-7' is no GPU"),
    ],
)
def test_a_command_refuses_it_before_anything_is_loaded(
    command: list[str], visible: str, says: str, bare_machine: Path, monkeypatch: Kept
) -> None:
    cards_here = bare_machine / "site"
    cards_here.mkdir()
    (cards_here / "pynvml.py").write_text(PYNVML)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(cards_here), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    outputs = bare_machine / "outputs"
    given = [*command, "tracking=off", "evaluation=quick", f"output_root={outputs}"]
    done = subprocess.run([sys.executable, "-m", "qlora_exp.cli", *given], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(outputs.glob("runs/*"))


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
