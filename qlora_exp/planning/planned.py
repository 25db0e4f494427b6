"""A configuration's figures: parameters, bytes by part, whether they fit, time, money and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qlora_exp import heap
from qlora_exp.config import Config, ModelConfig, TargetsConfig
from qlora_exp.errors import QloraExpError
from qlora_exp.plan import Architecture, WeightShape, compute_dtype, int8_dora
from qlora_exp.plan.peak import predicted_peak
from qlora_exp.plan.seconds import Extent
from qlora_exp.plan.tables import known_architecture
from qlora_exp.plan.targets import resolve_targets
from qlora_exp.plan.weights import BaseBytes, adapter_bytes, base_bytes
from qlora_exp.planning.devices import PlanDevice, device_of
from qlora_exp.planning.paying import UNKNOWN, Cashier
from qlora_exp.planning.points import Point
from qlora_exp.planning.rows import PlannedRows, RowCounter
from qlora_exp.records import RunRecord
from qlora_exp.tables import bytes_text

Found = TypeVar("Found")


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes by part; ``None`` is unknown. ``activation_bytes`` is whatever training needs at its peak beyond the other
    parts; ``known_bytes`` the sum of what is known, which no peak lies below."""

    base_weight_bytes: int
    quantization_state_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    peak_bytes: int | None

    @property
    def known_bytes(self) -> int:
        parts = (self.base_weight_bytes, self.quantization_state_bytes, self.adapter_bytes)
        return sum(parts) + self.gradient_bytes + self.optimizer_bytes + (self.activation_bytes or 0)


@dataclass(frozen=True)
class PlannedDisk:
    """``adapter_file_bytes`` stays after a run; ``checkpoint_bytes`` is one training checkpoint, the optimizer's state
    included."""

    adapter_file_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class PlannedRun:
    """One configuration's plan. ``fits`` is ``None`` where the device's memory or the peak isn't known, ``False`` also
    for what can't be run at all; ``reason`` says why in words. ``rows`` is ``None`` where they aren't known here: peak
    and seconds are then those of rows as long as ``training.max_length``. ``seconds`` are of training,
    ``other_seconds`` of loading and scoring, by runs like it; ``usd`` is of both, of training alone where the others
    aren't known."""

    params: dict[str, Any]
    settings: dict[str, Any]
    device: str | None
    trainable_parameters: int | None
    total_parameters: int | None
    memory: PlannedMemory | None
    disk: PlannedDisk | None
    rows: PlannedRows | None
    seconds: float | None
    seconds_interval: tuple[float, float] | None
    other_seconds: float | None
    other_seconds_interval: tuple[float, float] | None
    usd: float | None
    usd_interval: tuple[float, float] | None
    fits: bool | None
    reason: str


class Planner:
    """Plans points one after the other; what several have in common is worked out once. ``device``: for all of them, in
    place of each one's own; ``budget_bytes``: the memory to fit into, in place of ``budget.memory_bytes`` and the
    device's; ``records``: finished runs, by which seconds are told; ``counter``: counts the tasks' rows, which are
    taken for as long as ``training.max_length`` without it; ``hosts``: trial hosts will train."""

    def __init__(
        self,
        device: PlanDevice | None = None,
        budget_bytes: int | None = None,
        records: Sequence[RunRecord] = (),
        counter: RowCounter | None = None,
        hosts: bool = False,
    ) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self._architectures: dict[str, Architecture | QloraExpError] = {}
        self._adapted: dict[tuple[str, str], tuple[WeightShape, ...] | QloraExpError] = {}
        self._bases: dict[tuple[Any, ...], BaseBytes] = {}
        self._cashier = Cashier(records, hosts)
        self._counter = counter
        self._problems: dict[str, QloraExpError] = {}

    def plan(self, point: Point) -> PlannedRun:
        """The figures of one point; what can't be run becomes a row with its reason, too."""
        config = point.config
        if config is None:
            assert point.problem is not None
            return self._impossible(point.params, None, point.problem)
        try:
            return self._planned(point.params, config, self._device or device_of(config))
        except QloraExpError as error:
            return self._impossible(point.params, config, error)

    @property
    def problems(self) -> list[QloraExpError]:
        """Why points can't be run, each problem once."""
        return list(self._problems.values())

    def architecture(self, model: ModelConfig) -> Architecture:
        """As the package's table has it, or else described from its configuration file (which loads torch).

        Raises:
            ModelError: there is no such configuration, or transformers can't build it.
        """
        key = _model_key(model)
        if key not in self._architectures:
            try:
                self._architectures[key] = known_architecture(model) or _described(model)
            except QloraExpError as error:
                self._architectures[key] = error
        return _or_raise(self._architectures[key])

    def adapted(self, model: ModelConfig, targets: TargetsConfig) -> tuple[WeightShape, ...]:
        """The layers that ``targets`` adapt.

        Raises:
            ModelError: it matches nothing in this architecture.
        """
        key = (_model_key(model), repr(targets))
        if key not in self._adapted:
            architecture = self.architecture(model)
            try:
                names = set(resolve_targets(architecture, targets))
                self._adapted[key] = tuple(shape for shape in architecture.weights if shape.name in names)
            except QloraExpError as error:
                self._adapted[key] = error
        return _or_raise(self._adapted[key])

    def base(self, config: Config, device: PlanDevice) -> BaseBytes:
        """Bytes of the frozen base on ``device``."""
        quantization = config.quantization
        dtype = compute_dtype(quantization, device.kind, device.bf16)
        key = (_model_key(config.model), quantization.mode, quantization.double_quantization, dtype)
        if key not in self._bases:
            self._bases[key] = base_bytes(self.architecture(config.model), quantization, dtype)
        return self._bases[key]

    def _planned(self, params: dict[str, Any], config: Config, device: PlanDevice) -> PlannedRun:
        _refuse(config, device)
        architecture = self.architecture(config.model)
        base = self.base(config, device)
        adapted = self.adapted(config.model, config.targets)
        adapters = adapter_bytes(adapted, config.lora, config.training.optimizer)
        names = [shape.name for shape in adapted]
        rows = self._counter.of(config) if self._counter is not None else None
        peak = _peak(architecture, names, config, device, rows)
        paid = self._cashier.payment(config, device, architecture, names, rows)
        known = PlannedMemory(
            base_weight_bytes=base.base_weight_bytes,
            quantization_state_bytes=base.quantization_state_bytes,
            adapter_bytes=adapters.adapter_bytes,
            gradient_bytes=adapters.gradient_bytes,
            optimizer_bytes=adapters.optimizer_bytes,
            activation_bytes=None,
            peak_bytes=peak,
        )
        memory = replace(known, activation_bytes=max(peak - known.known_bytes, 0))
        limits = (self._budget_bytes, config.budget.memory_bytes, device.memory_bytes)
        limit = next((one for one in limits if one is not None), None)
        fits, reason = _fits(memory, limit)
        return PlannedRun(
            params=params,
            settings=_settings(config),
            device=device.name,
            trainable_parameters=adapters.trainable_parameters,
            total_parameters=architecture.total_parameters,
            memory=memory,
            disk=PlannedDisk(adapters.file_bytes, adapters.checkpoint_bytes),
            rows=rows,
            **vars(paid),
            fits=fits,
            reason=reason,
        )

    def _impossible(self, params: dict[str, Any], config: Config | None, error: QloraExpError) -> PlannedRun:
        parts = getattr(error, "errors", (error,))
        for one in parts:
            self._problems.setdefault(str(one), one)
        return PlannedRun(
            params=params,
            settings=_settings(config) if config is not None else {},
            device=(self._device or device_of(config)).name if config is not None else None,
            trainable_parameters=None,
            total_parameters=None,
            memory=None,
            disk=None,
            rows=None,
            **vars(UNKNOWN),
            fits=False,
            reason=f"can't be run: {'; '.join(one.what for one in parts)}",
        )


def _described(model: ModelConfig) -> Architecture:
    from qlora_exp import models

    path = Path(model.path).expanduser() if model.path else None
    if path is not None and (path / "config.json").is_file():
        path = path / "config.json"
    if path is not None and path.suffix == ".json":
        return models.describe_file(path)
    return models.describe(model)


def _peak(
    architecture: Architecture, names: Sequence[str], config: Config, device: PlanDevice, rows: PlannedRows | None
) -> int:
    return predicted_peak(
        architecture,
        names,
        config,
        device.kind,
        bf16=device.bf16,
        rows=rows.lengths if rows else None,
        steps=Extent.of(config.training, rows.rows, rows.mean_tokens).steps if rows else None,
        joined_heap=heap.joins(heap.tunables()),
    ).needed_bytes


def _refuse(config: Config, device: PlanDevice) -> None:
    problem = int8_dora(config) if device.kind == "cpu" else None
    if problem is not None:
        raise problem


def _fits(memory: PlannedMemory, limit: int | None) -> tuple[bool | None, str]:
    needed = memory.peak_bytes if memory.peak_bytes is not None else memory.known_bytes
    least = "" if memory.peak_bytes is not None else "at least "
    if limit is None:
        return None, f"needs {least}{bytes_text(needed)}; no card is named (plan.device=CARD, --fit SIZE)"
    told = f"needs {least}{bytes_text(needed)} of {bytes_text(limit)}"
    if needed > limit:
        held = memory.base_weight_bytes + memory.quantization_state_bytes
        return False, f"{told}{', the base alone ' + bytes_text(held) if held > limit else ''}"
    return (None, f"{told}; activations unknown") if memory.peak_bytes is None else (True, told)


def _settings(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        "model": config.model.family,
        "variant": config.model.variant.value,
        "quantization": config.quantization.mode.value,
        "r": config.lora.r,
        "targets": config.targets.modules or config.targets.set,
        "optimizer": training.optimizer,
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size or training.batch_size,
        "max_length": training.max_length,
    }


def _model_key(model: ModelConfig) -> str:
    checkpoint = model.checkpoints.get(model.variant.value)
    return f"{model.path or ''}|{model.family}|{checkpoint}|{model.revision}"


def _or_raise(found: Found | QloraExpError) -> Found:
    if isinstance(found, QloraExpError):
        raise found
    return found
