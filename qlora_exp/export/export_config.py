"""The settings of ``qlora-exp export``, typed. Their defaults are in conf/export.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_exp.config.enums import ComputeDtype


@dataclass
class ExportConfig:
    """``qlora-exp export``: conf/export.yaml, which isn't part of a run's configuration."""

    formats: list[str]
    """adapter, merged, or a GGUF block type."""
    dtype: ComputeDtype
    """Of the merged model: bfloat16 or float16."""
    check_items: int
    tolerance: float
    """How much accuracy an exported file may lose against the run, as a share of items."""
    context_tokens: int
    generated_tokens: int
    usd_per_hour: float | None
    """null: the cost in the run's record."""
    phone: bool
    """List every criterion of the phone case in the card."""
    phone_file_bytes: int
    phone_memory_bytes: int
    phone_usd: float
