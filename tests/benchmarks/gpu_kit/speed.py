"""Stages that measure: memory and speed against the plan and plain TRL, the anatomy of a step, seconds of a step
by its tokens, predicted seconds, and scoring."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_kit.commands import command, train
from gpu_kit.correctness import release
from gpu_kit.inputs import Cell, Kit, as_arguments

CELLS = (
    Cell("nf4", 16, 16, 512, 1, "auto", "paged_adamw_8bit"),
    Cell("nf4", 16, 4, 2048, 4, "on", "paged_adamw_8bit"),
    Cell("nf4", 16, 4, 2048, 4, "off", "adamw_torch_fused"),
    Cell("bf16", 16, 4, 2048, 4, "on", "adamw_torch_fused"),
    Cell("nf4", 64, 4, 2048, 4, "on", "paged_adamw_8bit", mixed=True),
    Cell("int8", 8, 4, 1024, 4, "on", "adamw_8bit"),
    Cell("nf4", 8, 1, 512, 16, "off", "adamw_torch"),
    Cell("nf4", 8, 1, 4096, 1, "on", "adamw_torch"),
    Cell("nf4", 8, 2, 4096, 1, "on", "adamw_torch"),
    Cell("nf4", 8, 8, 4096, 1, "on", "adamw_torch"),
    Cell("nf4", 8, 8, 1024, 2, "off", "adamw_torch", mixed=True),
    Cell("bf16", 64, 8, 1024, 2, "off", "adamw_torch_fused"),
)
"""The first six answer most. Trained in this order, except that the cells of one mode share a loaded base."""
FIRST_CELLS = 6
PEAK_RATIO = {False: (0.95, 1.05), True: (0.85, 1.15)}
"""By ``mixed``: the allowed measured / predicted peak."""
EXACT_ERROR = 0.01
"""Of the bytes that torch has allocated before training, against those of base and adapters."""
GOALS = {"H200": (Cell("nf4", 16, 4, 2048, 4, "off", "adamw_torch_fused"), 13_000.0)}
"""By card: a cell, and the real tokens per second that it should reach."""
TRL_SHARE = 0.97
"""Least speed of the product, as a share of plain TRL's with the settings of its documentation."""
MAX_SYNCS = 3.0
"""Per micro-batch: times that the host waits for the GPU."""
MICRO_STEP_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COHORT_SIZES = (2, 4, 8)
PEER = Path(__file__).with_name("plain_trl.py")


@dataclass
class Watched:
    """What the process used during ``Trainer.train``, and the memory allocated when it began."""

    cpu_seconds: float = 0.0
    seconds: float = 0.0
    allocated_before: int = 0
    steps: int = 0


@contextlib.contextmanager
def watched_training() -> Iterator[Watched]:
    import torch
    from transformers import Trainer

    watched, original = Watched(), Trainer.train

    def watched_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched.allocated_before = torch.cuda.memory_allocated()
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            watched.cpu_seconds, watched.seconds = time.process_time() - cpu, time.perf_counter() - wall
            watched.steps = int(self.state.global_step)

    Trainer.train = watched_train
    try:
        yield watched
    finally:
        Trainer.train = original


def first_cells(kit: Kit) -> None:
    import torch

    rates = _cells(kit, CELLS[:FIRST_CELLS])
    name = "" if kit.rehearse else torch.cuda.get_device_name()
    for card, (cell, goal) in GOALS.items():
        if kit.rehearse or card in name:
            rate = rates.get(kit.shown(cell).name) or 0.0
            kit.check_on_gpu(f"{card}: real tokens/s of an 8B model", rate >= goal, f"{rate:.0f}", f">= {goal:.0f}")


def more_cells(kit: Kit) -> None:
    _cells(kit, CELLS[FIRST_CELLS:])


def _cells(kit: Kit, cells: tuple[Cell, ...]) -> dict[str, float | None]:
    """Return tokens per second by the cell's name."""
    from qlora_exp.models.base_cache import BaseCache

    bases = BaseCache()
    modes = list(dict.fromkeys(cell.mode for cell in cells))
    rows = [measure_cell(kit, cell, bases) for cell in sorted(cells, key=lambda cell: modes.index(cell.mode))]
    return {row["cell"]: row["tokens_per_second"] for row in rows if row}


def measure_cell(kit: Kit, cell: Cell, bases: Any, table: str = "cells") -> dict[str, Any]:
    """Train ``cell``, write its row, and check its end, its tokens and its predicted peak."""
    import torch

    from qlora_exp.estimate.throughput import achieved_flops_per_second

    cell = kit.shown(cell)
    with watched_training() as watched:
        record, status = train(kit.of_cell(cell), bases)
    kit.findings.check(f"{cell.name}: status", status == "COMPLETED", status, "COMPLETED")
    if status != "COMPLETED" or record.plan is None:
        return {}
    plan, memory, speed = record.plan, record.memory, record.speed
    steps = max(1, watched.steps)
    predicted, measured = plan.predicted_peak_train_bytes, memory.train_working_set_bytes
    ratio = measured / predicted if measured and predicted else None
    tokens = speed.train_tokens or 0
    row = {
        "cell": cell.name,
        "config": json.loads(as_arguments(cell)),
        "checkpointing": plan.gradient_checkpointing,
        "predicted_peak_bytes": predicted,
        "predicted_context_bytes": plan.predicted_context_bytes,
        "predicted_activation_bytes": plan.predicted_activation_bytes,
        "predicted_logits_bytes": plan.predicted_logits_bytes,
        "measured_peak_bytes": measured,
        "measured_reserved_bytes": memory.peak_train_reserved_bytes,
        "measured_base_bytes": (memory.base_weight_bytes or 0) + (memory.quantization_state_bytes or 0),
        "allocated_before_bytes": watched.allocated_before,
        "context_bytes": _context_bytes(),
        "measured_over_predicted": ratio,
        "tokens_per_second": speed.train_tokens_per_second,
        "tokens_per_second_wall": tokens / watched.seconds if watched.seconds else None,
        "computed_tokens_share": _share(plan.predicted_padded_tokens, plan.predicted_train_tokens),
        "step_seconds_p50": speed.step_seconds_p50,
        "step_seconds_p95": speed.step_seconds_p95,
        "host_seconds_per_step": watched.cpu_seconds / steps,
        "utilisation": speed.model_flops_utilisation,
        "joules_per_token": (speed.energy_joules or 0.0) / tokens if tokens and speed.energy_joules else None,
        "flops_per_second": achieved_flops_per_second(record),
        "train_flops": (plan.train_flops_per_token or 0.0) * tokens,
        "train_seconds": speed.train_seconds,
        "load_seconds": speed.load_seconds,
    }
    kit.findings.row(table, **row)
    if not cell.mixed:
        wanted = watched.steps * cell.rows * cell.accumulation * cell.length
        kit.findings.check(f"{cell.name}: tokens", tokens == wanted, tokens, wanted)
    exact = sum(part or 0 for part in (memory.base_weight_bytes, memory.quantization_state_bytes, memory.adapter_bytes))
    off = watched.allocated_before / exact - 1 if exact else 1.0
    kit.check_on_gpu(f"{cell.name}: base and adapters", abs(off) <= EXACT_ERROR, f"{off:+.2%}", f"± {EXACT_ERROR:.0%}")
    low, high = PEAK_RATIO[cell.mixed]
    name, wanted_ratio = f"{cell.name}: measured / predicted peak", f"{low} to {high}"
    kit.check_on_gpu(name, ratio is not None and low <= ratio <= high, ratio, wanted_ratio)
    torch.cuda.empty_cache()
    return row


def _context_bytes() -> int:
    """Return what is used on the card outside torch's allocator, if this is the only process on it."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def _share(part: int | None, whole: int | None) -> float | None:
    return part / whole if part and whole else None


def plain_trl(kit: Kit) -> None:
    """Product, plain TRL, product again, on the same rows and card; each in its own process or with its own base.
    The two figures of the product show the noise: a smaller difference is none."""
    from qlora_exp.models.base_cache import BaseCache

    for number, cell in enumerate(CELLS[: 1 if kit.rehearse else 2]):
        shown, bases = kit.shown(cell), BaseCache()
        first = measure_cell(kit, cell, bases, "product and TRL")
        del bases
        release()  # TRL's process needs the card's memory
        kinds = ("documented",) if kit.rehearse else ("documented", "tuned", *(("bf16",) if number == 1 else ()))
        peers = {kind: _peer(kit, shown, kind) for kind in kinds}
        second = measure_cell(kit, cell, BaseCache(), "product and TRL")
        rates = [row["tokens_per_second"] for row in (first, second) if row.get("tokens_per_second")]
        documented = peers["documented"].get("tokens_per_second")
        kit.findings.check(f"{shown.name}: both were trained", bool(rates and documented), (rates, documented), "rates")
        if not rates or not documented:
            continue
        shares = {kind: max(rates) / peer["tokens_per_second"] for kind, peer in peers.items() if peer}
        noise = abs(rates[0] - rates[-1]) / max(rates)
        kit.findings.row("product / TRL", cell=shown.name, noise=noise, **shares)
        name = f"{shown.name}: product / TRL as documented"
        kit.check_on_gpu(name, shares["documented"] >= TRL_SHARE - noise, shares["documented"], f">= {TRL_SHARE}")


def _peer(kit: Kit, cell: Cell, kind: str) -> dict[str, Any]:
    file = kit.out / "peer.json"
    file.unlink(missing_ok=True)
    arguments = [str(kit.model("llama3_1_8b")), str(kit.rows(cell.length, cell.mixed)), str(file)]
    done = command([sys.executable, str(PEER), *arguments, kind, str(kit.steps), as_arguments(cell)], os.environ)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found:
        kit.findings.row("TRL", cell=cell.name, kind=kind, **found)
    else:
        print(f"plain TRL ({kind}): {done}", flush=True)
    return found


def anatomy(kit: Kit) -> None:
    """Profile three steps; then train single rows of 128 to 16384 tokens: T(n), which says whether several adapters in
    one step could pay."""
    from qlora_exp.models.base_cache import BaseCache

    bases, cell = BaseCache(), kit.shown(CELLS[0])
    steps = 6 if kit.rehearse else 10
    with profiled_steps(kit, first=steps - 4, count=3) as profile:
        _, status = train(kit.of_cell(cell, steps), bases)
    kit.findings.check("profiled run", status == "COMPLETED", status, "COMPLETED")
    _profile_rows(kit, profile, cell)
    seconds: dict[int, float] = {}
    for tokens in MICRO_STEP_TOKENS[: 3 if kit.rehearse else None]:
        for checkpointing in ("off",) if kit.rehearse or tokens < 8192 else ("off", "on"):
            row = replace(cell, rows=1, length=tokens, accumulation=1, checkpointing=checkpointing)
            record, status = train(kit.of_cell(row), bases)  # the longest may not fit on a small card
            p50 = record.speed.step_seconds_p50 if status == "COMPLETED" else None
            kit.findings.row("micro-steps", tokens=tokens, checkpointing=checkpointing, seconds=p50, status=status)
            if p50 is not None and checkpointing == "off":
                seconds[tokens] = p50
    for tokens in seconds:
        gains = {
            f"K={size}": size * seconds[tokens] / seconds[size * tokens]
            for size in COHORT_SIZES
            if size * tokens in seconds
        }
        if gains:
            kit.findings.row("gain of K rows in one step", tokens=tokens, **gains)
    smallest = min(MICRO_STEP_TOKENS)
    kit.findings.check(
        "micro-steps", smallest in seconds and len(seconds) > 2, sorted(seconds), "three lengths or more"
    )


@contextlib.contextmanager
def profiled_steps(kit: Kit, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Profile ``count`` optimizer steps from the one that begins after step ``first``; ``result`` has the profile."""
    import torch
    from transformers import Trainer

    result: dict[str, Any] = {"micro_batches": 0}
    original = Trainer.training_step
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not kit.rehearse:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        if step == first and "began" not in result:
            torch.cuda.synchronize()
            profiler.start()
            result["began"] = time.perf_counter()
        if step == first + count and "seconds" not in result:
            torch.cuda.synchronize()
            result["seconds"] = time.perf_counter() - result["began"]
            profiler.stop()
        if first <= step < first + count:
            result["micro_batches"] += 1
        return original(self, *args, **kwargs)

    Trainer.training_step = training_step
    try:
        yield result
    finally:
        Trainer.training_step = original
        result["profiler"] = profiler


KERNELS = {
    "dequantization": ("dequant",),
    "attention": ("flash", "fmha", "attention", "softmax"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas"),
    "element-wise": ("elementwise", "vectorized", "reduce", "copy"),
}
"""Parts of kernels' names; a kernel belongs to the first that matches."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = "aten::_local_scalar_dense"
"""The operation behind ``item()``, ``float()`` and ``bool()`` of a tensor: on CUDA each one waits."""


def _profile_rows(kit: Kit, profile: dict[str, Any], cell: Cell) -> None:
    averages = profile["profiler"].key_averages() if "seconds" in profile else []
    micro_batches = max(1, profile["micro_batches"])
    counts = {one.key: one.count for one in averages}
    waits = max(0, sum(counts.get(name, 0) for name in WAITS) - 1) / micro_batches  # one is the profile's end
    reads = counts.get(READS, 0) / micro_batches
    kernels = {one.key: one.self_device_time_total / 1e6 for one in averages if str(one.device_type).endswith("CUDA")}
    busy = sum(kernels.values())
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, seconds in kernels.items():
        lower = name.lower()
        kind = next((kind for kind, parts in KERNELS.items() if any(part in lower for part in parts)), "other")
        shares[kind] += seconds / busy if busy else 0.0
    kit.findings.row(
        "anatomy",
        cell=cell.name,
        seconds_per_step=profile.get("seconds", 0.0) / 3,
        idle_share=1 - busy / profile["seconds"] if kernels else None,
        waits_per_micro_batch=waits,
        reads_per_micro_batch=reads,
        **shares,
    )
    for name, seconds in sorted(kernels.items(), key=lambda item: -item[1])[:15]:
        kit.findings.row("kernels", name=name[:100], share=seconds / busy)
    kit.findings.check("profile", bool(averages), f"{len(averages)} kinds of events", "some")
    kit.check_on_gpu("waits per micro-batch", waits <= MAX_SYNCS, waits, f"<= {MAX_SYNCS:g}")
    if averages and not kit.rehearse:
        plain = kit.out / "trace.json"
        profile["profiler"].export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(kit.out / "trace.json.gz", "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()


def calibration(kit: Kit) -> None:
    """Calibrate, and compare the seconds that it predicts for the cells with what they took."""
    from qlora_exp.config.enums import Quantization
    from qlora_exp.estimate import calibration as product
    from qlora_exp.estimate.benchmark import measured_flops_per_second
    from qlora_exp.estimate.throughput import seconds_at

    device, seconds = ("cpu", 0.05) if kit.rehearse else ("cuda", product.SECONDS_PER_MODE)
    rates = {}
    for mode in product.MODES[:2] if kit.rehearse else product.MODES:
        rates[mode.value] = measured_flops_per_second(Quantization(mode), device, seconds)
        kit.findings.row("calibrated", mode=mode.value, tflops=rates[mode.value] / 1e12)
    kit.findings.check("rates", all(rate > 0 for rate in rates.values()), rates, "above 0")
    inside, shares = [], []
    for row in _cell_rows(kit):
        mode, took = row["config"]["mode"], row["train_seconds"]
        if mode not in rates or not took or not row["train_flops"]:
            continue
        predicted = seconds_at(product.rate_from_calibration(rates[mode]), row["train_flops"])
        assert predicted is not None
        inside.append(predicted.low <= took <= predicted.high)
        shares.append(row["train_flops"] / took / rates[mode])
        kit.findings.row("calibrated cells", cell=row["cell"], share=shares[-1], low=predicted.low, took=took,
                         high=predicted.high)  # fmt: skip
    if shares:
        middle = statistics.median(shares)
        kit.findings.row("calibrated share", low=min(shares), middle=middle, high=max(shares), cells=len(shares))
    enough = bool(inside) and sum(inside) >= 0.8 * len(inside)
    kit.check_on_gpu("predicted seconds hold", enough, f"{sum(inside)} of {len(inside)}", ">= 80 % of the cells")


def _cell_rows(kit: Kit) -> list[dict[str, Any]]:
    """Rows of the stages of cells, from this state."""
    file = kit.out / "state.json"
    stages = json.loads(file.read_text(encoding="utf-8"))["stages"] if file.is_file() else {}
    numbers = [row for stage in stages.values() for row in stage["numbers"]]
    return [row for row in numbers if row["table"] == "cells"]


def scoring(kit: Kit) -> None:
    """Seconds of each part of scoring, on one loaded base: the tuned model is scored after one step."""
    from qlora_exp.models.base_cache import BaseCache

    bases, items = BaseCache(), 4 if kit.rehearse else 64
    documents, length = (2, 48) if kit.rehearse else (40, 512)
    own = kit.own_task(length, family="llama3_1_8b")
    labels = [own[0], own[1], own[2], "task=embedded", "training.max_length=512"]
    parts = {
        "completion": [*own, "evaluation.generate=false"],
        "options": [*labels, "evaluation.generate=false"],
        "generation": [*own, "evaluation.generate=true", f"evaluation.max_new_tokens={4 if kit.rehearse else 32}"],
        "forgetting": [*own, "evaluation.forgetting=true", f"evaluation.forgetting_documents={documents}"],
    }
    for name, overrides in parts.items():
        more = ["quantization=nf4", "training.batch_size=2", "training.gradient_checkpointing=on"]
        record, status = train([*kit.quick("scoring", 1, items), *overrides, *more], bases)
        kit.findings.check(f"{name}: status", status == "COMPLETED", status, "COMPLETED")
        if record is None:
            continue
        seconds, after = record.speed.evaluation_seconds, record.scores.after
        scored = after.items if after is not None else None
        kit.findings.row("scoring", part=name, seconds=seconds, items=scored)
        kit.findings.check(f"{name}: items", scored is not None and 0 < scored <= items, scored, f"1 to {items}")
