"""A start from data: the principal directions of what a layer reads, on rows that the run trains on (EVA)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_exp.data.items import Item
from qlora_exp.errors import ModelError

START_ROWS = 64
"""Training rows, drawn by the run's seed, whose activations are read."""
PASSES = 4
"""Forward passes over these rows: each is one power iteration of a randomized decomposition (Halko et al. 2011)."""
OVERSAMPLED = 8
"""Directions beyond the rank that are iterated, for accuracy."""


def module_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator for the random values of one module, seeded by the run's seed and the module's name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def start_rows(items: Sequence[Item], seed: int) -> list[Item]:
    """Return the rows whose activations are read."""
    return random.Random(f"{seed} start rows").sample(list(items), min(START_ROWS, len(items)))


def check_start_rows(items: Sequence[Item], rank: int, seed: int) -> None:
    """Raise :class:`ModelError` if the rows have fewer tokens than EVA needs for ``rank`` directions."""
    tokens = sum(len(item.ids) for item in start_rows(items, seed))
    if tokens <= rank:
        what = f"EVA can't take {rank} directions from {tokens} tokens of {min(START_ROWS, len(items))} training rows"
        raise ModelError(what, f"lora.r = {rank}", "more training rows, a lower rank, or lora.init=kaiming")


@torch.no_grad()
def principal_inputs(
    model: PreTrainedModel, ranks: Mapping[str, int], items: Sequence[Item], seed: int
) -> dict[str, torch.Tensor]:
    """Return, by module, the directions in which its inputs vary most, as orthonormal rows (rank × inputs), the
    strongest first. All tokens of :func:`start_rows` count equally, and their mean is subtracted.

    ``model``: the base, without adapters; it stays as it is. Memory: per module its inputs × (rank + 8), twice, in
    float64 on the model's device.
    """
    rows, was_training = start_rows(items, seed), model.training
    sketches = {name: _Sketch(rank, module_generator(seed, name)) for name, rank in ranks.items()}
    hooks = [model.get_submodule(name).register_forward_pre_hook(sketch.read) for name, sketch in sketches.items()]
    model.eval()
    try:
        for _ in range(PASSES):
            for row in rows:
                model(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False, logits_to_keep=1)
            for sketch in sketches.values():
                sketch.end_pass()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return {name: sketch.directions() for name, sketch in sketches.items()}


class _Sketch:
    """Block power iteration for the inputs' covariance, which is never held as a matrix."""

    def __init__(self, rank: int, generator: torch.Generator) -> None:
        self.rank, self.generator = rank, generator
        self.basis: torch.Tensor | None = None
        self.projected: torch.Tensor | None = None
        self.count, self.total = 0, torch.zeros(())
        self.best = torch.zeros(())

    def read(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        if self.basis is None:
            width = hidden.shape[1]
            drawn = torch.randn(
                width, min(self.rank + OVERSAMPLED, width), generator=self.generator, dtype=torch.float64
            )
            self.basis = torch.linalg.qr(drawn.to(hidden.device))[0]
        if self.projected is None:
            self.count, self.total = 0, torch.zeros_like(hidden[0])
            self.projected = torch.zeros_like(self.basis)
        self.count += len(hidden)
        self.total += hidden.sum(0)
        self.projected += hidden.T @ (hidden @ self.basis)

    def end_pass(self) -> None:
        if self.basis is None or self.projected is None:  # an expert that no token reached
            return
        mean = self.total / max(1, self.count)
        product = self.projected - self.count * torch.outer(mean, mean @ self.basis)
        self.projected = None
        vectors = torch.linalg.eigh(self.basis.T @ product).eigenvectors
        self.best = (self.basis @ vectors.flip(1)[:, : self.rank]).T
        self.basis = torch.linalg.qr(product)[0]

    def directions(self) -> torch.Tensor:
        """Return the directions; the sign of each makes its largest entry positive."""
        if self.basis is None:
            raise ModelError(
                "a target module read no token of the training rows", "lora.init = eva", "lora.init=kaiming"
            )
        largest = self.best.gather(1, self.best.abs().argmax(1, keepdim=True))
        return (self.best * largest.sign()).float().cpu()
