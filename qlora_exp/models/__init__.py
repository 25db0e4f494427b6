"""Base models, their quantization and their adapters. The only importer of bitsandbytes and peft."""

from qlora_exp.models import libraries as libraries  # before the others: see there

# isort: split
from qlora_exp.models.adapters import (
    adapter_parameters,
    attach_adapters,
    load_adapter,
    recast_adapters,
    save_adapter,
    write_portable,
)
from qlora_exp.models.base import Base, load_base, shell
from qlora_exp.models.bytes import WeightBytes, weight_bytes
from qlora_exp.models.describe import describe, describe_file
from qlora_exp.models.lending import ColdBases, WarmBases, model_key
from qlora_exp.models.merging import merged_model
from qlora_exp.models.portable import is_portable
from qlora_exp.models.selftest import SelfTest, quantization_self_test
from qlora_exp.models.sources import ModelSource, fingerprint, model_config, resolve_source
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.models.weight_files import holds_weights
from qlora_exp.plan.targets import resolve_targets

__all__ = [
    "Base",
    "ColdBases",
    "ModelSource",
    "SelfTest",
    "WarmBases",
    "WeightBytes",
    "adapter_parameters",
    "attach_adapters",
    "describe",
    "describe_file",
    "fingerprint",
    "holds_weights",
    "is_portable",
    "load_adapter",
    "load_base",
    "load_tokenizer",
    "merged_model",
    "model_config",
    "model_key",
    "quantization_self_test",
    "recast_adapters",
    "resolve_source",
    "resolve_targets",
    "save_adapter",
    "shell",
    "weight_bytes",
    "write_portable",
]
