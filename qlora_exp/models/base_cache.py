"""Where a run's base comes from: loaded for this run only, or cached between trials and cloned without copying
tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from qlora_exp.config.schema import Config, ModelConfig
from qlora_exp.models.base import Base, clone_sharing_weights, load_base
from qlora_exp.models.sources import fingerprint, resolve_source

T = TypeVar("T")


class NoCache:
    """Loads the base for every run and caches nothing."""

    warm = False

    def get(self, config: Config, device_kind: str) -> Base:
        return load_base(config, device_kind)

    def model(self, base: Base) -> PreTrainedModel:
        """Return the base's own model: no other run needs it."""
        return base.model

    def memoize(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        return make()


class BaseCache:
    """Keeps the last base, and the last object of each other kind that doesn't change between trials. Trials get clones
    of the base."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Hashable, Any]] = {}
        self._new = False
        """Whether an object was made since the last ``gc.freeze()``."""

    @property
    def warm(self) -> bool:
        """Whether a base is in the cache."""
        return "base" in self._last

    def get(self, config: Config, device_kind: str) -> Base:
        """Return the cached base if ``config`` needs the same one; otherwise free it, then load the new one."""
        _collect()  # the last trial's clone, trainer and optimizer are reference cycles
        key = (model_key(config.model), repr(config.quantization), device_kind)
        base = self.memoize("base", key, lambda: load_base(config, device_kind))
        if self._new:
            gc.freeze()  # the collector skips cached objects: saves half a second per trial
            self._new = False
        return base

    def model(self, base: Base) -> PreTrainedModel:
        return clone_sharing_weights(base)

    def memoize(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return the object made for ``key`` last time, or else ``make()``. One object of each ``kind`` is cached."""
        if kind not in self._last or self._last[kind][0] != key:
            if self._last.pop(kind, None) is not None:
                gc.unfreeze()
                _collect()
            self._last[kind], self._new = (key, make()), True
        value: T = self._last[kind][1]
        return value


def model_key(model: ModelConfig) -> Hashable:
    """Return a key for a model's configuration and the contents of its files."""
    return repr(model), fingerprint(resolve_source(model))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
