"""The plan of one candidate: parameters, bytes by part, whether it fits, time, money and disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from qlora_exp.architecture.families import known_architecture
from qlora_exp.architecture.run_plan import check_integer_groups
from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.architecture.targets import rank_warning
from qlora_exp.architecture.tuned_weights import trained_modules
from qlora_exp.config.checks_lora import int8_dora
from qlora_exp.config.checks_method import scaled_16_bit_weights
from qlora_exp.config.enums import DeviceChoice, Isolation, Method, PaddingFree
from qlora_exp.config.schema import Config, ModelConfig, to_plain
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.estimate.budget import Affordable, BudgetTooSmall, affordable_steps, check_covers_a_step, check_energy
from qlora_exp.estimate.calibration import calibrated_card_rate, calibrated_rate
from qlora_exp.estimate.candidates import Candidate
from qlora_exp.estimate.device import PlanDevice, device_notes, device_of
from qlora_exp.estimate.estimator import Estimator, RunEstimate
from qlora_exp.estimate.memory_fit import planned_fit
from qlora_exp.estimate.micro_batch_tokens import micro_batch_note
from qlora_exp.estimate.throughput import Interval, MeasuredThroughput, from_finished_runs
from qlora_exp.estimate.tokens import PlannedRows, RowCounter
from qlora_exp.estimate.workload import steps_of_epochs
from qlora_exp.records.model_name import model_name
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import Environment, RunRecord
from qlora_exp.system import heap
from qlora_exp.system.cards import card_of, read_prices
from qlora_exp.system.environment import available_cores, probe_without_torch

Shared = TypeVar("Shared")


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


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The plan of one configuration; ``None`` is unknown.

    * ``rows``: if ``None``, peak, seconds and tokens assume rows as long as ``training.max_length``.
    * ``steps``, ``tokens`` and ``seconds`` are of training; ``other_seconds`` are of loading and scoring, from similar
      runs.
    * ``usd`` covers both; training alone if ``other_seconds`` is unknown.
    * ``budget``: what each limit is enough for: steps of a run, trials of a sweep.
    * ``fits``: ``None`` if the device's memory is unknown; ``False`` also if it can't run, or if the budget is too
      small for one step.
    * ``borderline``: the memory limit lies within the prediction's error. ``reason`` says why; ``notes`` adds
      warnings.
    """

    params: dict[str, Any]
    settings: dict[str, Any]
    device: str | None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    memory: PlannedMemory | None = None
    disk: PlannedDisk | None = None
    rows: PlannedRows | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: Interval | None = None
    other_seconds: Interval | None = None
    usd: Interval | None = None
    budget: tuple[Affordable, ...] = ()
    fits: bool | None
    borderline: bool = False
    reason: str
    notes: tuple[str, ...] = ()


class Planner:
    """Plans candidates one after the other, and computes what they share once.

    ``device``: replaces each candidate's own. ``fit_bytes``: the memory that must hold all of it; replaces
    ``budget.memory_bytes`` and the device's memory. ``records``: ended runs, the newest first; those of the same base
    take precedence over the machine's calibration. ``counter``: counts the tasks' rows; without it, rows count as
    ``training.max_length`` tokens. ``hosts``: trial hosts will train, and share the cores and the memory.

    Raises:
        ConfigError: the price table can't be read.
    """

    def __init__(
        self,
        device: PlanDevice | None = None,
        fit_bytes: int | None = None,
        records: Sequence[RunRecord] = (),
        counter: RowCounter | None = None,
        hosts: bool = False,
    ) -> None:
        self._device, self._fit_bytes, self._hosts = device, fit_bytes, hosts
        self._records, self._prices, self._counter = records, read_prices(), counter
        self._results: dict[tuple[Any, ...], Any] = {}
        self._problems: dict[str, QloraExpError] = {}
        self._cheapest_over_budget: BudgetTooSmall | None = None
        self._some_can_start = False

    def with_rows(self, counter: RowCounter | None, records: Sequence[RunRecord]) -> Planner:
        """Return a planner of single runs for the same device and memory, with the tasks' rows and other ended runs."""
        other = Planner(self._device, self._fit_bytes, records, counter)
        other._results = {key: result for key, result in self._results.items() if key[0] != "rates"}
        return other

    def checkpointing(self, config: Config) -> bool:
        """Return whether training ``config`` uses gradient checkpointing.

        Raises:
            ModelError: the model is unknown, or ``targets`` match nothing in it.
        """
        return self.estimate(config, self._counter.of(config) if self._counter is not None else None).checkpointing

    def plan(self, point: Candidate) -> PlannedRun:
        """Return the plan of one candidate. One that can't run gets a plan with its reason, too."""
        config = point.config
        try:
            if point.problem is not None:
                raise point.problem
            assert config is not None
            return self._planned(point.params, config)
        except QloraExpError as error:
            parts = getattr(error, "errors", (error,))
            for part in parts:
                self._problems.setdefault(str(part), part)
            return PlannedRun(
                params=point.params,
                settings=_settings(config) if config is not None else {},
                device=self.device(config).name if config is not None else None,
                fits=False,
                reason=f"can't run: {'; '.join(part.what for part in parts)}",
            )

    @property
    def problems(self) -> list[QloraExpError]:
        """If no candidate can run: why, each problem once. Of the budget's problems, the one closest to a single
        step."""
        if self._some_can_start:
            return []
        return [*self._problems.values(), *([self._cheapest_over_budget] if self._cheapest_over_budget else [])]

    def device(self, config: Config) -> PlanDevice:
        """Return the device that ``config`` is planned for."""
        return self._device or device_of(config)

    def architecture(self, model: ModelConfig) -> Architecture:
        """Return the architecture from the package's table, or else from the configuration file (which loads torch).

        Raises:
            ModelError: there is no such configuration, or transformers can't build it.
        """
        return self._once(("architecture", *_model_key(model)), lambda: known_architecture(model) or _describe(model))

    def adapted(self, config: Config) -> tuple[WeightShape, ...]:
        """Return the linear layers that get an adapter, or are trained themselves.

        Raises:
            ModelError: ``targets`` match nothing in this architecture.
        """

        def resolve() -> tuple[WeightShape, ...]:
            architecture = self.architecture(config.model)
            names = set(trained_modules(architecture, config))
            return tuple(shape for shape in architecture.weights if shape.name in names)

        key = ("adapted", *_model_key(config.model), repr(config.targets), repr(config.method))
        return self._once(key, resolve)

    def estimate(self, config: Config, rows: PlannedRows | None = None) -> RunEstimate:
        """Return what training ``config`` takes on its device. ``rows``: the task's rows, if they are known.

        Raises:
            ModelError: the model is unknown, or ``targets`` match nothing in it.
        """
        device = self.device(config)
        limits = (self._fit_bytes, config.budget.memory_bytes, device.memory_bytes)
        estimator = Estimator(
            self.architecture(config.model),
            tuple(shape.name for shape in self.adapted(config)),
            device.hardware,
            rows=lambda _: rows.lengths if rows is not None else None,
            rates=lambda config, steps, padding_free: self._rates(config, device, steps, padding_free),
            joined_heap=heap.merges_free_chunks(heap.tunables_for_training()),
            memory_bytes=next((size for size in limits if size is not None), None),
            prices=self._prices,
        )
        return estimator.estimate(config)

    def _planned(self, params: dict[str, Any], config: Config) -> PlannedRun:
        device, budget = self.device(config), config.budget
        if device.kind == "cpu" and (problem := int8_dora(config) or scaled_16_bit_weights(config)):
            raise problem
        check_integer_groups(self.architecture(config.model), config.quantization)
        rows = self._counter.of(config) if self._counter is not None else None
        estimate = self.estimate(config if rows is not None else self._with_steps(config), rows)
        architecture, modules = estimate.estimator.architecture, estimate.estimator.modules
        is_lora = config.method.kind is Method.lora
        rank_note = rank_warning(architecture, modules, config.lora) if is_lora else None
        peak, base, adapters = estimate.memory, estimate.memory.base, estimate.memory.adapters
        exact = base.total_bytes + adapters.adapter_bytes + adapters.gradient_bytes + adapters.optimizer_bytes
        hosts = config.workers.count if self._hosts and config.workers is not None else None
        memory_bytes = device.memory_bytes
        if hosts is not None and device.kind == "cpu" and memory_bytes is not None:
            memory_bytes //= hosts
        fit = planned_fit(peak, exact, device.kind, self._fit_bytes, budget.memory_bytes, memory_bytes)
        budget_problem = self._budget_problem(config, device, estimate)
        self._some_can_start |= budget_problem is None
        train, other = estimate.time.train, estimate.time.other
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
                activation_bytes=max(peak.needed_bytes - exact, 0),
                peak_bytes=peak.needed_bytes,
            ),
            disk=PlannedDisk(adapters.file_bytes, adapters.checkpoint_bytes),
            rows=rows,
            steps=estimate.workload.steps,
            tokens=estimate.workload.tokens,
            seconds=train,
            other_seconds=other,
            usd=estimate.usd(train.plus(other) if train is not None else None),
            budget=() if self._hosts else tuple(affordable_steps(budget, estimate)),
            fits=fit.fits if budget_problem is None else False,
            borderline=fit.borderline and budget_problem is None,
            reason=fit.reason if budget_problem is None else f"{budget_problem.what}; {fit.reason}",
            notes=(
                *device_notes(config, device, architecture),
                *(self._counter.warnings(config) if self._counter is not None else ()),
                *([rank_note] if rank_note else []),
                *([f"rows are padded: {estimate.padded_because}"] if _pads_unasked(config, estimate) else []),
                *([micro_batch_note(config, estimate.micro_batch_tokens)] if estimate.micro_batch_tokens else []),
            ),
        )

    def _with_steps(self, config: Config) -> Config:
        """Return ``config`` with the steps of ``training.epochs``, if its rows can't be counted in tokens.

        Raises:
            DataError: the rows can't be read, so that nobody knows the steps.
        """
        training = config.training
        if training.epochs is None:
            return config
        rows = self._once(("training rows", repr(config.task)), lambda: len(load_rows(config.task).train))
        steps = steps_of_epochs(training.epochs, rows, training.batch_size)
        return replace(config, training=replace(training, epochs=None, max_steps=steps))

    def _budget_problem(self, config: Config, device: PlanDevice, estimate: RunEstimate) -> QloraExpError | None:
        try:
            if device.kind == "cpu":  # for a GPU, only its own machine knows whether energy is measured
                check_energy(config.budget, DeviceChoice.cpu)
            check_covers_a_step(config.budget, estimate)
        except BudgetTooSmall as error:
            cheapest = self._cheapest_over_budget or error
            self._cheapest_over_budget = min(cheapest, error, key=lambda problem: problem.times)
            return error
        except ConfigError as error:
            self._problems.setdefault(str(error), error)
            return error
        return None

    def _rates(
        self, config: Config, device: PlanDevice, steps: int, padding_free: bool
    ) -> tuple[MeasuredThroughput, Interval | None]:
        """Return what ended runs predict, and the calibrated rate: of this machine, or of a card by its name."""
        mode, threads = config.quantization.mode, self._threads(config)

        def look_up() -> tuple[MeasuredThroughput, Interval | None]:
            environment: Environment | None
            if device.kind == "cpu":  # as in a run with so many threads
                environment = replace(probe_without_torch(), torch_threads=threads)
                calibrated = calibrated_rate(environment, mode)
            else:  # the environment of the last run on such a card
                on_cards = (record.environment for record in self._records if record.environment.device.kind == "cuda")
                card = card_of(device.card) if device.card is not None else None
                matches = (one for one in on_cards if card is None or card_of(one.device.name or "") == card)
                environment = next(matches, None)
                calibrated = calibrated_card_rate(device.card, mode)
            if environment is None:
                return MeasuredThroughput(None, None, None), calibrated
            warm = self._hosts and config.workers is not None and config.workers.isolation is Isolation.warm
            plain = redact(to_plain(config))
            return from_finished_runs(self._records, environment, plain, steps, warm, padding_free), calibrated

        sections = (config.model, mode, config.task, config.evaluation)
        return self._once(("rates", device.name, threads, steps, padding_free, repr(sections)), look_up)

    def _threads(self, config: Config) -> int | None:
        """Return the threads of one run. Trial hosts share the cores; a single run takes OMP_NUM_THREADS, or all
        cores."""
        cores = available_cores()
        if config.training.threads is not None:
            return config.training.threads
        if self._hosts:
            at_once = (config.workers.count if config.workers is not None else None) or 1
            return max(1, (cores or 1) // at_once)
        omp_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        return int(omp_threads) if omp_threads.isdecimal() and int(omp_threads) > 0 else cores

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Shared]) -> Shared:
        """Return the result of ``compute``, which is called once for a key. Its error is raised each time."""
        if key not in self._results:
            try:
                self._results[key] = compute()
            except QloraExpError as error:
                self._results[key] = error
        result = self._results[key]
        if isinstance(result, QloraExpError):
            raise result
        return result  # type: ignore[no-any-return]


def _describe(model: ModelConfig) -> Architecture:
    from qlora_exp.models.inspect import describe, describe_file
    from qlora_exp.models.weight_files import holds_weights

    path = Path(model.variant_path).expanduser() if model.variant_path else None
    if path is not None and (path / "config.json").is_file() and not holds_weights(path):
        path = path / "config.json"
    if path is not None and path.suffix == ".json":
        return describe_file(path)
    return describe(model, to_load=False)


def _pads_unasked(config: Config, estimate: RunEstimate) -> bool:
    return estimate.padded_because is not None and config.training.padding_free is PaddingFree.auto


def _settings(config: Config) -> dict[str, Any]:
    """Return what the plan is of, with every key of ``training`` by its name."""
    training = config.training
    return {
        "model": model_name(vars(config.model)),
        "variant": config.model.variant.value,
        "quantization": config.quantization.mode.value,
        "r": config.lora.r,
        "targets": config.targets.modules or config.targets.set,
        **to_plain(training),
        "micro_batch_size": training.micro_batch_size or training.batch_size,
    }


def _model_key(model: ModelConfig) -> tuple[Any, ...]:
    return model.variant_path, model.family, model.checkpoint, model.revision
