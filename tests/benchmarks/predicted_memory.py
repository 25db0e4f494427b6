"""Predicted and measured peak of training, in fresh processes of their own: the table behind docs/plan_accuracy.md.

python tests/benchmarks/predicted_memory.py --measure --again   # 45 minutes on an idle core
python tests/benchmarks/predicted_memory.py                     # predicts again for the measured rows, and draws them

With --plain-heap for glibc as it is, in place of glibc as qlora_exp/system/heap.py tells it to be: another table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlora_exp.architecture.families import known_architecture
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.shipped.build import CONFIGS
from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.compose import compose
from qlora_exp.estimate import peak
from qlora_exp.estimate.peak import Heap, Peak, predicted_peak
from qlora_exp.estimate.workload import RowLengths
from qlora_exp.system import heap

ROOT = Path(__file__).resolve().parents[2]
TABLES = {True: ROOT / "docs" / "predicted_memory.csv", False: ROOT / "docs" / "predicted_memory_plain.csv"}
"""Whether the heap joins what is freed → what was measured."""
PICTURE = ROOT / "docs" / "pictures" / "predicted_memory.png"
FITTED = ("llama", "gpt2", "gpt_neox")
"""Said before anything was measured: constants may be fitted to these architectures; all others are held out."""
FRESH = ("mixtral", "qwen3_moe", "gpt_oss", "phi", "cohere", "glm4", "nemotron", "gpt_neo")
"""Held out, and measured after everything else: nobody had seen them. What a layer keeps had been compared with what
autograd saves. Earlier fresh ones have been seen since: gemma2, granite, stablelm, starcoder2, smollm3, olmo."""
STEPS = {True: 10, False: 2}
"""With the joined heap so many that every row is drawn where their lengths differ; the other table is of two."""
PROCESSES = {True: 2, False: 1}
"""The same command takes more or less by up to a third: which gap a large tensor finds is a matter of chance."""


@dataclass(frozen=True)
class Case:
    """One configuration: a random model of an ``architecture`` of transformers or of a family's published sizes. Rows
    are ``length`` tokens long, or with ``ragged`` from half of that upwards; a batch has ``parts`` micro-batches; with
    ``scored`` the untouched base is scored in the same process before."""

    architecture: str
    hidden: int
    layers: int
    vocabulary: int
    quantization: str
    r: int
    targets: str
    batch: int
    length: int
    checkpointing: bool = False
    ragged: bool = False
    parts: int = 1
    scored: bool = False

    @property
    def split(self) -> str:
        if self.architecture in FITTED:
            return "fit"
        return "fresh" if self.architecture in FRESH else "held out"


CASES = (
    Case("llama", 768, 4, 4096, "fp32", 8, "attention", 2, 256),
    Case("llama", 512, 4, 16384, "nf4", 16, "all_linear", 4, 256),
    Case("llama", 512, 6, 4096, "bf16", 8, "all_linear", 4, 256, ragged=True),
    Case("llama", 512, 4, 8192, "fp16", 64, "all_linear", 4, 128),
    Case("llama", 512, 4, 4096, "int8", 8, "all_linear", 4, 256),
    Case("llama", 512, 8, 8192, "nf4", 8, "attention", 4, 256, checkpointing=True),
    Case("llama", 512, 4, 32000, "fp32", 4, "attention_qv", 4, 128),
    Case("llama", 384, 3, 4096, "fp32", 128, "mlp", 16, 256, ragged=True),
    Case("llama", 768, 6, 4096, "bf16", 16, "all_linear", 2, 512, checkpointing=True),
    Case("llama", 512, 2, 4096, "fp32", 8, "all_linear", 16, 512),
    Case("gpt2", 512, 4, 4096, "fp32", 8, "attention", 4, 256),
    Case("gpt2", 512, 4, 8192, "nf4", 16, "all_linear", 8, 128),
    Case("gpt2", 384, 6, 16384, "bf16", 8, "all_linear", 4, 256),
    Case("gpt2", 512, 6, 8192, "int8", 8, "mlp", 4, 256, checkpointing=True),
    Case("gpt_neox", 512, 4, 4096, "fp32", 16, "all_linear", 4, 256),
    Case("gpt_neox", 512, 4, 16384, "nf4", 8, "attention", 4, 256, ragged=True),
    Case("gpt_neox", 512, 6, 4096, "bf16", 32, "all_linear", 4, 256),
    Case("gpt_neox", 512, 4, 8192, "int8", 8, "all_linear", 2, 384),
    Case("gpt_neox", 768, 6, 4096, "fp16", 8, "mlp", 2, 256, checkpointing=True),
    Case("qwen3", 512, 4, 4096, "fp32", 8, "attention", 4, 256),
    Case("qwen3", 384, 4, 16384, "nf4", 16, "all_linear", 4, 256),
    Case("qwen3", 512, 4, 4096, "bf16", 16, "all_linear", 4, 256, ragged=True),
    Case("qwen3", 512, 4, 8192, "int8", 8, "all_linear", 4, 128),
    Case("qwen3", 512, 8, 8192, "nf4", 64, "all_linear", 2, 384, checkpointing=True),
    Case("qwen3", 512, 2, 4096, "fp32", 8, "all_linear", 16, 512),
    Case("gemma3_text", 512, 4, 4096, "fp32", 8, "attention", 4, 256),
    Case("gemma3_text", 384, 4, 32000, "nf4", 16, "all_linear", 2, 256),
    Case("gemma3_text", 512, 4, 16384, "bf16", 8, "all_linear", 4, 256),
    Case("gemma3_text", 512, 6, 4096, "fp32", 8, "mlp", 4, 256, ragged=True),
    Case("gemma3_text", 512, 6, 8192, "fp32", 8, "all_linear", 4, 256, checkpointing=True),
    Case("phi3", 512, 4, 4096, "fp32", 16, "all_linear", 4, 256),
    Case("phi3", 512, 4, 8192, "nf4", 8, "attention", 4, 256),
    Case("phi3", 384, 6, 16384, "bf16", 32, "all_linear", 2, 384),
    Case("phi3", 512, 4, 4096, "int8", 8, "all_linear", 4, 256, ragged=True),
    Case("phi3", 768, 4, 4096, "fp32", 8, "all_linear", 2, 512, checkpointing=True),
    Case("opt", 512, 4, 4096, "fp32", 8, "attention", 4, 256),
    Case("opt", 384, 4, 16384, "nf4", 16, "all_linear", 4, 256),
    Case("opt", 512, 4, 8192, "fp16", 8, "all_linear", 4, 128),
    Case("opt", 512, 4, 8192, "int8", 32, "all_linear", 4, 128),
    Case("falcon", 512, 4, 4096, "fp32", 8, "attention", 4, 256),
    Case("falcon", 512, 4, 8192, "fp16", 16, "all_linear", 4, 256),
    Case("falcon", 384, 6, 16384, "bf16", 8, "all_linear", 4, 256),
    Case("falcon", 512, 6, 8192, "fp32", 64, "mlp", 4, 256, checkpointing=True),
    Case("embedded", 192, 4, 4096, "fp32", 8, "all_linear", 16, 256),
    Case("embedded", 192, 4, 4096, "nf4", 16, "all_linear", 8, 384),
    Case("smollm2_135m", 576, 30, 49152, "fp32", 8, "attention", 4, 128),
    Case("smollm2_135m", 576, 30, 49152, "fp32", 16, "all_linear", 2, 512),
    Case("smollm2_135m", 576, 30, 49152, "nf4", 8, "attention", 4, 128),
    Case("smollm2_135m", 576, 30, 49152, "nf4", 16, "all_linear", 2, 512),
    Case("mistral", 512, 4, 8192, "nf4", 8, "all_linear", 4, 256),
    Case("mistral", 512, 6, 4096, "fp32", 16, "all_linear", 4, 256, checkpointing=True),
    Case("qwen2", 512, 6, 16384, "bf16", 16, "attention", 4, 256),
    Case("qwen2", 384, 4, 4096, "int8", 8, "mlp", 8, 256, ragged=True),
    Case("olmo2", 512, 4, 4096, "fp32", 8, "all_linear", 4, 256),
    Case("olmo2", 512, 6, 16384, "nf4", 16, "attention", 2, 512),
    Case("granite", 512, 4, 8192, "fp16", 16, "all_linear", 4, 256, ragged=True),
    Case("stablelm", 512, 4, 4096, "fp32", 8, "attention", 4, 256),
    Case("starcoder2", 512, 6, 8192, "nf4", 8, "all_linear", 4, 256),
    Case("gemma2", 384, 6, 16384, "bf16", 16, "all_linear", 2, 384),
    Case("smollm3", 512, 6, 4096, "fp32", 8, "all_linear", 4, 256, checkpointing=True),
    Case("olmo", 512, 4, 8192, "int8", 8, "mlp", 4, 256, ragged=True),
    Case("llama", 512, 4, 8192, "nf4", 256, "all_linear", 8, 256, parts=4),
    Case("qwen3", 512, 4, 8192, "nf4", 256, "all_linear", 8, 256, parts=4),
    Case("smollm2_135m", 576, 30, 49152, "nf4", 256, "all_linear", 4, 256, parts=4),
    Case("embedded", 192, 4, 4096, "nf4", 8, "all_linear", 16, 256, scored=True),
    Case("phi3", 512, 4, 8192, "nf4", 8, "attention", 4, 256, scored=True),
    Case("gpt_neox", 512, 4, 4096, "fp32", 16, "all_linear", 4, 256, scored=True),
    Case("mixtral", 512, 4, 4096, "nf4", 8, "attention", 4, 256),
    Case("qwen3_moe", 512, 4, 8192, "fp32", 16, "attention", 4, 256),
    Case("gpt_oss", 384, 4, 4096, "bf16", 8, "attention", 4, 256),
    Case("phi", 512, 4, 8192, "nf4", 8, "all_linear", 4, 256),
    Case("cohere", 512, 4, 16384, "bf16", 16, "all_linear", 4, 256),
    Case("glm4", 512, 4, 8192, "fp32", 16, "all_linear", 4, 256, ragged=True),
    Case("nemotron", 512, 6, 4096, "nf4", 8, "mlp", 4, 256),
    Case("gpt_neo", 512, 4, 4096, "fp32", 8, "all_linear", 4, 256),
)


def shape_of(case: Case) -> dict[str, Any]:
    """The model_type, and its own names for its sizes: a family's published ones, else heads of 64, half as many for
    keys and values where it has them."""
    if case.architecture in CONFIGS:
        return CONFIGS[case.architecture][1]
    heads = case.hidden // 64
    # A table that only the input reads is mapped from its file, and rows that no token names are never resident.
    tied = {"tie_word_embeddings": case.vocabulary >= 16384}
    modern = tied | {
        "hidden_size": case.hidden,
        "intermediate_size": 3 * case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 1024,
    }
    plain = tied | {"hidden_size": case.hidden, "num_hidden_layers": case.layers, "num_attention_heads": heads}
    named: dict[str, dict[str, Any]] = {
        "llama": modern,
        "mistral": modern | {"head_dim": 64},
        "qwen2": modern,
        "olmo2": modern,
        "granite": modern,
        "stablelm": modern,
        "starcoder2": modern,
        "gemma2": modern | {"head_dim": 64},
        "smollm3": modern,
        "olmo": modern,
        "qwen3": modern | {"head_dim": 64},
        "gemma3_text": modern | {"head_dim": 64, "tie_word_embeddings": True},
        "phi3": modern | {"original_max_position_embeddings": 1024},
        "gpt2": {"n_embd": case.hidden, "n_layer": case.layers, "n_head": heads, "n_positions": 1024},
        "gpt_neox": plain | {"intermediate_size": 4 * case.hidden, "max_position_embeddings": 1024},
        "opt": plain
        | {"tie_word_embeddings": True}
        | {"ffn_dim": 4 * case.hidden, "word_embed_proj_dim": case.hidden, "max_position_embeddings": 1024},
        "falcon": plain | {"tie_word_embeddings": True, "max_position_embeddings": 1024},
        "mixtral": modern | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": modern
        | {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": case.hidden},
        "gpt_oss": modern | {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        "phi": modern,
        "cohere": modern | {"tie_word_embeddings": True},
        "glm4": modern | {"head_dim": 64},
        "nemotron": modern,
        "gpt_neo": tied
        | {"hidden_size": case.hidden, "num_layers": case.layers, "num_heads": heads}
        | {"attention_types": [[["global"], case.layers]], "max_position_embeddings": 1024},
    }
    return {"model_type": case.architecture, "vocab_size": case.vocabulary} | named[case.architecture]


def save_model(case: Case, folder: Path) -> Path:
    """A random model of the case's shape with the embedded pair's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer()
    tokens = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape_of(case), **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from qlora_exp.paths import EMBEDDED

    return AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))


def rows_of(case: Case) -> list[tuple[str, str]]:
    """Prompts and completions of distinct rows of as many tokens as the case says: a number, and as often one word as
    are missing."""
    tokenizer, rows = _tokenizer(), []
    count = max(40, 2 * case.batch)
    for number in range(count):
        prompt = f"Row {number}:"
        end = 1
        length = case.length - (number * case.length // (2 * count) if case.ragged else 0)
        rows.append((prompt, " the" * (length - len(tokenizer(prompt)["input_ids"]) - end)))
    return rows


@functools.cache
def lengths_of(case: Case) -> RowLengths:
    scored = [len(completion.split()) + 1 for _, completion in rows_of(case)]
    prompts = [len(_tokenizer()(prompt)["input_ids"]) for prompt, _ in rows_of(case)]
    return RowLengths.of([sum(pair) for pair in zip(prompts, scored, strict=True)], scored)


def write_rows(case: Case, path: Path) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows_of(case)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def training(case: Case, joined: bool) -> list[str]:
    return [
        f"training.batch_size={case.batch}",
        f"training.micro_batch_size={case.batch // case.parts}",
        f"training.max_length={case.length}",
        f"training.max_steps={STEPS[joined]}",
        f"training.gradient_checkpointing={'on' if case.checkpointing else 'off'}",
        "training.padding_free=off",  # as the measured runs of the tables
    ]


def overrides(case: Case, folder: Path, joined: bool) -> list[str]:
    model = ["model=embedded"]
    if case.architecture != "embedded":
        model = ["model=local", f"model.path={save_model(case, folder / 'model')}", "model.variant=base"]
    return [
        *model,
        f"quantization={case.quantization}",
        f"lora.r={case.r}",
        f"targets={case.targets}",
        "task=local",
        f"task.path={write_rows(case, folder / 'rows.jsonl')}",
        *training(case, joined),
        "training.device=cpu",
        *(["evaluation=default", "evaluation.generate=false"] if case.scored else ["evaluation=quick"]),
        f"evaluation.before={str(case.scored).lower()}",
        f"evaluation.max_items={32 if case.scored else 1}",
        "tracking=off",
        f"output_root={folder / 'outputs'}",
    ]


def measure(case: Case, joined: bool) -> dict[str, Any]:
    """The record of one fresh process that trains ``case`` on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment |= {heap.MALLOC_VARIABLE: heap.TUNABLES if joined else ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "qlora_exp.cli", "run", *overrides(case, folder, joined)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        records = list((folder / "outputs").rglob("record.json"))
        if done.returncode or not records:
            raise SystemExit(f"{case}\n{done.stdout}\n{done.stderr}")
        record: dict[str, Any] = json.loads(records[0].read_text(encoding="utf-8"))
        return record


@dataclass(frozen=True)
class Row:
    """One measured configuration; bytes."""

    case: Case
    measured_exact_bytes: int
    """Base, quantization state, adapters and optimizer states, as the run counted them."""
    measured_peak_bytes: int
    """``memory.train_working_set_bytes``: the most that one of the processes took."""
    measured_least_bytes: int


@functools.cache
def architecture_of_case(case: Case) -> Architecture:
    """What ``describe`` says of the case's model, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.models.inspect import architecture_of

    if case.architecture == "embedded":
        known = known_architecture(compose(["model=embedded"]).model)
        assert known is not None
        return known
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(**shape_of(case), **tokens)
    with torch.device("meta"):
        return architecture_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def predict(case: Case, joined: bool) -> Peak:
    architecture = architecture_of_case(case)
    config = compose(
        [
            "model=embedded",
            f"quantization={case.quantization}",
            f"lora.r={case.r}",
            f"targets={case.targets}",
            *training(case, joined),
        ]
    )
    modules = resolve_targets(architecture, config.targets)
    return predicted_peak(architecture, modules, config, "cpu", rows=lengths_of(case), joined_heap=joined)


def row_of(case: Case, records: Sequence[dict[str, Any]]) -> Row:
    memories = [record["memory"] for record in records]
    exact = ("base_weight_bytes", "quantization_state_bytes", "adapter_bytes", "optimizer_bytes")
    peaks = sorted(memory["train_working_set_bytes"] for memory in memories)
    return Row(case, sum(memories[0][name] for name in exact), peaks[-1], peaks[0])


def read_rows(joined: bool) -> list[Row]:
    with TABLES[joined].open(encoding="utf-8", newline="") as stream:
        return [
            Row(_case(line), *(int(line[f"measured_{name}_bytes"]) for name in ("exact", "peak", "least")))
            for line in csv.DictReader(stream)
        ]


def _case(line: dict[str, str]) -> Case:
    kinds = {"int": int, "str": str, "bool": lambda text: text == "True"}
    return Case(**{item.name: kinds[str(item.type)](line[item.name]) for item in fields(Case) if item.name in line})


def write_table(rows: Sequence[Row], joined: bool) -> None:
    """The measured rows, in the order of ``CASES``, with what is predicted for them now."""
    rows = sorted(rows, key=lambda row: CASES.index(row.case))
    with TABLES[joined].open("w", encoding="utf-8", newline="") as stream:
        writer: Any = None
        for row in rows:
            predicted = predict(row.case, joined)
            line = {
                "split": row.case.split,
                **asdict(row.case),
                "measured_exact_bytes": row.measured_exact_bytes,
                "predicted_exact_bytes": predicted.exact_bytes,
                "predicted_activation_bytes": predicted.activation_bytes,
                "predicted_logits_bytes": predicted.logits_bytes,
                "predicted_slack_bytes": predicted.slack_bytes,
                "predicted_peak_bytes": predicted.peak_bytes,
                "measured_peak_bytes": row.measured_peak_bytes,
                "measured_least_bytes": row.measured_least_bytes,
                "error": f"{predicted.peak_bytes / row.measured_peak_bytes - 1:+.3f}",
            }
            writer = writer or csv.DictWriter(stream, list(line), lineterminator="\n")
            if row is rows[0]:
                writer.writeheader()
            writer.writerow(line)


def draw(rows: Sequence[Row], path: Path = PICTURE) -> None:
    """Predicted against measured, both in MB, with the band of ±10 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for split, marker in (("fit", "o"), ("held out", "s"), ("fresh", "^")):
        chosen = [row for row in rows if row.case.split == split]
        measured = [row.measured_peak_bytes / 1e6 for row in chosen]
        axes.scatter(measured, [predict(row.case, True).peak_bytes / 1e6 for row in chosen], marker=marker, label=split)
    ends = [200.0, 1.2 * max(row.measured_peak_bytes for row in rows) / 1e6]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="grey", alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="measured, MB", ylabel="predicted, MB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.FixedLocator([200.0 * 2**power for power in range(5)]))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_locator(ticker.NullLocator())
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def fitted_heap(rows: Sequence[Row], joined: bool) -> Heap:
    """The constants of :class:`Heap` that give the ``FITTED`` rows the least sum of relative errors, none below 0. With
    the joined heap one share for layers and logits, which predicts a left-out row of them better than two do."""
    import numpy
    from scipy.optimize import linprog

    def slack(case: Case, heap: Heap) -> float:
        with heap_of(heap, joined):
            return float(predict(case, joined).slack_bytes)

    chosen = [row for row in rows if row.case.split == "fit"]
    units = [Heap(1e6, 0, 0, 0), Heap(0, 1e6, 0, 0), Heap(0, 0, 1, 0), Heap(0, 0, 0, 1)]
    if joined:
        units[2:] = [Heap(0, 0, 1, 1)]
    measured = numpy.array([row.measured_peak_bytes for row in chosen])
    with heap_of(Heap(0, 0, 0, 0), joined):
        known = numpy.array([predict(row.case, joined).peak_bytes for row in chosen])
    parts = numpy.array([[slack(row.case, unit) for unit in units] for row in chosen]) / measured[:, None]
    missing, each = (measured - known) / measured, numpy.eye(len(chosen))
    bounds = numpy.block([[parts, -each], [-parts, -each]])
    costs = [0.0] * len(units) + [1.0] * len(chosen)
    found = linprog(costs, bounds, numpy.concatenate([missing, -missing])).x[: len(units)]
    code, kernels, layers, logits = (*found, found[-1]) if joined else found
    return Heap(code * 1e6, kernels * 1e6, layers, logits)


@contextlib.contextmanager
def heap_of(heap: Heap, joined: bool) -> Iterator[None]:
    """Predictions inside are for another :class:`Heap`."""
    name = "TUNED_HEAP" if joined else "DEFAULT_HEAP"
    kept = getattr(peak, name)
    setattr(peak, name, heap)
    try:
        yield
    finally:
        setattr(peak, name, kept)


def errors_of(rows: Sequence[Row], joined: bool) -> list[float]:
    """Predicted beside measured, less one."""
    return [predict(row.case, joined).peak_bytes / row.measured_peak_bytes - 1 for row in rows]


def summary(rows: Sequence[Row], joined: bool) -> Iterator[str]:
    for split in ("fit", "held out", "fresh"):
        errors = errors_of([row for row in rows if row.case.split == split], joined)
        if errors:
            within = sum(abs(error) <= 0.1 for error in errors)
            sizes = [abs(error) for error in errors]
            yield (
                f"{split:9}{len(errors):3} configurations, {within} within 10 %; "
                f"median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train the configurations that the table lacks")
    parser.add_argument("--again", action="store_true", help="and those that it has")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--plain-heap", action="store_true", help="glibc as it is")
    parser.add_argument("--fit", action="store_true", help="print the constants that fit the fitted rows best")
    given = parser.parse_args()
    joined = not given.plain_heap
    rows = [] if given.again or not TABLES[joined].exists() else read_rows(joined)
    known = {row.case for row in rows}
    wanted = [case for case in CASES if case not in known] if given.measure else []
    with ThreadPoolExecutor(given.jobs) as pool:
        every = [[pool.submit(measure, case, joined) for _ in range(PROCESSES[joined])] for case in wanted]
        for case, measuring in zip(wanted, every, strict=True):
            rows.append(row_of(case, [one.result() for one in measuring]))
            write_table(rows, joined)
            print(rows[-1], flush=True)
    write_table(rows, joined)
    if joined:
        draw(rows)
    print(*summary(rows, joined), sep="\n")
    if given.fit:
        print(fitted_heap(rows, joined))


if __name__ == "__main__":
    main()
