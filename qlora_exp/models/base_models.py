"""The interface through which a run gets its base model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from qlora_exp.config.schema import Config
from qlora_exp.models.base import Base

T = TypeVar("T")


class BaseModels(Protocol):
    """Gives a run its base model, and caches what a process with many runs needs to make only once."""

    @property
    def warm(self) -> bool:
        """Whether a base is in the cache."""

    def get(self, config: Config, device_kind: str) -> Base:
        """Return the base that ``config`` needs, as :func:`models.base.load_base` loads it."""

    def model(self, base: Base) -> Any:
        """Return a model to evaluate or train. Changes to it don't reach a base that is needed again."""

    def memoize(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, or its last result for the same key."""
