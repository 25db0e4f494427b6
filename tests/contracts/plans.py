"""``plan --json`` of 60 configurations: what is counted before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.contracts.calling import call, called_in

WORDS = ("reason", "message", "notes", "sentence")
"""Fields that hold sentences: compared by whether there is one."""
MOST_ROWS = 12
"""Of a plan with more configurations the first and last are kept, and their number."""

FAMILIES = (
    *("gemma3_1b", "gemma3_270m", "gemma3_4b", "llama3_1_8b", "llama3_2_1b", "llama3_2_3b", "mistral_7b"),
    *("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b", "smollm2_135m", "smollm2_1_7b", "smollm2_360m"),
)
PLANS = (
    "",
    "model.variant=instruct task.format=chat lora.r=16 targets=all_linear",
    *(f"model={family} --device rtx4090" for family in FAMILIES),
    "model=llama3_1_8b quantization=fp32,bf16,fp16,int8,nf4,fp4 --device a100_80gb",
    "model=qwen3_8b quantization=nf4,int8 lora.r=8,16,64 --device rtx4090",
    "model=llama3_1_8b quantization=nf4 plan.device=cuda",
    "model=mistral_7b quantization=int8 --device t4",
    "model=gemma3_4b quantization=bf16 --device l4",
    "model=llama3_2_3b quantization=fp16 --device v100_16gb",
    "model=llama3_1_8b targets=attention,attention_qv,mlp,all_linear --device h100_80gb",
    "model=qwen3_4b targets.modules=[q_proj,down_proj] --device rtx3090",
    "model=gemma3_270m targets.modules=[o_proj] lora.r=1 --device cpu",
    "model=smollm2_135m lora.r=1,2,4,256 --device cpu",
    "model=smollm2_135m lora.rslora=true lora.alpha_policy=fixed lora.alpha=16 lora.r=64",
    "model=smollm2_360m lora.dora=true lora.dropout=0.1",
    "model=llama3_2_1b lora.dtype=bfloat16 --device rtx4090",
    "model=llama3_2_1b lora.init=pissa quantization=bf16",
    "model=llama3_1_8b training.optimizer=adamw_torch,adamw_8bit,paged_adamw_8bit,adafactor,sgd,lion_32bit "
    "--device rtx4090",
    "model=llama3_1_8b training.batch_size=32 training.micro_batch_size=1,4,32 --device a100_40gb",
    "model=llama3_1_8b training.max_length=128,2048,8192 --device h200",
    "model=qwen3_1_7b training.gradient_checkpointing=on,off --device rtx4080",
    "model=qwen3_1_7b model.attention=eager --device rtx4080",
    "model=qwen3_8b training.max_steps=null training.max_tokens=1000000 --device rtx4090",
    "training.batch_size=4,64 training.max_length=32",
    "training.micro_batch_size=8 training.max_steps=17 quantization=fp32",
    "quantization=int8 training.threads=2",
    "task=local task.path=rows.jsonl training.max_length=64",
    "task=local task.path=rows.jsonl task.kind=classification training.max_steps=5 model=embedded",
    "model=smollm2_135m task=local task.path=rows.jsonl --device cpu",
    "budget.tokens=20000",
    "budget.memory_bytes=240000000 quantization=fp32,nf4",
    "model=llama3_1_8b budget.usd=2 budget.usd_per_hour=0.5 --device rtx4090",
    "model=llama3_1_8b budget.seconds=600 --device rtx4090",
    "model=llama3_1_8b budget.usd_per_hour=1.25 --device rtx4090",
    "demo budget.tokens=400000",
    "lora_search sweep.n_trials=7 model=smollm2_135m --device rtx4090",
    "pareto model=qwen3_0_6b --device l4",
    "rank_by_quantization model=llama3_2_1b --device rtx4090",
    "rank_doubling sweep.ladder.r_max=16 model=qwen3_8b --device rtx4090 budget.usd=30",
    "rank_doubling quantization=nf4,int8 model=llama3_2_1b sweep.ladder.r_max=8 sweep.ladder.lr_policy=fixed",
    "base_or_instruct lora.r=4 model=llama3_2_3b --device rtx4090",
    "instruct_or_base sweep.ladder.seeds=2 model=gemma3_1b",
    "--fit 24GB model=llama3_1_8b lora.r=16 targets=all_linear training.max_length=512",
    "--fit rtx3060_12gb model=qwen3_4b quantization=nf4 targets=attention training.micro_batch_size=1",
    "--fit 16GiB model=gemma3_1b lora.r=8 training.max_length=1024 training.micro_batch_size=4",
    "--sizes model=llama3_1_8b lora.r=32",
    "--sizes model=gemma3_1b targets=mlp --device t4",
    "--sizes",
    "-- quantization=glob(*) model=smollm2_1_7b plan.device=rtx3090",
)
assert len(PLANS) >= 60, len(PLANS)


def plans(folder: Path) -> dict[str, Any]:
    """Arguments → what ``plan --json`` gives."""
    write_rows(folder / "rows.jsonl")
    with called_in(folder):
        return {arguments: one_plan(arguments) for arguments in PLANS}


def one_plan(arguments: str) -> Any:
    called = call("plan", *arguments.split(), "--json")
    if called.code != 0:
        return {"exit_code": called.code, "error": called.err}
    return shortened(without_words(json.loads(called.out)))


def without_words(value: Any) -> Any:
    """Sentences may be rewritten: of each only whether it is there."""
    if isinstance(value, dict):
        return {key: _no_words(item) if key in WORDS else without_words(item) for key, item in value.items()}
    return [without_words(item) for item in value] if isinstance(value, list) else value


def _no_words(value: Any) -> Any:
    if isinstance(value, list):
        return [_no_words(item) for item in value]
    return "<words>" if isinstance(value, str) else value


def shortened(rows: Any) -> Any:
    if not isinstance(rows, list) or len(rows) <= MOST_ROWS:
        return rows
    half = MOST_ROWS // 2
    return {"rows": len(rows), "first": rows[:half], "last": rows[-half:]}


def write_rows(file: Path) -> None:
    """Thirty rows of different lengths, the same ones each time."""
    colours = ("red", "green", "blue")
    rows = [
        {"prompt": f"Row {number}: {'a berry ' * (number % 7)}has the colour", "completion": colours[number % 3]}
        for number in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
