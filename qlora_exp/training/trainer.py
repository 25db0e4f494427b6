"""One training through TRL's SFTTrainer, every default chosen on purpose. The only importer of trl."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from torch.nn.functional import cross_entropy, pad
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item
from qlora_exp.data.load import to_training_dataset
from qlora_exp.models.adapters import recast_adapters
from qlora_exp.paths import RunPaths
from qlora_exp.records.types import Plan, Training
from qlora_exp.training import checkpoints
from qlora_exp.training.callbacks import (
    ITEM_NATS,
    SCALER_PATIENCE,
    Budget,
    GracefulInterrupt,
    LossCurve,
    PruningCallback,
    StepMeter,
    TokenBudget,
)
from qlora_exp.training.outcome import Diverged, Interrupted, NullObserver, Observer, PruneCheck, no_pruning


@dataclass(frozen=True)
class Trained:
    """What a training did and what it weighed; seconds and tokens include those of a resumed run's earlier parts."""

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
    """The live side of a training: what a failure can still tell."""

    meter: StepMeter
    curve: LossCurve
    plan: Plan
    resumed_from_step: int | None = None
    steps: int = 0

    def so_far(self) -> Trained:
        """What is known now, of a training that may still run or that failed."""
        counted, tokens = self.meter.counted()
        return Trained(
            training=Training(
                steps=self.steps or (self.resumed_from_step or 0) + len(self.meter.step_seconds),
                first_loss=self.curve.first_loss,
                final_loss=self.curve.final_loss,
                epochs=None,
                resumed_from_step=self.resumed_from_step,
                micro_batch_size=self.plan.micro_batch_size,
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
    watching: Callable[[TrainingState], None] = lambda watch: None,
    exhausted: Callable[[], str | None] = lambda: None,
) -> Trained:
    """Train ``model`` (a PeftModel; changed in place) on ``train_items``.

    ``watching`` is given the live side before the first step, so that a failed training can be told of too.
    ``exhausted`` is asked after each step which budget is spent.

    Raises:
        Diverged: a loss or gradient is not finite.
        Pruned: ``report`` said stop.
        Interrupted: Ctrl-C; a checkpoint was saved first.
    """
    meter = StepMeter()
    resumed = checkpoints.newest_valid(paths.checkpoints) if config.training.resume else None
    resumed_step = checkpoints.step_of(resumed[0]) if resumed else None
    carried = resumed[1] if resumed else {}
    meter.tokens, meter.loss_tokens = carried.get("tokens", 0), carried.get("loss_tokens", 0)
    meter.earlier_tokens = meter.tokens
    meter.earlier_seconds = float(carried.get("seconds", 0.0))

    def carry() -> dict[str, Any]:
        return {"tokens": meter.tokens, "loss_tokens": meter.loss_tokens, "seconds": meter.seconds()}

    curve = LossCurve(paths.curve, meter, observer or NullObserver(), resumed_step or 0)
    watch = TrainingState(meter, curve, plan, resumed_step)
    watching(watch)
    interruption, token_budget = GracefulInterrupt(), TokenBudget(config.training.max_tokens, meter)
    budget = Budget(exhausted)
    watchers = [
        meter,
        token_budget,
        budget,
        curve,
        PruningCallback(report),
        interruption,
        checkpoints.ChecksumCallback(carry),
    ]
    if config.training.early_stopping_patience is not None:
        watchers.append(EarlyStoppingCallback(config.training.early_stopping_patience))
    folder = paths.checkpoints
    trainer = _trainer(plan, model, tokenizer, train_items, validation_items, config, folder, watchers, meter)
    trainer.per_item = report.per_item
    with interruption:
        meter.began = time.perf_counter()
        result = trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
    watch.steps = steps = int(trainer.state.global_step)
    if interruption.asked and steps < trainer.state.max_steps:
        raise Interrupted(steps)
    _check_adapters_finite(model, steps)
    # On CUDA accelerate wrapped forward in autocast for good; scores before and after must be computed alike.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    so_far = watch.so_far()
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


@contextmanager
def logits_where_there_is_a_label(rows_multiple: int = 1) -> Iterator[None]:
    """TRL's fused head (``add_fused_lm_head``) computes logits for the tokens that carry a loss alone where it has
    Triton's kernels; elsewhere for all of them, which it then masks, lest a compiler meets new shapes with every batch.
    On a CPU most tokens are the prompt's, and where shapes are compiled (``rows_multiple`` above 1) there are as many
    tokens as the next multiple. The loss is the same, to rounding."""
    head = trl.trainer.utils
    kept, function = head._use_triton, head._ChunkedLogProbFunction
    head._use_triton = lambda device: device.type == "cpu" or kept(device)
    if rows_multiple > 1:
        head._ChunkedLogProbFunction = _RowsInMultiples(function, rows_multiple)
    try:
        yield
    finally:
        head._use_triton, head._ChunkedLogProbFunction = kept, function


@dataclass(frozen=True)
class _RowsInMultiples:
    """Stands for TRL's ``ChunkedLogProbFunction``: the same of ``hidden`` (tokens, width), given rows of zeros up to a
    multiple of ``multiple`` tokens, whose results are left out again."""

    function: Any
    multiple: int

    def apply(self, hidden: torch.Tensor, weight: Any, bias: Any, targets: torch.Tensor, *settings: Any) -> Any:
        tokens = hidden.shape[0]
        missing = -tokens % self.multiple
        results = self.function.apply(
            pad(hidden, (0, 0, 0, missing)), weight, bias, pad(targets, (0, missing)), *settings
        )
        return tuple(None if result is None else result[:tokens] for result in results)


class _MeteredTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that counts real tokens, and refuses to step on a gradient that isn't finite."""

    meter: StepMeter
    per_item = False
    bad_gradients = 0
    logits_multiple = 1

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = int(inputs["attention_mask"].sum())
        loss_tokens = int((inputs["labels"][:, 1:] != -100).sum())
        self.meter.count(tokens, loss_tokens)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise Diverged("the loss", self.state.global_step + 1)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with logits_where_there_is_a_label(self.logits_multiple):
            return super().compute_loss(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The validation loss as it is defined everywhere: nats of all tokens / all tokens, not a mean of batch means,
        so that it doesn't depend on the batch size. Where each item's nats are wanted, the same pass gives them.

        A data loader draws a seed whenever it begins. Random numbers are put back, so that a training with dropout is
        the same whether and how often it is validated."""
        self.model.eval()
        nats: list[float] = []
        tokens = 0
        with torch.random.fork_rng(devices=_devices_with_random_numbers(self.args.device)):
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                count = int((inputs["labels"][:, 1:] != -100).sum())
                with torch.no_grad(), self.compute_loss_context_manager():
                    if self.per_item:
                        nats += self._item_nats(inputs)
                    else:
                        nats.append(float(self.compute_loss(self.model, inputs)) * count)
                tokens += count
        metrics = {f"{metric_key_prefix}_loss": sum(nats) / tokens}
        self.log(metrics)
        told = {**metrics, ITEM_NATS: nats} if self.per_item else metrics
        self.callback_handler.on_evaluate(self.args, self.state, self.control, told)
        return metrics

    def _item_nats(self, inputs: dict[str, Any]) -> list[float]:
        """Of each row its nats over the tokens that carry a loss, in float32; one row's logits at a time are upcast."""
        logits = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        rows = zip(logits[:, :-1], inputs["labels"][:, 1:], strict=True)
        return [float(cross_entropy(row.float(), labels, ignore_index=-100, reduction="sum")) for row, labels in rows]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A loss scaler (fp16) meets infinite gradients on purpose while it looks for its scale, and skips those steps.
        patience = SCALER_PATIENCE if self.accelerator.scaler is not None else 0
        self.bad_gradients = 0 if norm is not None and math.isfinite(float(norm)) else self.bad_gradients + 1
        if self.bad_gradients > patience:
            raise Diverged("the gradient's norm", self.state.global_step + 1)
        return norm


def _devices_with_random_numbers(device: torch.device) -> list[torch.device]:
    """Besides the CPU, whose random numbers ``fork_rng`` always puts back."""
    return [device] if device.type == "cuda" else []


def _trainer(
    plan: Plan,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_items: Sequence[Item],
    validation_items: Sequence[Item],
    config: Config,
    folder: Path,
    watchers: list[Any],
    meter: StepMeter,
) -> _MeteredTrainer:
    evaluates = config.training.evaluate_every_steps is not None
    trainer = _MeteredTrainer(
        model=model,
        args=arguments(plan, config, folder),
        train_dataset=to_training_dataset(train_items),
        eval_dataset=to_training_dataset(validation_items) if evaluates else None,
        processing_class=tokenizer,
        callbacks=watchers,
    )
    # SFTTrainer rounds the adapters of a quantized model to bfloat16; the optimizer doesn't exist yet.
    recast_adapters(model, config.lora)
    trainer.meter = meter
    trainer.logits_multiple = plan.logits_multiple
    # Trainer adds its own console printers; the observer is ours.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    return trainer


def arguments(plan: Plan, config: Config, folder: Path) -> SFTConfig:
    """The trainer's settings. What differs from TRL's defaults, and why:

    * ``skip_prepare_dataset``: rows come tokenized, cut and labelled; the prompt is given, not learned. ``packing``
      off: without FlashAttention, packed rows would see each other.
    * ``logging_nan_inf_filter`` off: a NaN must be seen.
    * ``report_to`` empty: tracking is a view of the record, not a side effect of training.
    * ``gradient_checkpointing`` only where the plan says that memory needs it: it costs about a third of the speed.
    """
    training = config.training
    cuda = plan.device == "cuda"
    every = training.evaluate_every_steps
    save_every = every if training.keep_best else training.save_every_steps
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=plan.max_steps,
        per_device_train_batch_size=plan.micro_batch_size,
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=warmup_steps(training.warmup_ratio, plan.max_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        seed=config.seed,
        data_seed=config.seed,
        max_length=training.max_length,
        completion_only_loss=True,
        router_aux_loss_coef=0.0,  # TRL adds it to both losses of whatever has experts; routers are frozen here
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        pad_to_multiple_of=plan.length_multiple if plan.length_multiple > 1 else None,
        bf16=cuda and plan.compute_dtype == "bfloat16",
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
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        remove_unused_columns=True,
        push_to_hub=False,
    )
    # Where CUDA had begun before it could be limited to one GPU (in a notebook), transformers would split the batches.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def warmup_steps(ratio: float, steps: int) -> int:
    """Steps of warm-up; the last step is never one of them. The first has a learning rate of 0, and a training of one
    step would change nothing."""
    return min(math.ceil(ratio * steps), steps - 1)


def _best_step(trainer: SFTTrainer) -> int | None:
    best = trainer.state.best_model_checkpoint
    return checkpoints.step_of(Path(best)) if best else None


def _check_adapters_finite(model: Any, step: int) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise Diverged("an adapter weight", step)
