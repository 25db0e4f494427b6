"""Where a run's base comes from: loaded for it alone, or kept by a warm host and lent out in shells."""

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
    """Every run loads its base and makes everything itself."""

    warm = False

    def lend(self, config: Config, device_kind: str) -> Base:
        return load_base(config, device_kind)

    def model(self, base: Base) -> PreTrainedModel:
        return base.model

    def kept(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        return make()


class BaseCache:
    """Keeps the last base, and the last of whatever else doesn't change between trials. Trials see shells only."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Hashable, Any]] = {}
        self._new = False
        """Whether something has been made since the last look."""

    @property
    def warm(self) -> bool:
        return "base" in self._last

    def lend(self, config: Config, device_kind: str) -> Base:
        """The kept base where ``config`` asks for the same one; else that is freed first, and the new one loaded."""
        _collect()  # the last trial's shell, trainer and optimizer are cycles of references
        key = (model_key(config.model), repr(config.quantization), device_kind)
        base = self.kept("base", key, lambda: load_base(config, device_kind))
        if self._new:
            gc.freeze()  # what is kept needs no walk between trials: half a second each
            self._new = False
        return base

    def model(self, base: Base) -> PreTrainedModel:
        return clone_sharing_weights(base)

    def kept(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What was made of ``key`` last time, or else ``make()``; one of each ``kind`` is kept."""
        if kind not in self._last or self._last[kind][0] != key:
            if self._last.pop(kind, None) is not None:
                gc.unfreeze()
                _collect()
            self._last[kind], self._new = (key, make()), True
        value: T = self._last[kind][1]
        return value


def model_key(model: ModelConfig) -> Hashable:
    """What stands for a model's configuration and the contents of its files."""
    return repr(model), fingerprint(resolve_source(model))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
