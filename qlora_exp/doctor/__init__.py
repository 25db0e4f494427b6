"""Named checks of this machine and installation, and of what a sweep would ask of it. Nothing is changed."""

from qlora_exp.doctor.check import Check
from qlora_exp.doctor.checks import checks, disk_space, embedded_assets, writable
from qlora_exp.doctor.sweep_disk import sweep_disk

__all__ = ["Check", "checks", "disk_space", "embedded_assets", "sweep_disk", "writable"]
