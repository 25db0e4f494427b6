"""One training with TRL's SFTTrainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from qlora_exp.architecture.run_plan import optimizer_on
from qlora_exp.config.checks_method import TUNES_WEIGHTS, trains_base_weights
from qlora_exp.config.enums import Checkpointing, Method
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.data.load import to_training_dataset
from qlora_exp.models.adapters import autocast_casts_inputs
from qlora_exp.models.attention import attention_by_rows
from qlora_exp.models.fake_quantization import fake_quantization_of
from qlora_exp.models.optimizers import bitsandbytes_optimizers
from qlora_exp.models.tuning import is_peft, restore_precision
from qlora_exp.paths import RunPaths
from qlora_exp.records.types import Plan, Training
from qlora_exp.training import checkpoints
from qlora_exp.training.batches import REAL_ROWS, RoundedBatches, row_sums
from qlora_exp.training.callbacks import (
    ITEM_NATS,
    MAX_SCALER_SKIPS,
    Budget,
    GracefulInterrupt,
    LossCurve,
    NoInputGradients,
    PilotCallback,
    PruningCallback,
    QatCallback,
    StepMeter,
    TokenBudget,
)
from qlora_exp.training.distillation import TeacherTargets
from qlora_exp.training.light_trainer import LOSS_POSITIONS, TOKENS, CountingCollator, LightTrainer
from qlora_exp.training.micro_batches import PARTS, MicroBatchCollator, padded_tokens
from qlora_exp.training.outcome import Diverged, Interrupted, NullObserver, Observer, PruneCheck, no_pruning
from qlora_exp.training.reporters import Reporter


@dataclass(frozen=True)
class Trained:
    """Result and measurements of a training. Seconds and tokens include a resumed run's earlier parts."""

    training: Training
    seconds: float
    tokens: int
    loss_tokens: int
    counted_seconds: tuple[float, ...]
    """Seconds of each counted step (warm-up excluded)."""
    counted_tokens: int
    excluded_steps: int
    gradient_bytes: int | None
    optimizer_bytes: int | None
    checkpoint_bytes: int | None


@dataclass
class TrainingState:
    """State of a running training, from which a failed run's record takes its figures."""

    meter: StepMeter
    curve: LossCurve
    plan: Plan
    resumed_from_step: int | None = None
    steps: int = 0
    pilot: PilotCallback | None = None
    """Only for a ladder's pilot that may be stopped early."""

    def so_far(self) -> Trained:
        """Return the figures known now, for a training that still runs or has failed."""
        counted, tokens = self.meter.counted()
        return Trained(
            training=Training(
                steps=self.steps or (self.resumed_from_step or 0) + len(self.meter.step_seconds),
                first_loss=self.curve.first_loss,
                final_loss=self.curve.final_loss,
                epochs=None,
                resumed_from_step=self.resumed_from_step,
                micro_batch_size=self.plan.micro_batch_size,
                pilot_loss=self.pilot.loss if self.pilot is not None else None,
            ),
            seconds=self.meter.seconds(),
            tokens=self.meter.tokens,
            loss_tokens=self.meter.loss_tokens,
            counted_seconds=tuple(counted),
            counted_tokens=tokens,
            excluded_steps=len(self.meter.step_seconds) - len(counted),
            gradient_bytes=self.meter.gradient_bytes,
            optimizer_bytes=self.meter.optimizer_bytes,
            checkpoint_bytes=None,
        )


def train(
    plan: Plan,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_items: Sequence[Item],
    validation_items: Sequence[Item],
    config: Config,
    paths: RunPaths,
    report: PruneCheck = no_pruning,
    observer: Observer | None = None,
    watching: Callable[[TrainingState], None] = lambda state: None,
    exhausted: Callable[[], str | None] = lambda: None,
    reporters: Sequence[Reporter] = (),
    teacher: TeacherTargets | None = None,
) -> Trained:
    """Train ``model`` (from models.tuning.attach; changed in place) on ``train_items``.

    Args:
        report: called after each validation, or for a pilot at the step of comparison; returns whether the pruner stops
            the trial.
        watching: gets the training's state before the first step, so that a failed run's record has its figures.
        exhausted: called after each step; returns the limit of ``budget`` that is spent.
        reporters: get the training's log, as callbacks.
        teacher: what a teacher says of ``train_items``, for distillation.

    Raises:
        Diverged: a loss, gradient or adapter weight is not finite.
        Pruned: the pruner stopped the trial.
        Interrupted: Ctrl-C, TERM or HUP; a checkpoint was saved first.
    """
    meter = StepMeter()
    resumed = checkpoints.newest_valid(paths.checkpoints) if config.training.resume else None
    resumed_step = checkpoints.step_of(resumed[0]) if resumed else None
    counters = resumed[1] if resumed else {}
    meter.tokens, meter.loss_tokens = counters.get("tokens", 0), counters.get("loss_tokens", 0)
    meter.earlier_tokens = meter.tokens
    meter.earlier_seconds = float(counters.get("seconds", 0.0))

    def current_counters() -> dict[str, Any]:
        return {"tokens": meter.tokens, "loss_tokens": meter.loss_tokens, "seconds": meter.seconds()}

    curve = LossCurve(paths.curve, meter, observer or NullObserver(), resumed_step or 0)
    state = TrainingState(meter, curve, plan, resumed_step)
    if report.pilot:
        state.pilot = PilotCallback(report, paths.curve, math.ceil(len(train_items) / plan.batch_size))
    watching(state)
    interrupt, token_budget = GracefulInterrupt(), TokenBudget(config.training.max_tokens, meter)
    budget = Budget(exhausted)
    callbacks = [
        meter,
        token_budget,
        budget,
        curve,
        state.pilot or PruningCallback(report),
        interrupt,
        checkpoints.ChecksumCallback(current_counters),
        *reporters,
    ]
    if plan.gradient_checkpointing and (config.method.layers is not None or config.method.kind in TUNES_WEIGHTS):
        callbacks.append(NoInputGradients())
    if (fake := fake_quantization_of(model)) is not None:
        callbacks.append(QatCallback(fake, config.training.qat))
    if config.training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.training.early_stopping_patience))
    folder = paths.checkpoints
    trainer = _trainer(plan, model, tokenizer, train_items, validation_items, config, folder, callbacks, meter, teacher)
    trainer.per_item = report.per_item
    autocast = trainer.accelerator.native_amp and not config.lora.dora
    # Only LoRA's layers have the switch; other adapters cast as PEFT does.
    is_lora = config.method.kind is Method.lora
    casts = autocast_casts_inputs(model, active=autocast) if is_lora else nullcontext()
    attention = attention_by_rows(model) if plan.padding_free else nullcontext()
    with interrupt, bitsandbytes_optimizers(), casts, attention:
        meter.began = time.perf_counter()
        result = trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
    state.steps = steps = int(trainer.state.global_step)
    if interrupt.asked and steps < trainer.state.max_steps:
        raise Interrupted(steps)
    _check_adapters_finite(model, steps)
    # On CUDA accelerate wraps forward in autocast permanently; scores before and after need the same forward.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    so_far = state.so_far()
    return replace(
        so_far,
        training=replace(
            so_far.training,
            epochs=float(result.metrics.get("epoch", 0.0)) or None,
            best_step=_best_step(trainer),
            stopped_early=steps < trainer.state.max_steps and not token_budget.spent and not budget.ended_by,
            ended_by_budget=budget.ended_by,
        ),
        checkpoint_bytes=checkpoints.newest_checkpoint_bytes(paths.checkpoints),
    )


class _MeteredTrainer(LightTrainer):
    """SFTTrainer that counts unpadded tokens, and raises :class:`Diverged` before a step whose loss or gradient isn't
    finite."""

    meter: StepMeter
    per_item = False
    bad_gradients = 0
    _step_loss: torch.Tensor | None = None
    """The sum of the losses of the step's micro-batches so far. It isn't finite if one of them isn't."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.meter.count(inputs[TOKENS], len(inputs[LOSS_POSITIONS]))
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return the validation loss: nats of all tokens / number of tokens, not a mean of batch means, so that it
        doesn't depend on the batch size. If ``per_item``, the same pass gives each item's nats. The fused head computes
        no logits of other tokens: under autocast accelerate would copy those of a whole batch to float32.

        A data loader draws a seed when it starts. The random state is restored, so that validation doesn't change a
        training with dropout.
        """
        self.model.eval()
        losses: list[torch.Tensor] = []
        counts: list[int] = []
        with torch.random.fork_rng(devices=_rng_devices(self.args.device)):
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                rows = inputs.get(REAL_ROWS)
                counts.append(len(inputs[LOSS_POSITIONS]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    if self.per_item:
                        losses.append(row_sums(-self.log_probs(self.model, inputs).float(), inputs)[:rows])
                    else:
                        losses.append(self.compute_loss(self.model, inputs)[None])
        nats: list[float] = torch.cat(losses).tolist()  # the host waits for the device here, and not in each batch
        if not self.per_item:
            nats = [mean * count for mean, count in zip(nats, counts, strict=True)]
        tokens = sum(counts)
        metrics = {f"{metric_key_prefix}_loss": sum(nats) / tokens}
        self.log(metrics)
        callback_metrics = {**metrics, ITEM_NATS: nats} if self.per_item else metrics
        self.callback_handler.on_evaluate(self.args, self.state, self.control, callback_metrics)
        return metrics

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.meter.start_step()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        values = [torch.as_tensor(value, device=self.args.device).float() for value in (self._step_loss, norm)]
        loss, norm = torch.stack(values).tolist()  # here alone the host waits for the device
        self._step_loss = None
        if not math.isfinite(loss):
            raise Diverged("the loss", self.state.global_step + 1)
        # A loss scaler (fp16) causes infinite gradients on purpose while it searches its scale, and skips those steps.
        patience = MAX_SCALER_SKIPS if self.accelerator.scaler is not None else 0
        self.bad_gradients = 0 if math.isfinite(norm) else self.bad_gradients + 1
        if self.bad_gradients > patience:
            raise Diverged("the gradient's norm", self.state.global_step + 1)
        return norm


class _TokenTrainer(_MeteredTrainer):
    """Processes the one batch of each step by micro-batches of at most ``micro_batch_tokens`` tokens.

    The Trainer's own gradient accumulation has the same number of micro-batches in every step; here a step has as many
    as its rows need. TRL divides a micro-batch's loss by the scored tokens of the whole step, so that losses and
    gradients add up to those of the batch.
    """

    micro_batch_tokens: int | None = None
    """``None``: a batch is not cut."""
    length_multiple = 1
    data_collator: Any

    def get_train_dataloader(self) -> Any:
        collate = self.data_collator
        if self.micro_batch_tokens is not None:
            cost = sum if self.args.padding_free else padded_tokens(self.length_multiple)
            self.data_collator = MicroBatchCollator(collate, self.micro_batch_tokens, cost)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate  # validation isn't cut: its rows keep their order

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        parts = [part for batch in batch_samples for part in batch.get(PARTS, [batch])]
        return super()._get_num_items_in_batch(parts, device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        step = super().training_step
        return torch.stack([step(model, part, *args, **kwargs) for part in inputs.get(PARTS, [inputs])]).sum()


def _rng_devices(device: torch.device) -> list[torch.device]:
    """Return the devices for ``fork_rng``, which always restores the CPU's random state."""
    return [device] if device.type == "cuda" else []


def _trainer(
    plan: Plan,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_items: Sequence[Item],
    validation_items: Sequence[Item],
    config: Config,
    folder: Path,
    callbacks: list[Any],
    meter: StepMeter,
    teacher: TeacherTargets | None,
) -> _MeteredTrainer:
    evaluates = config.training.evaluate_every_steps is not None
    if plan.gradient_checkpointing and config.training.gradient_checkpointing is Checkpointing.selective:
        # SFTConfig's key "selective" does the same on the PeftModel, whose method transformers 5.23 doesn't call: torch
        # then refuses the key ("Unexpected keyword arguments").
        base = model.get_base_model() if is_peft(model) else model
        enable_selective_activation_checkpointing(base)
    trainer = _TokenTrainer(
        model=model,
        args=trainer_arguments(plan, config, folder),
        train_dataset=to_training_dataset(train_items, numbered=teacher is not None),
        eval_dataset=to_training_dataset(validation_items) if evaluates else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    # SFTTrainer casts the adapters of a quantized model to bfloat16. Cast them back before the optimizer exists.
    restore_precision(model, config)
    if plan.padding_free and (plan.length_multiple, plan.logits_multiple) != (1, 1):
        collate = RoundedBatches(trainer.data_collator.collate, plan.logits_multiple, plan.length_multiple)
        trainer.data_collator = CountingCollator(collate)
    if teacher is not None:
        trainer.data_collator = replace(trainer.data_collator, teacher=teacher)
        trainer.distillation = config.distillation
    trainer.meter = meter
    trainer.loraplus_lr_ratio = config.lora.loraplus_lr_ratio
    trainer.logits_multiple = plan.logits_multiple
    trainer.micro_batch_tokens, trainer.length_multiple = plan.micro_batch_tokens, plan.length_multiple
    # Remove the Trainer's console output: the observer shows progress.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    return trainer


def trainer_arguments(plan: Plan, config: Config, folder: Path) -> SFTConfig:
    """Return the trainer's settings. These differ from TRL's defaults:

    * ``skip_prepare_dataset``: rows are already tokenized, truncated and labelled (loss on the completion only).
    * ``packing`` off: the rows of a batch are those of ``training.batch_size``.
    * ``padding_free``: TRL recommends it for FlashAttention only; ``models/attention.py`` serves SDPA. TRL then takes
      no ``max_length``: rows come truncated.
    * ``logging_nan_inf_filter`` off: a NaN must be visible.
    * ``report_to`` empty: tracking reads the record, and ``tracking.also`` has its own :class:`Reporter`.
    * ``adamw_torch`` runs as torch's fused kernel on a GPU (:func:`optimizer_on`), and batches are copied there without
      waiting for the copy.
    * ``gradient_checkpointing`` only where memory may need it (``Estimator.checkpointing``): it costs a quarter to
      a third of the speed. ``selective`` is set on the model, not here.
    """
    training = config.training
    cuda = plan.device == "cuda"
    every = training.evaluate_every_steps
    save_every = every if training.keep_best else training.save_every_steps
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=plan.max_steps,
        per_device_train_batch_size=plan.micro_batch_size,
        per_device_eval_batch_size=_validation_rows(plan, training.max_length),
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=warmup_steps(training.warmup_ratio, plan.max_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=optimizer_on(plan.device, plan.compute_dtype, training.optimizer),
        seed=config.seed,
        data_seed=config.seed,
        max_length=None if plan.padding_free else training.max_length,
        padding_free=bool(plan.padding_free),
        completion_only_loss=True,
        router_aux_loss_coef=0.0,  # TRL adds it to both losses of models with experts; routers are frozen here
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        pad_to_multiple_of=None if plan.padding_free or plan.length_multiple == 1 else plan.length_multiple,
        # PEFT casts what its adapters read; trained base weights are float32 and need autocast on a CPU, too.
        bf16=(cuda or trains_base_weights(config)) and plan.compute_dtype == "bfloat16",
        fp16=cuda and plan.compute_dtype == "float16",
        use_cpu=not cuda,
        gradient_checkpointing=plan.gradient_checkpointing,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=2,
        load_best_model_at_end=training.keep_best,
        metric_for_best_model="eval_loss" if every else None,
        greater_is_better=False if every else None,
        restore_callback_states_from_checkpoint=True,
        report_to=[],
        run_name=folder.parent.name,  # as the reporters of tracking.also call the run
        project=config.tracking.experiment,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": True} if cuda else None,
        remove_unused_columns=True,
        push_to_hub=False,
    )
    # In a notebook, CUDA may be initialized before the limit to one GPU: transformers would then split the batches.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def _validation_rows(plan: Plan, max_length: int) -> int:
    """Return the rows of a validation batch: no more tokens than a micro-batch of training, were all rows long."""
    if plan.micro_batch_tokens is None:
        return plan.micro_batch_size
    return max(1, min(plan.micro_batch_size, plan.micro_batch_tokens // max_length))


def warmup_steps(ratio: float, steps: int) -> int:
    """Return the number of warm-up steps, at most ``steps`` - 1.

    The first warm-up step has a learning rate of 0: with one step of warm-up, a training of one step would change
    nothing.
    """
    return min(math.ceil(ratio * steps), steps - 1)


def _best_step(trainer: SFTTrainer) -> int | None:
    best = trainer.state.best_model_checkpoint
    return checkpoints.step_of(Path(best)) if best else None


def _check_adapters_finite(model: Any, step: int) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise Diverged("a trained weight", step)
