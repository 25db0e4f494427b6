"""The settings of ``qlora-exp quantize``, typed. Their defaults are in conf/ptq.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.enums import Enum
from qlora_exp.errors import ConfigError, nearest
from qlora_exp.paths import CONF

if TYPE_CHECKING:
    from qlora_exp.quantizers.affine import AffineFormat

BITS = range(2, 9)
MOST_FORMATS = 64


class Calibration(Enum):
    """How the range of a group of weights is chosen."""

    minmax = "minmax"
    mse = "mse"
    """The range with the smallest squared error of the weights."""
    activations = "activations"
    """Columns that see large inputs are scaled up first (AWQ), so that the layer's output changes least."""


@dataclass
class PtqConfig:
    """``qlora-exp quantize``: conf/ptq.yaml, which isn't part of a run's configuration. Every combination of ``bits``,
    ``symmetric`` and ``groups`` is tried."""

    bits: list[int]
    symmetric: list[bool]
    groups: list[str]
    """``tensor``, ``channel`` or a number of inputs."""
    calibration: Calibration
    rows: int
    """Rows of the training split whose inputs the layers see."""
    items: int
    """Items of the run's split that are scored before and after."""

    def formats(self) -> list[AffineFormat]:
        """Return every combination."""
        from qlora_exp.quantizers.affine import AffineFormat

        sizes: list[Any] = [int(group) if group.isdecimal() else group for group in self.groups]
        return [AffineFormat(b, symmetric, size) for b in self.bits for symmetric in self.symmetric for size in sizes]


def load_ptq_config(changes: Mapping[str, Any]) -> PtqConfig:
    """Return conf/ptq.yaml, overridden by ``changes`` (``None`` keeps a default).

    Raises:
        ConfigError: a value is unknown or out of range.
    """
    overrides = {key: value for key, value in changes.items() if value is not None}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PtqConfig), OmegaConf.load(CONF / "ptq.yaml"), overrides)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = f"qlora-exp quantize: {error.full_key or error.key}"
        raise ConfigError(str(error).splitlines()[0], where, "qlora-exp quantize --help") from None
    assert isinstance(settings, PtqConfig)
    for name in ("bits", "symmetric", "groups"):
        if not getattr(settings, name):
            raise ConfigError(f"{name} is empty", "qlora-exp quantize", "e.g. --bits 8,4 --group 64")
    for bits in settings.bits:
        if bits not in BITS:
            raise ConfigError(f"there is no format of {bits} bits", f"--bits {bits}", "2 to 8")
    for group in settings.groups:
        if not (group in ("tensor", "channel") or (group.isdecimal() and int(group) > 1)):
            hint = nearest(group, ("tensor", "channel")) if not group.isdecimal() else "at least 2"
            raise ConfigError(f"there is no group {group!r}", "--group", f"{hint}; or a number of inputs, e.g. 64")
    for name in ("rows", "items"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name} is {getattr(settings, name)}", f"--{name}", "0 or more")
    if settings.calibration is Calibration.activations and settings.rows == 0:
        raise ConfigError("this calibration needs rows", "--calibration activations", "--rows 64")
    if (count := len(settings.bits) * len(settings.symmetric) * len(settings.groups)) > MOST_FORMATS:
        raise ConfigError(f"{count} formats are too many", "quantize", f"at most {MOST_FORMATS}")
    return settings
