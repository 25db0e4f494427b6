"""The plan of one configuration: parameters, bytes by part, whether it fits, time, money and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qlora_exp.architecture.families import known_architecture
from qlora_exp.architecture.run_plan import compute_dtype
from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.architecture.targets import rank_warning, resolve_targets
from qlora_exp.config.checks_lora import int8_dora
from qlora_exp.config.schema import Config, DeviceChoice, ModelConfig, TargetsConfig
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.estimate.affordable_steps import (
    Affordable,
    BudgetTooSmall,
    StepCost,
    affordable_steps,
    check_covers_a_step,
)
from qlora_exp.estimate.budget import check_energy, limits_of
from qlora_exp.estimate.candidates import Candidate
from qlora_exp.estimate.cost import UNKNOWN_COST, CostEstimator
from qlora_exp.estimate.device import PlanDevice, device_notes, device_of
from qlora_exp.estimate.fit_result import FitResult, fit_result, planned_limit
from qlora_exp.estimate.flops import Workload
from qlora_exp.estimate.peak import predicted_peak
from qlora_exp.estimate.tokens import PlannedRows, RowCounter
from qlora_exp.estimate.weights_and_optimizer import BaseBytes, adapter_bytes, base_bytes
from qlora_exp.records.types import RunRecord
from qlora_exp.system import heap

Found = TypeVar("Found")


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes by part.

    ``activation_bytes`` is what training needs at its peak beyond the other parts, which are exact. On a CPU nothing of
    the process itself is included.
    """

    base_weight_bytes: int
    quantization_state_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class PlannedDisk:
    """``adapter_file_bytes`` stays after a run. ``checkpoint_bytes`` is one training checkpoint with the optimizer's
    state."""

    adapter_file_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class PlannedRun:
    """The plan of one configuration; ``None`` is unknown.

    * ``fits``: ``None`` if the device's memory is unknown; ``False`` also if it can't run, or if the budget is too
      small for one step.
    * ``borderline``: the memory limit lies within the prediction's error. ``reason`` says why; ``notes`` adds
      warnings.
    * ``rows``: if ``None``, peak, seconds and tokens assume rows as long as ``training.max_length``.
    * ``steps``, ``tokens`` and ``seconds`` are of training; ``other_seconds`` are of loading and scoring, from similar
      runs.
    * ``usd`` covers both; training alone if ``other_seconds`` is unknown.
    * ``budget``: what each limit is enough for: steps of a run, trials of a sweep.
    """

    params: dict[str, Any]
    settings: dict[str, Any]
    device: str | None
    trainable_parameters: int | None
    total_parameters: int | None
    memory: PlannedMemory | None
    disk: PlannedDisk | None
    rows: PlannedRows | None
    steps: int | None
    tokens: int | None
    seconds: float | None
    seconds_interval: tuple[float, float] | None
    other_seconds: float | None
    other_seconds_interval: tuple[float, float] | None
    usd: float | None
    usd_interval: tuple[float, float] | None
    budget: tuple[Affordable, ...]
    fits: bool | None
    borderline: bool
    reason: str
    notes: tuple[str, ...]


class Planner:
    """Plans candidates one after the other, and computes what they share once.

    ``device``: replaces each candidate's own. ``fit_bytes``: the memory that must hold all of it; replaces
    ``budget.memory_bytes`` and the device's memory. ``records``: finished runs, from which seconds are predicted.
    ``counter``: counts the tasks' rows; without it, rows count as ``training.max_length`` tokens. ``hosts``: trial
    hosts will train.
    """

    def __init__(
        self,
        device: PlanDevice | None = None,
        fit_bytes: int | None = None,
        records: Sequence[RunRecord] = (),
        counter: RowCounter | None = None,
        hosts: bool = False,
    ) -> None:
        self._device = device
        self._fit_bytes = fit_bytes
        self._architectures: dict[str, Architecture | QloraExpError] = {}
        self._adapted: dict[tuple[str, str], tuple[WeightShape, ...] | QloraExpError] = {}
        self._cost_estimator = CostEstimator(records, hosts)
        self._hosts = hosts
        self._counter = counter
        self._problems: dict[str, QloraExpError] = {}
        self._cheapest_over_budget: BudgetTooSmall | None = None
        self._some_can_start = False

    def plan(self, point: Candidate) -> PlannedRun:
        """Return the plan of one candidate. One that can't run gets a plan with its reason, too."""
        config = point.config
        if config is None:
            assert point.problem is not None
            return self._not_runnable(point.params, None, point.problem)
        try:
            return self._planned(point.params, config, self._device or device_of(config))
        except QloraExpError as error:
            return self._not_runnable(point.params, config, error)

    @property
    def problems(self) -> list[QloraExpError]:
        """If no candidate can run: why, each problem once. Of the budget's problems, the one closest to a single
        step."""
        errors = [
            *self._problems.values(),
            *([self._cheapest_over_budget] if self._cheapest_over_budget is not None else []),
        ]
        return errors if not self._some_can_start else []

    def architecture(self, model: ModelConfig) -> Architecture:
        """Return the architecture from the package's table, or else from the configuration file (which loads torch).

        Raises:
            ModelError: there is no such configuration, or transformers can't build it.
        """
        key = _model_key(model)
        if key not in self._architectures:
            try:
                self._architectures[key] = known_architecture(model) or _describe(model)
            except QloraExpError as error:
                self._architectures[key] = error
        return _or_raise(self._architectures[key])

    def adapted(self, model: ModelConfig, targets: TargetsConfig) -> tuple[WeightShape, ...]:
        """Return the layers that ``targets`` adapt.

        Raises:
            ModelError: ``targets`` match nothing in this architecture.
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
        """Return the bytes of the frozen base on ``device``."""
        quantization = config.quantization
        dtype = compute_dtype(quantization, device.kind, device.bf16)
        return base_bytes(self.architecture(config.model), quantization, dtype)

    def _planned(self, params: dict[str, Any], config: Config, device: PlanDevice) -> PlannedRun:
        _check_device(config, device)
        architecture = self.architecture(config.model)
        base = self.base(config, device)
        adapted = self.adapted(config.model, config.targets)
        adapters = adapter_bytes(adapted, config.lora, config.training.optimizer)
        names = [shape.name for shape in adapted]
        too_wide = rank_warning(architecture, names, config.lora)
        rows = self._counter.of(config) if self._counter is not None else None
        peak = _peak(architecture, names, config, device, rows)
        exact = base.total_bytes + adapters.adapter_bytes + adapters.gradient_bytes + adapters.optimizer_bytes
        limit = planned_limit(self._fit_bytes, config.budget.memory_bytes, self._shared(device, config))
        fit = fit_result(peak, exact, base.total_bytes, limit, device.kind)
        limits = limits_of(config.budget)
        cost, step_cost = self._cost_estimator.estimate_cost(config, device, architecture, names, rows)
        budget_problem = self._budget_problem(config, device, step_cost)
        if budget_problem is not None:
            fit = FitResult(False, False, f"{budget_problem.what}; {fit.reason}")
        self._some_can_start |= budget_problem is None
        return PlannedRun(
            params=params,
            settings=_settings(config),
            device=device.name,
            trainable_parameters=adapters.trainable_parameters,
            total_parameters=architecture.total_parameters,
            memory=PlannedMemory(
                base_weight_bytes=base.base_weight_bytes,
                quantization_state_bytes=base.quantization_state_bytes,
                adapter_bytes=adapters.adapter_bytes,
                gradient_bytes=adapters.gradient_bytes,
                optimizer_bytes=adapters.optimizer_bytes,
                activation_bytes=max(peak - exact, 0),
                peak_bytes=peak,
            ),
            disk=PlannedDisk(adapters.file_bytes, adapters.checkpoint_bytes),
            rows=rows,
            **vars(cost),
            budget=() if self._hosts else tuple(affordable_steps(limits, config.budget.usd_per_hour, step_cost)),
            **vars(fit),
            notes=(*device_notes(config, device, architecture), *([too_wide] if too_wide else [])),
        )

    def _shared(self, device: PlanDevice, config: Config) -> PlanDevice:
        """Return ``device`` with the share of this machine's memory that each concurrent trial may take."""
        hosts = config.workers.count if self._hosts and config.workers is not None else None
        if hosts is None or device.kind != "cpu" or device.memory_bytes is None:
            return device
        return replace(device, memory_bytes=device.memory_bytes // hosts)

    def _budget_problem(self, config: Config, device: PlanDevice, step_cost: StepCost) -> QloraExpError | None:
        try:
            if device.kind == "cpu":  # for a GPU, only its own machine knows whether energy is measured
                check_energy(config.budget, DeviceChoice.cpu)
            check_covers_a_step(limits_of(config.budget), config.budget.usd_per_hour, step_cost)
        except BudgetTooSmall as error:
            self._cheapest_over_budget = min(
                self._cheapest_over_budget or error, error, key=lambda problem: problem.times
            )
            return error
        except ConfigError as error:
            self._problems.setdefault(str(error), error)
            return error
        return None

    def _not_runnable(self, params: dict[str, Any], config: Config | None, error: QloraExpError) -> PlannedRun:
        parts = getattr(error, "errors", (error,))
        for part in parts:
            self._problems.setdefault(str(part), part)
        return PlannedRun(
            params=params,
            settings=_settings(config) if config is not None else {},
            device=(self._device or device_of(config)).name if config is not None else None,
            trainable_parameters=None,
            total_parameters=None,
            memory=None,
            disk=None,
            rows=None,
            **vars(UNKNOWN_COST),
            budget=(),
            fits=False,
            borderline=False,
            reason=f"can't run: {'; '.join(part.what for part in parts)}",
            notes=(),
        )


def _describe(model: ModelConfig) -> Architecture:
    from qlora_exp.models.inspect import describe, describe_file
    from qlora_exp.models.weight_files import holds_weights

    path = Path(model.path).expanduser() if model.path else None
    if path is not None and (path / "config.json").is_file() and not holds_weights(path):
        path = path / "config.json"
    if path is not None and path.suffix == ".json":
        return describe_file(path)
    return describe(model, to_load=False)


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
        steps=Workload.of(config.training, rows.lengths).steps if rows else None,
        joined_heap=heap.merges_free_chunks(heap.tunables_for_training()),
    ).needed_bytes


def _check_device(config: Config, device: PlanDevice) -> None:
    problem = int8_dora(config) if device.kind == "cpu" else None
    if problem is not None:
        raise problem


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


def _or_raise(result: Found | QloraExpError) -> Found:
    if isinstance(result, QloraExpError):
        raise result
    return result
