"""The training loop of both models: packed rows, bf16 autocast, Muon and AdamW, warm-up and cosine.

It ends after a fixed number of steps, not after a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_exp.embedded.build.tokenizer import CONTEXT_TOKENS, VOCABULARY

IGNORED = -100  # torch's cross-entropy leaves these targets out
_LOG_EVERY = 50

Rows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids and targets, each (rows, tokens per row); a target is the token itself or IGNORED."""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate: `steps` batches of `rows` packed rows, peak learning rate after `warmup_steps`."""

    steps: int
    rows: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    last_fraction: float = 0.05

    def at(self, step: int) -> float:
        """Return the fraction of the peak learning rate at `step`: linear warm-up, then cosine to `last_fraction`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.last_fraction + (1 - self.last_fraction) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class TrainingFacts:
    """Cost and result of a training. The curve holds (step, mean loss in nats since the last point)."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    loss_curve: list[tuple[int, float]]


def new_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 2.56 M parameters, every dimension a multiple of 64 so that nf4 blocks are full."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, batches: Iterator[Rows], schedule: Schedule, say: Callable[[str], None]
) -> TrainingFacts:
    """Train all weights in place on `schedule.steps` batches. The loss is on the targets that are not IGNORED."""
    optimizers = _optimizers(model, schedule)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.at) for optimizer in optimizers]
    model.train()
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    tokens, start = 0, time.perf_counter()
    for step in range(1, schedule.steps + 1):
        ids, targets = next(batches)
        loss = _loss(model, torch.from_numpy(ids), torch.from_numpy(targets))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        tokens += ids.size
        if step % _LOG_EVERY == 0 or step == schedule.steps:
            curve.append((step, round(sum(recent) / len(recent), 4)))
            recent.clear()
            speed = tokens / (time.perf_counter() - start)
            say(f"step {step}/{schedule.steps}  loss {curve[-1][1]:.3f}  {speed:.0f} tokens/s")
    seconds = time.perf_counter() - start
    return TrainingFacts(schedule.steps, tokens, round(seconds, 1), round(tokens / seconds, 1), curve)


def _optimizers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices (orthogonalised momentum, Jordan et al. 2024) and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    embeddings = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" in name]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": embeddings, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        # match_rms_adamw scales Muon's steps to AdamW's, so that one learning rate serves both
        torch.optim.Muon(
            matrices,
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95)),
    ]


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        shifted = targets[:, 1:]
        has_loss = shifted != IGNORED  # else the logits of prompt tokens would be most of an instruct batch's work
        logits = model.lm_head(hidden[has_loss])
    return nn.functional.cross_entropy(logits.float(), shifted[has_loss])
