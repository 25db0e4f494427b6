"""What forward keeps for backward, counted from shapes, against what autograd saves."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from qlora_exp.architecture.families import known_architecture
from qlora_exp.estimate.activations import TrainingPass, is_eager, saved_bytes_per_token
from qlora_exp.estimate.candidates import search_space
from qlora_exp.estimate.selective_checkpointing import kept_attention_bytes

HIDDEN, ROWS, LENGTH = 256, 2, 24
LONG = 128
"""For attention that is written out: its scores must weigh more than the tolerance."""
FLOAT32 = TrainingPass(r=8, compute_bytes=4, adapter_bytes=4, int8=False, length=LENGTH, padded=False)
MODERN = {
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
PLAIN = {"hidden_size": HIDDEN, "num_attention_heads": 8, "max_position_embeddings": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": MODERN,
    "qwen3": MODERN | {"head_dim": 64},
    "gemma3_text": MODERN | {"head_dim": 64},
    "phi3": MODERN | {"original_max_position_embeddings": 256},
    "gpt2": {"n_embd": HIDDEN, "n_head": 8, "n_positions": 256},
    "gpt_neox": PLAIN | {"intermediate_size": 4 * HIDDEN},
    "opt": PLAIN | {"ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN},
    "falcon": PLAIN,
    "falcon, few heads": PLAIN | {"num_attention_heads": 4},
}
EAGER: dict[str, dict[str, Any]] = {
    "gemma2": MODERN | {"head_dim": 64},
    "gemma2, wide heads": MODERN | {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama": MODERN,
    "qwen3": MODERN | {"head_dim": 64},
    "gpt2": SHAPES["gpt2"],
}
PLAIN_GPT = {"n_embd": HIDDEN, "n_head": 8, "n_positions": 256}
ROUTED = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": MODERN,
    "arcee": MODERN,
    "biogpt": PLAIN,
    "bloom": {"hidden_size": HIDDEN, "n_head": 8},
    "codegen": PLAIN_GPT | {"rotary_dim": 32},
    "cohere": MODERN,
    "glm4": MODERN | {"head_dim": 64},
    "glm4_moe": MODERN | ROUTED | {"head_dim": 64, "n_routed_experts": 4},
    "gpt_bigcode": PLAIN_GPT,
    "gpt_neo": {"hidden_size": HIDDEN, "num_heads": 8, "max_position_embeddings": 256},
    "gpt_oss": MODERN | ROUTED | {"head_dim": 64, "num_local_experts": 4},
    "gptj": PLAIN_GPT | {"rotary_dim": 32},
    "granitemoe": MODERN | ROUTED | {"num_local_experts": 4},
    "mixtral": MODERN | ROUTED | {"num_local_experts": 4},
    "nemotron": MODERN,
    "olmo": MODERN,
    "olmo2": MODERN,
    "olmoe": MODERN | ROUTED | {"num_experts": 4},
    "persimmon": PLAIN | {"intermediate_size": 3 * HIDDEN},
    "phi": MODERN,
    "qwen2_moe": MODERN | ROUTED | {"num_experts": 4, "shared_expert_intermediate_size": 256},
    "qwen3_moe": MODERN | ROUTED | {"num_experts": 4, "head_dim": 64},
    "seed_oss": MODERN | {"head_dim": 64},
    "smollm3": MODERN,
    "stablelm": MODERN,
    "starcoder2": MODERN,
}
IN_FLOAT32 = {
    *("__pow__", "cumsum", "exp", "expm1", "group_norm", "layer_norm", "log", "log_softmax", "logsumexp", "norm"),
    *("normalize", "pow", "prod", "reciprocal", "rms_norm", "rsqrt", "softmax", "softplus", "square", "sum"),
}
"""Operations that CUDA's autocast computes in float32 (torch's ``AutocastTestLists``), as far as these models call
them. ``square`` calls ``pow``."""
LAYERS = {
    **dict.fromkeys(("bloom", "codegen", "gpt2", "gpt_bigcode", "gptj"), "n_layer"),
    "gpt_neo": "num_layers",
}


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast to bfloat16 as CUDA does it, on a CPU.

    A CPU's autocast also multiplies in bfloat16, but leaves the operations of :data:`IN_FLOAT32` in the dtype of their
    input. PEFT asks whether CUDA's autocast is on. CUDA's dropout saves a mask of one byte.
    """
    import torch

    def float32(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
        return value.float() if narrow and torch.is_autocast_cpu_enabled() else value

    class Cuda(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.nn.functional.dropout:
                values = inspect.signature(func).bind(*args, **kwargs)
                values.apply_defaults()
                tensor, p, training, _ = values.args
                return torch.native_dropout(tensor, p, True)[0] if training and p > 0 else tensor
            if getattr(func, "__name__", "") in IN_FLOAT32 and kwargs.get("dtype") is None:
                args = tuple(float32(value) for value in args)
                kwargs = {name: float32(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autocast("cpu", dtype=torch.bfloat16),
        Cuda(),
    ):
        patch.setattr(torch, "is_autocast_enabled", lambda *device_type: True)
        yield


def LivingTensors() -> Any:
    """A mode that notes each tensor that is made, without keeping it: checkpointing hides what it keeps from autograd's
    hooks."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Living(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: dict[int, tuple[Any, int, int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), storage.data_ptr()
            return output

        def living_bytes(self, weights: set[int]) -> int:
            """Return the bytes of all that still exists, without views of ``weights`` (addresses)."""
            noted = self.made.values()
            return sum(size for storage, size, data in noted if not storage.expired() and data not in weights)

    return Living()


def in_4_bit(layer: Any) -> Any:
    """The same layer, quantized as transformers does it for ``load_in_4bit``."""
    import bitsandbytes
    import torch

    weight = layer.weight.data.t().contiguous() if type(layer).__name__ == "Conv1D" else layer.weight.data
    made = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    if layer.bias is not None:
        made.bias = torch.nn.Parameter(layer.bias.data, requires_grad=False)
    return made.to("cpu").requires_grad_(False)


def saved_bytes(
    architecture: str,
    layers: int,
    dtype: str,
    padded: bool,
    adapted: bool,
    eager: bool = False,
    length: int = LENGTH,
    autocast: bool = False,
    quantized: bool = False,
    dropout: float = 0.0,
    padding_free: bool = False,
    checkpointing: str = "off",
) -> tuple[int, Any]:
    """Bytes of distinct tensors, other than weights, that a forward pass in training mode saves.

    ``autocast``: as CUDA's does it, see :func:`cuda_autocast`. ``quantized``: with bitsandbytes' 4-bit layers.
    ``checkpointing``: with ``on`` or ``selective``, of all tensors that exist after the pass, its output included.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.models import enable_selective_activation_checkpointing

    from qlora_exp.models.adapters import autocast_casts_inputs
    from qlora_exp.models.attention import attention_by_rows
    from qlora_exp.models.inspect import architecture_of

    count: dict[str, Any] = {LAYERS.get(architecture, "num_hidden_layers"): layers}
    if architecture == "gpt_neo":
        count["attention_types"] = [[["global"], layers]]
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    shape = (SHAPES | EAGER | OTHERS)[architecture]
    config = AutoConfig.for_model(architecture.partition(",")[0], vocab_size=128, **shape, **count, **tokens)
    attention = {"attn_implementation": "eager"} if eager else {}
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **attention)
    model.requires_grad_(False)
    described = architecture_of(model)
    names = [shape.name for shape in described.weights if shape.kind != "other"]
    if quantized:
        for shape in described.weights:
            if shape.quantizable:
                model.set_submodule(shape.name, in_4_bit(model.get_submodule(shape.name)))
        model.is_loaded_in_4bit = True
    if adapted:
        transposed = architecture == "gpt2" and not quantized
        settings = LoraConfig(r=4, target_modules=names, fan_in_fan_out=transposed, lora_dropout=dropout)
        get_peft_model(model, settings, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.train()
    if checkpointing == "selective":
        enable_selective_activation_checkpointing(model)
    if checkpointing != "off":
        model.activation_checkpointing_enable()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> None:
        """No backward pass needs the tensor; a graph that held its own output would never be freed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    mask = torch.ones(ROWS, length, dtype=torch.long)
    mask[0, length // 2 :] = 0 if padded else 1
    ids = torch.arange(ROWS * length).reshape(ROWS, length) % 128
    context = cuda_autocast() if autocast else contextlib.nullcontext()
    inputs = {"input_ids": ids, "attention_mask": mask}
    attention_of_rows = contextlib.nullcontext()
    if padding_free:
        rows = [torch.arange(length // 2), torch.arange(length)]
        bounds = torch.tensor([0, length // 2, length // 2 + length], dtype=torch.int32)
        inputs = {"input_ids": torch.cat(rows)[None] % 128, "position_ids": torch.cat(rows)[None]}
        inputs |= {"cu_seq_lens_q": bounds, "max_length_q": length}
        attention_of_rows = attention_by_rows(model)
    casts = autocast_casts_inputs(model, active=autocast)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    watch = LivingTensors() if checkpointing != "off" else None
    with watch or saved, context, casts, attention_of_rows:
        output = model.base_model(**inputs, use_cache=False)
    total = watch.living_bytes(own) if watch else sum(storage.nbytes() for storage in kept.values())
    del output
    return total, (described, names if adapted else [])


def check_a_layer(
    architecture: str,
    dtype: str,
    padded: bool,
    adapted: bool,
    eager: bool = False,
    length: int = LENGTH,
    autocast: bool = False,
    quantized: bool = False,
    dropout: float = 0.0,
    padding_free: bool = False,
) -> None:
    """What a third layer adds to two. Small vectors (norms' deviations, a number a head) are left out of the count."""
    saved, counted = [], []
    tokens = length // 2 + length if padding_free else ROWS * length
    for layers in (2, 3):
        total, (described, names) = saved_bytes(
            architecture, layers, dtype, padded, adapted, eager, length, autocast, quantized, dropout, padding_free
        )
        setting = TrainingPass(
            r=4,
            compute_bytes=4 if dtype == "float32" else 2,
            adapter_bytes=4,
            int8=False,
            length=length,
            padded=padded,
            eager=eager or is_eager("auto", described),
            lora_dropout=dropout > 0,
            autocast=autocast,
            quantized=quantized,
            laid_out=ROWS * length / tokens if padding_free else None,
        )
        kept = saved_bytes_per_token(described, names, setting)
        saved.append(total)
        adapters = sum(
            4 * (shape.in_features + shape.out_features) for shape in described.weights if shape.name in names
        )
        counted.append(kept.layers * tokens + (2 * adapters if autocast else 0))
    assert counted[1] - counted[0] == pytest.approx(saved[1] - saved[0], rel=0.03)


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "padded", "adapted"),
    [("float32", False, True), ("bfloat16", True, True), ("float32", True, False)],
)
def test_kept_bytes_of_a_layer_are_what_autograd_saves(
    architecture: str, dtype: str, padded: bool, adapted: bool
) -> None:
    check_a_layer(architecture, dtype, padded, adapted)


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize(("dtype", "padded"), [("float32", False), ("bfloat16", True)])
def test_kept_bytes_of_a_layer_of_other_architectures(architecture: str, dtype: str, padded: bool) -> None:
    check_a_layer(architecture, dtype, padded, adapted=True, length=LONG)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "phi3", "opt", "mixtral", "cohere", "phi"])
@pytest.mark.parametrize(("dtype", "quantized"), [("float32", False), ("bfloat16", True)])
def test_kept_bytes_of_a_layer_without_padding(architecture: str, dtype: str, quantized: bool) -> None:
    autocast = dtype == "bfloat16"
    check_a_layer(architecture, dtype, False, True, False, LONG, autocast, quantized, padding_free=True)


@pytest.mark.parametrize("architecture", EAGER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [True, False])
def test_attention_that_is_written_out_keeps_its_scores(architecture: str, dtype: str, adapted: bool) -> None:
    check_a_layer(architecture, dtype, True, adapted, eager=True, length=LONG)


@pytest.mark.parametrize("architecture", [*SHAPES, *OTHERS])
@pytest.mark.parametrize("quantized", [False, True])
def test_kept_bytes_under_cudas_autocast(architecture: str, quantized: bool) -> None:
    check_a_layer(architecture, "bfloat16", quantized, True, length=LONG, autocast=True, quantized=quantized)


@pytest.mark.parametrize("architecture", EAGER)
def test_kept_scores_under_cudas_autocast(architecture: str) -> None:
    check_a_layer(architecture, "bfloat16", True, True, eager=True, length=LONG, autocast=True, quantized=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("quantized", [False, True])
def test_kept_inputs_of_adapters_with_dropout_under_cudas_autocast(architecture: str, quantized: bool) -> None:
    check_a_layer(architecture, "bfloat16", False, True, length=LONG, autocast=True, quantized=quantized, dropout=0.1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt_neox", "opt", "phi"])
@pytest.mark.parametrize(
    ("quantized", "padding_free"), [(False, False), (True, True)], ids=["float32, padded", "nf4 under autocast"]
)
@pytest.mark.parametrize("checkpointing", ["on", "selective"])
def test_kept_bytes_of_a_layer_with_checkpointing(
    architecture: str, quantized: bool, padding_free: bool, checkpointing: str
) -> None:
    """A layer keeps its input, and with selective checkpointing what attention returns."""
    saved, counted = [], []
    tokens = LONG // 2 + LONG if padding_free else ROWS * LONG
    dtype = "bfloat16" if quantized else "float32"
    for layers in (2, 3):
        total, (described, names) = saved_bytes(
            *(architecture, layers, dtype, not padding_free, True, False, LONG, quantized, quantized, 0.0),
            *(padding_free, checkpointing),
        )
        setting = replace(
            FLOAT32,
            compute_bytes=2 if quantized else 4,
            length=LONG,
            padded=not padding_free,
            autocast=quantized,
            quantized=quantized,
            laid_out=ROWS * LONG / tokens if padding_free else None,
        )
        kept = saved_bytes_per_token(described, names, setting).inputs
        kept += kept_attention_bytes(described, setting) if checkpointing == "selective" else 0
        saved.append(total)
        counted.append(kept * tokens)
    assert counted[1] - counted[0] == pytest.approx(saved[1] - saved[0], rel=0.03)


def test_a_llama_layer_in_numbers() -> None:
    """fp32, no adapters: two norms' inputs, q and output, k and v, three of the intermediate width, a sum a head."""
    _, (described, _) = saved_bytes("llama", 1, "float32", False, False)
    kept = saved_bytes_per_token(described, [], FLOAT32)
    elements = 2 * HIDDEN + 2 * HIDDEN + 2 * HIDDEN // 2 + 3 * 3 * HIDDEN + 8
    # the first layer's first norm keeps nothing, nor does its attention: its input needs no gradient
    assert kept.layers == 4 * (elements - HIDDEN - (2 * HIDDEN + 2 * HIDDEN // 2 + 8))
    assert kept.inputs == 4 * HIDDEN


@pytest.mark.parametrize("mode", ["int8", "fp32"])
def test_what_int8_holds_outlives_checkpointing(mode: str) -> None:
    import bitsandbytes
    import torch
    from torch.utils.checkpoint import checkpoint

    linear = torch.nn.Linear(16, 16)
    if mode == "int8":
        linear = bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False).to("cpu")
    linear.requires_grad_(False)
    inner: list[weakref.ref[Any]] = []

    def layer(x: Any) -> Any:
        doubled = x * 2
        inner.append(weakref.ref(doubled))
        return linear(doubled)

    output = checkpoint(layer, torch.randn(4, 16, requires_grad=True), use_reentrant=False)
    assert (inner[0]() is not None) == (mode == "int8")
    del output
    _, (described, _) = saved_bytes("llama", 2, "float32", False, False)
    kept = saved_bytes_per_token(described, [], replace(FLOAT32, int8=mode == "int8"))
    held = 2 * HIDDEN + HIDDEN + 3 * HIDDEN  # what q, k, v read, what o reads, what gate and up read, what down reads
    assert kept.inputs == 2 * 4 * (HIDDEN + (held if mode == "int8" else 0))


def test_counting_loads_no_torch() -> None:
    modules = "qlora_exp.estimate.peak, qlora_exp.estimate.throughput, qlora_exp.system.cards"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_adapters_keep_in_single_layers_adds_up() -> None:
    [point] = search_space(["model=smollm2_135m"]).points
    assert point.config is not None
    architecture = known_architecture(point.config.model)
    assert architecture is not None
    names = [shape.name for shape in architecture.weights if shape.name.endswith("q_proj")]

    def kept(adapted: list[str]) -> float:
        return saved_bytes_per_token(architecture, adapted, FLOAT32).layers

    single = [kept([name]) - kept([]) for name in names]
    assert kept(names) - kept([]) == pytest.approx(sum(single))
    assert single[0] > single[1] == single[-1] > 0  # the first layer's attention is kept for its adapter alone


@pytest.mark.parametrize(
    ("checkpointing", "after_forward", "after_each_layer"), [(False, 3, [2, 1, 0]), (True, 0, [0, 0, 0])]
)
def test_autocasts_copies_of_weights_outlive_forward_without_checkpointing(
    checkpointing: bool, after_forward: int, after_each_layer: list[int]
) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint

    weights = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    copies: list[weakref.ref[Any]] = []
    seen: list[int] = []

    def alive() -> int:
        return sum(copy() is not None for copy in copies)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].shape == (16, 16) and made.dtype is torch.bfloat16:
                copies.append(weakref.ref(made))
            return made

    with Watch():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
            for weight in weights:
                linear = torch.nn.functional.linear
                hidden = (
                    checkpoint(linear, hidden, weight, use_reentrant=False) if checkpointing else linear(hidden, weight)
                )
            assert alive() == 3
        assert alive() == after_forward
        for weight in weights:
            weight.register_hook(lambda gradient: seen.append(alive()))
        hidden.sum().backward()
    assert seen == after_each_layer
