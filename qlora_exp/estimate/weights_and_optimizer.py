"""Exact bytes, known before anything is loaded: base weights, quantization state, adapters, gradients, optimizer
states, and a checkpoint on disk. The count matches what ``models.weight_bytes`` measures in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from qlora_exp.architecture.expert_targets import ExpertParameter, expert_targets
from qlora_exp.architecture.run_plan import adapter_dtype, compute_dtype
from qlora_exp.architecture.shapes import DTYPES, Architecture, WeightShape
from qlora_exp.architecture.targets import rank_of
from qlora_exp.architecture.tuned_weights import TunedTensor, inserted_shapes, tuned_tensors, whole_tensors
from qlora_exp.config.allowed_values import FROM_WEIGHTS, INTEGER_MODES, QUANTIZED, codes_per_byte
from qlora_exp.config.enums import ComputeDtype, Method, Quantization
from qlora_exp.config.peft_kinds import peft_kind_of
from qlora_exp.config.schema import Config, LoraConfig, QuantizationConfig

QUANTIZATION_BLOCK = 64
"""4-bit weights per constant (bitsandbytes ``Params4bit``)."""
NESTED_BLOCK = 256
"""Block constants per nested constant under double quantization; also 8-bit optimizer values per constant."""
FOUR_BIT_CODE_BYTES, EIGHT_BIT_CODE_BYTES = 16 * 4, 256 * 4
MIN_8_BIT_ELEMENTS = 4096
"""bitsandbytes' optimizers keep the states of smaller tensors in float32 (``min_8bit_size``)."""
BITS_PER_WEIGHT = {
    Quantization.fp32: 32,
    Quantization.bf16: 16,
    Quantization.fp16: 16,
    Quantization.int8: 8,
    Quantization.nf4: 4,
    Quantization.fp4: 4,
    **{mode: 8 // codes_per_byte(bits) for mode, (bits, _) in INTEGER_MODES.items()},
}
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}
FLOAT32_WIDTH = WIDTHS["F32"]
WIDTHS_OF = {dtype: WIDTHS[name] for dtype, name in SAFETENSORS_DTYPES.items()}

Shape = tuple[int, ...]
AdaptedLayer = tuple[str, int, int, int]
"""A layer with an adapter: full name, input width, output width, rank."""
WholeTensor = tuple[str, Shape, bool]
"""A tensor of ``lora.modules_to_save``: full name, shape, whether it is an embedding's."""


@dataclass(frozen=True)
class BaseBytes:
    """The frozen base in memory, as :class:`qlora_exp.models.weight_bytes.WeightBytes` splits it."""

    base_weight_bytes: int
    quantization_state_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.base_weight_bytes + self.quantization_state_bytes


@dataclass(frozen=True)
class AdapterBytes:
    """What adapters add to training. ``optimizer_bytes``: the states after the first step. ``file_bytes``: the
    adapter's safetensors file. ``checkpoint_bytes``: that and the optimizer's states, without container overhead (some
    hundred bytes per tensor)."""

    trainable_parameters: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int
    checkpoint_bytes: int


def base_bytes(architecture: Architecture, quantization: QuantizationConfig, dtype: str) -> BaseBytes:
    """Return the bytes of the base. ``dtype`` is ``run_plan.compute_dtype``: also the dtype of everything that isn't
    quantized: embeddings, norms, biases, the head, and layers that bitsandbytes doesn't support."""
    return _base_bytes(architecture, quantization.mode, quantization.double_quantization, quantization.group, dtype)


@lru_cache(maxsize=256)
def _base_bytes(
    architecture: Architecture, mode: Quantization, double_quantization: bool, group: int, dtype: str
) -> BaseBytes:
    column = DTYPES.index(dtype)
    weights = sum(tensor.elements * tensor.element_bytes[column] for tensor in architecture.others)
    state = 0
    for shape in architecture.weights:
        matrix = shape.in_features * shape.out_features
        weights += (shape.parameters - matrix) * shape.element_bytes[column]
        if mode in QUANTIZED and shape.quantizable:
            weights += math.ceil(matrix * BITS_PER_WEIGHT[mode] / 8)
            state += quantization_state(shape, mode, double_quantization, group)
        else:
            weights += matrix * shape.element_bytes[column]
    return BaseBytes(weights, state)


def in_mode(quantization: QuantizationConfig, mode: Quantization) -> QuantizationConfig:
    """Return the same settings in another mode, with that mode's default compute dtype."""
    return replace(quantization, mode=mode, compute_dtype=ComputeDtype.auto)


def smallest_base(
    architecture: Architecture, quantization: QuantizationConfig, device_kind: str, bf16: bool
) -> tuple[Quantization, int]:
    """Return the mode in which the base takes the least memory, and its bytes."""

    def size(mode: Quantization) -> int:
        candidate = in_mode(quantization, mode)
        return base_bytes(architecture, candidate, compute_dtype(candidate, device_kind, bf16)).total_bytes

    mode = min((mode for mode in Quantization if mode not in INTEGER_MODES), key=size)
    return mode, size(mode)


def quantization_state(shape: WeightShape, mode: Quantization, double_quantization: bool, group: int = 64) -> int:
    """Return the bytes kept with one quantized matrix.

    * int8 (LLM.int8(), Dettmers et al. 2022): a float32 scale per row. Outlier columns are found in each forward pass,
      and not kept.
    * 4 bit: a code book, and a float32 constant per block of 64.
    * 4 bit with double quantization (QLoRA, Dettmers et al. 2023): a code book, and 8 bits per constant. The constants
      have their float32 mean, a code book, and a float32 constant per 256 of them.
    * integers (int4_asym …): per group of a row's inputs a float16 scale and, if asymmetric, a zero point of a byte.
    """
    if mode in INTEGER_MODES:
        groups = shape.out_features * math.ceil(shape.in_features / group)
        return groups * (2 if INTEGER_MODES[mode][1] else 3)
    if mode is Quantization.int8:
        return 4 * shape.out_features
    blocks = math.ceil(shape.in_features * shape.out_features / QUANTIZATION_BLOCK)
    if not double_quantization:
        return FOUR_BIT_CODE_BYTES + 4 * blocks
    return FOUR_BIT_CODE_BYTES + EIGHT_BIT_CODE_BYTES + blocks + 4 + 4 * math.ceil(blocks / NESTED_BLOCK)


def adapter_bytes(
    adapted: Sequence[WeightShape],
    lora: LoraConfig,
    optimizer: str,
    whole: Sequence[TunedTensor] = (),
    compute: str = "float32",
    experts: Sequence[ExpertParameter] = (),
) -> AdapterBytes:
    """Return the bytes of adapters on ``adapted``, of their gradients (in the adapters' dtype) and of their optimizer
    states. ``whole``: tensors that are trained with them, in float32, and saved in the dtype ``compute``."""
    layers = tuple((shape.name, shape.in_features, shape.out_features, rank_of(lora, shape.name)) for shape in adapted)
    layers += tuple((target.saved_as, target.inputs, target.outputs, lora.r * target.experts) for target in experts)
    others = tuple((tensor.name, tensor.shape, tensor.part == "embeddings") for tensor in whole)
    sizes = _adapter_bytes(layers, lora.dora, adapter_dtype(lora), optimizer, others, compute)
    if lora.init not in FROM_WEIGHTS:
        return sizes
    # The file also holds the initial adapter.
    doubled = tuple((name, inputs, outputs, 2 * rank) for name, inputs, outputs, rank in layers)
    written = _adapter_bytes(doubled, lora.dora, "float32", optimizer, others, compute)
    return replace(sizes, file_bytes=written.file_bytes)


def trained_bytes(
    architecture: Architecture, adapted: Sequence[WeightShape], config: Config, compute: str
) -> AdapterBytes:
    """Return the bytes of what ``config.method`` trains: adapters on ``adapted``, or float32 copies of the base's own
    tensors. ``compute``: the base's dtype, in which such tensors are saved after training."""
    method, optimizer = config.method, config.training.optimizer
    if method.kind is Method.lora:
        whole, experts = whole_tensors(architecture, config.lora), expert_targets(architecture, config.lora)
        return adapter_bytes(adapted, config.lora, optimizer, whole, compute, experts)
    inserted = inserted_shapes(architecture, method, adapted)
    tuned = () if inserted is not None else tuned_tensors(architecture, method)
    shapes = inserted if inserted is not None else tuple((tensor.name, tensor.shape) for tensor in tuned)
    embeddings = {tensor.name for tensor in tuned if tensor.part == "embeddings"}
    masters = [(name, shape, "F32") for name, shape in shapes]
    saved = masters if inserted is not None else [(name, shape, SAFETENSORS_DTYPES[compute]) for name, shape in shapes]
    parameters = sum(math.prod(shape) for _, shape in shapes)
    states = optimizer_state_bytes(
        optimizer,
        [(shape, FLOAT32_WIDTH) for name, shape in shapes if name not in embeddings],
        [(shape, FLOAT32_WIDTH) for name, shape in shapes if name in embeddings],
    )
    size = FLOAT32_WIDTH * parameters
    return AdapterBytes(
        trainable_parameters=parameters,
        adapter_bytes=size,
        gradient_bytes=size,
        optimizer_bytes=states,
        file_bytes=sum(math.prod(shape) * WIDTHS[kind] for _, shape, kind in saved) + _safetensors_header(saved),
        checkpoint_bytes=size + _safetensors_header(masters) + states,
    )


def frozen_bytes(
    architecture: Architecture, config: Config, dtype: str, adapted: Sequence[WeightShape] = ()
) -> BaseBytes:
    """Return the bytes of the base during training: without the tensors that the method replaces by its own, with what
    adapters on ``adapted`` keep without training it."""
    base = base_bytes(architecture, config.quantization, dtype)
    column = DTYPES.index(dtype)
    tuned = tuned_tensors(architecture, config.method)
    replaced = sum(tensor.elements * tensor.element_bytes[column] for tensor in tuned)
    found = peft_kind_of(config.method)
    if found is not None and adapted:
        sizes = [(shape.in_features, shape.out_features) for shape in adapted]
        replaced -= FLOAT32_WIDTH * found[0].fixed(sizes, found[0].settings(found[1]))
    return replace(base, base_weight_bytes=base.base_weight_bytes - replaced)


@lru_cache(maxsize=1024)
def _adapter_bytes(
    layers: tuple[AdaptedLayer, ...],
    dora: bool,
    dtype: str,
    optimizer: str,
    whole: tuple[WholeTensor, ...],
    compute: str,
) -> AdapterBytes:
    matrices = [tensor for layer in layers for tensor in _adapter_tensors(layer, dora, dtype)]
    tensors = matrices + [(f"base_model.model.{name}", shape, "F32") for name, shape, _ in whole]
    saved = matrices + [(f"base_model.model.{name}", shape, SAFETENSORS_DTYPES[compute]) for name, shape, _ in whole]
    size = sum(math.prod(shape) * WIDTHS[kind] for _, shape, kind in tensors)
    states = optimizer_state_bytes(
        optimizer,
        [(shape, WIDTHS[kind]) for _, shape, kind in matrices]
        + [(shape, FLOAT32_WIDTH) for _, shape, embedding in whole if not embedding],
        [(shape, FLOAT32_WIDTH) for _, shape, embedding in whole if embedding],
    )
    return AdapterBytes(
        trainable_parameters=sum(math.prod(shape) for _, shape, _ in tensors),
        adapter_bytes=size,
        gradient_bytes=size,
        optimizer_bytes=states,
        file_bytes=sum(math.prod(shape) * WIDTHS[kind] for _, shape, kind in saved) + _safetensors_header(saved),
        checkpoint_bytes=size + _safetensors_header(tensors) + states,
    )


def optimizer_state_bytes(
    optimizer: str, tensors: Iterable[tuple[Shape, int]], embeddings: Iterable[tuple[Shape, int]] = ()
) -> int:
    """Return the bytes of the states of ``optimizer`` (one of ``config.names.OPTIMIZERS``) over ``tensors`` and
    ``embeddings``: (shape, bytes per element). Paged states count, too: they move to the host only if the card runs out
    of memory.

    transformers makes bitsandbytes' 8-bit optimizers keep the states of ``torch.nn.Embedding`` in float32
    (``Trainer.create_optimizer``).
    """
    name = optimizer.removeprefix("paged_")
    others = list(tensors)
    shapes = [*others, *embeddings]
    if name == "sgd":
        return 0
    if name == "adafactor":  # float32 sums of a matrix's rows and columns, and a norm
        return sum(4 * (sum(shape) if len(shape) > 1 else math.prod(shape)) + 4 for shape, _ in shapes)
    if name in _TORCH_MOMENTS:
        return sum(_TORCH_MOMENTS[name] * math.prod(shape) * width + 4 for shape, width in shapes)
    # bitsandbytes: values per parameter, and whether they are kept in 8 bit.
    moments = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}[name.partition("_")[0]]
    in_8_bit = name.endswith("8bit")
    sizes = [math.prod(shape) for shape, _ in shapes]
    large = [size for size in sizes[: len(others)] if in_8_bit and size >= MIN_8_BIT_ELEMENTS]
    blocks = sum(math.ceil(size / NESTED_BLOCK) for size in large)
    code_books = min(moments, 2) * EIGHT_BIT_CODE_BYTES if large else 0
    return moments * (4 * (sum(sizes) - sum(large)) + sum(large) + 4 * blocks) + code_books


_TORCH_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1}
"""The numbers per parameter that torch's optimizers keep, in its dtype; plus a step of four bytes per tensor."""


_FOREACH_OPTIMIZERS = {"adamw_torch", "adagrad", "rmsprop"}
"""torch's optimizers that on CUDA make one temporary for all parameters together (``torch/optim``: ``foreach``)."""


def temporaries_bytes(optimizer: str, adapters: AdapterBytes) -> int:
    """Return what the step of ``optimizer`` needs on CUDA in addition to states and gradients: the root of the second
    moments."""
    return adapters.adapter_bytes if optimizer in _FOREACH_OPTIMIZERS else 0


def _adapter_tensors(layer: AdaptedLayer, dora: bool, dtype: str) -> list[tuple[str, Shape, str]]:
    """Return (name in the adapter's file, shape, safetensors' name of the dtype) of each tensor."""
    name, in_features, out_features, r = layer
    kind = SAFETENSORS_DTYPES[dtype]
    prefix = f"base_model.model.{name}.lora_"
    tensors: list[tuple[str, Shape, str]] = [
        (f"{prefix}A.weight", (r, in_features), kind),
        (f"{prefix}B.weight", (out_features, r), kind),
    ]
    if dora:
        tensors.append((f"{prefix}magnitude_vector", (out_features,), "F32"))
    return tensors


def _safetensors_header(tensors: Sequence[tuple[str, Shape, str]]) -> int:
    """Return the bytes before the values: 8 for the length, and a JSON text, padded with spaces to a multiple of 8."""
    length, offset = len('{"__metadata__":{"format":"pt"}}'), 0
    for name, shape, kind in sorted(tensors, key=lambda tensor: (-WIDTHS[tensor[2]], tensor[0])):
        end = offset + math.prod(shape) * WIDTHS[kind]
        sizes = ",".join(map(str, shape))
        length += len(f',"{name}":{{"dtype":"{kind}","shape":[{sizes}],"data_offsets":[{offset},{end}]}}')
        offset = end
    return 8 + math.ceil(length / 8) * 8
