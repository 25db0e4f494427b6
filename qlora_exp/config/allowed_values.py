"""The names and numbers that a configuration may use, and the checks of single values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from qlora_exp.config.enums import AdapterInit, Quantization
from qlora_exp.config.other_values import value_here
from qlora_exp.errors import ConfigError, nearest

TARGET_SETS = ("attention", "attention_qv", "mlp", "all_linear")
ALPHA_POLICIES = ("2r", "r", "fixed")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
MASKED_ATTENTIONS = ("eager", "flex_attention")
"""They mask all pairs of a batch's tokens, so that they need padded rows."""
FROM_WEIGHTS = (AdapterInit.pissa, AdapterInit.olora)
"""Starts that take A and B from the base's weights, and subtract them there."""
INTEGER_MODES = {
    Quantization.int8_sym: (8, True),
    Quantization.int8_asym: (8, False),
    Quantization.int4_sym: (4, True),
    Quantization.int4_asym: (4, False),
    Quantization.int3_asym: (3, False),
    Quantization.int2_asym: (2, False),
}
"""Frozen integers that we quantize ourselves: bits, and whether they have no zero point."""
BITSANDBYTES = (Quantization.int8, Quantization.nf4, Quantization.fp4)
QUANTIZED = (*BITSANDBYTES, *INTEGER_MODES)
NATIVE_DTYPES = {Quantization.fp32: "float32", Quantization.bf16: "bfloat16", Quantization.fp16: "float16"}
FOUR_BIT = (Quantization.nf4, Quantization.fp4)
REPORTERS = ("tensorboard", "wandb", "trackio")
"""``tracking.also``: names of transformers' integrations."""
AUTO_TOKENS = "auto"
"""``training.micro_batch_tokens``: the largest that is predicted to fit."""

# Copied here because importing transformers takes seconds; a test checks that both equal transformers' enums.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
    "stable_adamw",
)  # fmt: skip
UNSUPPORTED_SCHEDULERS = {
    "reduce_lr_on_plateau": "it needs a metric at every evaluation",
    "greedy": "it needs a metric at every step",
    "cosine_with_min_lr": "it needs a minimum learning rate",
    "cosine_warmup_with_min_lr": "it needs a minimum learning rate",
    "warmup_stable_decay": "it needs a number of decay steps",
}
UNSUPPORTED_OPTIMIZERS = re.compile(
    r"galore|lomo|apollo|anyprecision|_xla|_npu|_torch_4bit|_torch_8bit|grok|free|stable"
)
"""Names in transformers that need another package, another machine or a list of weight matrices."""

EPSILON_IN_ADAPTER_DTYPE = ("adamw_torch", "rmsprop", "adagrad")
"""torch optimizers that keep their state, epsilon included, in the adapters' dtype. In float16 the second step gives
NaN."""

MAX_THREADS = 1024
"""More than any machine has cores. A thousand times as many threads crash the process."""

MAX_WORKERS = 1024
"""Each worker is a process with a connection to the study's database."""

MAX_RANK = 65_536
"""More than the width of any model; a higher rank adds nothing."""


def codes_per_byte(bits: int) -> int:
    """Return how many codes of ``bits`` a byte in memory holds. Codes of 3 bits take 4."""
    return 4 if bits <= 2 else 2 if bits <= 4 else 1


def config_error(what: str, key: str, value: object, hint: str) -> ConfigError:
    return ConfigError(what, f"{key} = {'null' if value is None else value}", hint)


def at_least(key: str, value: float | None, minimum: float) -> Iterator[ConfigError]:
    """Yield an error unless the number is null, or finite and at least ``minimum``."""
    if value is not None and not (math.isfinite(value) and value >= minimum):
        finite = "" if math.isfinite(value) else " and finite"
        yield config_error(f"{key} must be at least {minimum:g}{finite}", key, value, f"try {key}={minimum:g} or more")


def above_zero(key: str, value: float | None) -> Iterator[ConfigError]:
    """Yield an error unless the number is null, or finite and above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        finite = "" if math.isfinite(value) else " and finite"
        yield config_error(f"{key} must be above 0{finite}", key, value, f"give {key} a positive number")


def within(key: str, value: float | None, low: float, high: float, open_end: bool = False) -> Iterator[ConfigError]:
    """Yield an error unless the number is null, or ``low`` ≤ ``value`` ≤ ``high``; with ``open_end``, it must be below
    ``high``."""
    if value is not None and not (low <= value < high if open_end else low <= value <= high):
        upper = f"below {high:g}" if open_end else f"{high:.10g}"
        example = -value if low <= -value < high else low  # a sign too many
        yield config_error(f"{key} must lie between {low:g} and {upper}", key, value, f"e.g. {key}={example:g}")


def one_of(key: str, value: str, valid: tuple[str, ...]) -> Iterator[ConfigError]:
    if value not in valid:
        known = value_here(key, value)
        hint = f"did you mean {key}={known}?" if known in valid else nearest(value, valid, template=f"{key}={{}}")
        yield config_error(f"{key} has no choice called {value}", key, value, hint)
