"""What a configuration's rarer settings say in a word: how its model ships, and from whom it learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_exp.records.method_name import is_lora

SHIPS, QAT, TEACHER = "ships", "qat", "teacher"
"""Keys of :func:`said_in_a_word`."""
USUAL_TOP_K = 64
"""The teacher's kept probabilities that a label doesn't name."""


def unread_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the beginnings of dotted keys that a comparison of runs leaves out: those of :func:`said_in_a_word` and of
    the method, and LoRA's for another method. Earlier records lack the newer ones, and equal new ones with their
    defaults."""
    newer = ("method.", "ship.", "training.qat.", "distillation.", "model.layers")
    return newer if is_lora(config) else (*newer, "lora.", "targets.")


def said_in_a_word(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of shipping, QAT, distillation and pruning that the run reads, each in a word; nothing for
    what is off.

    Example: ``{"ships": "ships merged int4 g64", "teacher": "taught by 3f2a gold 0.5", "kept": "layers 0+3"}``.
    """
    said: dict[str, str] = {}
    ship, training = config.get("ship") or {}, config.get("training") or {}
    qat, distillation = training.get("qat") or {}, config.get("distillation") or {}
    if ship.get("model") is not None:
        rounded = ship.get("format") if ship["model"] != "trained" else None
        words = {"trained": "as trained", "merged_into_dequantized": "remerged"}.get(ship["model"], ship["model"])
        said[SHIPS] = f"ships {words} {_format(ship)}" if rounded is not None else f"ships {words}"
    if qat.get("format") is not None:
        warm = f" from step {qat['start_step']}" if qat.get("start_step") else ""
        warm += f" warm-up {qat['warmup_ratio']:g}" if qat.get("warmup_ratio") else ""
        said[QAT] = f"QAT {_format(qat)}{warm}"
    if distillation.get("teacher") is not None:
        kind = "" if distillation.get("divergence") == "forward" else f" {distillation.get('divergence')}"
        soft = "" if distillation.get("temperature") == 1.0 else f" T={distillation.get('temperature'):g}"
        name = str(distillation["teacher"])
        name = name.rpartition("/")[2].rpartition(":")[2] if name.startswith("model:") else name[-4:]
        mode = distillation.get("teacher_quantization")
        name += f" in {mode}" if mode is not None else ""
        top = distillation.get("top_k") or USUAL_TOP_K
        few = "" if top == USUAL_TOP_K or distillation.get("gold_weight") == 1.0 else f" top {top}"
        learned = f"gold {distillation.get('gold_weight'):g}{kind}{soft}{few}"
        said[TEACHER] = f"taught by {name} {'answers' if distillation.get('mode') == 'answers' else learned}"
    layers = (config.get("model") or {}).get("layers")
    if layers is not None:
        said["kept"] = layers if isinstance(layers, str) else "layers " + "+".join(map(str, layers))
    return said


def _format(settings: Mapping[str, Any]) -> str:
    name = str(settings["format"])
    if not name.startswith("int"):
        return name
    return f"{name}{' symmetric' if settings.get('symmetric') else ''} g{settings.get('group')}"
