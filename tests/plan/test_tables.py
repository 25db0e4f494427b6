"""The shipped tables say what a described configuration says, and the plan of a known family needs no torch."""

from __future__ import annotations

import json

import pytest

from qlora_exp.architecture.families import FOLDER, from_table, known_architecture, known_families, to_table
from qlora_exp.architecture.shipped.build import CONFIGS, architecture_table
from qlora_exp.config.choices import choices
from qlora_exp.config.compose import compose
from qlora_exp.models.inspect import describe


@pytest.mark.parametrize("family", CONFIGS)
def test_a_table_is_the_description_of_the_published_sizes(family: str) -> None:
    """described() holds the published number of parameters, too."""
    built = architecture_table(family)
    table = json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))
    base = next(iter(table["positions"]))
    assert from_table(table, base) == built
    assert json.loads(json.dumps(to_table(built, table["positions"]))) == table


def test_every_family_of_the_hub_has_a_table_for_all_of_its_checkpoints() -> None:
    families = [choice.name for choice in choices("model") if choice.name not in ("hub", "local")]
    assert known_families() == sorted(families)
    for choice in choices("model"):
        for variant in choice.keys.get("checkpoints") or {}:
            model = compose([f"model={choice.name}", f"model.variant={variant}"]).model
            assert known_architecture(model) is not None


def test_a_table_holds_experts() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.models.inspect import architecture_of

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_local_experts": 4}
    with torch.device("meta"):
        built = architecture_of(AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)))
    table = json.loads(json.dumps(to_table(built, {"someone/base": built.positions})))
    assert [run["times"] for run in table["experts"]] == [3]
    assert from_table(table, "someone/base") == built


@pytest.mark.parametrize("variant", ["base", "instruct"])
def test_the_embedded_models_table_is_its_description(variant: str) -> None:
    model = compose([f"model.variant={variant}"]).model
    assert known_architecture(model) == describe(model)


def test_another_checkpoint_of_a_known_family_has_no_table() -> None:
    other = compose(["model=qwen3_8b", "model.checkpoints.base=someone/else"]).model
    assert known_architecture(other) is None
