"""Whatever is wrong in a configuration is told in one message: what, where, nearest valid names or what to do."""

from __future__ import annotations

import shlex

import pytest

from qlora_exp.config.choices import groups
from qlora_exp.config.compose import check_multirun, compose
from qlora_exp.config.overrides import without_globs
from qlora_exp.errors import QloraExpError

# (overrides, texts that the message must hold)
WRONG = [
    (["quantisation=nf4"], ["quantisation", "quantization"]),
    (["quantization=nf5"], ["nf5", "nf4"]),
    (["model=smollm_135m"], ["smollm_135m", "smollm2_135m"]),
    (["model=llama3_8b"], ["llama3_8b", "llama3_1_8b"]),
    (["model.variant=chat"], ["model.variant", "base", "instruct"]),
    (["model.varient=base"], ["model.varient", "model.variant"]),
    (["lora.rank=8"], ["lora.rank", "lora.r"]),
    (["lora.r=eight"], ["lora.r", "whole number"]),
    (["lora.r=8.5"], ["lora.r", "whole number"]),
    (["lora.r=0"], ["lora.r", "0"]),
    (["lora.r=-4"], ["lora.r", "-4"]),
    (["lora.r=1000000"], ["lora.r", "65536"]),
    (["lora.dropout=1.5"], ["lora.dropout", "1.5"]),
    (["lora.dropout=-0.1"], ["lora.dropout"]),
    (["lora.alpha=7", "lora.alpha_policy=2r"], ["lora.alpha", "alpha_policy=fixed"]),
    (["lora.alpha_policy=fixed"], ["lora.alpha"]),
    (["lora.alpha_policy=3r"], ["lora.alpha_policy", "2r"]),
    (["lora.alpha_policy=fixed", "lora.alpha=-1"], ["lora.alpha"]),
    (["targets=[]"], ["targets=attention", "targets=[q_proj,v_proj]"]),
    (["lora_alpha="], ["lora.alpha=VALUE", "No value"]),
    (["lora.init=pizza"], ["lora.init", "pissa"]),
    (["lora.init=pissa", "quantization=nf4"], ["pissa", "quantiz"]),
    (["lora.init=olora", "quantization=nf4"], ["OLoRA", "exact weights"]),
    (["lora.loraplus_lr_ratio=0"], ["lora.loraplus_lr_ratio", "positive"]),
    (["method=full", "quantization=fp32", "lora.loraplus_lr_ratio=4"], ["no LoRA adapters", "method=lora"]),
    (["lora.dora=true", "quantization=int8", "training.device=cpu"], ["lora.dora", "int8", "nf4"]),
    (["lora.dtype=float8"], ["lora.dtype", "float32"]),
    (["r=8"], ["lora.r"]),
    (["targets=attn"], ["attn", "attention"]),
    (["targets.modules=q_proj"], ["targets.modules", "list"]),
    (["targets.set=everything"], ["targets.set", "all_linear"]),
    (["task=wordnet"], ["wordnet", "embedded"]),
    (["task=local"], ["task.path"]),
    (["task=hub"], ["task.hub_id"]),
    (["model=local"], ["model.path"]),
    (["task.kind=regression"], ["task.kind", "classification"]),
    (["task.format=jinja"], ["task.format", "chat", "plain"]),
    (["task.invalid_rows=skip"], ["task.invalid_rows", "drop"]),
    (["task.goal='be good'"], ["task.goal"]),
    (["task.goal='acuracy >= 0.5'"], ["acuracy", "accuracy"]),
    (["task.goal=accuracy >= 0.5"], ["'task.goal=\"accuracy >= 0.5\"'"]),
    (["task.goal='accuracy >= 60'"], ["accuracy", "between 0 and 1", "0.6"]),
    (["task.goal='rouge_l >= 0.5'"], ["rouge_l", "classification"]),
    (["task=local", "task.path=x.jsonl", "task.goal='accuracy >= 0.5'"], ["accuracy", "generation"]),
    (["task.goal='exact_match >= 0.5'", "evaluation=quick"], ["exact_match", "evaluation.generate"]),
    (["task=hub", "task.hub_id=a/b", "task.splits.validation=dev"], ["doesn't exist", "+task.splits.validation=dev"]),
    (["task.validation_fraction=0.7", "task.test_fraction=0.5"], ["fraction"]),
    (["training.max_steps=0"], ["training.max_steps"]),
    (["training.max_steps=null"], ["training.max_steps", "training.max_tokens"]),
    (["training.max_tokens=1000"], ["training.max_tokens = 1000", "training.max_steps=80", "training.max_steps=null"]),
    (["training.max_steps=10", "training.max_tokens=1000"], ["training.max_steps=10", "training.max_tokens=null"]),
    (["training.max_steps=null", "training.max_tokens=-5"], ["training.max_tokens"]),
    (["training.batch_size=0"], ["training.batch_size"]),
    (["training.batch_size=32", "training.micro_batch_size=5"], ["training.micro_batch_size", "32"]),
    (["training.learning_rate=0"], ["training.learning_rate"]),
    (["training.learning_rate=fast"], ["training.learning_rate", "number"]),
    (["training.lr=1e-4"], ["training.lr", "training.learning_rate"]),
    (["training.scheduler=cosin"], ["cosin", "cosine"]),
    (["training.optimizer=adamw_8bits"], ["adamw_8bits", "adamw_8bit"]),
    (["training.warmup_ratio=2"], ["training.warmup_ratio"]),
    (["training.max_length=0"], ["training.max_length"]),
    (["training.gradient_checkpointing=maybe"], ["training.gradient_checkpointing", "auto"]),
    (["training.keep_best=true"], ["training.keep_best", "training.evaluate_every_steps"]),
    (
        ["training.keep_best=true", "training.evaluate_every_steps=10", "training.save_every_steps=5"],
        ["training.save_every_steps = 5", "training.save_every_steps=null", "10"],
    ),
    (["model.revision=main"], ["model.revision", "Hub"]),
    (["model=local", "model.path=/some/where", "model.revision=v1"], ["model.revision", "Hub"]),
    (["training.early_stopping_patience=3"], ["training.early_stopping_patience", "training.evaluate_every_steps"]),
    (["training.device=tpu"], ["training.device", "cuda"]),
    (["training.threads=0"], ["training.threads"]),
    (["training.threads=100000"], ["training.threads", "1024"]),
    (["lora.dtype=float16"], ["lora.dtype", "adamw_torch", "bfloat16"]),
    (["training.learning_rate=inf"], ["training.learning_rate", "finite"]),
    (["task.path=rows.jsonl"], ["task.path", "task=local task.path="]),
    (["task.hub_id=a/b"], ["task.hub_id", "task=hub task.hub_id=a/b"]),
    (["sweeps=null"], ["sweeps", "lora_search"]),
    (["lora..r=8"], ["lora..r", "write key=value"]),
    (["workers.count=100000"], ["workers.count", "1024"]),
    (["hydra.launcher.njobs=2", "hydra/launcher=joblib"], ["hydra.launcher.njobs", "n_jobs"]),
    (["hydra.job.chdir=maybe"], ["hydra.job.chdir", "bool"]),
    (["hydra/launcher=basic,joblib"], ["hydra/launcher", "choose one"]),
    (["hydra/sweeper=nevergrad"], ["hydra/sweeper", "nevergrad", "basic", "qlora_optuna"]),
    (["hydra/launcher=joblip"], ["hydra/launcher", "joblip", "joblib"]),
    (["hydra/launcher=submitit_slurm"], ["submitit_slurm", "pip install hydra-submitit-launcher"]),
    (["name='${nope}'"], ["nope", "where: name", "name=VALUE"]),
    (["lora.r='${oc.env:NOT_SET_ANYWHERE}'"], ["NOT_SET_ANYWHERE", "where: lora.r", "export NOT_SET"]),
    (["training.engine=sleep", "training.sleep_seconds=-1"], ["training.sleep_seconds", "0"]),
    (["evaluation.split=train"], ["evaluation.split", "validation", "test"]),
    (["evaluation.batch_size=0"], ["evaluation.batch_size"]),
    (["evaluation.max_new_tokens=0"], ["evaluation.max_new_tokens"]),
    (["evaluation.metrics=[sacrebleu]", "evaluation.generate=false"], ["evaluation.metrics", "evaluation.generate"]),
    (["evaluation.generate=perhaps"], ["evaluation.generate", "true or false"]),
    (["tracking.timeout_seconds=0"], ["tracking.timeout_seconds"]),
    (["tracking=wandb"], ["wandb", "MLflow", "tracking.also=[wandb]"]),
    (["budget.usd_per_hour=-1"], ["budget.usd_per_hour"]),
    (["seed=-1"], ["seed"]),
    (["seed=one"], ["seed", "whole number"]),
    (["model.trust_remote_code=true"], ["remote code"]),
    (["task._target_=os.system"], ["_target_"]),
    (["lora.r"], ["lora.r", "key=value"]),
    (["lora.r=8,16"], ["lora.r", "-m"]),
    (["lora.r.x=1"], ["lora.r"]),
    (["~lora.r"], ["lora.r", "deleted"]),
    (["=8"], ["key=value"]),
]


@pytest.mark.parametrize(("overrides", "told"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_wrong_override_is_told_with_its_key_and_what_to_do(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(QloraExpError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert all(text in message for text in told), message
    assert "where:" in message
    assert "do:" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "text", ["task.goal=accuracy >= 0.5", 'task.prompt=Is "{a}", or {b}?\nAnswer:', "name=it's [1]"]
)
def test_the_remedy_for_an_unquoted_value_can_be_pasted_into_a_shell(text: str) -> None:
    with pytest.raises(QloraExpError) as caught:
        compose([text])
    [pasted] = shlex.split(str(caught.value.hint))
    key, _, value = text.partition("=")
    group, _, name = key.rpartition(".")
    config = compose([pasted])
    assert getattr(config.task if group else config, name) == value


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(QloraExpError) as caught:
        compose(["lora.rank=8", "quantization=nf5", "training.lr=1"])
    assert all(text in str(caught.value) for text in ("lora.rank", "nf5", "training.lr"))


def test_a_multirun_is_refused_for_any_of_its_points() -> None:
    with pytest.raises(QloraExpError, match="nf5"):
        check_multirun(["quantization=nf4,nf5", "lora.r=8,16"])
    with pytest.raises(QloraExpError, match="pissa"):
        check_multirun(["quantization=fp32,nf4", "lora.init=kaiming,pissa"])
    check_multirun(["quantization=nf4,int8", "lora.r=8,16", "model.variant=base,instruct"])


@pytest.mark.parametrize("group", ["quantization", "lora", "targets", "evaluation"])
def test_a_glob_means_every_choice_of_its_group(group: str) -> None:
    check_multirun([f"{group}=glob(*)"])
    [spelt_out] = without_globs([f"{group}=glob(*)"], [f"{group}=glob(*)"])
    assert spelt_out == f"{group}={','.join(groups()[group])}"


def test_a_globs_points_are_checked_like_any_other() -> None:
    with pytest.raises(QloraExpError, match="PiSSA"):
        check_multirun(["quantization=glob(*)", "lora.init=pissa"])
    check_multirun(["quantization=glob([fp32,*16])", "lora.init=pissa"])
    check_multirun(["quantization=glob(*, exclude=[*4,int*])", "lora.init=pissa"])


@pytest.mark.parametrize("glob", ["quantization=glob(x*)", "lora.r=glob(*)"])
def test_a_glob_that_means_nothing_is_told(glob: str) -> None:
    with pytest.raises(QloraExpError, match="matches no choice"):
        check_multirun([glob])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lora.r=64", "lora.alpha_policy=fixed", "lora.alpha=16"],
        ["targets.modules=[q_proj,v_proj]"],
        ["model=llama3_1_8b", "model.variant=instruct", "quantization=int8", "targets=all_linear"],
        ["task=local", "task.path=FILE.jsonl", "task.columns.prompt=question"],
        ["training.max_steps=null", "training.max_tokens=10000"],
        ["task.prompt='Is \"{a}\", or {b}?'"],
        ["model=local", "model.path=/some/where"],
        ["model=smollm2_135m", "model.revision=main"],
        ["training.keep_best=true", "training.evaluate_every_steps=10", "training.save_every_steps=10"],
        ["training.keep_best=true", "training.evaluate_every_steps=10"],
    ],
    ids=lambda overrides: " ".join(overrides) or "nothing",
)
def test_a_right_configuration_composes(overrides: list[str]) -> None:
    assert compose(overrides).lora.r >= 8
