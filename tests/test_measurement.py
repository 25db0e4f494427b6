"""A card's peak is found by its whole name as the driver tells it, and by no part of another's; a phase's peak is its
own."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import pytest

from qlora_exp.training.meter import Meter, model_flops_utilisation

# Device names as NVML and torch give them, and the data sheets' dense 16-bit TFLOP/s.
KNOWN = {
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71,
}
UNKNOWN = (
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GH200 480GB",
    "NVIDIA T400 4GB",
    "NVIDIA A1000",
    "AMD Instinct MI300X",
    "",
    None,
)


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_card_is_measured_against_its_own_data_sheet(name: str) -> None:
    assert model_flops_utilisation(name, 1e9, 1000) == pytest.approx(1e12 / (KNOWN[name] * 1e12))


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_card_is_unknown_and_not_the_nearest_name(name: str | None) -> None:
    assert model_flops_utilisation(name, 1e9, 1000) is None


MEGABYTE = 1_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc hands freed memory back when asked")
def test_a_phases_peak_counts_what_an_earlier_phase_needed_and_freed_too() -> None:
    meter = Meter("cpu")
    needed = {"train": 120 * MEGABYTE, "evaluate in small batches": 20 * MEGABYTE, "evaluate": 60 * MEGABYTE}
    kept = []
    for phase, wanted in needed.items():
        with meter.phase(phase):
            blocks = [bytearray(50_000) for _ in range(wanted // 50_000)]  # too small to be mapped one by one
            kept.append(bytearray(50_000))  # stands in the way of the heap's shrinking by itself
            del blocks
    for phase, wanted in needed.items():
        peak = meter.of(phase).peak_bytes
        assert peak is not None
        assert 0.8 * wanted < peak < 1.2 * wanted, phase


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux tells files' pages apart")
def test_what_a_phase_reads_of_mapped_files_is_no_memory_of_its_own(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1" * 80 * MEGABYTE)
    meter = Meter("cpu")
    with (
        weights.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        meter.phase("train"),
    ):
        made = b"2" * 40 * MEGABYTE
        touched = sum(mapped[place] for place in range(0, len(mapped), mmap.PAGESIZE))
    assert touched > 0
    assert made
    measured = meter.of("train")
    assert measured.peak_bytes is not None
    assert measured.anonymous_peak_bytes is not None
    assert measured.peak_bytes > 115 * MEGABYTE
    assert 0.9 * 40 * MEGABYTE < measured.anonymous_peak_bytes < 1.2 * 40 * MEGABYTE
