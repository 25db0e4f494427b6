"""Other tools' names for the values of our settings: ``4bit`` is nf4, ``bayes`` is tpe."""

from __future__ import annotations

import re
from typing import Any

OTHER_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
VALUES: dict[str, dict[str, str]] = {
    "quantization": {
        **dict.fromkeys(("4bit", "4", "int4", "q4", "qlora", "bnb_4bit", "bnb", "bitsandbytes", "nf4_dq"), "nf4"),
        **dict.fromkeys(("8bit", "8", "llm_int8", "q8", "bnb_8bit", "fp8"), "int8"),
        **dict.fromkeys(("bfloat16", "16", "16bit", "half", "none", "false", "no", "full", "lora"), "bf16"),
        **dict.fromkeys(("float16",), "fp16"),
        **dict.fromkeys(("float32", "32", "32bit", "float"), "fp32"),
    },
    "targets": {
        **dict.fromkeys(("all", "all_linear_layers", "linear", "lora_target_linear"), "all_linear"),
        **dict.fromkeys(("qv", "query_value"), "attention_qv"),
        **dict.fromkeys(("ffn", "feed_forward"), "mlp"),
        **dict.fromkeys(("qkvo", "attn"), "attention"),
    },
    "sweep.sampler": {
        **dict.fromkeys(("bayes", "bayesian", "bo", "optuna", "hyperopt", "tpesampler"), "tpe"),
        **dict.fromkeys(("gridsearch", "grid_search", "gridsampler"), "grid"),
        **dict.fromkeys(("randomsearch", "random_search", "randomsampler", "uniform"), "random"),
        **dict.fromkeys(("gaussian_process", "gpsampler", "bohb"), "gp"),
        **dict.fromkeys(("nsga", "nsgaii", "nsgaiisampler"), "nsga2"),
        **dict.fromkeys(("cma", "cma_es"), "cmaes"),
        **dict.fromkeys(("sobol", "halton"), "qmc"),
        **dict.fromkeys(("rank_doubling",), "ladder"),
    },
    "sweep.pruner": {
        **dict.fromkeys(("successive_halving", "successivehalvingpruner", "sha", "halving"), "asha"),
        **dict.fromkeys(("medianpruner", "medianstoppingrule", "median_stopping"), "median"),
        **dict.fromkeys(("hyperbandpruner", "bohb"), "hyperband"),
        **dict.fromkeys(("noppruner", "nop", "off", "false", "no"), "none"),
    },
    "sweep.ladder.lr_policy": {"transfer": "carry"},
    "training.optimizer": {
        **dict.fromkeys(("adam", "adamw", "adamw_hf", "torch", "adamw_apex_fused"), "adamw_torch"),
        **dict.fromkeys(("adam8bit", "adamw8bit", "adam_8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw", "pagedadamw32bit"), "paged_adamw_32bit"),
        **dict.fromkeys(("pagedadamw8bit", "paged_adam_8bit"), "paged_adamw_8bit"),
        **dict.fromkeys(("lion", "lion8bit"), "lion_8bit"),
    },
    "training.scheduler": {
        **dict.fromkeys(("cosine_annealing", "one_cycle", "cosineannealinglr"), "cosine"),
        **dict.fromkeys(("none", "const"), "constant"),
        **dict.fromkeys(("linear_decay",), "linear"),
    },
    "training.device": {**dict.fromkeys(("gpu", "cuda:0", "cuda0"), "cuda"), "mps": "cpu"},
    "training.gradient_checkpointing": {
        **dict.fromkeys(("true", "unsloth", "offload", "offload_disk"), "on"),
        "false": "off",
    },
    "training.padding_free": {"true": "on", "false": "off"},
    "model.attention": {
        **dict.fromkeys(("fa2", "flash", "flash_attn", "flash_attention", "flash_attn_2"), "flash_attention_2"),
        **dict.fromkeys(("fa3", "flash_attn_3"), "flash_attention_3"),
        **dict.fromkeys(("sdp", "scaled_dot_product"), "sdpa"),
        **dict.fromkeys(("disabled", "none"), "eager"),
        "flex": "flex_attention",
    },
    "model.variant": dict.fromkeys(("chat", "it", "sft", "instruction"), "instruct") | {"pretrained": "base"},
    "task.format": dict.fromkeys(("chatml", "messages", "sharegpt", "chat_template"), "chat") | {"alpaca": "plain"},
    "lora.init": {"default": "kaiming", "true": "kaiming"},
    "quantization.compute_dtype": OTHER_DTYPES,
    "lora.dtype": OTHER_DTYPES,
    "tracking": {"none": "off", "false": "off", "all": "mlflow"},
}
"""Our key or group → other names of its values, in lower case, with ``_`` for ``-`` and spaces → our name."""


def value_here(key: str, value: Any) -> str | None:
    """Return our name for another tool's value of ``key``: ``quantization``, ``4bit`` gives ``nf4``; ``None``: it is
    unknown."""
    text = re.sub(r"^torch\.", "", str(value).strip().lower())
    names = VALUES.get(key, {})
    return names.get(text) or names.get(re.sub(r"[-\s]", "_", text)) or names.get(re.sub(r"[-_\s]", "", text))
