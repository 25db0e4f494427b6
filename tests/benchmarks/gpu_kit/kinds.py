"""The last stages: are the meters right, and does every kind of training end as it should."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpu_kit.commands import train
from gpu_kit.inputs import Kit
from gpu_kit.runner import ROOT

ENERGY_RATIO = (0.95, 1.05)
HELD_BYTES = 3_000_000_000
WORK_SECONDS = 8.0
RESUMES_AFTER_SECONDS = 90.0


def meters(kit: Kit) -> None:
    """Energy against NVML's power, a known peak, and the context's bytes."""
    from qlora_exp.training.meter import Meter, energy_joules

    meter = Meter("cuda")
    first = energy_joules("cuda")
    with meter.phase("work"):
        watts = _work(kit)
    second = energy_joules("cuda")
    phase = meter.of("work")
    measured = phase.energy_joules
    grown = first is not None and second is not None and measured is not None and 0 < measured <= second - first
    kit.findings.check("energy counter", grown, (first, measured, second), "the phase's joules within both readings")
    by_power = sum(watts) / len(watts) * WORK_SECONDS if watts else 0.0
    kit.findings.row("energy", joules=measured, joules_by_power=by_power, readings=len(watts))
    ratio = (measured or 0.0) / by_power if by_power else 0.0
    low, high = ENERGY_RATIO
    kit.check_on_gpu("energy / power × time", low <= ratio <= high, ratio, f"{low} to {high}")
    if kit.rehearse:
        kit.findings.not_checked("a known peak", f"{HELD_BYTES} bytes")
        return
    import torch

    held = torch.cuda.memory_allocated()
    with meter.phase("peak"):
        block = torch.empty(HELD_BYTES, dtype=torch.uint8, device="cuda")
        del block
    peak = (meter.of("peak").peak_bytes or 0) - held
    exact = HELD_BYTES <= peak <= HELD_BYTES + 2**21
    kit.findings.check("a known peak", exact, peak, f"{HELD_BYTES} bytes, or the allocator's next 2 MiB")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    kit.findings.row("context", bytes=total - free - torch.cuda.memory_reserved())


def _work(kit: Kit) -> list[float]:
    """Multiply matrices, and read the card's power meanwhile; return the readings in watts."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    watts: list[float] = []
    seconds = 0.2 if kit.rehearse else WORK_SECONDS
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(0.05):
            watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000.0)

    device, width = ("cpu", 64) if kit.rehearse else ("cuda", 8192)
    matrix = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()
    ended.set()
    reader.join()
    return watts


def kinds(kit: Kit) -> None:
    """Six steps of each kind of training with separate code, and a run that is ended and continued."""
    from qlora_exp.models.base_cache import BaseCache

    trainings: dict[str, list[str]] = {
        "fp16": ["quantization=fp16"],
        "int8, threshold 0": ["quantization=int8", "quantization.int8_threshold=0"],
        "int8, threshold 6": ["quantization=int8"],
        "fp4": ["quantization=fp4"],
        "DoRA": ["quantization=nf4", "lora.dora=true"],
        "PiSSA": ["quantization=bf16", "lora.init=pissa"],
        "dropout": ["quantization=nf4", "lora.dropout=0.1"],
        "max_tokens": ["quantization=nf4", "training.max_steps=null", "training.max_tokens=500"],
        "validation": ["quantization=nf4", "training.evaluate_every_steps=2", "training.keep_best=true"],
        "accumulation": ["quantization=nf4", "training.micro_batch_size=1"],
    }
    if importlib.util.find_spec("flash_attn") is not None and not kit.rehearse:
        trainings["FlashAttention"] = ["quantization=nf4", "model.attention=flash_attention_2"]
    bases, steps = BaseCache(), 3 if kit.rehearse else 6
    length = 48 if kit.rehearse else 256
    for name, more in trainings.items():
        quick = kit.quick("kinds", steps)
        if "training.max_steps=null" in more:
            quick = [one for one in quick if not one.startswith("training.max_steps")]
        overrides = [*kit.own_task(length, mixed=True), *quick, "training.batch_size=4", *more]
        record, status = train(overrides, bases)
        kit.findings.check(f"{name}: status", status == "COMPLETED", status, "COMPLETED")
        training = record.training if record is not None else None
        loss = training.final_loss if training is not None else None
        taken = training.steps if training is not None else 0
        compute = record.plan.compute_dtype if record is not None and record.plan is not None else None
        kit.findings.row("kinds", kind=name, steps=taken, loss=loss, compute=compute)
        if name != "max_tokens":
            kit.findings.check(f"{name}: steps", taken == steps, taken, steps)
    _resumed(kit, length)


def _has_trained(outputs: Path) -> bool:
    """Return whether a run has logged a loss."""
    return any(file.stat().st_size for file in outputs.glob("runs/*/curve.jsonl"))


def _resumed(kit: Kit, length: int) -> None:
    """SIGTERM to ``qlora-exp run``: it saves, ends with code 130, and ``--resume`` continues from there."""
    from qlora_exp.records.files import read_record

    steps = 120 if kit.rehearse else 200
    outputs = kit.outputs("resumed")
    overrides = [
        *(*kit.own_task(length), *kit.quick("resumed", steps), "quantization=nf4"),
        *("training.batch_size=2", "training.logging_steps=1"),
    ]
    if kit.rehearse:  # no mock reaches another process's command: this one trains on the CPU
        overrides[-1:] = ["training.logging_steps=1", "training.device=cpu"]
    start = [sys.executable, "-m", "qlora_exp.cli", "run"]
    with (kit.out / "resumed.log").open("wb") as log:
        process = subprocess.Popen([*start, *overrides], cwd=ROOT, env=os.environ, stdout=log, stderr=log)
        until = time.monotonic() + RESUMES_AFTER_SECONDS
        while not _has_trained(outputs) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    records = [read_record(file) for file in outputs.glob("runs/*/record.json")]
    status = str(records[0].status) if records else "no record"
    kit.findings.check("after SIGTERM", status == "INTERRUPTED", f"{status}, exit code {code}", "INTERRUPTED")
    if status != "INTERRUPTED":
        return
    resume = [*start, "--resume", str(outputs / "runs" / records[0].run_id)]
    done = subprocess.run(resume, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    record = read_record(next(outputs.glob("runs/*/record.json")))
    training = record.training
    at, total = (training.resumed_from_step, training.steps) if training is not None else (None, None)
    continued = record.status == "COMPLETED" and at is not None and at > 0 and total == steps
    kit.findings.check(
        "continued", continued, (str(record.status), at, total), f"COMPLETED, from a step > 0 to {steps}"
    )
