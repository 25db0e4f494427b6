"""Architectures that the package ships as tables, so that a plan needs neither torch nor a network."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from qlora_exp.architecture.pruned import pruned
from qlora_exp.architecture.shapes import Architecture, Experts, OtherTensor, WeightShape
from qlora_exp.config.model_choice import listed_checkpoints
from qlora_exp.config.schema import ModelConfig

FOLDER = Path(__file__).resolve().parent / "shipped"
SCALARS = ("model_type", "total_parameters", "output_head", "layers", "hidden_size", "vocabulary_size", "heads")
INDEX = re.compile(r"\.(\d+)\.")

Tensor = TypeVar("Tensor", WeightShape, OtherTensor, Experts)


def known_architecture(model: ModelConfig) -> Architecture | None:
    """Return the shipped architecture of ``model``'s checkpoint; ``None`` if there is none: another checkpoint, a file,
    a revision."""
    checkpoint = model.checkpoint or ""
    family = model.family
    if family == "hub":  # an id that conf/model/ lists
        family, _ = listed_checkpoints().get(checkpoint.lower(), ("", ""))
    if model.path or model.revision or not (FOLDER / f"{family}.json").is_file():
        return None
    if checkpoint not in _read(family)["positions"]:
        return None
    return pruned(_architecture(family, checkpoint), model)


def known_families() -> list[str]:
    """Return the families of conf/model that have a table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def to_table(architecture: Architecture, positions: Mapping[str, int | None]) -> dict[str, Any]:
    """Return ``architecture`` as JSON types, with repeated layers written once.

    ``positions``: checkpoint → its longest sequence in tokens.
    """
    return {
        "positions": dict(positions),
        **{
            key: getattr(architecture, key)
            for key in (*SCALARS, "eager_alone", "window")
            if key in SCALARS or getattr(architecture, key)
        },
        "weights": list(_fold_layers(architecture.weights)),
        "others": list(_fold_layers(architecture.others)),
        **({"experts": list(_fold_layers(architecture.experts))} if architecture.experts else {}),
    }


def from_table(table: Mapping[str, Any], checkpoint: str) -> Architecture:
    """Return the architecture that :func:`to_table` wrote, for one checkpoint."""
    return Architecture(
        **{key: table[key] for key in SCALARS},
        eager_alone=table.get("eager_alone", False),
        window=table.get("window"),
        positions=table["positions"][checkpoint],
        weights=tuple(_unfold_layers(table["weights"], WeightShape)),
        others=tuple(_unfold_layers(table["others"], OtherTensor)),
        experts=tuple(_unfold_layers(table.get("experts", ()), Experts)),
    )


@cache
def _architecture(family: str, checkpoint: str) -> Architecture:
    return from_table(_read(family), checkpoint)


@cache
def _read(family: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))
    return table


def _fold_layers(tensors: Iterable[WeightShape | OtherTensor | Experts]) -> Iterator[dict[str, Any]]:
    """Yield runs of equal layers as {"times": n, "first": number of the first, "tensors": […]}.

    In the tensors' names, ``*`` stands for the layer's number: ``model.layers.*.mlp.up_proj``.
    """
    layers: list[tuple[int, list[dict[str, Any]]]] = []
    for index, group in itertools.groupby(tensors, key=_layer_index):
        layers.append((index, [_non_default_fields(tensor) for tensor in group]))
    run: dict[str, Any] | None = None
    for index, entries in layers:
        if run is not None and run["tensors"] == entries and index == run["first"] + run["times"] and index > 0:
            run["times"] += 1
            continue
        if run is not None:
            yield run
        run = {"times": 1, "first": index, "tensors": entries}
    if run is not None:
        yield run


def _unfold_layers(runs: Iterable[Mapping[str, Any]], kind: type[Tensor]) -> Iterator[Tensor]:
    for run in runs:
        for index in range(run["first"], run["first"] + run["times"]):
            for entry in run["tensors"]:
                values = {key: tuple(value) if key == "element_bytes" else value for key, value in entry.items()}
                yield kind(**{**values, "name": entry["name"].replace(".*.", f".{index}.", 1)})


def _layer_index(tensor: WeightShape | OtherTensor | Experts) -> int:
    """Return the number of the tensor's layer; -1 outside all layers."""
    match = INDEX.search(tensor.name)
    return int(match[1]) if match else -1


def _non_default_fields(tensor: WeightShape | OtherTensor | Experts) -> dict[str, Any]:
    """Return the tensor's fields, without those that equal their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(tensor)}
    fields = {key: value for key, value in dataclasses.asdict(tensor).items() if value != defaults[key]}
    return {**fields, "name": INDEX.sub(".*.", tensor.name, count=1)}
