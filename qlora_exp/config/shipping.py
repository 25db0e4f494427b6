"""The settings of a small model: how it ships, training through rounded weights, and a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_exp.config.enums import DistillationMode, Divergence, Quantization, RangeChoice, ShippedModel


@dataclass
class ShipConfig:
    """Which model is scored after training: the one that ships. Records of earlier versions lack it."""

    model: ShippedModel | None
    """``None``: the trained model is scored, and nothing is said of shipping."""
    format: str | None
    """What the linear layers are rounded to: int2 … int8, q8_0, q4_0, q4_1, ternary; ``None``: 16 bits."""
    symmetric: bool
    group: str
    """Inputs that share a scale: a number, ``channel`` or ``tensor``."""
    calibration: RangeChoice


@dataclass
class DistillationConfig:
    """Learning from a teacher's probabilities. Records of earlier versions lack it."""

    teacher: str | None
    """A finished run (an id, a folder, or last), or an untuned model as ``model:NAME``. ``None``: the rows' own answers
    are learned alone."""
    teacher_quantization: Quantization | None
    """``None``: as the run was trained; for a model, as the student's base."""
    mode: DistillationMode
    divergence: Divergence
    temperature: float
    gold_weight: float
    """Weight of the rows' own answers, from 0 to 1."""
    top_k: int
    """Probabilities of the teacher that are kept for each token; all others count as one outcome."""


@dataclass
class QatConfig:
    """Training with rounded weights (quantization-aware training). The run then ships in this format."""

    format: str | None
    """As ``ship.format``; ``None``: weights are not rounded."""
    symmetric: bool
    group: str
    start_step: int
    """Steps that are trained with exact weights first."""
    warmup_ratio: float
    """Share of the steps in which weights move from exact to rounded; for ternary weights."""
