"""Removes decoder layers from a loaded model; those that stay are numbered anew."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_exp.errors import ModelError

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists of a configuration with one entry a layer."""


def prune_layers(model: PreTrainedModel, layers: tuple[int, ...], where: str) -> PreTrainedModel:
    """Keep the decoder layers with the numbers ``layers``, in place.

    Raises:
        ModelError: the model's decoder layers aren't one list.
    """
    config: Any = model.config
    count = int(config.num_hidden_layers)
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1:
        what = f"the decoder layers of {config.model_type} aren't one list, of which some could be kept"
        raise ModelError(what, where, "model.layers=null")
    parent, name, every = lists[0]
    kept = nn.ModuleList([every[number] for number in layers])
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                cached: Any = module
                cached.layer_idx = place  # the key-value cache has one entry a layer
    setattr(parent, name, kept)
    config.num_hidden_layers = len(layers)
    for key in PER_LAYER_LISTS:
        entries = getattr(config, key, None)
        if isinstance(entries, list) and len(entries) == count:
            setattr(config, key, [entries[number] for number in layers])
    return model
