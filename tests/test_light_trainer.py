"""What a training step costs the host: how often it waits for the device, and how often it visits all modules. Counted
on a CPU, where the same calls are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_exp.config.compose import compose
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.execute import execute
from qlora_exp.training.trainer import _MeteredTrainer

Kept = pytest.MonkeyPatch
STEPS, MICRO_BATCHES = 4, 2
OPTIONS = (
    *("training.device=cpu", f"training.max_steps={STEPS}", "training.batch_size=8", "training.micro_batch_size=4"),
    *("evaluation=quick", "evaluation.max_items=4", "evaluation.cache=false", "evaluation.baselines=false"),
    *("evaluation.before=false", "tracking=off", "quantization=nf4"),
)
WAIT = {
    *("_local_scalar_dense", "equal", "is_nonzero", "masked_scatter_backward", "masked_select", "nonzero"),
    *("repeat_interleave", "unique_consecutive", "_unique2"),
}
"""Operations that read a value, or whose result's shape depends on one."""
METHODS = (
    *("training_step", "_get_num_items_in_batch", "_clip_grad_norm", "_get_grad_norm", "_maybe_log_save_evaluate"),
)
"""All of a step but collating (in the host's memory) and the optimizer (torch keeps its step count there, too)."""


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype is torch.bool for index in indices)
        if name in WAIT or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def during(owner: type, names: Sequence[str], counting: Callable[[], AbstractContextManager[Any]], kept: Kept) -> None:
    """Run these methods of ``owner`` inside ``counting()``."""

    def wrapped(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with counting():
                return method(*arguments, **named)

        return call

    for name in names:
        kept.setattr(owner, name, wrapped(getattr(owner, name)))


def run(tmp_path: Path, *overrides: str) -> RunRecord:
    record = execute(compose([*OPTIONS, f"output_root={tmp_path}", *overrides]))
    assert record.status is Status.COMPLETED, record.failure
    return record


@pytest.mark.parametrize(
    "overrides",
    [(), ("training.padding_free=off",), ("training.gradient_checkpointing=on", "training.max_grad_norm=0")],
    ids=str,
)
def test_the_host_waits_for_the_device_once_a_step(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: Kept
) -> None:
    waits = Waits()
    read = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        waits.counts["tolist"] += bool(torch.utils._python_dispatch._get_current_dispatch_mode())
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    during(_MeteredTrainer, METHODS, lambda: waits, monkeypatch)
    record = run(tmp_path, f"training.logging_steps={STEPS}", *overrides)
    logged = 2  # transformers reads the loss at the first and at the last step
    assert waits.counts == {"tolist": STEPS, "_local_scalar_dense": logged}
    assert record.speed.train_tokens
    assert record.speed.loss_tokens


def test_a_step_visits_no_modules(tmp_path: Path, monkeypatch: Kept) -> None:
    """A model of 8B has more than 2,000, and a visit takes milliseconds."""
    counting = False
    visits: Counter[str] = Counter()

    @contextmanager
    def counted() -> Any:
        nonlocal counting
        counting = True
        yield
        counting = False

    def visiting(name: str) -> Any:
        method = getattr(torch.nn.Module, name)

        def visit(*arguments: Any, **named: Any) -> Any:
            if counting:
                visits[name] += 1
            return method(*arguments, **named)

        return visit

    for name in ("named_modules", "children", "_named_members", "train", "zero_grad"):
        monkeypatch.setattr(torch.nn.Module, name, visiting(name))
    during(_MeteredTrainer, METHODS, counted, monkeypatch)
    during(_MeteredTrainer, ("floating_point_ops",), counted, monkeypatch)
    run(tmp_path, f"training.logging_steps={STEPS}")
    assert visits == {}
