"""Which model ``model=hub`` and ``model=local`` mean: variant, name, and what to write instead of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Variant
from qlora_exp.config.from_record import recorded_overrides
from qlora_exp.config.overrides import hydra_value
from qlora_exp.config.schema import to_plain
from qlora_exp.estimate.candidates import search_space
from qlora_exp.paths import EMBEDDED, OutputPaths
from qlora_exp.records.find import read_runs
from qlora_exp.records.model_name import model_name, variant_name
from qlora_exp.study.spec import read_spec
from tests.analysis import made_up

SNAPSHOT = "/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("model", "variant", "name", "in_a_run"),
    [
        (["hub", "model.id=Qwen/Qwen2.5-0.5B"], "base", "Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B-base"),
        (["hub", "model.id=a/b-Instruct-v0.3"], "instruct", "a/b-Instruct-v0.3", "b-Instruct-v0.3"),
        (["hub", "model.id=a/b-3-1b-it"], "instruct", "a/b-3-1b-it", "b-3-1b-it-instruct"),
        (["hub", "model.id=a/Chatty-Itself"], "base", "a/Chatty-Itself", "Chatty-Itself-base"),
        (["hub", "model.id=Qwen/Qwen3-8B"], "instruct", "Qwen/Qwen3-8B", "Qwen3-8B-instruct"),  # conf/model/ lists it
        (["hub", "model.id=a/b-it", "model.variant=base"], "base", "a/b-it", "b-it-base"),
        (["hub", "model.id=a/b", "model.instruct_id=a/c-it"], "base", "a/b", "b-base"),
        (["hub", "model.id=a/b", "model.instruct_id=a/c", "model.variant=instruct"], "instruct", "a/c", "c-instruct"),
        (["hub", "model.id=gpt2"], "base", "gpt2", "gpt2-base"),
        (["local", "model.path=/m/SmolLM2-135M-Instruct.Q4_1.gguf"], "instruct", *["SmolLM2-135M-Instruct.Q4_1"] * 2),
        (["local", "model.path=/m/big-00002-of-00003.gguf"], "base", "big", "big-base"),
        (["local", f"model.path={SNAPSHOT}"], "base", "Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B-base"),
        (
            ["local", "model.path=/m/b", "model.instruct_path=/m/c", "model.variant=instruct"],
            "instruct",
            "c",
            "c-instruct",
        ),
        (["smollm2_135m", "model.variant=auto"], "base", "smollm2_135m", "smollm2_135m-base"),
    ],
)
def test_a_model_has_the_variant_and_the_name_that_it_is_known_by(
    model: list[str], variant: str, name: str, in_a_run: str
) -> None:
    config = compose([f"model={model[0]}", *model[1:]])
    plain = to_plain(config)["model"]
    assert config.model.variant is Variant[variant]
    assert (model_name(plain), variant_name(plain)) == (name, in_a_run)
    record = made_up.run(r=8, seed=1, accuracy=0.5).replace(config=to_plain(config))
    assert to_plain(compose(recorded_overrides(record))) == record.config


@pytest.mark.parametrize(
    ("overrides", "says", "do"),
    [
        (["model=Qwen/Qwen2.5-0.5B"], "has no choice", "model=hub model.id=Qwen/Qwen2.5-0.5B"),
        (["model=https://huggingface.co/a/b/tree/main"], "has no choice", "model=hub model.id=a/b"),
        (["model=Qwen/Qwen3-8B"], "has no choice", "model=qwen3_8b model.variant=instruct"),
        (["model=smollm2_135"], "has no choice", "did you mean smollm2_135m or"),
        (["model.path=Qwen/Qwen2.5-0.5B"], "only for model=local", "model=hub model.id=Qwen/Qwen2.5-0.5B"),
        (["model=local", "model.path=a/b"], "no such directory", "model=hub model.id=a/b"),
        (["model.id=a/b"], "only for model=hub", "model=hub model.id=a/b"),
        (["model=hub"], "needs an id", "model.id=OWNER/NAME"),
        (["model=hub", "model.id=''"], "needs an id", "model.id=OWNER/NAME"),
        (["model=local", "model.path=''"], "needs a path", "model.path=DIRECTORY_OR_FILE.gguf"),
        (["model=hub", "model.id=https://hf.co/a/b"], "no address", "model.id=a/b"),
        (["model=hub", "model.id=.."], "a directory", "model=local model.path=.."),
        (["model=hub", "model.id='a b'"], "no Hub id", "model.id=OWNER/NAME"),
        (["model.adapter=someone/lora"], "no adapter someone/lora", "hf download someone/lora --local-dir DIR"),
        (["model.adapter=last"], "no runs yet", "a directory of PEFT"),
        (["model.adapter=folder"], "no adapter: adapter_config.json is missing", "model.adapter=folder/checkpoint-8"),
    ],
)
def test_a_wrong_model_is_answered_with_the_right_words(
    overrides: list[str],
    says: str,
    do: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "folder" / "checkpoint-8"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    assert main(["validate", *overrides]) == 2
    message = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    [what, _, hint] = message.splitlines()
    assert says in what
    assert do in hint


SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.01", "tracking=off", "sweep.name=s", "sweep.max_failures=0"]


def test_base_and_instruct_are_an_axis_of_a_pair_and_not_of_a_single_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    axis = ["sweep", "base_or_instruct", *SLEEP, "quantization=nf4"]
    assert main([*axis, "model=local", "model.path=base"]) == 2
    assert "base and instruct would be the same model" in capsys.readouterr().err
    assert main([*axis, "model=hub", "model.id=a/b"]) == 2
    assert "model.instruct_id=OWNER/NAME for a pair" in capsys.readouterr().err
    assert main([*axis, "model=local", "model.path=base", "model.instruct_path=tuned"]) == 0
    records, _ = read_runs(OutputPaths.of(tmp_path / "outputs"))
    assert sorted(record.name.split()[1] for record in records) == ["base", "tuned-instruct"]


def test_the_last_run_stays_the_adapter_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *SLEEP[:3]]) == 0
    [first] = (tmp_path / "outputs" / "runs").iterdir()
    assert main(["sweep", "base_or_instruct", *SLEEP, "quantization=nf4", "model.adapter=last"]) == 0
    spec = read_spec(OutputPaths.of(tmp_path / "outputs").study("s"))
    assert spec.fixed["model.adapter"] == str(first / "adapter")
    assert main(["sweep", "base_or_instruct", *SLEEP, "model.adapter=null,last"]) == 2
    assert "last would mean another run in each trial" in capsys.readouterr().err


@pytest.mark.parametrize("pair", [["model.instruct_id=a/c-it"], []])
def test_a_recorded_hub_run_can_be_repeated_with_another_model(pair: list[str]) -> None:
    record = made_up.run(r=8, seed=1, accuracy=0.5).replace(
        config=to_plain(compose(["model=hub", "model.id=a/b", *pair]))
    )
    model = compose(recorded_overrides(record, ["model.id=c/d"])).model
    assert model.checkpoints == {"base": "c/d", **({"instruct": "a/c-it"} if pair else {})}


@pytest.mark.parametrize(
    ("fixed", "axis"),
    [
        (["model=hub"], "model.id=a/b,c/d-Instruct"),
        (["model=local"], "model.path=/m/b,/m/c-it"),
        (["model=smollm2_135m"], "model.variant=auto,instruct"),
        (["lora.r=4"], "lora.alpha=8,16"),
        (["lora.r=4"], "training.epochs=1,null"),
    ],
)
def test_a_plan_counts_the_configuration_that_a_sweep_runs(fixed: list[str], axis: str) -> None:
    points = search_space([*fixed, axis]).points
    assert len(points) == 2
    policy = ["lora.alpha_policy=fixed"] if axis.startswith("lora.alpha=") else []
    for point in points:
        given = [f"{key}={hydra_value(value)}" for key, value in point.params.items()]
        assert point.config == compose([*fixed, *policy, *given])


def test_a_study_of_an_earlier_version_with_other_defaults_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["run", "-m", "lora.r=4,8", "task=local", "task.path=rows.jsonl", "sweep.name=old", "tracking=off"]
    command += [
        "model=local",
        f"model.path={EMBEDDED / 'base'}",
        "training.engine=sleep",
        "training.sleep_seconds=0.01",
    ]
    assert main(command) == 0
    stored = optuna.load_study(study_name="old", storage=f"sqlite:///{tmp_path}/outputs/optuna.db")
    settings = stored.user_attrs["settings"]
    assert settings["model.variant"] == "base"
    earlier = {"task.columns.prompt": "prompt", "task.columns.completion": "completion"}
    stored.set_user_attr("settings", settings | earlier)
    assert main(command) == 0
    stored.set_user_attr("settings", settings | earlier | {"task.columns.prompt": "question"})
    capsys.readouterr()
    assert main(command) == 2
    assert "task.columns.prompt" in capsys.readouterr().err
