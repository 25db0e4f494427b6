"""Each slot has a GPU of its own where there are enough, occupied ones are refused, and threads stay what they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_exp.config.enums import DeviceChoice, Engine
from qlora_exp.errors import ConfigError
from qlora_exp.orchestration import devices
from qlora_exp.orchestration.devices import Gpu, GpuUser, assign, environment_of, threads_per_process

GPUS = (Gpu(0, "GPU-aaa", "H200"), Gpu(1, "GPU-bbb", "H200"), Gpu(2, "GPU-ccc", "H200"))


@pytest.mark.parametrize(
    ("visible", "slots", "assigned"),
    [
        (None, None, ("GPU-aaa", "GPU-bbb", "GPU-ccc")),
        (None, 2, ("GPU-aaa", "GPU-bbb")),
        ("2,0", None, ("GPU-ccc", "GPU-aaa")),
        ("GPU-bbb", None, ("GPU-bbb",)),
        ("1,-1,0", None, ("GPU-bbb",)),
        ("1", 2, ("GPU-bbb", "GPU-bbb")),
        ("", None, (None,)),
        ("", 3, (None, None, None)),
    ],
)
def test_slots_get_the_visible_gpus_in_turn(
    visible: str | None, slots: int | None, assigned: tuple[str | None, ...]
) -> None:
    assert assign(GPUS, visible, slots) == assigned


def test_without_gpus_there_is_one_slot() -> None:
    assert assign((), None, None) == (None,)


def test_a_gpu_in_use_is_refused_with_its_user_named() -> None:
    occupied = (GPUS[0], Gpu(1, "GPU-bbb", "H200", (GpuUser(4321, "python", 3 * 2**30),)))
    with pytest.raises(ConfigError, match="GPU 1") as told:
        assign(occupied, None, None)
    assert "4321" in str(told.value)
    assert "python" in str(told.value)
    assert "3.0 GiB" in str(told.value)
    assert assign(occupied, None, None, own_pids={4321}) == ("GPU-aaa", "GPU-bbb")
    assert assign(occupied, "0", None) == ("GPU-aaa",)


def test_a_workers_own_hosts_may_hold_memory_before_they_have_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def used_by(pid: int) -> None:
        monkeypatch.setattr(devices, "inventory", lambda: (Gpu(0, "GPU-aaa", "H200", (GpuUser(pid, "python", 1),)),))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as host:
        used_by(host.pid)
        assert devices.assign_slots(Engine.sft, DeviceChoice.auto, None) == ("GPU-aaa",)
        host.kill()
    used_by(os.getppid())
    with pytest.raises(ConfigError, match="GPU 0 is in use"):
        devices.assign_slots(Engine.sft, DeviceChoice.auto, None)


def test_a_studys_threads_are_fixed_by_its_first_worker(tmp_path: Path) -> None:
    kept = tmp_path / "threads.json"
    assert threads_per_process(3, 1, kept) == 3
    assert not kept.exists()
    first = threads_per_process(None, 1_000_000, kept)
    assert first == 1
    assert threads_per_process(None, 1, kept) == first


def test_a_host_is_pinned_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "GPU-bbb"}
    allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment_of("GPU-bbb", 2) == pinned | allocator
    assert not {"CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"} & set(environment_of(None, 2))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as chosen:
            chosen.setenv(name, "max_split_size_mb:64")
            assert environment_of("GPU-bbb", 2) == pinned
