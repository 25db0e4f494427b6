"""Liger's Triton kernels for norms and gated MLPs, in the modules of one model.

Liger's own ``apply_liger_kernel_to_…`` replaces classes and functions of transformers for all models of the process.
Here only the modules of the given model change, so that the next run of the process may do without. Liger's rotary
embedding is left out: transformers calls it as a function of a Python module, not of the model.
"""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_exp.config.enums import Kernels
from qlora_exp.errors import ConfigError

SUPPORTED = {
    "llama": ("LlamaRMSNorm", "LlamaMLP"),
    "mistral": ("MistralRMSNorm", "MistralMLP"),
    "qwen2": ("Qwen2RMSNorm", "Qwen2MLP"),
    "qwen3": ("Qwen3RMSNorm", "Qwen3MLP"),
}
"""Architecture → its classes that compute RMSNorm as Llama does, and SwiGLU."""
SILU = ("silu", "swish")


def kernels_of_run(choice: Kernels, model_type: str, device_kind: str) -> str:
    """Return ``liger`` or ``none``: the kernels that a run uses. ``model_type``: as in transformers' configuration.

    Raises:
        ConfigError: Liger's kernels are required, and can't be used here.
    """
    if choice is Kernels.none:
        return "none"
    problem = _problem(model_type, device_kind)
    if problem is None:
        return "liger"
    if choice is Kernels.liger:
        what, hint = problem
        raise ConfigError(what, "training.kernels = liger", f"training.kernels=none or auto; {hint}")
    return "none"


def _problem(model_type: str, device_kind: str) -> tuple[str, str] | None:
    """Return why Liger's kernels can't be used, and what to do; ``None`` if they can."""
    if device_kind != "cuda":
        return "Liger's kernels need a GPU", "training.device=cuda on a machine that has one"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel isn't installed", "pip install 'qlora-exp[liger]'"
    if model_type not in SUPPORTED:
        return (
            f"Liger's kernels aren't set up for the architecture {model_type}",
            f"they are for {', '.join(SUPPORTED)}",
        )
    return None


def with_kernels(model: Any, kernels: str) -> Any:
    """Return ``model`` (changed in place) with ``kernels``: ``none`` or ``liger``. A PeftModel's adapters are kept."""
    if kernels == "none":
        return model
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    norm, mlp = SUPPORTED[base.config.model_type]
    for module in base.modules():
        name = type(module).__name__
        if name == norm:
            module.forward = types.MethodType(_rms_norm, module)
        elif name == mlp and base.config.hidden_act in SILU:
            module.forward = types.MethodType(_swiglu_mlp, module)
    return model


def _rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the normalized hidden states, of the same shape and dtype."""
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: the gradient of a norm's output may have other users, e.g. several adapters.
    normalized: torch.Tensor = liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)
    return normalized


def _swiglu_mlp(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return ``down(silu(gate(x)) * up(x))``; the three layers may have adapters."""
    from liger_kernel.transformers.functional import liger_swiglu

    output: torch.Tensor = self.down_proj(liger_swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))
    return output
