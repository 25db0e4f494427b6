"""A download says how much of which file has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.progress import Amount, shown_by
from tests.hub.fake_hub import FakeHub, serving


def test_a_download_is_counted_in_megabytes_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(25_000_000))
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    shown: list[Amount] = []
    with serving(FakeHub({("models", "someone/large"): folder})) as hub, shown_by(shown.append), quiet_loading():
        for name in ("config.json", "model.safetensors"):
            huggingface_hub.hf_hub_download(
                "someone/large", name, endpoint=hub.url, cache_dir=tmp_path / "cache", token=False
            )
    assert {amount.unit for amount in shown} == {"MB of model.safetensors downloaded"}
    assert [amount.done for amount in shown] == sorted(amount.done for amount in shown)
    assert (shown[-1].done, shown[-1].total, shown[-1].share) == (25, 25, 1.0)
    assert len(shown) > 1


def test_a_download_from_xet_storage_counts_what_is_written() -> None:
    shown: list[Amount] = []

    @dataclass
    class Report:
        total_bytes_completed: int
        total_transfer_bytes_completed: int
        total_bytes: int = 8_000_000
        total_bytes_completion_rate: float | None = None
        total_transfer_bytes_completion_rate: float | None = None

    names = {"reconstruction_desc": "a.safetensors: reconstructing file", "transfer_desc": "a: downloading bytes"}
    with (
        shown_by(shown.append),
        quiet_loading(),
        XetDownloadProgressReporter(**names, total=8_000_000, log_level=0) as reporter,
    ):
        reporter.update_progress(Report(0, 6_000_000))
        reporter.update_progress(Report(8_000_000, 8_000_000))
    assert [(amount.done, amount.total, amount.unit) for amount in shown] == [(8, 8, "MB of a.safetensors downloaded")]
