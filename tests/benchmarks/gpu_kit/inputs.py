"""What stages train: random models of published sizes, rows of exact lengths, configurations."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from gpu_kit.runner import Findings

REHEARSED_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
SHARD_BYTES = 4e9
MODELS_BYTES = 30e9
"""Room for the models that all stages together write."""
STANDARD_DEVIATION = 0.02
INPUTS_VERSION = 1
"""Raise it when models or rows change: those of an earlier call are used again."""
ROWS = {True: 40, False: 160}
"""By ``rehearse``. A fifth of them are the validation and test splits."""


@dataclass(frozen=True)
class Cell:
    """One training whose memory and speed are measured. ``rows`` and ``length`` are of a micro-batch; ``mixed``: rows
    differ in length."""

    mode: str
    r: int
    rows: int
    length: int
    accumulation: int
    checkpointing: str
    optimizer: str
    mixed: bool = False

    @property
    def name(self) -> str:
        kind = "mixed" if self.mixed else "even"
        shape = f"{self.rows}×{self.length} {kind} ×{self.accumulation}"
        return f"{self.mode} r={self.r} {shape} checkpointing={self.checkpointing} {self.optimizer}"

    def smaller(self) -> Cell:
        """For a rehearsal: a short row; bitsandbytes has paged memory on CUDA only."""
        return replace(
            self,
            r=min(8, self.r),
            rows=min(2, self.rows),
            length=min(48, self.length),
            accumulation=min(2, self.accumulation),
            optimizer=self.optimizer.removeprefix("paged_").removesuffix("_fused"),
        )


@dataclass
class Kit:
    """What a stage gets."""

    stage: str
    findings: Findings
    out: Path
    rehearse: bool

    @cached_property
    def scratch(self) -> Path:
        """The folder of models and rows, which all stages of a machine share."""
        folder = self.out / "scratch" if self.rehearse else scratch_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def steps(self) -> int:
        """Steps of a measured training; the product leaves the first five out of its rates."""
        return 3 if self.rehearse else 12

    def check_on_gpu(self, name: str, ok: bool, got: Any, wanted: Any) -> None:
        """A check that means nothing without a GPU."""
        if self.rehearse:
            self.findings.not_checked(name, wanted)
        else:
            self.findings.check(name, ok, got, wanted)

    def shown(self, cell: Cell) -> Cell:
        return cell.smaller() if self.rehearse else cell

    def outputs(self, name: str) -> Path:
        return self.out / "outputs" / self.stage / name

    def model(self, family: str, seed: int = 0) -> Path:
        """Return a folder with a random model of ``family``'s published sizes (rehearsed: two layers)."""
        folder = self.scratch / f"{family}-{seed}"
        with FileLock(self.scratch / f"{family}-{seed}.lock"):
            if not (folder / "complete").is_file():
                write_model(folder, family, self.rehearse, seed)
                (folder / "complete").touch()
        return folder

    def rows(self, length: int, mixed: bool = False) -> Path:
        count = ROWS[self.rehearse]
        file = self.scratch / f"{'mixed' if mixed else 'even'}-{length}-{count}.jsonl"
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                write_rows(file, length, mixed, count)
        return file

    def own_task(self, length: int, mixed: bool = False, family: str = "llama3_2_1b", seed: int = 0) -> list[str]:
        """Overrides for a random model and rows of ``length`` tokens."""
        return [
            *("model=local", f"model.path={self.model(family, seed)}", "model.variant=base"),
            *("task=local", f"task.path={self.rows(length, mixed)}", f"training.max_length={length}"),
        ]

    def quick(self, name: str, steps: int, items: int = 1) -> list[str]:
        """Overrides for a short training without scores of the base model. In a rehearsal the device is mocked."""
        return [
            *("evaluation=quick", "evaluation.before=false", f"evaluation.max_items={items}", "evaluation.cache=false"),
            *("tracking=off", f"output_root={self.outputs(name)}", f"training.max_steps={steps}"),
            f"training.device={'auto' if self.rehearse else 'cuda'}",
        ]

    def of_cell(self, cell: Cell, steps: int | None = None, family: str = "llama3_1_8b") -> list[str]:
        return [
            *self.own_task(cell.length, cell.mixed, family),
            *self.quick("cells", steps or self.steps),
            *(f"quantization={cell.mode}", f"lora.r={cell.r}", "targets=all_linear"),
            *(f"training.micro_batch_size={cell.rows}", f"training.batch_size={cell.rows * cell.accumulation}"),
            *(f"training.gradient_checkpointing={cell.checkpointing}", f"training.optimizer={cell.optimizer}"),
        ]


def scratch_folder() -> Path:
    """Return where models lie on a GPU machine: in memory, if that is large enough."""
    name = f"qlora-exp-gpu-{INPUTS_VERSION}-{os.getuid()}"
    memory, disk = Path("/dev/shm") / name, Path(os.environ.get("TMPDIR", tempfile.gettempdir())) / name
    large = memory.parent.is_dir() and shutil.disk_usage(memory.parent).free > MODELS_BYTES
    return memory if memory.is_dir() or large else disk


def sizes(family: str, rehearse: bool) -> dict[str, Any]:
    from qlora_exp.architecture.shipped.build import CONFIGS

    return {**CONFIGS[family][1], **(REHEARSED_SIZES if rehearse else {})}


def write_model(folder: Path, family: str, rehearse: bool, seed: int) -> None:
    """Write random weights, shard by shard, so that they are never in memory twice."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.paths import EMBEDDED

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**sizes(family, rehearse), bos_token_id=0, eos_token_id=0, pad_token_id=1)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    names = list(model.named_parameters())
    number, held, total = 1, 0, 0
    for position, (name, parameter) in enumerate(names):
        if "norm" in name:
            value = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            value = torch.empty(parameter.shape, device=generator.device, dtype=torch.bfloat16)
            value = value.normal_(std=STANDARD_DEVIATION, generator=generator).cpu()
        shard[name], held, total = value, held + value.nbytes, total + value.nbytes
        if held > SHARD_BYTES or position == len(names) - 1:
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, held, number = {}, 0, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "base" / file, folder / file)


def write_rows(file: Path, length: int, mixed: bool, count: int) -> None:
    """Write rows of exactly ``length`` tokens, or of log-normal lengths with median ``length`` / 3, at most ``length``.

    A fourth of each row is the completion. Each `` the`` is one token of the embedded tokenizer; a row ends with one
    end token.
    """
    from tokenizers import Tokenizer

    from qlora_exp.paths import EMBEDDED

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "base" / "tokenizer.json"))
    drawn, lines = random.Random(0), []
    for number in range(count):
        tokens = length
        if mixed and number:  # one row has the full length, so that the maximum is known
            tokens = min(length, max(16, round(drawn.lognormvariate(math.log(length / 3), 0.6))))
        start = f"Row {number}:"
        prompt = start + " the" * (tokens - tokens // 4 - len(tokenizer.encode(start).ids))
        lines.append(json.dumps({"prompt": prompt, "completion": " the" * (tokens // 4 - 1)}))
    part = file.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(file)


def as_arguments(cell: Cell) -> str:
    return json.dumps(asdict(cell))
