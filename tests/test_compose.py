"""What a warm host composes equals what Hydra composes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from qlora_exp.config import compose as compose_module
from qlora_exp.config.compose import Composer, as_checked_config, compose, compose_raw
from qlora_exp.config.schema import Config, register
from qlora_exp.errors import QloraExpError
from qlora_exp.paths import CONF, SWEEPS

COMPOSED = [
    ["lora.r=4", "training.learning_rate=1e-3"],
    ["lora.r=8", "training.learning_rate=1e-3"],
    ["sweeps=demo", "lora.r=16", "sweep.n_trials=2"],
    ["sweeps=demo", "quantization=int8", "lora.dropout=0.1"],
    ["lora.alpha_policy=fixed", "lora.alpha=8"],
    ["lora.alpha_policy=fixed", "lora.alpha=16", "targets.modules=[q_proj,v_proj]", "quantization.compute_dtype=auto"],
    ["name='a ${seed} b'", "seed=7", "task.prompt='x, {y} \\'z\\''"],
    ["model.checkpoints.base=a/b", "+sweep.params={lora.r: '1,2'}", "tracking=off", "training.threads=null"],
    ["model=qwen3_0_6b", "training.max_steps=5"],
    ["model=embedded", "training.max_steps=5"],
    ["lora.r=2", "++lora.r=4", "lora.dropout=0.1"],
]


def by_hydra(overrides: list[str]) -> Config:
    """Every override applied by Hydra, and nothing kept."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return as_checked_config(hydra_compose("config", [f"hydra.searchpath=[file://{SWEEPS.parent}]", *overrides]))


def test_what_is_kept_between_compositions_gives_what_hydra_gives_one_by_one() -> None:
    composer = Composer()
    expected = {tuple(overrides): by_hydra(overrides) for overrides in COMPOSED}
    for overrides in [*COMPOSED, *reversed(COMPOSED)]:
        assert composer.compose(overrides) == compose(overrides) == expected[tuple(overrides)]


def test_a_changed_file_is_composed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(compose_module, "CONF", conf)
    before = compose(["lora.dropout=0.1"])
    file = conf / "lora" / "default.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace(f"r: {before.lora.r}", "r: 32"), encoding="utf-8")
    after = compose(["lora.dropout=0.1"])
    assert (before.lora.r, after.lora.r, after.lora.dropout) == (before.lora.r, 32, 0.1)
    assert before.lora.r != 32


def test_a_composition_does_not_see_what_was_changed_in_an_earlier_one() -> None:
    first = compose_raw(["lora.r=4"])
    first.lora.r, first.training.max_steps = 64, 1
    assert compose_raw(["lora.r=4"]).lora.r == 4
    assert compose_raw([]) == compose_raw([])
    assert compose_raw([]).training.max_steps != 1


@pytest.mark.parametrize(
    "wrong", ["lora.r=x", "lora.rank=4", "lora.alpha_policy=fixed", "quantization=nf5", "sweep.params={a: b}"]
)
def test_it_tells_what_is_wrong_in_the_same_words(wrong: str) -> None:
    composer = Composer()
    composer.compose(["lora.r=4"])
    with pytest.raises(QloraExpError) as one:
        composer.compose(["lora.r=4", wrong])
    with pytest.raises(QloraExpError) as other:
        compose(["lora.r=4", wrong])
    assert str(one.value) == str(other.value)
    assert composer.compose(["lora.r=4"]) == compose(["lora.r=4"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("sqlite:///runs.db", "sqlite:///{here}/runs.db"),
        ("sqlite:///../runs.db", "sqlite:///{above}/runs.db"),
        ("sqlite:////data/runs.db", "sqlite:////data/runs.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("null", None),
    ],
)
def test_a_store_is_the_same_file_whichever_folder_is_the_current_one_later(
    given: str, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = compose([f"tracking.uri={given}"]).tracking.uri
    assert uri == (named and named.format(here=tmp_path, above=tmp_path.parent))
