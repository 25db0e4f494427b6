"""SFTTrainer with little work on the host between two steps.

On a GPU the host queues work and runs ahead of it. To read a value from the GPU (``.item()``, ``bool(tensor)``, a
boolean index), the host waits until the queue is empty, and then the GPU waits for the host. TRL's SFTTrainer and
transformers read a dozen values of each micro-batch. Here the host counts a batch's tokens while the batch is in the
host's memory, and reads the GPU once a step. (Logging and float16's loss scaler read it once more, and some models'
layers do, e.g. experts.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from torch import nn
from torch.nn.functional import pad
from transformers import masking_utils
from trl import SFTTrainer

from qlora_exp.config.shipping import DistillationConfig
from qlora_exp.models.tuning import is_peft, restore_tuned, save_tuned
from qlora_exp.training.batches import REAL_ROWS, token_count
from qlora_exp.training.distillation import (
    ITEM,
    TEACHER_LOG_PROBS,
    TEACHER_TOKENS,
    DistilledTokens,
    TeacherTargets,
)

TOKENS = "unpadded_tokens"
"""Key of a batch: the number of its tokens that aren't padding (an int, which stays with the host)."""
LOSS_POSITIONS = "loss_positions"
"""Key of a batch: which predictions carry a loss, as indices into rows × (length - 1) predictions (int64)."""
FOR_THE_HOST = (TOKENS, LOSS_POSITIONS, REAL_ROWS, TEACHER_TOKENS, TEACHER_LOG_PROBS)
"""Keys of a batch that the model doesn't take."""


@dataclass(frozen=True)
class CountingCollator:
    """Adds :data:`TOKENS` and :data:`LOSS_POSITIONS` to each batch that ``collate`` makes."""

    collate: Callable[[Any], Any]
    teacher: TeacherTargets | None = None

    def __call__(self, rows: Any) -> Any:
        targets = {}
        if self.teacher is not None and ITEM in rows[0]:
            targets = self.teacher.of([row[ITEM] for row in rows])
            rows = [{key: value for key, value in row.items() if key != ITEM} for row in rows]
        batch = self.collate(rows)
        batch |= targets
        batch[TOKENS] = token_count(batch)
        batch[LOSS_POSITIONS] = (batch["labels"][:, 1:] != -100).flatten().nonzero().squeeze(1)
        return batch


def separate_rates(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Move B matrices to parameter groups with ``ratio`` times their group's learning rate: LoRA+ (Hayou et al. 2024).

    A's groups stay first: the logged learning rate is theirs.
    """
    b_matrices = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in b_matrices]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in b_matrices]
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": moved, "lr": ratio * group["lr"]})


class LightTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose micro-batches read nothing from the device, and whose steps don't walk over all modules.

    Loss and gradients are SFTTrainer's, bit by bit on a CPU. Left out is what no record has: the entropy and the
    accuracy of tokens in the trainer's log, and its count of floating-point operations (an estimate for which it visits
    every parameter in every micro-batch).
    """

    logits_multiple = 1
    """The number of tokens that get logits is rounded up to a multiple of this, if shapes are compiled."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of LoRA's B relative to A's; ``None``: equal."""
    distillation: DistillationConfig | None = None
    """How a teacher's targets enter the loss; ``None``: they don't."""
    _trainable: tuple[nn.Parameter, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # compute_loss divides by the step's tokens itself, also for models that don't take their number (Gemma 4).
        self.model_accepts_loss_kwargs = True
        self.data_collator: Any = CountingCollator(vars(self)["data_collator"])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._trainable = tuple(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        with few_module_walks(self.model, self._trainable):
            return super().train(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ITEM not in self._signature_columns:
            self._signature_columns.append(ITEM)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Give LoRA's B the learning rate of ``loraplus_lr_ratio``. The scheduler scales both rates alike."""
        existing = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.loraplus_lr_ratio is not None and not existing:
            separate_rates(optimizer, self.model, self.loraplus_lr_ratio)
        return optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss in nats of the tokens that carry one: of the micro-batch's, or of
        ``num_items_in_batch``, the whole batch's."""
        tokens = len(inputs[LOSS_POSITIONS]) if num_items_in_batch is None else num_items_in_batch
        return (-self.log_probs(model, inputs)).sum() / torch.as_tensor(tokens).clamp(min=1)

    def log_probs(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the log-probability of each next token, rows × (length - 1); 0 for tokens without a loss."""
        positions, mask = inputs[LOSS_POSITIONS], inputs.get("attention_mask")
        batch = {name: value for name, value in inputs.items() if name not in FOR_THE_HOST}
        distilled = DistilledTokens.of(self.distillation, inputs)
        with known_padding(mask, inputs[TOKENS]), logits_for_loss_tokens(positions, self.logits_multiple, distilled):
            result: torch.Tensor = model(**batch, use_cache=False, fused_lm_head=True).log_probs
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save what is trained. The Trainer would write the whole model if it isn't PEFT's."""
        if is_peft(self.model):
            super()._save(output_dir, state_dict)
            return
        save_tuned(self.model, Path(output_dir or self.args.output_dir))
        self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_peft(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_tuned(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if is_peft(self.model):
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            restore_tuned(self.model, Path(self.state.best_model_checkpoint))

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.accelerator.clip_grad_norm_(self._trainable, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return grad_norm
        return self.accelerator.clip_grad_norm_(self._trainable, float("inf"))


@contextmanager
def few_module_walks(model: nn.Module, trainable: Sequence[nn.Parameter]) -> Iterator[None]:
    """Make ``model.train()`` and ``model.zero_grad()`` cheap in the ``with`` block.

    The trainer calls the one in every micro-batch and the other in every step. Both visit all modules: more than 2,000
    in a model of 8B. The first does nothing if the model is training already; the second visits ``trainable`` only.
    """
    walk = model.train

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else walk(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trainable:
            parameter.grad = None

    attributes = {"train": train, "zero_grad": zero_grad}
    vars(model).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(model)[name]


@contextmanager
def known_padding(mask: torch.Tensor | None, tokens: int) -> Iterator[None]:
    """Tell transformers what it would read from the device to make attention masks.

    That is twice whether ``mask`` (rows × length) has padding, and, without a mask, whether positions begin anew. The
    attention of batches without padding takes ``cu_seq_lens`` and makes no mask, so the answer doesn't matter there.

    ``tokens``: how many tokens of the mask aren't padding.
    """
    read, search = masking_utils.fast_all, masking_utils.find_packed_sequence_indices
    if mask is None:
        masking_utils.find_packed_sequence_indices = lambda positions: None
    else:
        shape, full = mask.shape, tokens == mask.numel()
        masking_utils.fast_all = lambda tensor: full if tensor.shape == shape else read(tensor)
    try:
        yield
    finally:
        masking_utils.fast_all, masking_utils.find_packed_sequence_indices = read, search


@contextmanager
def logits_for_loss_tokens(
    positions: torch.Tensor, rows_multiple: int = 1, distilled: DistilledTokens | None = None
) -> Iterator[None]:
    """Patch TRL's fused head so that it computes logits only for tokens that carry a loss, on every device.

    With Triton the head (``add_fused_lm_head``) does that already, by boolean masks: for each, the host waits for its
    number of tokens, in forward and in backward. Elsewhere it computes all logits and masks them, so that a compiler
    doesn't get new shapes with every batch. On a CPU that is slow: most tokens are the prompt's.
    """
    head = trl.trainer.utils
    original_check, original_function = head._use_triton, head._ChunkedLogProbFunction
    head._use_triton = lambda device: False  # the head then passes all tokens
    head._ChunkedLogProbFunction = LossTokenLogProbs(original_function, positions, rows_multiple, distilled)
    try:
        yield
    finally:
        head._use_triton, head._ChunkedLogProbFunction = original_check, original_function


@dataclass(frozen=True)
class LossTokenLogProbs:
    """Wraps TRL's ``ChunkedLogProbFunction``: passes on the rows ``positions`` of ``hidden`` (tokens, width), and gives
    all other tokens a log-probability of 0.

    If ``multiple`` is above 1, the rows are padded with zeros to that multiple; the loss is equal up to rounding.
    """

    function: Any
    positions: torch.Tensor
    multiple: int = 1
    distilled: DistilledTokens | None = None
    """A teacher's targets: each value is then that of the distillation's loss, with the opposite sign."""

    def apply(self, hidden: torch.Tensor, weight: Any, bias: Any, targets: torch.Tensor, *settings: Any) -> Any:
        scored, missing = len(self.positions), -len(self.positions) % self.multiple
        rows, words = hidden.index_select(0, self.positions), targets.index_select(0, self.positions)
        if missing:
            rows, words = pad(rows, (0, 0, 0, missing)), pad(words, (0, missing))
        temperature, chunk_size, softcapping, logit_scale, _ = settings
        only_log_probs = (temperature, chunk_size, softcapping, logit_scale, ("log_probs",))
        values = self.function.apply(rows, weight, bias, words, *only_log_probs)[0][:scored]
        if self.distilled is not None:
            scored_hidden = hidden.index_select(0, self.positions)
            logits = _logits(scored_hidden, weight, bias, softcapping, logit_scale)
            values = self.distilled.mixed(values, logits)
        log_probs = values.new_zeros(len(hidden)).index_copy(0, self.positions, values)
        return log_probs, None, None, None, None


def _logits(
    hidden: torch.Tensor, weight: Any, bias: Any, softcapping: float | None, scale: float | None
) -> torch.Tensor:
    """Return the logits of these tokens, as the head computes them."""
    logits: torch.Tensor = nn.functional.linear(hidden, weight, bias)
    logits = logits if scale is None else logits * scale
    return softcapping * torch.tanh(logits / softcapping) if softcapping else logits
