"""The two models that are compared: the tuned one, and its base if it is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_exp.models.tuning import without_tuning


@dataclass(frozen=True)
class ModelPair:
    """``base`` may be ``tuned`` itself: then the base is the same model with its tuning switched off. ``None``: the
    base isn't known, or isn't asked."""

    tuned: Any
    base: Any | None

    @property
    def has_base(self) -> bool:
        return self.base is not None

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """Yield the base model."""
        if self.base is self.tuned:
            with without_tuning(self.tuned):
                yield self.tuned
        else:
            yield self.base
