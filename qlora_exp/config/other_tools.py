"""Other tools' names for our settings: TRL, PEFT, transformers, Axolotl, LLaMA-Factory.

Error messages name our key for theirs (``lora_r=16``: did you mean lora.r=16?), and ``qlora-exp import`` converts whole
files. A test compares the names with the fields of the installed TRL, PEFT and transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config import other_methods
from qlora_exp.config.choices import choices
from qlora_exp.config.other_values import value_here
from qlora_exp.config.overrides import hydra_value

Settings = dict[str, Any]
"""Our keys and groups → values."""

ARGS, SFT, LORA, BNB = "TrainingArguments", "SFTConfig", "LoraConfig", "BitsAndBytesConfig"
LOAD, SCRIPT, AXOLOTL, FACTORY, HABIT = "from_pretrained", "TRL's scripts", "Axolotl", "LLaMA-Factory", "scripts"
"""``HABIT``: short names that many training scripts have, and those of earlier versions."""


@dataclass(frozen=True)
class Counterpart:
    """What another tool's key is here.

    ``key`` is our key, if the value stays the same or ``convert`` gives only that. ``convert(value, others)`` returns
    our settings; ``others`` are the other settings of the same file, because a batch size needs two of them. ``note``
    says what a user should know, or what to do where there is no counterpart.
    """

    tools: tuple[str, ...]
    key: str | None = None
    convert: Callable[[Any, Mapping[str, Any]], Settings] | None = None
    note: str | None = None

    def settings(self, value: Any, others: Mapping[str, Any] | None = None) -> Settings:
        """Return our settings for ``value``; empty: there are none, or the value is our default or means *off*."""
        if value is None:
            return {}
        if self.convert is not None:
            return self.convert(value, others or {})
        return {} if self.key is None else {self.key: value}


def _own(key: str) -> Callable[[Any, Mapping[str, Any]], Settings]:
    """Return a conversion to ``key`` that replaces other names of its values."""
    return lambda value, _: {key: value_here(key, value) or (value.lower() if isinstance(value, str) else value)}


def _number(key: str, kind: type = float, minimum: float = 0) -> Callable[[Any, Mapping[str, Any]], Settings]:
    """Return a conversion to a number, which YAML reads as a text if it is ``1e-4``. A number below ``minimum`` means
    *off* in transformers (``max_steps: -1``)."""

    def convert(value: Any, _: Mapping[str, Any]) -> Settings:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return {key: value}
        return {} if number < minimum or (kind is int and number != int(number)) else {key: kind(number)}

    return convert


def _if_true(settings: Settings, otherwise: Settings | None = None) -> Callable[[Any, Mapping[str, Any]], Settings]:
    return lambda value, _: dict(settings if is_true(value) else otherwise or {})


def is_true(value: Any) -> bool:
    """Return whether a value means *yes* in another tool's file: ``true``, ``"auto"`` (of bf16), ``1``."""
    return value is True or str(value).lower() in ("true", "1", "yes", "on", "auto")


def _batch(value: Any, others: Mapping[str, Any]) -> Settings:
    """Rows of an optimizer step = rows of a forward pass × gradient accumulation steps (on one GPU)."""
    rows = others.get("per_device_train_batch_size", others.get("micro_batch_size"))
    steps = int(others.get("gradient_accumulation_steps") or 1)
    if "micro_batch_size" in others and others.get("batch_size") and not others.get("gradient_accumulation_steps"):
        steps = max(1, int(others["batch_size"]) // int(others["micro_batch_size"]))  # Axolotl's older spelling
    if rows is None:  # the tools' defaults
        rows = 1 if "base_model" in others else 8
    rows = int(rows)
    return {"training.batch_size": rows * steps, **({"training.micro_batch_size": rows} if steps > 1 else {})}


def _epochs(value: Any, others: Mapping[str, Any]) -> Settings:
    """A number of steps takes precedence, as in transformers."""
    steps = others.get("max_steps")
    return {} if steps is not None and float(steps) > 0 else _number("training.epochs", float)(value, others)


def _warmup(value: Any, others: Mapping[str, Any]) -> Settings:
    """Steps as a share of all steps, if those are known; transformers takes a number below 1 as a share itself."""
    steps, total = float(value), float(others.get("max_steps") or 0)
    if 0 < steps < 1:
        return {"training.warmup_ratio": steps}
    return {"training.warmup_ratio": round(steps / total, 4)} if total > 0 and steps <= total else {}


def _is_quantized(others: Mapping[str, Any]) -> bool:
    flags = ("load_in_4bit", "load_in_8bit")
    return any(is_true(others.get(flag)) for flag in flags) or bool(others.get("quantization_bit"))


def _precision(name: str, dtype: str) -> Callable[[Any, Mapping[str, Any]], Settings]:
    """``bf16: true`` is the dtype of the computation over a quantized base, else also of the weights."""

    def convert(value: Any, others: Mapping[str, Any]) -> Settings:
        if not is_true(value):
            return {}
        return {"quantization.compute_dtype": dtype} if _is_quantized(others) else {"quantization": name}

    return convert


def _dtype(value: Any, others: Mapping[str, Any]) -> Settings:
    """``dtype`` of from_pretrained: of the weights, unless bitsandbytes quantizes them."""
    mode = value_here("quantization", value)
    if mode in ("bf16", "fp16", "fp32") and not _is_quantized(others):
        return {"quantization": mode}
    compute = value_here("quantization.compute_dtype", value) or re.sub(r"^torch\.", "", str(value))
    return {"quantization.compute_dtype": compute} if mode in ("bf16", "fp16", "fp32") else {}


def _four_bit(value: Any, others: Mapping[str, Any]) -> Settings:
    """transformers' default is fp4, but no recipe means it: fp4 only where the file says so."""
    kind = others.get("bnb_4bit_quant_type", others.get("quantization_type"))
    return {"quantization": "fp4" if kind == "fp4" else "nf4"} if is_true(value) else {}


def _four_bit_kind(value: Any, others: Mapping[str, Any]) -> Settings:
    """The kind of 4 bits, unless the same file says that there are 8 or none."""
    is_four = is_true(others.get("load_in_4bit", True)) and str(others.get("quantization_bit") or 4) == "4"
    return {"quantization": value} if is_four and not is_true(others.get("load_in_8bit")) else {}


def _bits(value: Any, others: Mapping[str, Any]) -> Settings:
    return {"quantization": {"4": _four_bit(True, others)["quantization"], "8": "int8"}.get(str(value), str(value))}


def _targets(value: Any, _: Mapping[str, Any]) -> Settings:
    """``all-linear``, a list, or a text with commas."""
    names = [value] if isinstance(value, str) else list(value)
    names = [name.strip() for text in names for name in str(text).strip("[]").split(",") if name.strip()]
    if len(names) == 1 and (known := value_here("targets", names[0])):
        return {"targets": known}
    if len(names) == 1 and names[0].replace("-", "_") in _choice_names("targets"):
        return {"targets": names[0].replace("-", "_")}
    return {"targets.modules": names} if names else {}


def _init(value: Any, _: Mapping[str, Any]) -> Settings:
    text = str(value).lower()
    return {"lora.init": "kaiming" if is_true(value) else "pissa" if text.startswith("pissa") else text}


def _model(value: Any, _: Mapping[str, Any]) -> Settings:
    """A folder or GGUF file, a checkpoint of a family in conf/model/, or another model of the Hub."""
    name = str(value)
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        return {"model": "local", "model.path": name}
    for choice in choices("model"):
        if choice.name == name.lower().replace("-", "_").replace(".", "_"):
            return {"model": choice.name}
        for variant, checkpoint in (choice.keys.get("checkpoints") or {}).items():
            if checkpoint == name:
                return {"model": choice.name, "model.variant": variant}
    return {"model": "hub", "model.id": name} if "/" in name else {"model": name}


def _task(value: Any, _: Mapping[str, Any]) -> Settings:
    """A data file, or a data set of the Hub."""
    name = str(value)
    is_file = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    if is_file or re.search(r"\.(jsonl?|csv|tsv|parquet|arrow)(\.\w+)?$", name):
        return {"task": "local", "task.path": name}
    return {"task": "hub", "task.hub_id": name} if "/" in name else {}


def _datasets(value: Any, others: Mapping[str, Any]) -> Settings:
    """The first of Axolotl's data sets; the columns of Alpaca, ShareGPT and OpenAI messages are recognised."""
    entries = value if isinstance(value, list) else [value]
    first = entries[0] if entries else None
    if not isinstance(first, Mapping) or not first.get("path"):
        return _task(first, others) if isinstance(first, str) else {}
    file = first.get("data_files")
    file = file[0] if isinstance(file, list) and file else file
    settings = _task(file if file and first["path"] in ("json", "csv", "parquet") else first["path"], others)
    if settings.get("task") == "hub":
        settings |= {"task.hub_config": first["name"]} if first.get("name") else {}
        settings |= {"task.splits": {"train": first["split"]}} if first.get("split") else {}
    kind = first.get("type")
    fields = kind if isinstance(kind, Mapping) else first
    instruction, answer = fields.get("field_instruction"), fields.get("field_output")
    if instruction and answer:
        settings |= {"task.columns.prompt": instruction, "task.columns.completion": answer}
    return settings | ({"task.columns.messages": first["field_messages"]} if first.get("field_messages") else {})


NO_NUMBER_OF_ROWS = "a number of rows has no counterpart: task.validation_fraction=0.1"


def _share(value: Any, _: Mapping[str, Any]) -> Settings:
    """A validation split as a share of the rows; a number of rows has no counterpart."""
    return {"task.validation_fraction": float(value)} if 0 < float(value) < 1 else {}


def _report(value: Any, _: Mapping[str, Any]) -> Settings:
    names = [value] if isinstance(value, str) else list(value)
    others = [name for name in names if name in ("wandb", "tensorboard", "trackio")]
    return {"tracking.also": others} if others else {}


def _splits(name: str) -> Callable[[Any, Mapping[str, Any]], Settings]:
    return lambda value, _: {"task.splits": {name: value}}


def _attention(name: str) -> Callable[[Any, Mapping[str, Any]], Settings]:
    return _if_true({"model.attention": name})


BATCH_NOTE = "rows of an optimizer step: per_device_train_batch_size × gradient_accumulation_steps"
ONE_GPU = "a run uses one GPU; a sweep runs one trial on each"
NO_PACKING = "rows aren't packed, and training.padding_free=auto trains them without padding"
NO_CODE = "remote code is never run"
ANSWER_ONLY = "the answer alone is learned; of a conversation the last one, or all with task.learn=all"
TEMPLATE = "the tokenizer's own chat template is used; model.chat_template=FILE.jinja replaces it"
ITS_OWN = "qlora-exp takes care of it"
ADAM = "torch's default"
STEPS_COUNT = "max_steps ends the training first"
IN_STEPS = "a number of steps is needed, not a share of them"
DATA_NOTE = "write task=local task.path=FILE, or task=hub task.hub_id=OWNER/NAME"
UNQUANTIZED = "quantization=bf16 trains over unquantized weights"
BEST_MODEL = "sweep.objectives names it for a sweep; a run keeps the lowest loss"
PUSH = "qlora-exp export RUN writes the adapter for other tools"

_EIGHT_BIT = _if_true({"quantization": "int8"})
_TRAINERS = (ARGS, SFT, FACTORY)
TRAINED_WHOLE = ("lora.modules_to_save", other_methods.list_of_names("lora.modules_to_save"))
COUNTERPARTS: dict[str, Counterpart] = {
    # Adapters
    "r": Counterpart((LORA, HABIT), "lora.r"),
    "lora_r": Counterpart((AXOLOTL, SCRIPT), "lora.r"),
    "lora_rank": Counterpart((FACTORY,), "lora.r"),
    "rank": Counterpart((HABIT,), "lora.r"),
    "lora_alpha": Counterpart((LORA, AXOLOTL, FACTORY, SCRIPT), "lora.alpha"),
    "lora_dropout": Counterpart((LORA, AXOLOTL, FACTORY, SCRIPT), "lora.dropout"),
    "target_modules": Counterpart((LORA, HABIT), "targets.modules", _targets),
    "lora_target_modules": Counterpart((AXOLOTL, SCRIPT), "targets.modules", _targets),
    "lora_target": Counterpart((FACTORY,), "targets.modules", _targets),
    "lora_target_linear": Counterpart((AXOLOTL,), None, _if_true({"targets": "all_linear"})),
    "use_dora": Counterpart((LORA, FACTORY, SCRIPT), "lora.dora"),
    "peft_use_dora": Counterpart((AXOLOTL,), "lora.dora"),
    "use_rslora": Counterpart((LORA, FACTORY, SCRIPT), "lora.rslora"),
    "peft_use_rslora": Counterpart((AXOLOTL,), "lora.rslora"),
    "init_lora_weights": Counterpart((LORA,), "lora.init", _init),
    "peft_init_lora_weights": Counterpart((AXOLOTL,), "lora.init", _init),
    "loraplus_lr_ratio": Counterpart((AXOLOTL, FACTORY), "lora.loraplus_lr_ratio"),
    "pissa_init": Counterpart((FACTORY,), None, _if_true({"lora.init": "pissa"})),
    "lora_model_dir": Counterpart((AXOLOTL,), "model.adapter"),
    "adapter_name_or_path": Counterpart((FACTORY,), "model.adapter"),
    "adapter": Counterpart((AXOLOTL,), None, other_methods.tuned_by_adapter, ITS_OWN),
    "bias": Counterpart((LORA,), note="biases aren't trained"),
    "modules_to_save": Counterpart((LORA,), *TRAINED_WHOLE),
    "lora_modules_to_save": Counterpart(
        (AXOLOTL, SCRIPT), "lora.modules_to_save", other_methods.list_of_names("lora.modules_to_save")
    ),
    "additional_target": Counterpart(
        (FACTORY,), "lora.modules_to_save", other_methods.list_of_names("lora.modules_to_save")
    ),
    "rank_pattern": Counterpart((LORA,), "lora.rank_pattern", other_methods.module_pattern("lora.rank_pattern")),
    "alpha_pattern": Counterpart((LORA,), "lora.alpha_pattern", other_methods.module_pattern("lora.alpha_pattern")),
    "target_parameters": Counterpart(
        (LORA,), "lora.target_parameters", other_methods.list_of_names("lora.target_parameters")
    ),
    "qat": Counterpart((AXOLOTL,), "training.qat.format", other_methods.rounding_of_qat),
    "layers_to_transform": Counterpart((LORA,), "method.layers", other_methods.chosen_layers_of),
    "peft_layers_to_transform": Counterpart((AXOLOTL,), "method.layers", other_methods.chosen_layers_of),
    "task_type": Counterpart((LORA,), note="always a causal language model"),
    "peft_type": Counterpart((LORA,), "method", other_methods.tuned_by_kind),
    "finetuning_type": Counterpart((FACTORY,), "method", other_methods.tuned_by),
    "stage": Counterpart((FACTORY,), note="always supervised fine-tuning"),
    "use_peft": Counterpart((SCRIPT,), None, _if_true({}, {"method": "full"})),
    # Model and quantization
    "model_name_or_path": Counterpart((SCRIPT, FACTORY), "model", _model),
    "base_model": Counterpart((AXOLOTL,), "model", _model),
    "base_model_name_or_path": Counterpart((LORA,), "model", _model),
    "pretrained_model_name_or_path": Counterpart((LOAD,), "model", _model),
    "model_id": Counterpart((HABIT,), "model", _model),
    "model_name": Counterpart((HABIT,), "model", _model),
    "model_revision": Counterpart((SCRIPT, FACTORY), "model.revision"),
    "revision_of_model": Counterpart((AXOLOTL,), "model.revision"),
    "revision": Counterpart((LORA, LOAD), "model.revision"),
    "load_in_4bit": Counterpart((BNB, AXOLOTL, SCRIPT), "quantization", _four_bit, UNQUANTIZED),
    "load_in_8bit": Counterpart((BNB, AXOLOTL, SCRIPT), "quantization", _EIGHT_BIT, UNQUANTIZED),
    "quantization_bit": Counterpart((FACTORY,), "quantization", _bits),
    "bnb_4bit_quant_type": Counterpart((BNB, SCRIPT), "quantization", _four_bit_kind),
    "quantization_type": Counterpart((FACTORY,), "quantization", _four_bit_kind),
    "bnb_4bit_use_double_quant": Counterpart((BNB,), "quantization.double_quantization"),
    "use_bnb_nested_quant": Counterpart((SCRIPT,), "quantization.double_quantization"),
    "double_quantization": Counterpart((FACTORY,), "quantization.double_quantization"),
    "bnb_4bit_compute_dtype": Counterpart(
        (BNB,), "quantization.compute_dtype", lambda v, o: _dtype(v, {"load_in_4bit": True})
    ),
    "llm_int8_threshold": Counterpart((BNB,), "quantization.int8_threshold", _number("quantization.int8_threshold")),
    "quant": Counterpart((HABIT,), "quantization", _own("quantization")),
    "bf16": Counterpart((ARGS, SFT, AXOLOTL, FACTORY), None, _precision("bf16", "bfloat16")),
    "fp16": Counterpart((ARGS, SFT, AXOLOTL, FACTORY), None, _precision("fp16", "float16")),
    "dtype": Counterpart((LOAD, SCRIPT), None, _dtype),
    "torch_dtype": Counterpart((LOAD,), None, _dtype),
    **dict.fromkeys(("precision", "mixed_precision"), Counterpart((HABIT,), None, _dtype)),
    "attn_implementation": Counterpart((LOAD, SCRIPT), "model.attention", _own("model.attention")),
    "flash_attn": Counterpart((FACTORY,), "model.attention", _own("model.attention")),
    "flash_attention": Counterpart((AXOLOTL,), None, _attention("flash_attention_2")),
    "sdp_attention": Counterpart((AXOLOTL,), None, _attention("sdpa")),
    "eager_attention": Counterpart((AXOLOTL,), None, _attention("eager")),
    "flex_attention": Counterpart((AXOLOTL,), None, _attention("flex_attention")),
    "chat_template_path": Counterpart((SFT,), "model.chat_template"),
    "chat_template": Counterpart((AXOLOTL,), note=TEMPLATE),
    "chat_template_jinja": Counterpart((AXOLOTL,), note=TEMPLATE),
    "template": Counterpart((FACTORY,), note=TEMPLATE),
    "trust_remote_code": Counterpart((LOAD, AXOLOTL, FACTORY), note=NO_CODE),
    "device_map": Counterpart((LOAD, AXOLOTL), note=ONE_GPU),
    # Training
    "learning_rate": Counterpart((*_TRAINERS, AXOLOTL), "training.learning_rate", _number("training.learning_rate")),
    "lr": Counterpart((HABIT,), "training.learning_rate", _number("training.learning_rate")),
    "num_train_epochs": Counterpart(_TRAINERS, "training.epochs", _epochs, STEPS_COUNT),
    "num_epochs": Counterpart((AXOLOTL, HABIT), "training.epochs", _epochs, STEPS_COUNT),
    "epochs": Counterpart((HABIT,), "training.epochs", _epochs, STEPS_COUNT),
    "max_steps": Counterpart((*_TRAINERS, AXOLOTL), "training.max_steps", _number("training.max_steps", int, 1)),
    "steps": Counterpart((HABIT,), "training.max_steps", _number("training.max_steps", int, 1)),
    "per_device_train_batch_size": Counterpart(_TRAINERS, None, _batch, BATCH_NOTE),
    "micro_batch_size": Counterpart((AXOLOTL,), None, _batch, BATCH_NOTE),
    "gradient_accumulation_steps": Counterpart((*_TRAINERS, AXOLOTL), None, _batch, BATCH_NOTE),
    "batch_size": Counterpart((AXOLOTL, HABIT), "training.batch_size"),
    "train_batch_size": Counterpart((HABIT,), "training.batch_size"),
    "bs": Counterpart((HABIT,), "training.batch_size"),
    "optim": Counterpart(_TRAINERS, "training.optimizer", _own("training.optimizer")),
    "optimizer": Counterpart((AXOLOTL,), "training.optimizer", _own("training.optimizer")),
    "lr_scheduler_type": Counterpart(_TRAINERS, "training.scheduler", _own("training.scheduler")),
    "lr_scheduler": Counterpart((AXOLOTL,), "training.scheduler", _own("training.scheduler")),
    "warmup_ratio": Counterpart((AXOLOTL, FACTORY), "training.warmup_ratio", _number("training.warmup_ratio")),
    "warmup_steps": Counterpart((*_TRAINERS, AXOLOTL), None, _warmup, "training.warmup_ratio is a share of all steps"),
    "weight_decay": Counterpart((*_TRAINERS, AXOLOTL), "training.weight_decay", _number("training.weight_decay")),
    "max_grad_norm": Counterpart((*_TRAINERS, AXOLOTL), "training.max_grad_norm", _number("training.max_grad_norm")),
    "max_length": Counterpart((SFT,), "training.max_length"),
    "max_seq_length": Counterpart((HABIT,), "training.max_length"),
    "sequence_len": Counterpart((AXOLOTL,), "training.max_length"),
    "cutoff_len": Counterpart((FACTORY,), "training.max_length"),
    "gradient_checkpointing": Counterpart(
        (*_TRAINERS, AXOLOTL), "training.gradient_checkpointing", _own("training.gradient_checkpointing")
    ),
    "use_liger_kernel": Counterpart((ARGS, SFT), None, _if_true({"training.kernels": "liger"})),
    "enable_liger_kernel": Counterpart((FACTORY,), None, _if_true({"training.kernels": "liger"})),
    "padding_free": Counterpart((SFT,), "training.padding_free", _own("training.padding_free")),
    "packing": Counterpart((SFT, FACTORY), note=NO_PACKING),
    "sample_packing": Counterpart((AXOLOTL,), note=NO_PACKING),
    "pad_to_sequence_len": Counterpart((AXOLOTL,), note=NO_PACKING),
    "seed": Counterpart((*_TRAINERS, AXOLOTL), "seed"),
    "use_cpu": Counterpart((ARGS, SFT), None, _if_true({"training.device": "cpu"})),
    "logging_steps": Counterpart(
        (*_TRAINERS, AXOLOTL), "training.logging_steps", _number("training.logging_steps", int, 1), IN_STEPS
    ),
    "eval_steps": Counterpart(
        (*_TRAINERS, AXOLOTL),
        "training.evaluate_every_steps",
        _number("training.evaluate_every_steps", int, 1),
        IN_STEPS,
    ),
    "save_steps": Counterpart(
        (*_TRAINERS, AXOLOTL), "training.save_every_steps", _number("training.save_every_steps", int, 1), IN_STEPS
    ),
    "early_stopping_patience": Counterpart((AXOLOTL,), "training.early_stopping_patience"),
    "load_best_model_at_end": Counterpart((ARGS, SFT, AXOLOTL), "training.keep_best"),
    "resume_from_checkpoint": Counterpart((ARGS, SFT, AXOLOTL), note="qlora-exp run --resume last continues a run"),
    "neftune_noise_alpha": Counterpart((ARGS, SFT, AXOLOTL, FACTORY), note="no noise is added to embeddings"),
    "deepspeed": Counterpart((ARGS, SFT, AXOLOTL), note=ONE_GPU),
    "fsdp": Counterpart((ARGS, SFT, AXOLOTL), note=ONE_GPU),
    "fsdp_config": Counterpart((ARGS, SFT, AXOLOTL), note=ONE_GPU),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), Counterpart((ARGS, SFT, AXOLOTL), note=ADAM)),
    # Data
    "dataset_name": Counterpart((SCRIPT, HABIT), "task", _task),
    "dataset": Counterpart((FACTORY, HABIT), "task", _task, DATA_NOTE),
    "data": Counterpart((HABIT,), "task", _task, DATA_NOTE),
    "data_path": Counterpart((HABIT,), "task", _task),
    "train_file": Counterpart((HABIT,), "task", _task),
    "datasets": Counterpart((AXOLOTL,), "task", _datasets),
    "dataset_config": Counterpart((SCRIPT,), "task.hub_config"),
    "dataset_train_split": Counterpart((SCRIPT,), None, _splits("train")),
    "dataset_test_split": Counterpart((SCRIPT,), None, _splits("validation")),
    "dataset_text_field": Counterpart((SFT,), note="a column of plain text is recognised"),
    "val_set_size": Counterpart((AXOLOTL,), "task.validation_fraction", _share, NO_NUMBER_OF_ROWS),
    "val_size": Counterpart((FACTORY,), "task.validation_fraction", _share, NO_NUMBER_OF_ROWS),
    "max_samples": Counterpart((FACTORY,), "task.max_train_items"),
    "completion_only_loss": Counterpart((SFT,), note=ANSWER_ONLY),
    "assistant_only_loss": Counterpart((SFT,), None, _if_true({"task.learn": "all"}), ANSWER_ONLY),
    "train_on_inputs": Counterpart((AXOLOTL,), note=ANSWER_ONLY),
    "train_on_prompt": Counterpart((FACTORY,), note=ANSWER_ONLY),
    "mask_history": Counterpart((FACTORY,), None, _if_true({"task.learn": "last"}, {"task.learn": "all"})),
    # Evaluation and results
    "per_device_eval_batch_size": Counterpart(_TRAINERS, "evaluation.batch_size"),
    "eval_batch_size": Counterpart((AXOLOTL,), "evaluation.batch_size"),
    "eval_max_new_tokens": Counterpart((AXOLOTL,), "evaluation.max_new_tokens"),
    "max_new_tokens": Counterpart((FACTORY,), "evaluation.max_new_tokens"),
    "metric_for_best_model": Counterpart((ARGS, SFT, AXOLOTL), note=BEST_MODEL),
    "output_dir": Counterpart((*_TRAINERS, AXOLOTL), "output_root"),
    "run_name": Counterpart((ARGS, SFT, FACTORY), "name"),
    "wandb_name": Counterpart((AXOLOTL,), "name"),
    "wandb_project": Counterpart((AXOLOTL,), "tracking.experiment"),
    "mlflow_experiment_name": Counterpart((AXOLOTL,), "tracking.experiment"),
    "mlflow_tracking_uri": Counterpart((AXOLOTL,), "tracking.uri"),
    "report_to": Counterpart(_TRAINERS, None, _report, "MLflow records all runs; tracking=off turns it off"),
    "push_to_hub": Counterpart((ARGS, SFT), note=PUSH),
    "hub_model_id": Counterpart((ARGS, SFT, AXOLOTL), note=PUSH),
    # Names of earlier versions
    "most_seeds": Counterpart((HABIT,), "sweep.ladder.max_seeds"),
}
"""Another tool's key → what it is here. A nested key counts by its last part."""

MACHINE = re.compile(r"^(dataloader_|ddp_|log_level|dataset_(num_proc|prepared_path|processes|kwargs)|preprocessing_)")
"""How a tool uses the machine: no result depends on it."""


def counterpart(key: str) -> Counterpart | None:
    """Return what another tool's ``key`` is here; of ``training_args.learning_rate`` the last part counts.

    ``None``: the name is unknown.
    """
    name = key.rpartition(".")[2].lower().replace("-", "_")
    if name in COUNTERPARTS:
        return COUNTERPARTS[name]
    return Counterpart((ARGS,), note=ITS_OWN) if MACHINE.match(name) else None


def suggestion(key: str, text: str, value: Any, others: Mapping[str, Any]) -> str | None:
    """Return what to write here for another tool's ``key``, whose value is ``value`` and was written as ``text``; for
    an axis (``4,8``) ``text`` counts. ``None``: the name is unknown."""
    row = counterpart(key)
    if row is None:
        return None
    settings = _settings_or_none(row, value, others)
    if row.key is not None and value in (None, ""):
        return f"did you mean {row.key}=VALUE? No value follows the equals sign"
    is_axis = ("," in text or "(" in text) and not isinstance(value, list)
    if row.key is not None and (is_axis or (settings and _is_number(text) and list(settings) == [row.key])):
        return f"did you mean {row.key}={text}?"  # as it was written: 1e-4, not 0.0001
    if settings:
        note = f" ({row.note})" if row.convert is _batch else ""
        return f"did you mean {' '.join(setting_text(name, entry) for name, entry in settings.items())}?{note}"
    if row.note is not None:
        return f"leave {key} out; {row.note}"
    return f"leave {key} out: {value} is what qlora-exp does without it"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _settings_or_none(row: Counterpart, value: Any, others: Mapping[str, Any]) -> Settings | None:
    try:
        return row.settings(value, others)
    except (TypeError, ValueError, KeyError, AttributeError):  # a value of a type that the tool doesn't have
        return None


def setting_text(key: str, value: Any) -> str:
    """Return ``key=value`` as one types it, quoted for a shell where it must be."""
    text = f"{key}={hydra_value(value)}"
    return shlex.quote(text) if re.search(r"[\s'\"(){}$;&|<>*?]", text) else text


@functools.cache
def _choice_names(group: str) -> frozenset[str]:
    return frozenset(choice.name for choice in choices(group))


def tool_names(tool: str) -> list[str]:
    """Return the keys in the table that ``tool`` has."""
    return sorted(name for name, row in COUNTERPARTS.items() if tool in row.tools)


def has_key(schema: Any, key: str) -> bool:
    """Return whether a configuration (its dataclass) has a key or group; keys below an open mapping count."""
    import typing

    for part in key.split("."):
        if not dataclasses.is_dataclass(schema):
            return typing.get_origin(schema) is dict
        hints = typing.get_type_hints(schema)
        if part not in hints:
            return False
        options = typing.get_args(hints[part])
        schema = next((option for option in options if dataclasses.is_dataclass(option)), hints[part])
    return True


def settings_here(key: str, text: str, others: Mapping[str, Any]) -> Settings:
    """Return our settings for ``--key text`` of another tool's command line; our own and unknown keys stay."""
    from qlora_exp.config.schema import Config

    row = None if has_key(Config, key) and "." in key else counterpart(key)
    if row is None and key == "model":
        return _model(text, others)
    value: Any = yaml.safe_load(text) if text else text
    settings = _settings_or_none(row, value, others) if row is not None else None
    return settings if settings is not None else {key: value}
