"""Configuration files of other tools, converted: which tool a file is from, what has a counterpart here, what not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config.compose import compose
from qlora_exp.config.other_tools import COUNTERPARTS, Counterpart, Settings, counterpart, has_key
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import MAPPING_KEYS, Config
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.records.redaction import redact

PEFT_FILE, AXOLOTL_FILE, FACTORY_FILE = "PEFT's adapter_config.json", "Axolotl", "LLaMA-Factory"
SCRIPT_FILE, ARGUMENTS_FILE = "TRL's scripts", "transformers' TrainingArguments"
TELLING_KEYS: dict[str, tuple[str, ...]] = {
    PEFT_FILE: ("peft_type", "base_model_name_or_path", "init_lora_weights", "layers_to_transform"),
    AXOLOTL_FILE: (
        *("base_model", "sequence_len", "datasets", "num_epochs", "lora_target_linear", "val_set_size"),
        *("sample_packing", "lora_model_dir", "dataset_prepared_path", "micro_batch_size", "evals_per_epoch"),
    ),
    FACTORY_FILE: (
        *("finetuning_type", "cutoff_len", "lora_target", "lora_rank", "stage", "quantization_bit", "template"),
        *("overwrite_cache", "dataset_dir", "preprocessing_num_workers", "val_size", "plot_loss"),
    ),
    SCRIPT_FILE: ("dataset_name", "lora_r", "lora_target_modules", "use_peft", "attn_implementation", "load_in_4bit"),
    ARGUMENTS_FILE: (
        *("per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type", "optim", "output_dir", "report_to"),
        *("gradient_accumulation_steps", "per_device_eval_batch_size", "logging_dir", "max_grad_norm"),
    ),
}
"""Tool → keys that the others' files rarely have, the most telling tool first where two have equally many."""

OUR_GROUPS = ("lora", "targets", "task", "training", "evaluation", "tracking", "budget", "sweep", "workers", "model")

SAME_HERE: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "peft_type": ("LORA",),
    "lora_task_type": ("CAUSAL_LM",),
    "finetuning_type": ("lora",),
    "stage": ("sft",),
    "adapter": ("lora", "qlora"),
    "use_peft": (True,),
    "bias": ("none",),
    "completion_only_loss": (True,),
    "do_train": (True,),
    "do_eval": (True,),
    "report_to": ("mlflow", ["mlflow"]),
    "chat_template": ("tokenizer_default",),
    "save_strategy": ("steps",),
    "eval_strategy": ("steps",),
    "logging_strategy": ("steps",),
    "quantization_method": ("bnb", "bitsandbytes"),
    "train_on_eos": ("turn",),
}
"""Key → values that need no setting, because qlora-exp does the same."""

OFF: tuple[Any, ...] = (None, "", "no", "NO", "none", "None", False, -1, [], {})
CONVERSION_NOTES: dict[str, str] = {
    "output_dir": "runs lie in outputs/runs; output_root=DIR replaces outputs",
    "inference_mode": "an adapter is trained",
    "freeze_trainable_layers": "method.layers, where finetuning_type is freeze",
    "layers_pattern": "decoder layers are found by their numbers",
    **dict.fromkeys(("model_type", "tokenizer_type", "tokenizer_config"), "read from the model's own files"),
    **dict.fromkeys(("special_tokens", "tokens", "eos_token", "pad_token"), "the tokenizer's own tokens are used"),
    "evals_per_epoch": "training.evaluate_every_steps=N is in steps",
    "saves_per_epoch": "training.save_every_steps=N is in steps",
    "save_total_limit": "checkpoints are deleted when a run completes",
    "gradient_checkpointing_kwargs": "qlora-exp chooses the kind: training.gradient_checkpointing=on or selective",
    "lr_scheduler_kwargs": "training.scheduler has no options",
    "loss_watchdog_threshold": "a run whose loss diverges ends as DIVERGED",
    "loss_watchdog_patience": "a run whose loss diverges ends as DIVERGED",
    "overwrite_cache": "nothing of the data is cached",
    "overwrite_output_dir": "each run has its own folder",
    "plot_loss": "qlora-exp report plots the curves",
    "group_by_length": "training.micro_batch_tokens sorts rows by length",
    "tf32": "products are computed in the compute dtype",
    "torch_compile": "models aren't compiled",
    "shuffle_dataset": "rows are shuffled by the seed",
}
"""Keys that no setting replaces → what qlora-exp does, or what to use in their place."""

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Imported:
    """A converted file."""

    tool: str
    settings: Settings
    """Our key → value, group choices first."""
    origins: dict[str, str]
    """Our key → the keys that it comes from."""
    without: dict[str, str]
    """``key: value`` of the file → why it is not among the settings, or what to do."""
    unneeded: list[str]
    """Keys that are off in the file, or mean what qlora-exp does anyway."""


def tool_of(content: Any) -> str | None:
    """Return the tool whose configuration a YAML or JSON file holds; ``None``: it is ours, or unknown."""
    if not isinstance(content, Mapping):
        return None
    keys = {str(key) for key in content}
    if any(key.partition(".")[0] in OUR_GROUPS for key in keys):
        return None
    counts = {tool: len(keys.intersection(telling)) for tool, telling in TELLING_KEYS.items()}
    tool = max(counts, key=lambda name: counts[name])
    return tool if counts[tool] >= 2 else None


def tool_of_file(file: Path) -> str | None:
    """Return the tool whose configuration the file holds; ``None``: it is ours, unknown, or can't be read."""
    try:
        return tool_of(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def read_other(file: Path) -> tuple[str, dict[str, Any]]:
    """Return the tool and the settings of another tool's file.

    Raises:
        ConfigError: it can't be read, is a pickle, or no tool that we know writes such keys.
    """
    if file.is_dir():
        names = [name for name in ("adapter_config.json", "training_args.json") if (file / name).is_file()]
        hint = f"qlora-exp import {file / names[0]}" if names else "name one file: axolotl.yml, adapter_config.json …"
        raise ConfigError("a folder can't be imported", str(file), hint)
    if file.suffix in PICKLED_SUFFIXES:
        what = f"{file.name} is a pickle: reading it would run any code that it holds"
        hint = 'in the training script: open("training_args.json", "w").write(args.to_json_string()); import that file'
        raise ConfigError(what, str(file), hint)
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {file}", "qlora-exp import", "name an existing YAML or JSON file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}", str(file), "name a YAML or JSON file") from None
    except (yaml.YAMLError, ValueError) as error:
        what = f"not valid {'JSON' if file.suffix == '.json' else 'YAML'}: {error}".splitlines()[0]
        raise ConfigError(what, str(file), "correct the file") from None
    if not isinstance(content, dict):
        raise ConfigError("the file holds no settings", str(file), "key: value, one per line")
    content = {str(key): value for key, value in content.items()}
    if any(key.partition(".")[0] in OUR_GROUPS for key in content):
        raise ConfigError("the file has the keys of qlora-exp already", str(file), f"qlora-exp run --from {file}")
    known = [key for key in content if counterpart(key) is not None]
    tool = tool_of(content) or (ARGUMENTS_FILE if known else None)
    if tool is None:
        what = "no key of the file is one of TRL, PEFT, transformers, Axolotl or LLaMA-Factory"
        raise ConfigError(what, str(file), "name the configuration of a training: axolotl.yml, training_args.json …")
    return tool, content


def converted(tool: str, content: Mapping[str, Any]) -> Imported:
    """Return the file's settings with our keys. What doesn't compose here is among those without a counterpart."""
    flat: dict[str, Any] = redact(dict(_flat(content)))
    others = {key.rpartition(".")[2]: value for key, value in flat.items()}
    settings: Settings = {}
    origins: dict[str, list[str]] = {}
    without: dict[str, str] = {}
    unneeded: list[str] = []
    for key, value in flat.items():
        row = counterpart(key)
        name = key.rpartition(".")[2]
        if (left_out := _further_data(name, value)) is not None:
            without[f"{key}: {_short(left_out)}"] = "a run has one data file or folder, and reads the first"
        own, problem = _own_settings(row if name not in CONVERSION_NOTES else None, value, others)
        if own:
            for ours, entry in own.items():
                settings[ours] = entry
                origins.setdefault(ours, []).append(key)
        elif problem is not None:
            without[f"{key}: {_short(value)}"] = problem
        elif value in OFF or value in SAME_HERE.get(name, ()):
            unneeded.append(key)
        elif name in CONVERSION_NOTES:
            without[f"{key}: {_short(value)}"] = CONVERSION_NOTES[name]
        elif row is None:
            without[f"{key}: {_short(value)}"] = "unknown to qlora-exp"
        else:
            without[f"{key}: {_short(value)}"] = row.note or "qlora-exp does so without a setting"
    if "quantization" not in settings and tool in (AXOLOTL_FILE, FACTORY_FILE, SCRIPT_FILE):
        settings["quantization"] = "bf16"
        origins["quantization"] = ["no quantization in the file"]
    if "method" not in settings and _trains_without_adapter(tool, flat):
        settings["method"] = "full"
        origins["method"] = ["no adapter in the file"]
    if "method" in settings:
        for ours in [key for key in settings if key.startswith("lora.")]:
            reason = f"method={settings['method']} has no LoRA adapters"
            without[f"{', '.join(origins.pop(ours))}: {_short(settings.pop(ours))}"] = reason
    kept = _composing(settings, origins, without)
    return Imported(tool, kept, {key: ", ".join(origins[key]) for key in kept}, without, unneeded)


def _trains_without_adapter(tool: str, content: Mapping[str, Any]) -> bool:
    """Return whether the tool trains all weights because its file names no adapter."""
    if tool == AXOLOTL_FILE:
        return not content.get("adapter")
    return tool == SCRIPT_FILE and "use_peft" not in content and not any(key.startswith("lora_") for key in content)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value; of a mapping that has keys of the table, such as ``quantization_config``, its own ones."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and key not in COUNTERPARTS and any(map(counterpart, map(str, value))):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _further_data(name: str, value: Any) -> list[Any] | None:
    """Return the data sets or files after the first; ``None``: there are none."""
    if name != "datasets" or not isinstance(value, list):
        return None
    if len(value) > 1:
        return value[1:]
    files = value[0].get("data_files") if value and isinstance(value[0], Mapping) else None
    return files[1:] if isinstance(files, list) and len(files) > 1 else None


def _own_settings(row: Counterpart | None, value: Any, others: Mapping[str, Any]) -> tuple[Settings, str | None]:
    """Return our settings for a value, or why there are none although the tool's key has a counterpart."""
    if row is None:
        return {}, None
    try:
        settings = {_existing(key): entry for key, entry in _leaves(row.settings(value, others))}
    except (TypeError, ValueError, KeyError, AttributeError):
        return {}, f"not a value of {row.key or 'this key'}"
    missing = [key for key in settings if not has_key(Config, key.lstrip("+"))]
    return (settings, None) if not missing else ({}, f"this version has no {missing[0]}")


def _leaves(settings: Settings) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in MAPPING_KEYS:
            yield from ((f"{key}.{name}", entry) for name, entry in value.items())
        else:
            yield key, value


def _existing(key: str) -> str:
    """Return the key as an override: one of an open mapping that conf/ doesn't have is added by ``+``."""
    return f"+{key}" if key.startswith("task.splits.") and key != "task.splits.train" else key


def _composing(settings: Settings, origins: Mapping[str, list[str]], without: dict[str, str]) -> Settings:
    """Return those settings that compose together; the others go to ``without``, with the reason.

    Some need another one (``training.micro_batch_size`` a batch size that it divides), so those that fail are tried
    again at the end.
    """
    first = dict(sorted(settings.items(), key=lambda entry: "." in entry[0]))
    kept: Settings = {}
    waiting = list(_together(first))
    for _ in range(2):
        failed = []
        for part in waiting:
            error = _problem({**kept, **part})
            if error is None:
                kept |= part
            else:
                failed.append((part, error))
        waiting = [part for part, _ in failed]
    for part, error in failed:
        for key, value in part.items():
            without[f"{', '.join(origins[key])}: {_short(value)}"] = error
    return kept


def _together(settings: Settings) -> Iterator[Settings]:
    """Yield the settings one by one; a group's choice with what its file leaves open, such as ``model.id``."""
    needed = {
        "model": ("model.id", "model.path"),
        "task": ("task.path", "task.hub_id"),
        "method": ("method.layers", "method.peft_type", "quantization"),
    }
    used: set[str] = set()
    for key, value in settings.items():
        if key not in used:
            part = {key: value, **{name: settings[name] for name in needed.get(key, ()) if name in settings}}
            used |= set(part)
            yield part


def _problem(settings: Settings) -> str | None:
    try:
        compose([f"{key}={hydra_value(value)}" for key, value in settings.items()])
    except QloraExpError as error:
        return str(error).splitlines()[0].removeprefix("(1) ")
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def as_yaml(imported: Imported, source: str, target: str) -> str:
    """Return the settings as a file for ``--from``: each with the key that it comes from, then what is left out."""
    lines = [
        f"# {source} ({imported.tool}), converted by qlora-exp import.  qlora-exp run --from {target}",
        "# What isn't named here has qlora-exp's default.",
    ]
    written = [(f"{_yaml(key)}: {_yaml(value)}", imported.origins[key]) for key, value in imported.settings.items()]
    width = max((len(text) for text, _ in written if len(text) <= 60), default=0)
    lines += [f"{text.ljust(width)}  # {origin}" for text, origin in written]
    if imported.without:
        lines += ["", "# Without a counterpart here:"]
        lines += [f"#   {' '.join(key.split())} ({reason})" for key, reason in imported.without.items()]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n...\n").strip()
    )
