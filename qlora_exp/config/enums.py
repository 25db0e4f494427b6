"""The settings that are a choice of names: what each allows, with the names of the command line."""

from __future__ import annotations

import enum


class Enum(enum.Enum):
    """A setting's choices. As text they are their names: ``name='${quantization.mode}-r${lora.r}'``."""

    def __str__(self) -> str:
        return str(self.name)


class Variant(Enum):
    base = "base"
    instruct = "instruct"
    auto = "auto"
    """By the model's name. A composed configuration has one of the other two."""


class Quantization(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"
    int8_sym = "int8_sym"
    int8_asym = "int8_asym"
    int4_sym = "int4_sym"
    int4_asym = "int4_asym"
    int3_asym = "int3_asym"
    int2_asym = "int2_asym"


class ComputeDtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Method(Enum):
    """What is trained of the base."""

    lora = "lora"
    full = "full"
    layerwise = "layerwise"
    selective = "selective"
    bottleneck = "bottleneck"
    peft = "peft"


class ShippedModel(Enum):
    """Which model ships after training."""

    trained = "trained"
    merged = "merged"
    """Into the unquantized base."""
    merged_into_dequantized = "merged_into_dequantized"
    """Into what the quantized base's weights stand for."""


class RangeChoice(Enum):
    """How the range of a group of integers is chosen."""

    minmax = "minmax"
    mse = "mse"


class DistillationMode(Enum):
    """What a student learns from its teacher."""

    offline = "offline"
    """The teacher's probabilities of each learned token of the rows."""
    answers = "answers"
    """The texts that the teacher writes in place of the rows' answers (sequence-level distillation)."""


class Divergence(Enum):
    """How far the student's distribution is from the teacher's."""

    forward = "forward"
    """KL(teacher || student): the student covers all that the teacher finds likely."""
    reverse = "reverse"
    """KL(student || teacher): the student keeps to what the teacher finds most likely."""
    jsd = "jsd"
    """The mean of both against their mixture."""


class AdapterInit(Enum):
    kaiming = "kaiming"
    gaussian = "gaussian"
    pissa = "pissa"
    olora = "olora"
    eva = "eva"
    """A starts as the principal directions of the layer's inputs, on training rows."""


class TaskSource(Enum):
    embedded = "embedded"
    local = "local"
    hub = "hub"


class TaskKind(Enum):
    classification = "classification"
    generation = "generation"


class Format(Enum):
    auto = "auto"
    chat = "chat"
    plain = "plain"


class Learn(Enum):
    """Which answers of a conversation the model learns."""

    last = "last"
    all = "all"


class InvalidRows(Enum):
    error = "error"
    drop = "drop"


class SpecialTokens(Enum):
    """What the plain format does with a special token that is written out in a row."""

    refuse = "refuse"
    text = "text"
    """Read it as ordinary text."""
    token = "token"
    """In a prompt, read it as the token itself."""


class Checkpointing(Enum):
    auto = "auto"
    on = "on"
    selective = "selective"
    off = "off"


class PaddingFree(Enum):
    auto = "auto"
    """Where the architecture allows it."""
    on = "on"
    off = "off"


class Kernels(Enum):
    auto = "auto"
    none = "none"
    liger = "liger"


class EvaluationSplit(Enum):
    validation = "validation"
    test = "test"


class Engine(Enum):
    sft = "sft"
    """TRL's SFTTrainer."""
    sleep = "sleep"
    """Sleeps instead of training, and scores by a formula; marked SYNTHETIC, to try out orchestration."""


class SleepFault(Enum):
    none = "none"
    out_of_memory = "out_of_memory"
    diverge = "diverge"
    hang = "hang"
    crash = "crash"
    fail = "fail"


class Sampler(Enum):
    auto = "auto"
    grid = "grid"
    random = "random"
    tpe = "tpe"
    gp = "gp"
    nsga2 = "nsga2"
    qmc = "qmc"
    cmaes = "cmaes"
    ladder = "ladder"
    """Rank doubling, configured by sweep.ladder."""


class LrPolicy(Enum):
    carry = "carry"
    """Pilot runs at r_start only; other ranks use the chosen rate, scaled by one law."""
    search = "search"
    """As carry, and a rank leaves the law where pilot runs at every rank show a better rate beyond their noise."""
    fixed = "fixed"
    """training.learning_rate at every rank."""


class Pruner(Enum):
    none = "none"
    median = "median"
    asha = "asha"
    hyperband = "hyperband"
    wilcoxon = "wilcoxon"


class Isolation(Enum):
    warm = "warm"
    """Trials of one host share a loaded base."""
    fresh = "fresh"
    """Each trial has its own process."""


class DeviceChoice(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
