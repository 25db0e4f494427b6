"""PEFT's adapters other than LoRA's: for each kind, the bases that it trains right on, its options and its tensors.

A new kind is one row of :data:`PEFT_KINDS`; tests/models/test_peft_kinds.py measures each row with a small model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_exp.config.allowed_values import INTEGER_MODES
from qlora_exp.config.enums import Method, Quantization
from qlora_exp.config.schema import MethodConfig
from qlora_exp.errors import ModelError

MEASURED_WITH = "0.21"
"""The version of PEFT that the rows were measured with."""
BASES = {
    Quantization.fp32: "fp32",
    Quantization.bf16: "16 bit",
    Quantization.fp16: "16 bit",
    Quantization.int8: "int8",
    Quantization.nf4: "4 bit",
    Quantization.fp4: "4 bit",
    **dict.fromkeys(INTEGER_MODES, "4 bit"),  # PEFT sees a linear layer with a packed weight
}
"""The column of the table that a quantization mode has."""
PACKED = "PEFT computes with the packed 4-bit weights as if they were numbers"
SPARSE = re.compile(r"(magnitude|gradient):(\d*\.?\d+(?:[eE]-?\d+)?)")
"""``method.parameters`` that choose single entries of matrices."""

KindOptions = Mapping[str, Any]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class PeftKind:
    """A row of the table.

    Attributes:
        config: the class of its settings in PEFT.
        options: ``method.options`` that it has, with PEFT's defaults.
        refused: by column of :data:`BASES`, why it can't be used.
        shapes: from (in, out, options, "this is an MLP's last layer") to name and shape of each trained tensor.
        fixed: from the (in, out) of all adapted layers and the options to the number of 32-bit values that it keeps
            without training them.
        starts_at_base: before the first step the model is the base.
        transposed: it adapts GPT-2's ``Conv1D``.
        on_norms: it trains the norms, not linear layers.
    """

    config: str
    options: KindOptions
    shapes: Callable[[int, int, KindOptions, bool], Shapes]
    refused: Mapping[str, str] = field(default_factory=dict)
    fixed: Callable[[Sequence[tuple[int, int]], KindOptions], int] = lambda layers, options: 0
    starts_at_base: bool = True
    transposed: bool = False
    on_norms: bool = False

    def settings(self, options: KindOptions) -> dict[str, Any]:
        """Return all options, those that aren't given at their defaults."""
        return {**self.options, **options}


def in_peft_format(method: MethodConfig) -> bool:
    """Return whether the run saves an adapter of PEFT (``RUN/adapter``)."""
    return method.kind is Method.lora or peft_kind_of(method) is not None


def peft_kind_of(method: MethodConfig) -> tuple[PeftKind, dict[str, Any]] | None:
    """Return the row and the options that ``method`` uses; ``None``: it is LoRA, or no adapter of PEFT."""
    if method.kind is Method.peft and method.peft_type in PEFT_KINDS:
        return PEFT_KINDS[method.peft_type], dict(method.options or {})
    chosen = sparse_parameters(method)
    return (PEFT_KINDS["supertuning"], {"sparsity": 1 - chosen[1]}) if chosen is not None else None


def start_warning(method: MethodConfig) -> str | None:
    """Return a warning if training doesn't begin at the base, to which scores are compared."""
    found = peft_kind_of(method)
    if found is None or found[0].starts_at_base:
        return None
    return f"{method.peft_type} doesn't begin at the base: scores before training are those of the base without it"


def sparse_parameters(method: MethodConfig) -> tuple[str, float] | None:
    """Return score and share of ``method.parameters=magnitude:0.01``; ``None``: these are parts of the model."""
    given = [str(part) for part in method.parameters or ()]
    if method.kind is not Method.selective or len(given) != 1 or (match := SPARSE.fullmatch(given[0])) is None:
        return None
    return match[1], float(match[2])


def _ia3(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    return (("ia3_l", (1, inputs) if last else (outputs, 1)),)


def _oft(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    """PEFT takes the nearest block size that divides the inputs."""
    block = options["oft_block_size"]
    if block >= inputs:
        block = inputs
    elif inputs % block:
        lower = next(size for size in range(block, 0, -1) if inputs % size == 0)
        higher = next(size for size in range(block, inputs + 1) if inputs % size == 0)
        block = lower if block - lower <= higher - block else higher
    return (("oft_R.weight", (inputs // block, block * (block - 1) // 2)),)


def _oft_fixed(layers: Sequence[tuple[int, int]], options: KindOptions) -> int:
    """Two positions of 64 bits for each entry of a block's triangle."""
    return sum(4 * _oft(inputs, outputs, options, False)[0][1][1] for inputs, outputs in layers)


def _boft(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    block = options["boft_block_size"]
    _check_divides("boft_block_size", block, inputs)
    return (("boft_R", (1, inputs // block, block, block)), ("boft_s", (outputs, 1)))


def _miss(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    return (("miss_block", (options["r"], outputs)),)


def _shira(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    count = options["r"] * (inputs + outputs)
    if count > inputs * outputs:
        what = f"SHiRA would train {count:,} of a layer's {inputs * outputs:,} weights"
        raise ModelError(what, f"method.options.r = {options['r']}", "a smaller r")
    return (("shira_weight", (count,)),)


def _road(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    _check_divides("group_size", options["group_size"], outputs)
    size = {"road_1": outputs // 2, "road_2": outputs, "road_4": 2 * outputs}.get(options["variant"])
    if size is None:
        where = f"method.options.variant = {options['variant']}"
        raise ModelError("there is no such variant", where, "road_1, road_2 or road_4")
    return (("road_alpha", (size,)), ("road_theta", (size,)))


def _vera(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    return (("vera_lambda_b", (outputs,)), ("vera_lambda_d", (options["r"],)))


def _vera_fixed(layers: Sequence[tuple[int, int]], options: KindOptions) -> int:
    inputs, outputs = max(size for size, _ in layers), max(size for _, size in layers)
    return int(options["r"]) * (inputs + outputs)


def _randlora(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    bases = math.ceil(min(inputs, outputs) / options["r"])
    return (("randlora_gamma", (bases, min(inputs, outputs))), ("randlora_lambda", (options["r"], bases)))


def _randlora_fixed(layers: Sequence[tuple[int, int]], options: KindOptions) -> int:
    small, large = sorted((max(size for size, _ in layers), max(size for _, size in layers)))
    r = int(options["r"])
    return r * small + large * math.ceil(small / r) * r


def _fourierft(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    count = options["n_frequency"]
    if count > inputs * outputs:
        where = f"method.options.n_frequency = {count}"
        raise ModelError(f"a layer has {inputs * outputs:,} frequencies", where, "fewer frequencies")
    return (("fourierft_spectrum", (count,)),)


def _loha(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    r = options["r"]
    pair = (("a", (outputs, r)), ("b", (r, inputs)))
    return tuple((f"hada_w{number}_{part}", shape) for number in (1, 2) for part, shape in pair)


def _lokr(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    r, factor = options["r"], options["decompose_factor"]
    (out_first, out_second), (in_first, in_second) = _factors(outputs, factor), _factors(inputs, factor)
    first: Shapes = (("lokr_w1", (out_first, in_first)),)
    if options["decompose_both"] and r < max(out_first, in_first) / 2:
        first = (("lokr_w1_a", (out_first, r)), ("lokr_w1_b", (r, in_first)))
    if r < max(out_second, in_second) / 2:
        return (*first, ("lokr_w2_a", (out_second, r)), ("lokr_w2_b", (r, in_second)))
    return (*first, ("lokr_w2", (out_second, in_second)))


def _factors(size: int, factor: int) -> tuple[int, int]:
    """Return the two factors of ``size`` that LoKr takes: ``factor``, or the divisor nearest to it or to the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and (d <= limit or d == 1))
    return small, size // small


def _hra(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    if options["r"] % 2:
        what = "HRA with an odd number of reflections doesn't start at the base"
        raise ModelError(what, f"method.options.r = {options['r']}", "an even r")
    return (("hra_u", (inputs, options["r"])),)


def _supertuning(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    count = int(inputs * outputs * (1 - options["sparsity"]))
    if not 0 <= options["sparsity"] < 1:
        raise ModelError(
            "a share lies between 0 and 1", f"method.options.sparsity = {options['sparsity']}", "e.g. 0.99"
        )
    if count < 1:
        what = f"no entry of a layer with {inputs * outputs:,} weights would be trained"
        raise ModelError(what, f"a share of {1 - options['sparsity']:g}", "a larger share")
    return (("supertuning_values", (count,)),)


def _supertuning_fixed(layers: Sequence[tuple[int, int]], options: KindOptions) -> int:
    """A position of 32 bits for each entry."""
    return sum(_supertuning(inputs, outputs, options, False)[0][1][0] for inputs, outputs in layers)


def _norm(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    return (("ln_tuning_layers.weight", (inputs,)),)


def _check_divides(name: str, value: int, size: int) -> None:
    if size % value:
        divisors = [number for number in range(2, 257) if size % number == 0]
        where = f"method.options.{name} = {value}"
        hint = f"one of {', '.join(map(str, divisors[-8:]))}" if divisors else "other targets"
        raise ModelError(f"{value} doesn't divide a layer's {size} features", where, hint)


PROMPT = (
    "virtual tokens shift a row's positions, which training without padding and likelihoods over a shared prompt "
    "don't know"
)


def _nothing(inputs: int, outputs: int, options: KindOptions, last: bool) -> Shapes:
    return ()


def _never(config: str, why: str) -> PeftKind:
    return PeftKind(config, {}, _nothing, dict.fromkeys(set(BASES.values()), why))


PEFT_KINDS: dict[str, PeftKind] = {
    "ia3": PeftKind("IA3Config", {}, _ia3, transposed=True),
    "oft": PeftKind(
        "OFTConfig",
        {
            "oft_block_size": 32,
            "module_dropout": 0.0,
            "coft": False,
            "eps": 6e-5,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        },
        _oft,
        fixed=_oft_fixed,
    ),
    "boft": PeftKind(
        "BOFTConfig",
        {"boft_block_size": 4, "boft_dropout": 0.0},
        _boft,
        fixed=lambda layers, options: sum(inputs * inputs for inputs, _ in layers),
    ),
    "miss": PeftKind("MissConfig", {"r": 64, "miss_dropout": 0.0}, _miss),
    "shira": PeftKind("ShiraConfig", {"r": 32}, _shira),
    "road": PeftKind("RoadConfig", {"variant": "road_1", "group_size": 64}, _road),
    "vera": PeftKind(
        "VeraConfig",
        {"r": 256, "vera_dropout": 0.0, "d_initial": 0.1, "projection_prng_key": 0},
        _vera,
        fixed=_vera_fixed,
        transposed=True,
    ),
    "randlora": PeftKind(
        "RandLoraConfig",
        {"r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "projection_prng_key": 0},
        _randlora,
        fixed=_randlora_fixed,
        transposed=True,
    ),
    "fourierft": PeftKind(
        "FourierFTConfig",
        {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        _fourierft,
        starts_at_base=False,
        transposed=True,
    ),
    "loha": PeftKind(
        "LoHaConfig", {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0}, _loha, {"4 bit": PACKED}
    ),
    "lokr": PeftKind(
        "LoKrConfig",
        {
            "r": 8,
            "alpha": 8,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "decompose_both": False,
            "decompose_factor": -1,
        },
        _lokr,
        {"4 bit": PACKED},
    ),
    "hra": PeftKind(
        "HRAConfig",
        {"r": 8, "apply_GS": False},
        _hra,
        {"4 bit": PACKED, "int8": "PEFT leaves the int8 weights' scales out: the model would be another one"},
    ),
    "supertuning": PeftKind(
        "SupertuningConfig",
        {"sparsity": 0.99, "select_top": True},
        _supertuning,
        {"4 bit": PACKED, "int8": "PEFT multiplies the int8 weights without their scales"},
        fixed=_supertuning_fixed,
    ),
    "ln_tuning": PeftKind("LNTuningConfig", {}, _norm, on_norms=True),
    "adalora": _never("AdaLoraConfig", "AdaLoRA removes ranks while it trains, which needs a trainer that calls it"),
    "prompt": _never("PromptTuningConfig", PROMPT),
    "p_tuning": _never("PromptEncoderConfig", PROMPT),
    "prefix": _never("PrefixTuningConfig", PROMPT),
}
