"""What training one configuration takes: memory, time and money; for ``plan``, ``validate``, ``run`` and each trial."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_exp.architecture.padding import planned_padding_reason
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.tuned_weights import first_tuned_layer, layer_of, tuned_tensors
from qlora_exp.config.allowed_values import AUTO_TOKENS
from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.enums import Checkpointing, PaddingFree
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.data.items import Splits
from qlora_exp.estimate.calibration import calibrated_rate, lower_bound_seconds
from qlora_exp.estimate.memory_fit import RELATIVE_ERROR
from qlora_exp.estimate.micro_batch_tokens import check_holds_longest_row, choose_for_memory, longest_row_tokens
from qlora_exp.estimate.peak import Peak, predicted_peak
from qlora_exp.estimate.selective_checkpointing import check_selective
from qlora_exp.estimate.throughput import Interval, MeasuredThroughput, from_finished_runs, seconds_at
from qlora_exp.estimate.tokens import lengths_of
from qlora_exp.estimate.workload import RowLengths, WeightsByPass, Workload, train_flops_per_token
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import Device, Environment, Plan, RunRecord
from qlora_exp.system import heap
from qlora_exp.system.cards import Price, price_of


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds; ``None`` is unknown."""

    train: Interval | None
    least_train: float | None
    """A lower bound from the machine's calibration alone: something may have slowed earlier runs."""
    other: Interval | None
    """Loading and scoring, from similar runs."""
    before: float | None
    """The part of ``other`` before the last scoring."""


@dataclass(frozen=True)
class RunEstimate:
    """What training one configuration takes. ``estimator`` made it, and estimates variants of the configuration.

    ``workload``: with ``training.max_tokens`` its steps are expected ones; a plan's steps are an upper bound.
    """

    estimator: Estimator
    rows: RowLengths | None
    workload: Workload
    flops_per_token: float
    memory: Peak
    time: TimeEstimate
    price: Price | None
    checkpointing: bool
    padded_because: str | None
    """Why rows are padded; ``None`` if they aren't."""
    micro_batch_tokens: int | None
    """The largest micro-batch in tokens; ``None``: micro-batches are chosen in rows."""
    longest_row_tokens: int

    @property
    def train_flops(self) -> float:
        return self.workload.tokens * self.flops_per_token

    @property
    def shortest_row_tokens(self) -> int:
        return self.rows.shortest_tokens if self.rows is not None else 1

    def usd(self, seconds: Interval | None) -> Interval | None:
        """Return US dollars; ``None`` if time or price is unknown."""
        return seconds.times(self.price.usd_per_hour / 3600.0) if seconds is not None and self.price else None


@dataclass(frozen=True)
class Estimator:
    """Estimates trainings of adapters on ``modules`` (full names) of one architecture on one device.

    * ``rows``: configuration → the lengths of its training rows, cut at ``training.max_length``. If they are unknown
      (``None``), each row counts as ``training.max_length`` tokens, an upper bound, and the shortest as one token.
    * ``rates``: (configuration, steps, without padding) → what finished runs predict, and the calibrated rate of the
      machine.
    * ``joined_heap``: whether a CPU process runs with the settings of :mod:`qlora_exp.system.heap`.
    * ``memory_bytes``: what training may take, for ``gradient_checkpointing=auto``; ``None``: unknown.
    * ``prices``: US dollars per hour by device; ``None``: conf/prices.yaml is read for each estimate.
    """

    architecture: Architecture
    modules: tuple[str, ...]
    device: Device
    rows: Callable[[Config], RowLengths | None]
    rates: Callable[[Config, int, bool], tuple[MeasuredThroughput, Interval | None]]
    joined_heap: bool
    memory_bytes: int | None = None
    prices: Mapping[str, float] | None = None

    def estimate(self, config: Config) -> RunEstimate:
        """Return what ``config`` takes.

        Raises:
            ConfigError: the price table can't be read, a row is longer than ``training.micro_batch_tokens``,
                ``training.padding_free=on`` where rows need padding, or ``training.gradient_checkpointing=selective``
                where attention can't be kept.
        """
        check_selective(self.architecture, config, self.device.kind)
        rows = self.rows(config)
        longest = longest_row_tokens(config, self.architecture, self.device, rows)
        if rows is not None:
            check_holds_longest_row(config, longest)
        fixed = self._without_auto(config)
        checkpointing = fixed.training.gradient_checkpointing
        limit = fixed.training.micro_batch_tokens
        memory, padded_because = self._peak(fixed), self.padding_reason(config)
        workload = Workload.of(fixed.training, rows, padding_free=padded_because is None)
        # Weights that are trained are multiplied already as the base's.
        adapter_parameters = 0 if config.method.kind in TUNES_WEIGHTS else memory.adapters.trainable_parameters
        flops_per_token = train_flops_per_token(
            self.architecture,
            adapter_parameters,
            workload.row,
            recomputed=checkpointing is not Checkpointing.off,
            keeps_attention=checkpointing is Checkpointing.selective,
            weights=weights_by_pass(self.architecture, config, self.modules),
        )
        measured, machine_rate = self.rates(config, workload.steps, padded_because is None)
        calibrated = seconds_at(machine_rate, workload.tokens * flops_per_token)
        seconds = seconds_at(measured.rate, workload.tokens * flops_per_token) or calibrated
        time = TimeEstimate(seconds, lower_bound_seconds(calibrated), measured.other, measured.before)
        price = price_of(config.budget.usd_per_hour, self.device.kind, self.device.name, self.prices)
        return RunEstimate(
            self,
            rows,
            workload,
            flops_per_token,
            memory,
            time,
            price,
            checkpointing=checkpointing is not Checkpointing.off,
            padded_because=padded_because,
            micro_batch_tokens=limit if isinstance(limit, int) else None,
            longest_row_tokens=longest,
        )

    def padding_reason(self, config: Config) -> str | None:
        """Return why training ``config`` pads its rows; ``None`` if it doesn't.

        Raises:
            ConfigError: ``training.padding_free=on`` where rows need padding.
        """
        rows, longest = self.rows(config), config.training.max_length
        if rows is not None:
            longest = rows.longest_read_tokens(config.training)
        elif config.training.padding_free is PaddingFree.on:
            longest = 0  # unknown: the run compares its rows with a layer's window
        return planned_padding_reason(self.architecture, config, longest)

    def peak(self, config: Config) -> Peak:
        """Return the predicted peak memory of training ``config``."""
        return self._peak(self._without_auto(config))

    def _without_auto(self, config: Config) -> Config:
        """Return ``config`` with values in place of ``auto`` for ``gradient_checkpointing`` and ``micro_batch_tokens``.

        On CUDA there is no checkpointing if the predicted peak fits even if it is too small by the prediction's error:
        recomputing costs a quarter to a third of the speed. If the memory is unknown, there is. On a CPU there is none.
        The micro-batch, too, is the largest whose peak fits with that error; if the memory is unknown, the whole batch.
        """
        training, kind, memory_bytes = config.training, self.device.kind, self.memory_bytes

        def fits(candidate: Config) -> bool:
            needed = self._peak(candidate).needed_bytes * (1 + RELATIVE_ERROR[kind])
            return needed <= memory_bytes if memory_bytes is not None else kind == "cpu"

        if training.micro_batch_tokens == AUTO_TOKENS:
            rows = self.rows(config)
            longest = longest_row_tokens(config, self.architecture, self.device, rows)
            if memory_bytes is None:
                whole = replace(training, micro_batch_tokens=longest * training.batch_size)
                return self._without_auto(replace(config, training=whole))
            step_rows = training.batch_size if rows is None else min(training.batch_size, rows.rows)
            return choose_for_memory(config, kind == "cuda", longest, step_rows, fits)
        choice = training.gradient_checkpointing
        if choice is Checkpointing.auto:
            without = replace(config, training=replace(training, gradient_checkpointing=Checkpointing.off))
            choice = Checkpointing.off if kind == "cpu" or fits(without) else Checkpointing.on
        return replace(config, training=replace(training, gradient_checkpointing=choice))

    def _peak(self, config: Config) -> Peak:
        device, rows = self.device, self.rows(config)
        return predicted_peak(
            self.architecture,
            self.modules,
            config,
            device.kind,
            bf16=device.bf16,
            rows=rows,
            joined_heap=self.joined_heap,
            padding_free=self.padding_reason(config) is None,
        )


def weights_by_pass(architecture: Architecture, config: Config, modules: Sequence[str]) -> WeightsByPass:
    """Return which weights of linear layers have a gradient of their own, and which have no backward pass."""
    tensors = tuned_tensors(architecture, config.method)
    first = first_tuned_layer(architecture, config.method, modules)
    below = (shape for shape in architecture.weights if (number := layer_of(shape.name)) is not None and number < first)
    return WeightsByPass(
        tuned=sum(tensor.elements for tensor in tensors if tensor.matrix),
        frozen_below=sum(shape.in_features * shape.out_features for shape in below),
    )


def estimator_of_run(
    environment: Environment,
    architecture: Architecture,
    modules: Sequence[str],
    splits: Splits,
    ended: Sequence[RunRecord],
    warm: bool,
    memory_bytes: int | None,
) -> Estimator:
    """Return the estimator of a run in ``environment`` on loaded rows.

    ``ended``: finished runs; those of the same base say how fast this machine is, otherwise its calibration does.
    ``warm``: the base is loaded already. ``memory_bytes``: what its training may take, if that is known.
    """

    def rates(config: Config, steps: int, padding_free: bool) -> tuple[MeasuredThroughput, Interval | None]:
        measured = from_finished_runs(ended, environment, redact(to_plain(config)), steps, warm, padding_free)
        return measured, calibrated_rate(environment, config.quantization.mode)

    lengths = functools.cache(lambda max_length: lengths_of(splits, max_length))
    return Estimator(
        architecture,
        tuple(modules),
        environment.device,
        rows=lambda config: lengths(config.training.max_length),
        rates=rates,
        joined_heap=heap.merges_free_chunks(environment.glibc_tunables),
        memory_bytes=memory_bytes,
    )


def with_predictions(plan: Plan, estimate: RunEstimate) -> Plan:
    """Return ``plan`` with the predictions that a run's record shows next to its measurements."""
    memory, workload, time, price = estimate.memory, estimate.workload, estimate.time, estimate.price
    seconds, usd = time.train, estimate.usd(time.train)
    return replace(
        plan,
        micro_batch_tokens=estimate.micro_batch_tokens,
        longest_row_tokens=estimate.longest_row_tokens,
        predicted_peak_train_bytes=memory.peak_bytes,
        predicted_context_bytes=memory.context_bytes,
        predicted_activation_bytes=memory.activation_bytes,
        predicted_logits_bytes=memory.logits_bytes,
        predicted_train_tokens=workload.tokens,
        predicted_padded_tokens=workload.padded_tokens,
        predicted_loss_tokens=workload.scored_tokens,
        train_flops_per_token=estimate.flops_per_token,
        predicted_train_seconds=seconds.middle if seconds else None,
        predicted_train_seconds_low=seconds.low if seconds else None,
        predicted_train_seconds_high=seconds.high if seconds else None,
        predicted_train_seconds_basis=seconds.basis if seconds else None,
        predicted_train_usd=usd.middle if usd else None,
        usd_per_hour=price.usd_per_hour if price else None,
        usd_per_hour_from=price.source if price else None,
        predicted_other_seconds=time.other.middle if time.other else None,
    )


TIME_FIELDS = (
    *("predicted_train_seconds", "predicted_train_seconds_low", "predicted_train_seconds_high"),
    *("predicted_train_seconds_basis", "predicted_train_usd", "predicted_other_seconds"),
)


def with_first_predictions(plan: Plan, before: Plan | None) -> Plan:
    """Return ``plan`` with the predicted times of ``before``: a resumed run keeps those of its start."""
    return plan if before is None else replace(plan, **{name: getattr(before, name) for name in TIME_FIELDS})
