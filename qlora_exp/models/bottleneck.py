"""Bottleneck adapters: x + up(gelu(down(x))) behind a decoder layer's attention and MLP, zero at the start.

Houlsby et al. 2019 put one behind both blocks, Pfeiffer et al. 2021 one behind the MLP. PEFT has neither, and the
package ``adapters`` needs transformers 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.tuned_weights import bottleneck_places
from qlora_exp.config.schema import Config

ADAPTER_NAME = "bottleneck"


class Bottleneck(nn.Module):
    """One adapter. It computes in float32, and returns its input's dtype. ``up`` is zero at the start, so that the
    model begins as its base."""

    def __init__(self, width: int, size: int, seed: int, name: str, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big") >> 1
        )
        drawn = nn.init.kaiming_uniform_(torch.empty(size, width), a=math.sqrt(5), generator=generator)
        self.down_weight = nn.Parameter(drawn.to(device))
        self.down_bias = nn.Parameter(torch.zeros(size, device=device))
        self.up_weight = nn.Parameter(torch.zeros(width, size, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))
        self.active = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``hidden`` (…, width) with the adapter's part added."""
        if not self.active:
            return hidden
        inner = gelu(nn.functional.linear(hidden.to(self.down_weight.dtype), self.down_weight, self.down_bias))
        return hidden + nn.functional.linear(inner, self.up_weight, self.up_bias).to(hidden.dtype)


def insert_bottlenecks(model: nn.Module, config: Config, architecture: Architecture) -> None:
    """Put an adapter behind each of the blocks of ``method.after`` in ``method.layers``. ``model`` is changed in place.

    Raises:
        ModelError: the architecture has no such block as a module.
    """
    device = next(model.parameters()).device
    for place in bottleneck_places(architecture, config.method):
        adapter = Bottleneck(architecture.hidden_size, config.method.size, config.seed, place, device)
        block = model.get_submodule(place)
        block.add_module(ADAPTER_NAME, adapter)
        block.register_forward_hook(_behind)
    # The Trainer refuses a quantized model without adapters, and knows PEFT's alone.
    vars(model)["_hf_peft_config_loaded"] = True


def bottlenecks(model: nn.Module) -> Iterator[tuple[str, Bottleneck]]:
    """Yield the adapters of ``model`` with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            yield name, module


def set_active(adapters: Sequence[Bottleneck], active: bool) -> None:
    """Switch the adapters on, or off: the model is then its base, bit by bit."""
    for adapter in adapters:
        adapter.active = active


def _behind(block: nn.Module, inputs: Any, output: Any) -> Any:
    """Apply the block's adapter to its output; attention returns a tuple whose first part is the output."""
    adapter: Any = block.get_submodule(ADAPTER_NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)
