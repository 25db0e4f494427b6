"""What one autograd node for each LoRA layer saves against PEFT's layers: processor time of a step, and bytes held.

    OMP_NUM_THREADS=1 python tests/benchmarks/fused_lora.py time [--rounds 10] [--modes nf4 fp32] [targets=all_linear …]
    OMP_NUM_THREADS=1 python tests/benchmarks/fused_lora.py memory [--modes int8 bf16 nf4] [targets=all_linear …]

The product trains with PEFT's layers. This script holds the alternatives, so that their gain can be measured again on
another processor, or after PEFT changes:

* ``node``: base(x) + scale · x Aᵀ Bᵀ in one node, which saves x once and adds in place. Products with the rank have r
  rows, not r columns: MKL computes them two to five times as fast.
* ``merged``: x (W + scale · B A)ᵀ, as one product in fp32. Only for fp32 computation: 16 bits would round the update
  of W away.
* ``merged, full``: the same; the gradients of A and B come from the gradient of the whole weight.

Both commands first compare the gradients of A and B with PEFT's. ``time``: a round is one training of the embedded
model on the same 16 rows at every step, with SFTTrainer's whole step. The kinds take turns from step to step, in both
directions. It prints the milliseconds of a step, least and median over all rounds, and the ratios to PEFT's, of all
steps and of each round's median. ``memory``: the bytes that the forward pass of one batch leaves allocated for the
backward pass, with and without gradient checkpointing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from qlora_exp.config.compose import compose
from qlora_exp.data.load import to_training_dataset
from qlora_exp.models.adapters import ADAPTER, attach_adapters, recast_adapters
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.runs.prepare import prepare
from qlora_exp.runs.process import silence_libraries
from qlora_exp.system import environment
from qlora_exp.training.callbacks import StepMeter
from qlora_exp.training.trainer import _MeteredTrainer, trainer_arguments

WARM_UP = 4
KINDS = ("PEFT", "node", "merged", "merged, full")


class Node(torch.autograd.Function):
    """base(x) + scale · x Aᵀ Bᵀ, without dropout and autocast. x: (…, in), A: (r, in), B: (out, r).

    Where x is 16 bits wide and the adapters are fp32, x is cast again for A's gradient, not saved in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, a: Any, b: Any, base: Any, scale: float) -> Any:
        output = base(x)
        low = a @ x.reshape(-1, x.shape[-1]).to(a.dtype).t()
        rows = output.view(-1, output.shape[-1])
        if rows.dtype is a.dtype:
            rows.addmm_(low.t(), b.t(), alpha=scale)
        else:
            rows.add_(low.t() @ b.t(), alpha=scale)
        ctx.save_for_backward(x, a, b, low)
        ctx.base, ctx.scale = base, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, a, b, low = ctx.saved_tensors
        incoming = gradient.reshape(-1, gradient.shape[-1])
        wide = incoming.to(a.dtype)
        through_b = (b.t().contiguous() @ wide.t()).mul_(ctx.scale)
        of_a = through_b @ x.reshape(-1, x.shape[-1]).to(a.dtype)
        of_b = (low @ wide).mul_(ctx.scale).t().contiguous()
        of_x = None
        if ctx.needs_input_grad[0]:
            weight = frozen_weight(ctx.base, incoming.dtype)
            of_x = incoming @ weight
            if of_x.dtype is a.dtype:
                of_x.addmm_(through_b.t(), a)
            else:
                of_x.add_(through_b.t() @ a)
            of_x = of_x.to(x.dtype).view(x.shape)
        return of_x, of_a, of_b, None, None


class Merged(torch.autograd.Function):
    """x (W + scale · B A)ᵀ in fp32. W is rebuilt in the backward pass; nothing is saved but x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Any, a: Any, b: Any, base: Any, scale: float, full: bool) -> Any:
        ctx.save_for_backward(x, a, b)
        ctx.base, ctx.scale, ctx.full = base, scale, full
        return linear(x, torch.addmm(frozen_weight(base, x.dtype), b, a, alpha=scale), base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, a, b = ctx.saved_tensors
        incoming, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.full:
            of_weight = (incoming.t() @ rows).mul_(ctx.scale)
            of_a, of_b = b.t() @ of_weight, of_weight @ a.t()
        else:
            of_a = (b.t().contiguous() @ incoming.t()).mul_(ctx.scale) @ rows
            of_b = ((a @ rows.t()) @ incoming).mul_(ctx.scale).t().contiguous()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = incoming @ torch.addmm(frozen_weight(ctx.base, x.dtype), b, a, alpha=ctx.scale)
            of_x = of_x.view(x.shape)
        return of_x, of_a, of_b, None, None, None


def frozen_weight(base: Any, dtype: torch.dtype) -> Any:
    """The weight (out, in) that bitsandbytes' and torch's backward passes multiply with."""
    if isinstance(base, Linear4bit):
        return dequantize_4bit(base.weight, base.weight.quant_state).to(dtype)
    if isinstance(base, Linear8bitLt):
        return base.state.CB.to(dtype, copy=True).mul_(base.state.SCB.unsqueeze(1).mul(1.0 / 127.0))
    return base.weight


def forward(layer: Any, x: Any) -> Any:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    base, scale = layer.base_layer, layer.scaling[ADAPTER]
    if layer.kind == "node":
        return Node.apply(x, a, b, base, scale)
    return Merged.apply(x, a, b, base, scale, layer.kind == "merged, full")


@contextmanager
def layers_of_kind(model: Any, kind: str) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and kind != "PEFT"]
    for layer in layers:
        layer.kind, layer.forward = kind, MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.kind, layer.forward


class Turns(TrainerCallback):  # type: ignore[misc]
    """Switches the layers' kind at the start of a step, and counts the processor seconds until the next one."""

    def __init__(self, model: Any, first: int) -> None:
        self.model, self.first, self.kind = model, first, KINDS[0]
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.stack = ExitStack()
        self._began: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self._began is not None and state.global_step > WARM_UP:
            self.seconds[self.kind].append(now - self._began)
        turn = state.global_step % (2 * len(KINDS))
        self.kind = KINDS[(self.first + min(turn, 2 * len(KINDS) - 1 - turn)) % len(KINDS)]
        self.stack.close()
        self.stack.enter_context(layers_of_kind(self.model, self.kind))
        self._began = time.process_time()


class Prepared:
    """The embedded model with the configuration's adapters, ready to train."""

    def __init__(self, mode: str, overrides: list[str]) -> None:
        self.config = compose(["training.device=cpu", f"quantization={mode}", *overrides])
        self.run = prepare(self.config, environment.probe(self.config.training.device))
        self.base = load_base(self.config, "cpu")

    def model(self) -> Any:
        model = attach_adapters(clone_sharing_weights(self.base), self.config, self.run.modules)
        return model.train()

    def batch(self) -> Any:
        torch.manual_seed(0)
        return torch.randint(5, 4000, (self.config.training.batch_size, 64))


def largest_difference(ready: Prepared, kind: str) -> float:
    """Relative difference of the gradients of A and B from PEFT's, the largest of all layers."""
    model, ids, gradients = ready.model(), ready.batch(), {}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for current in ("PEFT", kind):
        with layers_of_kind(model, current):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients[current] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return max(float((gradients[kind][n] - peft).norm() / peft.norm()) for n, peft in gradients["PEFT"].items())


def one_round(ready: Prepared, first: int) -> dict[str, list[float]]:
    model = ready.model()
    turns = Turns(model, first)
    with tempfile.TemporaryDirectory() as folder, turns.stack:
        trainer = _MeteredTrainer(
            model=model,
            args=trainer_arguments(ready.run.plan, ready.config, Path(folder)),
            train_dataset=to_training_dataset(ready.run.splits.train[: ready.config.training.batch_size]),
            processing_class=ready.run.tokenizer,
            callbacks=[turns],
        )
        trainer.meter = StepMeter()
        recast_adapters(model, ready.config.lora)
        trainer.train()
    return turns.seconds


def print_seconds(mode: str, ready: Prepared, number_of_rounds: int) -> None:
    rounds = [one_round(ready, number % len(KINDS)) for number in range(number_of_rounds)]
    steps = {kind: [1000 * second for figures in rounds for second in figures[kind]] for kind in KINDS}
    for kind in KINDS:
        ratios = [median(figures[kind]) / median(figures["PEFT"]) for figures in rounds]
        least = min(steps[kind]) / min(steps["PEFT"])
        spread = f"{median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
        shown = f"{min(steps[kind]):.1f} / {median(steps[kind]):.1f}"
        print(f"| {mode} | {kind} | {shown} | {least:.3f} | {spread} |", flush=True)


def print_bytes(mode: str, ready: Prepared) -> None:
    for checkpointing in (False, True):
        held = []
        for kind in KINDS[:2]:
            model = ready.model()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            ids = ready.batch()
            with layers_of_kind(model, kind), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
                output = model.base_model(input_ids=ids, use_cache=False, logits_to_keep=1)
            held.append(sum(event.self_cpu_memory_usage for event in events.key_averages()))
            del output
        row = f"{held[0] / 1e6:.1f} | {held[1] / 1e6:.1f} | {held[1] / held[0]:.3f}"
        print(f"| {mode} | {'on' if checkpointing else 'off'} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2 * len(KINDS) * 2 + WARM_UP + 3)
    parser.add_argument("--modes", nargs="+")
    given, overrides = parser.parse_known_args()
    silence_libraries()
    settings = [f"training.max_steps={given.steps}", f"training.logging_steps={given.steps}", *overrides]
    timed = given.what == "time"
    modes = given.modes or (["nf4", "fp32"] if timed else ["int8", "bf16", "nf4"])
    ready = {mode: Prepared(mode, settings) for mode in modes}
    for mode in modes:
        differences = [f"{kind} {largest_difference(ready[mode], kind):.1e}" for kind in KINDS[1 : 4 if timed else 2]]
        print(f"{mode}: gradients differ from PEFT's by {', '.join(differences)}", flush=True)
    if timed:
        print("| quantization | layers | ms a step: least / median | ratio of least | ratio of medians (min, max) |")
        print("|---|---|---|---|---|")
    else:
        print("| quantization | checkpointing | PEFT: MB held | node: MB held | ratio |\n|---|---|---|---|---|")
    for mode in modes:
        if timed:
            print_seconds(mode, ready[mode], given.rounds)
        else:
            print_bytes(mode, ready[mode])


if __name__ == "__main__":
    main()
