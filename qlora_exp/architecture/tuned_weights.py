"""Which tensors a tuning method trains: from parts and layers to names and shapes of this model."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_exp.architecture.shapes import DTYPES, Architecture, ElementBytes, WeightShape
from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.enums import Method
from qlora_exp.config.peft_kinds import peft_kind_of
from qlora_exp.config.schema import Config, LoraConfig, MethodConfig
from qlora_exp.errors import ModelError, nearest

LAYER_NUMBER = re.compile(r"^(?:.*?\.)?(\d+)\.")
"""The number of a decoder layer in a tensor's name."""
NORM_NAME = re.compile(r"(norm|(^|[._])ln([._\d]|$))[^.]*(\.|$)", re.IGNORECASE)
EMBEDDING_NAME = re.compile(r"(^|\.)(embed\w*|wte|wpe|word_embeddings?|position_embeddings?)\.", re.IGNORECASE)
FLOAT32_COLUMN = DTYPES.index("float32")
MASTER_BYTES = 4
"""A weight that is trained is kept in float32: in 16 bits an update of less than 0.4 % of a weight is lost."""


@dataclass(frozen=True)
class TunedTensor:
    """A tensor of the base that is trained. ``layer``: its decoder layer; ``None`` outside of them. ``matrix``: it is
    the weight of a linear layer, whose gradient needs the layer's input."""

    name: str
    shape: tuple[int, ...]
    element_bytes: ElementBytes
    layer: int | None
    matrix: bool
    part: str

    @property
    def elements(self) -> int:
        """The number of its values."""
        product = 1
        for size in self.shape:
            product *= size
        return product


def trained_modules(architecture: Architecture, config: Config) -> tuple[str, ...]:
    """Return the full names of the linear layers that are trained or get an adapter, in the model's order.

    Raises:
        ModelError: the targets, layers or parts aren't there.
    """
    method = config.method
    layers = tuned_layers(architecture, method)
    found = peft_kind_of(method)
    if method.kind is Method.lora or (found is not None and not found[0].on_norms):
        names = resolve_targets(architecture, config.targets)
        if layers is None:
            return names
        kept = tuple(name for name in names if layer_of(name) in layers)
        if not kept:
            what = "none of the target modules is in these layers"
            raise ModelError(what, f"method.layers = {method.layers}", "other targets, or method.layers=null")
        return kept
    if method.kind is Method.bottleneck or found is not None:
        return ()
    matrices = {tensor.name for tensor in tuned_tensors(architecture, method) if tensor.matrix}
    return tuple(shape.name for shape in architecture.weights if f"{shape.name}.weight" in matrices)


def tuned_tensors(architecture: Architecture, method: MethodConfig) -> tuple[TunedTensor, ...]:
    """Return the base's own tensors that ``method`` trains; none with LoRA or bottleneck adapters.

    * ``full``: all of them. A tied head is its embedding, and counts once.
    * ``layerwise``: those of ``method.layers``, with their norms and biases.
    * ``selective``: ``method.parameters``: norms, biases, embeddings, head, attention, mlp. ``method.layers`` chooses
      among those in decoder layers.

    Raises:
        ModelError: a layer or a part isn't there.
    """
    if method.kind in (Method.lora, Method.bottleneck) or peft_kind_of(method) is not None:
        return ()
    tensors = tuple(_all_tensors(architecture))
    if method.kind is Method.full:
        return tensors
    layers = tuned_layers(architecture, method)
    if method.kind is Method.layerwise:
        assert layers is not None  # check() refuses layerwise without layers
        return tuple(tensor for tensor in tensors if tensor.layer in layers)
    chosen: list[TunedTensor] = []
    for part in method.parameters or ():
        of_part = [tensor for tensor in tensors if _is_in(tensor, part)]
        if not of_part:
            raise _no_part_error(architecture, tensors, part)
        chosen += of_part
    names = {tensor.name for tensor in chosen if tensor.layer is None or layers is None or tensor.layer in layers}
    if not names:
        what = "none of these parameters is in these layers"
        raise ModelError(what, f"method.layers = {method.layers}", "method.layers=null")
    return tuple(tensor for tensor in tensors if tensor.name in names)


def whole_tensors(architecture: Architecture, lora: LoraConfig) -> tuple[TunedTensor, ...]:
    """Return the tensors of ``lora.modules_to_save``, which are trained whole next to LoRA's adapters: the embeddings',
    the output head's.

    Raises:
        ModelError: a name is none of these, or embeddings and head are one matrix.
    """
    if lora.modules_to_save is None:
        return ()
    tensors = [tensor for tensor in _all_tensors(architecture) if tensor.part in ("embeddings", "head")]
    modules = [tensor.name.rpartition(".")[0] for tensor in tensors]
    head = architecture.output_head
    known = sorted({name.rpartition(".")[2] for name in (*modules, head or "") if name})
    chosen: set[str] = set()
    for ending in lora.modules_to_save:
        where = f"lora.modules_to_save = {ending}, architecture {architecture.model_type}"
        matches = {name for name in (*modules, head or "") if name == ending or name.endswith(f".{ending}")}
        if not matches:
            linear = any(shape.name == ending or shape.name.endswith(f".{ending}") for shape in architecture.weights)
            what = f"{ending} is a linear layer" if linear else f"no embedding or output head is called {ending}"
            raise ModelError(what, where, "targets gives it an adapter" if linear else nearest(ending, known))
        chosen |= matches
    if head is not None and head not in modules and chosen:
        what = "the embeddings are the output head, too (they are tied), and a trained copy of one would untie them"
        hint = "method=selective method.parameters=[embeddings] trains both; or lora.modules_to_save=null"
        raise ModelError(what, f"lora.modules_to_save = {lora.modules_to_save}", hint)
    return tuple(tensor for tensor, name in zip(tensors, modules, strict=True) if name in chosen)


def tuned_layers(architecture: Architecture, method: MethodConfig) -> frozenset[int] | None:
    """Return the decoder layers of ``method.layers``; ``None``: all.

    Raises:
        ModelError: the model has no such layer.
    """
    if method.layers is None:
        return None
    return chosen_layers(method.layers, architecture.layers, architecture.model_type, "method.layers")


def chosen_layers(layers: object, count: int, model_type: str, key: str) -> frozenset[int]:
    """Return the numbers that ``layers`` (``last:2``, ``first:4`` or a list) chooses of ``count`` decoder layers.

    Raises:
        ModelError: the model has no such layer. ``key``: the setting, for the message.
    """
    if isinstance(layers, str):
        end, _, number = layers.partition(":")
        wanted = int(number)
        numbers = list(range(count - wanted, count) if end == "last" else range(wanted))
    else:
        assert isinstance(layers, list | tuple)
        numbers = [int(number) for number in layers]
        wanted = max(numbers) + 1
    if wanted > count:
        what = f"{model_type} has {count} layers, numbered 0 to {count - 1}"
        raise ModelError(what, f"{key} = {layers}", f"{key}=last:{max(1, count // 2)}")
    return frozenset(numbers)


@functools.lru_cache(maxsize=1 << 16)  # one plan asks a million times for some hundred names
def layer_of(name: str) -> int | None:
    """Return the number of the decoder layer that a tensor or module is in, by its name; ``None``: in none."""
    match = LAYER_NUMBER.match(f"{name}.")
    return int(match[1]) if match else None


def first_tuned_layer(architecture: Architecture, method: MethodConfig, modules: Sequence[str]) -> int:
    """Return the first decoder layer whose input's gradient or own weights' gradient is needed. Layers before it save
    nothing for the backward pass."""
    found = peft_kind_of(method)
    if method.kind is Method.bottleneck or (found is not None and found[0].on_norms):
        return min(tuned_layers(architecture, method) or (0,))
    tensors = tuned_tensors(architecture, method)
    if any(tensor.part == "embeddings" for tensor in tensors):
        return 0
    numbers = [layer_of(name) for name in modules] + [tensor.layer for tensor in tensors]
    known = [number for number in numbers if number is not None]
    return min(known) if known else architecture.layers


def _all_tensors(architecture: Architecture) -> Iterator[TunedTensor]:
    for shape in architecture.weights:
        yield from _of_linear(shape)
    head = f"{architecture.output_head}.weight"
    for tensor in architecture.others:
        if tensor.buffer:
            continue
        layer, name = layer_of(tensor.name), tensor.name
        part = "other"
        if name == head:
            part = "head"
        elif name.endswith(".bias") and not NORM_NAME.search(name):
            part = "biases"
        elif NORM_NAME.search(name):
            part = "norms"
        elif layer is None and EMBEDDING_NAME.search(name):
            part = "embeddings"
        width = architecture.hidden_size
        table = part in ("embeddings", "head") and tensor.elements % width == 0
        size = (tensor.elements // width, width) if table else (tensor.elements,)
        yield TunedTensor(name, size, tensor.element_bytes, layer, False, part)


def _of_linear(shape: WeightShape) -> Iterator[TunedTensor]:
    matrix = shape.in_features * shape.out_features
    layer = layer_of(shape.name)
    size = (shape.out_features, shape.in_features)
    yield TunedTensor(f"{shape.name}.weight", size, shape.element_bytes, layer, True, shape.role)
    if shape.parameters > matrix:
        bias = (shape.parameters - matrix,)
        yield TunedTensor(f"{shape.name}.bias", bias, shape.element_bytes, layer, False, f"{shape.role} bias")


def _is_in(tensor: TunedTensor, part: str) -> bool:
    if part == "biases":
        return tensor.name.endswith(".bias")
    return tensor.part in (part, f"{part} bias")


def _no_part_error(architecture: Architecture, tensors: Sequence[TunedTensor], part: str) -> ModelError:
    where = f"method.parameters = {part}, architecture {architecture.model_type}"
    parts = sorted({tensor.part for tensor in tensors if " " not in tensor.part and tensor.part != "other"})
    if part == "head":
        what = "the output head is the embedding's matrix (they are tied)"
        return ModelError(what, where, "method.parameters=[embeddings] tunes both")
    return ModelError(f"the model has no {part}", where, f"it has {', '.join(parts)}")


def bottleneck_places(architecture: Architecture, method: MethodConfig) -> tuple[str, ...]:
    """Return the full names of the blocks behind which bottleneck adapters are put.

    Raises:
        ModelError: the architecture has no such block as a module.
    """
    layers = tuned_layers(architecture, method)
    places: list[str] = []
    for role in method.after:
        blocks: dict[int, str] = {}
        for shape in architecture.weights:
            number = layer_of(shape.name)
            if shape.role == role and number is not None and (layers is None or number in layers):
                parent = shape.name.rpartition(".")[0]
                blocks[number] = _common_parent(blocks.get(number, parent), parent)
        if not blocks or any(block.rpartition(".")[2].isdecimal() for block in blocks.values()):
            what = f"{architecture.model_type} has no {role} block behind which an adapter fits"
            other = "mlp" if role == "attention" else "attention"
            raise ModelError(what, f"method.after = {role}", f"method.after=[{other}]")
        places += blocks.values()
    return tuple(sorted(places))


def bottleneck_shapes(architecture: Architecture, method: MethodConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return name and shape of each tensor of the bottleneck adapters, as ``tuned.safetensors`` has them."""
    width, size = architecture.hidden_size, method.size
    return tuple(
        (f"{place}.bottleneck.{name}", shape)
        for place in bottleneck_places(architecture, method)
        for name, shape in (
            ("down_bias", (size,)),
            ("down_weight", (size, width)),
            ("up_bias", (width,)),
            ("up_weight", (width, size)),
        )
    )


def inserted_shapes(
    architecture: Architecture, method: MethodConfig, adapted: Sequence[WeightShape]
) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
    """Return name and shape of each tensor that the method adds to the base's own: bottleneck adapters, or
    PEFT's other than LoRA's. ``None``: it trains the base's own, or LoRA.

    ``adapted``: the layers that get an adapter.

    Raises:
        ModelError: the adapter doesn't fit a layer.
    """
    if method.kind is Method.bottleneck:
        return bottleneck_shapes(architecture, method)
    if (found := peft_kind_of(method)) is None:
        return None
    kind, options = found[0], found[0].settings(found[1])
    if kind.on_norms:
        return tuple(
            (f"{tensor.name.rpartition('.')[0]}.ln_tuning_layers.{tensor.name.rpartition('.')[2]}", tensor.shape)
            for tensor in norm_tensors(architecture, method)
        )
    for shape in adapted:
        if shape.kind == "conv1d" and not kind.transposed:
            what = f"PEFT has no {method.peft_type or 'such'} adapter for transposed layers such as {shape.name}"
            raise ModelError(what, "method.peft_type", "method=lora, or method.peft_type=ia3")
    return tuple(
        (f"{shape.name}.{name}", size)
        for shape in adapted
        for name, size in kind.shapes(
            shape.in_features, shape.out_features, options, is_last_of_mlp(architecture, shape)
        )
    )


def norm_tensors(architecture: Architecture, method: MethodConfig) -> tuple[TunedTensor, ...]:
    """Return the norms' weights and biases in ``method.layers``; without ``method.layers`` also the last norm."""
    layers = tuned_layers(architecture, method)
    tensors = tuple(tensor for tensor in _all_tensors(architecture) if tensor.part == "norms")
    return tuple(tensor for tensor in tensors if layers is None or tensor.layer in layers)


def is_last_of_mlp(architecture: Architecture, shape: WeightShape) -> bool:
    """Return whether the layer is an MLP's last one: (IA)³ scales the input of those, and the output of others."""
    return shape.role == "mlp" and shape.out_features == architecture.hidden_size


def _common_parent(first: str, second: str) -> str:
    parts = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        parts.append(one)
    return ".".join(parts)
