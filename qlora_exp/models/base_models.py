"""Where a run takes its base model from."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from qlora_exp.config.schema import Config
from qlora_exp.models.base import Base

T = TypeVar("T")


class BaseModels(Protocol):
    """Where a run's base comes from, and what else a host that makes many runs need not make twice."""

    @property
    def warm(self) -> bool:
        """Whether a base has been lent before."""

    def lend(self, config: Config, device_kind: str) -> Base:
        """The base that ``config`` asks for, as :func:`models.load_base` loads it."""

    def model(self, base: Base) -> Any:
        """A model to evaluate or to train; what is done to it does the base no harm, or nobody needs the base again."""

    def kept(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, or what it gave the last time with the same key."""
