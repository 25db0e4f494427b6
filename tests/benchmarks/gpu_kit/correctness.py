"""The first stages: is the machine what it should be, are the kernels right, is QLoRA's recipe what runs, and what
happens when memory runs out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from gpu_kit import faults
from gpu_kit.commands import card_used_bytes, run_records, sweep, train
from gpu_kit.inputs import Kit
from gpu_kit.runner import ROOT

NEEDED = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "hydra-core", "optuna")
NAMED = (
    *NEEDED,
    "tokenizers",
    "huggingface-hub",
    "pyarrow",
    "numpy",
    "triton",
    "mlflow",
    "mlflow-skinny",
    "liger-kernel",
)
MATMUL_WIDTH = 8192
DATA_SHEET_SHARE = 0.65
"""Least share of the data sheet's dense 16-bit rate that a large matrix product must reach: below it the card is
throttled, shared or partitioned. A guess."""
MEASURED_TOKENS = (1, 4, 8, 64, 512, 2048)
"""bitsandbytes chooses a kernel by the number of tokens: for single ones, for few, and dequantization for many."""
SHAPES = {True: ((256, 128), (128, 512)), False: ((4096, 4096), (14336, 4096), (4096, 14336))}
"""By ``rehearse``: outputs, inputs."""
PRODUCT_ERROR, GRADIENT_ERROR = 1e-2, 0.1
CONTEXT_BYTES = 1e9
PAGED = "with a paged optimizer"
MEMORY_BACK_SECONDS = 5.0


def preflight(kit: Kit) -> None:
    installed = {}
    for name in NAMED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    kit.findings.row("versions", python=sys.version.split()[0], **installed)
    missing = [name for name in NEEDED if name not in installed]
    kit.findings.check("packages", not missing, f"missing: {missing}" if missing else "all there", "all there")
    _check_versions(kit, installed)
    import torch

    from qlora_exp.orchestration.devices import inventory
    from qlora_exp.system.cards import data_sheet_flops

    kit.findings.row("torch", cuda=str(torch.version.cuda), threads=torch.get_num_threads())
    gpus = inventory()
    users = [user.pid for gpu in gpus for user in gpu.users if user.pid != os.getpid()]
    kit.check_on_gpu("one GPU is visible", torch.cuda.device_count() == 1, torch.cuda.device_count(), 1)
    kit.check_on_gpu("no other process is on a GPU", not users, users, "none")
    if kit.rehearse:
        for name in ("bitsandbytes has a CUDA library", "matrix products", "copy"):
            kit.findings.not_checked(name, "a GPU")
        return
    from bitsandbytes.cextension import lib

    kit.findings.check(
        "bitsandbytes has a CUDA library", getattr(lib, "compiled_with_cuda", False), type(lib).__name__, "CUDA's"
    )
    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    kit.findings.row("card", name=name, free_gb=free / 1e9, total_gb=total / 1e9, capability=str(capability()))
    left, right = (torch.randn(MATMUL_WIDTH, MATMUL_WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * MATMUL_WIDTH**3 / seconds_of(lambda: left @ right)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    kit.findings.row("ceilings", matmul_tflops=rate / 1e12, copy_tb_s=copied / 1e12)
    known = data_sheet_flops(name)
    if known is None:
        kit.findings.not_checked("matrix products", f"{DATA_SHEET_SHARE:.0%} of a data sheet that names {name}")
    else:
        wanted = f">= {DATA_SHEET_SHARE * known / 1e12:.0f} TFLOP/s"
        kit.findings.check("matrix products", rate >= DATA_SHEET_SHARE * known, f"{rate / 1e12:.0f} TFLOP/s", wanted)


def _check_versions(kit: Kit, installed: dict[str, str]) -> None:
    """Versions outside pyproject.toml's ranges are named: figures are then of another set than users install."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {one.name: one for one in map(Requirement, project["dependencies"])}
    outside = [
        f"{name} {version} ({requirements[name].specifier})"
        for name, version in installed.items()
        if name in requirements and not requirements[name].specifier.contains(version.split("+")[0])
    ]
    kit.findings.row("outside the declared ranges", packages=", ".join(outside) or "none")


def capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


def seconds_of(call: Any, repeats: int = 20) -> float:
    """Return the median seconds of ``call`` on the GPU, by events."""
    import torch

    for _ in range(3):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2] / 1e3


def gpu_tests(kit: Kit) -> None:
    from qlora_exp.config.enums import Quantization
    from qlora_exp.models.self_test import quantization_self_test

    device = "cpu" if kit.rehearse else "cuda"
    for mode in Quantization:
        result = quantization_self_test(mode, device)
        kit.findings.check(f"self-test {mode.value}", result.ok, result.detail, "ok")
    for tokens in MEASURED_TOKENS[: 3 if kit.rehearse else None]:
        for outputs, inputs in SHAPES[kit.rehearse]:
            error = _product_error(tokens, outputs, inputs, device)
            kit.findings.row("4-bit products", tokens=tokens, outputs=outputs, inputs=inputs, error=error)
            name = f"nf4 product of {tokens} tokens with {outputs} × {inputs}"
            kit.findings.check(name, error <= PRODUCT_ERROR, f"{error:.1e}", f"<= {PRODUCT_ERROR}")
    width, tokens = (256, 64) if kit.rehearse else (4096, 2048)
    error = _gradient_error(width, tokens, device)
    kit.findings.check(f"nf4 gradient, width {width}", error <= GRADIENT_ERROR, f"{error:.1e}", f"<= {GRADIENT_ERROR}")
    if kit.rehearse or importlib.util.find_spec("pytest") is None:
        kit.findings.not_checked("pytest -m gpu", "exit code 0")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/models/test_base.py"]
    code = subprocess.run(command, cwd=ROOT).returncode
    kit.findings.check("pytest -m gpu", code == 0, f"exit code {code}", "exit code 0")


def _nf4(outputs: int, inputs: int, device: str) -> tuple[Any, Any]:
    """Return an nf4 layer in bfloat16 and its dequantized weight in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data.normal_(std=0.02)
    layer = layer.to(device)
    return layer, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def _product_error(tokens: int, outputs: int, inputs: int, device: str) -> float:
    import torch

    layer, weight = _nf4(outputs, inputs, device)
    values = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        got, reference = layer(values).float(), values.float() @ weight.T
    return float((got - reference).norm() / reference.norm())


def _gradient_error(width: int, tokens: int, device: str) -> float:
    import torch

    layer, weight = _nf4(width, width, device)
    values = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(tokens, width, device=device)
    (layer(values).float() * weights).sum().backward()
    reference = weights @ weight
    assert values.grad is not None
    return float((values.grad.float() - reference).norm() / reference.norm())


def recipe(kit: Kit) -> None:
    """One nf4 run, and what its layers, adapters and optimizer really are."""
    optimizer = "adamw_8bit" if kit.rehearse else "paged_adamw_8bit"
    overrides = [
        *(*kit.own_task(48 if kit.rehearse else 512), *kit.quick("recipe", 3)),
        *("quantization=nf4", "targets=all_linear", f"training.optimizer={optimizer}"),
        *("training.batch_size=4", "training.gradient_checkpointing=on"),
    ]
    seen: dict[str, Any] = {}
    with _watching(seen):
        record, status = train(overrides, None)
    kit.findings.check("status", status == "COMPLETED", status, "COMPLETED")
    if record is None:
        return
    wanted = {
        "4-bit type": {"nf4"},
        "nested": {True},
        "storage": {"torch.uint8"},
        "compute dtype": {"torch.bfloat16"},
        "adapters": {"torch.float32"},
        "adapters' gradients": {"torch.float32"},
        "optimizer": {"bitsandbytes AdamW 8 bits"},
        "autocast": {"torch.bfloat16"},
        "norms": {"torch.bfloat16"},
        "layers' outputs": {"torch.bfloat16"},
        "reentrant checkpoints": {False},
        "paged": {False} if kit.rehearse else {True},
    }
    for name, values in wanted.items():
        got = seen.get(name, set())
        kit.findings.check(name, bool(got) and got <= values, got, values)
    memory, speed = record.memory, record.speed
    kit.findings.check("memory's source", memory.source == "cuda_allocated", memory.source, "cuda_allocated")
    for name, value in (("energy", speed.energy_joules), ("utilisation", speed.model_flops_utilisation)):
        kit.findings.check(f"{name} in the record", value is not None, value, "a number")


@contextlib.contextmanager
def _watching(seen: dict[str, Any]) -> Iterator[None]:
    """Note in ``seen`` what a training really uses, at the call of the optimizer and in the layers."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import Trainer

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def note(name: str, value: Any) -> None:
        seen.setdefault(name, set()).add(value)

    def of_layer(layer: Any, arguments: Any, output: Any) -> None:
        note("layers' outputs", str(output.dtype))
        autocast = torch.is_autocast_enabled(device)
        note("autocast", str(torch.get_autocast_dtype(device)) if autocast else "off")

    original = Trainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = [one.register_forward_hook(of_layer) for one in model.modules() if isinstance(one, Linear4bit)]
        try:
            result = original(self, model, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        for module in model.modules():
            if isinstance(module, Linear4bit):
                note("4-bit type", module.weight.quant_state.quant_type)
                note("nested", bool(module.weight.quant_state.nested))
                note("storage", str(module.weight.dtype))
                note("compute dtype", str(module.compute_dtype))
            elif type(module).__name__.endswith("RMSNorm"):
                note("norms", str(module.weight.dtype))
            if getattr(module, "gradient_checkpointing", False):
                settings = getattr(module._gradient_checkpointing_func, "keywords", {})
                note("reentrant checkpoints", settings.get("use_reentrant"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                note("adapters", str(parameter.dtype))
                note("adapters' gradients", str(parameter.grad.dtype if parameter.grad is not None else None))
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
        note("optimizer", f"{type(optimizer).__module__.split('.')[0]} {type(optimizer).__name__} {bits} bits")
        note("paged", bool(getattr(optimizer, "is_paged", False)))
        return result

    Trainer.training_step = training_step
    try:
        yield
    finally:
        Trainer.training_step = original


def out_of_memory(kit: Kit) -> None:
    """Memory runs out in a sweep, in training, in loading and with a paged optimizer."""
    length = 48 if kit.rehearse else 2048
    used_before = card_used_bytes(kit)
    _sweep_halves(kit, length)  # before this process uses CUDA: a sweep refuses a card on which others hold memory
    cases: dict[str, tuple[float, str, list[str]]] = {
        "in training": (8e9, "llama3_2_1b", ["training.batch_size=64", "training.gradient_checkpointing=off"]),
        "while loading": (1e9, "llama3_1_8b", []),
        PAGED: (3e9, "llama3_2_1b", ["lora.r=256", "training.optimizer=paged_adamw_8bit"]),
    }
    for name, (leaves_bytes, family, more) in cases.items():
        # Managed memory may move to the host: then the training completes. It must not end the process.
        wanted = ("OUT_OF_MEMORY", "COMPLETED") if name == PAGED else ("OUT_OF_MEMORY",)
        if kit.rehearse and name == PAGED:
            kit.findings.not_checked(f"{name}: status", wanted)
            continue
        overrides = [
            *(*kit.own_task(length, family=family), *kit.quick("out_of_memory", 2)),
            *("quantization=nf4", "targets=all_linear", "budget.force=true", "training.batch_size=4", *more),
        ]
        with ballast(kit, leaves_bytes), _patched(kit, name):
            ended, hint = _ending(overrides)
        kit.findings.check(f"{name}: status", ended in wanted, ended, wanted)
        if ended == "OUT_OF_MEMORY":
            kit.findings.check(f"{name}: hint", "micro_batch_size" in hint, hint, "names micro_batch_size")
        release()
    until = time.monotonic() + MEMORY_BACK_SECONDS
    while (more_bytes := card_used_bytes(kit) - used_before) > CONTEXT_BYTES and time.monotonic() < until:
        time.sleep(0.2)
    got, wanted_text = f"{more_bytes / 1e9:.2f} GB more", f"<= {CONTEXT_BYTES / 1e9:g} GB more (this process's context)"
    kit.check_on_gpu("memory is back", more_bytes <= CONTEXT_BYTES, got, wanted_text)


def release() -> None:
    """Give all memory of this process's earlier runs back to the card."""
    import gc

    import torch

    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def _sweep_halves(kit: Kit, length: int) -> None:
    """Two trials whose micro-batch doesn't fit continue with half of it, and with the same batch."""
    rows = 8 if kit.rehearse else 64
    overrides = [
        *("lora.r=4,8", *kit.own_task(length), *kit.quick("halved", 2)),
        *("quantization=nf4", "targets=all_linear", "training.gradient_checkpointing=off", "budget.force=true"),
        *(f"training.batch_size={rows}", "sweep.out_of_memory_retries=4"),
    ]
    environment = faults.environment_with("small memory", kit.out / "site-halved", kit.rehearse)
    done = sweep("halved", overrides, environment)
    records = run_records(kit.outputs("halved"))
    statuses = [str(record.status) for record in records]
    kit.findings.check("sweep: statuses", statuses == ["COMPLETED"] * 2, f"{statuses} {done}", "two COMPLETED")
    plans = [record.plan for record in records if record.plan is not None]
    smaller = bool(plans) and all(plan.micro_batch_size < rows for plan in plans)
    got = [(plan.batch_size, plan.micro_batch_size) for plan in plans]
    kit.findings.check("sweep: micro-batch is smaller", smaller, got, f"micro-batch < {rows}")
    same = bool(plans) and all(plan.batch_size == rows for plan in plans)
    kit.findings.check("sweep: batch is the same", same, got, rows)


def _ending(overrides: list[str]) -> tuple[str, str]:
    record, status = train(overrides, None)
    if record is None or record.failure is None:
        return status, ""
    return str(record.status) if record.status == "OUT_OF_MEMORY" else status, record.failure.hint or ""


@contextlib.contextmanager
def _patched(kit: Kit, where: str) -> Iterator[None]:
    """A rehearsal's full card: the allocation that a real one refuses raises what torch raises."""
    if not kit.rehearse:
        yield
        return
    import bitsandbytes
    import torch
    from transformers import Trainer

    owner, name = (Trainer, "training_step") if where == "in training" else (bitsandbytes.nn.Params4bit, "to")
    original, calls = getattr(owner, name), [0]

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] >= (1 if where == "in training" else 10):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB")
        return original(self, *args, **kwargs)

    setattr(owner, name, full)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def ballast(kit: Kit, leaves_bytes: float) -> Iterator[None]:
    """Another process holds all of the card but ``leaves_bytes``. In a rehearsal: nothing."""
    if kit.rehearse:
        yield
        return
    code = (
        "import sys, torch\n"
        "free = torch.cuda.mem_get_info()[0]\n"
        "held = torch.empty(max(0, int(free - float(sys.argv[1]))), dtype=torch.uint8, device='cuda')\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(leaves_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != b"held":
                raise RuntimeError("the process that holds the card's memory ended")
            yield
        finally:
            process.stdin.close()
            process.wait(30)
