"""The names that a configuration may use, and which of them can be combined."""

from __future__ import annotations

import re

from qlora_exp.config.schema import Quantization

TARGET_SETS = ("attention", "attention_qv", "mlp", "all_linear")
ALPHA_POLICIES = ("2r", "r", "fixed")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTIZED = (Quantization.int8, Quantization.nf4, Quantization.fp4)
NATIVE_DTYPES = {Quantization.fp32: "float32", Quantization.bf16: "bfloat16", Quantization.fp16: "float16"}
FOUR_BIT = (Quantization.nf4, Quantization.fp4)

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

MAX_RANK = 65_536
"""More than the width of any model; a higher rank adds nothing."""
