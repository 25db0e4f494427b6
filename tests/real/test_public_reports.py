"""Faults of other tools that people reported in public, each tried here. The docstrings have the links."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_exp.cli import main
from qlora_exp.export.compatibility import end_of_answers
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.training.trainer import warmup_steps
from tests.conftest import write_colour_task
from tests.real.families import KINDS, MISTRAL_TEMPLATE, SMOLLM2_TEMPLATE, trl_template, write_family, write_json
from tests.real.perfect_model import loaded, perfect_scores
from tests.test_training import adapters, configured, train_once

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf isn't installed")
SHORT = [
    *("tracking=off", "training.device=cpu", "training.batch_size=4", "training.max_length=128", "quantization=fp32"),
    *("training.max_steps=2", "evaluation=quick", "evaluation.max_items=4", "task=local"),
]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A family's folder, made once; with changes to a file, made anew."""
    made: dict[tuple[str, str], Path] = {}

    def build(name: str, variant: str = "instruct") -> Path:
        if (name, variant) not in made:
            made[name, variant] = write_family(name, variant, tmp_path_factory.mktemp(f"{name}-{variant}"))
        return made[name, variant]

    return build


def changed(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of ``folder`` with other values in one of its JSON files."""
    shutil.copytree(folder, copy)
    write_json(copy / file, json.loads((copy / file).read_text(encoding="utf-8")) | values)
    return copy


def ran(model: Path, task: Path, outputs: Path, *overrides: str) -> tuple[RunRecord, Path]:
    given = ["model=local", f"model.path={model}", f"task.path={task}", *SHORT, f"output_root={outputs}", *overrides]
    assert main(["run", *given]) == 0
    folder = next((outputs / "runs").iterdir())
    return read_record(folder / "record.json"), folder


def exported(outputs: Path, to: Path, formats: str = "adapter,merged") -> Path:
    told = ["export", "last", "--output-root", str(outputs), "--to", str(to), "--formats", formats]
    assert main([*told, "--check-items", "0"]) == 0
    return to


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def merged(family: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's merged export."""
    made: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(f"merged-{name}")
            task = folder / "rows.jsonl"
            rows = [{"prompt": f"{number} + 1 =", "completion": str(number + 1)} for number in range(12)]
            task.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            ran(family(name), task, folder / "outputs", "model.variant=instruct")
            made[name] = exported(folder / "outputs", folder / "to") / "merged"
        return made[name]

    return export


ROPE = {
    "gemma3_1b": ({"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None}, None),
    "gemma3_4b": ({}, {"rope_theta": 1000000, "rope_local_base_freq": 10000}),
    "llama3_2_1b": ({"rope_theta": 500000.0}, None),
    "qwen3_0_6b": ({"rope_theta": 1000000, "rope_scaling": None}, None),
}
"""What the published config.json says at its top, and in its text_config."""


@pytest.mark.parametrize("name", sorted(ROPE))
def test_an_exported_config_has_the_rotary_base_where_transformers_4_reads_it(
    name: str, family: Build, merged: Callable[[str], Path]
) -> None:
    """transformers 5 writes ``rope_theta`` into ``rope_parameters``; version 4 doesn't look there and computes with
    10,000 without a warning: https://github.com/vllm-project/vllm/pull/42624,
    https://github.com/sgl-project/sglang/pull/14745. Seen with transformers 4.57.3: logits off by 3.5 standard
    deviations before, equal to the last bit now."""
    config, published = read(merged(name) / "config.json"), read(family(name) / "config.json")
    whole, text = ROPE[name]
    for key, value in whole.items():
        assert config[key] == value == published[key]
    for key, value in (text or {}).items():
        assert config["text_config"][key] == value == published["text_config"][key]
    source = config["text_config"] if text else config
    scaling = (published.get("text_config") or published)["rope_scaling"]
    assert source["rope_scaling"] == scaling
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(merged(name)).config.get_text_config().rope_parameters
    before = AutoModelForCausalLM.from_pretrained(family(name)).config.get_text_config().rope_parameters
    assert again == before


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_tokenizer_names_a_class_that_transformers_4_has(
    name: str, family: Build, merged: Callable[[str], Path]
) -> None:
    """ "Tokenizer class TokenizersBackend does not exist": https://github.com/unslothai/unsloth/issues/8444,
    https://github.com/hiyouga/LlamaFactory/issues/10310, https://github.com/verl-project/verl/issues/5078."""
    settings = read(merged(name) / "tokenizer_config.json")
    assert settings["tokenizer_class"] != "TokenizersBackend"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert not {"is_local", "local_files_only"} & settings.keys()
    first, again = AutoTokenizer.from_pretrained(family(name)), AutoTokenizer.from_pretrained(merged(name))
    text = "Capital of France?  In 2024, naïve\n\nthe cat, isn't it"
    assert again(text)["input_ids"] == first(text)["input_ids"]
    assert again.chat_template == first.chat_template
    assert (again.bos_token, again.eos_token) == (first.bos_token, first.eos_token)


CHATS = {
    "llama3_2_1b": (lambda: trl_template("llama3_2"), "<|end_of_text|>", "<|eot_id|>"),
    "qwen3_0_6b": (lambda: trl_template("qwen3"), "<|endoftext|>", "<|im_end|>"),
    "gemma3_1b": (lambda: trl_template("gemma3"), "<eos>", "<end_of_turn>"),
    "smollm2_135m": (lambda: SMOLLM2_TEMPLATE, "<|endoftext|>", "<|im_end|>"),
    "mistral_7b": (lambda: MISTRAL_TEMPLATE, "</s>", "</s>"),
}
"""A family's base in the chat format: its template, its end of a text, and what ends an answer in training."""


@needs_gguf
@pytest.mark.parametrize("name", sorted(CHATS))
def test_an_exported_base_that_learnt_chats_stops_where_its_answers_end(
    name: str, family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """A base tuned on chats goes on after each answer elsewhere, for its files know the end of a text only:
    https://github.com/hiyouga/LlamaFactory/issues/7454, https://github.com/QwenLM/Qwen3/issues/927,
    https://github.com/meta-llama/llama-cookbook/issues/640, https://github.com/ollama/ollama/issues/8363."""
    import gguf

    template, end_of_text, end_of_turn = CHATS[name]
    (tmp_path / "chat.jinja").write_text(template(), encoding="utf-8")
    chat = ["model.variant=base", "task.format=chat", f"model.chat_template={tmp_path / 'chat.jinja'}"]
    ran(family(name, "base"), colour_task, tmp_path / "outputs", *chat)
    formats = "merged" if name == "mistral_7b" else "merged,q8_0"
    folder = exported(tmp_path / "outputs", tmp_path / "to", formats)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    wanted = list(dict.fromkeys(tokenizer.convert_tokens_to_ids([end_of_text, end_of_turn])))
    ends = read(folder / "merged" / "generation_config.json")["eos_token_id"]
    assert (ends if isinstance(ends, list) else [ends]) == wanted
    if "q8_0" in formats:
        fields = gguf.GGUFReader(folder / "model-q8_0.gguf").fields
        assert fields["tokenizer.ggml.eot_token_id"].contents() == wanted[-1]
        assert fields["tokenizer.ggml.eos_token_id"].contents() == wanted[0]


def test_ends_that_a_model_has_already_are_kept_as_they_are(family: Build, merged: Callable[[str], Path]) -> None:
    """https://github.com/ggml-org/llama.cpp/issues/4000: several ends, none of which may be lost."""
    for name in ("llama3_2_1b", "gemma3_1b", "qwen3_0_6b"):
        published = read(family(name) / "generation_config.json")
        again = read(merged(name) / "generation_config.json")
        assert again["eos_token_id"] == published["eos_token_id"]
        assert again["do_sample"] == published["do_sample"]


def test_a_turn_that_ends_with_ordinary_text_gives_no_stop_token(family: Build) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family("llama3_2_1b", "base"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\nEND\n{% endfor %}"
    assert end_of_answers(tokenizer, "chat") is None
    assert end_of_answers(tokenizer, "plain") == tokenizer.eos_token_id
    tokenizer.chat_template = "{{ bos_token }}{{ messages | length }}"
    assert end_of_answers(tokenizer, "chat") is None
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    assert end_of_answers(tokenizer, "chat") is None


@pytest.mark.parametrize("settings", [["training.max_steps=1"], ["training.max_steps=3", "training.warmup_ratio=1"]])
def test_every_training_has_a_step_that_is_no_warm_up(
    settings: list[str], family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """The first step of a warm-up has a learning rate of 0; a training of one step changed nothing and was COMPLETED:
    https://github.com/huggingface/transformers/issues/34754, https://github.com/EleutherAI/gpt-neox/issues/1373."""
    _, folder = ran(family("llama3_2_1b", "base"), colour_task, tmp_path / "outputs", *settings)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) > 0 for name, value in adapter.items() if "lora_B" in name)


def test_a_warm_up_is_its_share_of_the_steps_but_for_the_last() -> None:
    assert [warmup_steps(0.05, steps) for steps in (1, 2, 20, 200)] == [0, 1, 1, 10]
    assert [warmup_steps(1.0, steps) for steps in (1, 2, 20)] == [0, 1, 19]
    assert warmup_steps(0.0, 5) == 0


def test_a_training_with_dropout_is_the_same_however_often_it_is_validated(
    family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """ "-eval_val_every changes training": https://github.com/karpathy/char-rnn/issues/17. A data loader draws its seed
    from the random numbers that dropout goes on with."""
    found = []
    for name, every in (("never", "null"), ("often", "1"), ("seldom", "3")):
        settings = ["lora.dropout=0.3", "training.max_steps=6", f"training.evaluate_every_steps={every}"]
        _, folder = ran(family("llama3_2_1b", "base"), colour_task, tmp_path / name, *settings)
        found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("step", [6, 9])
def test_a_training_resumed_in_a_later_epoch_or_at_its_border_goes_on_as_if_undisturbed(
    step: int, family: Build, tmp_path: Path
) -> None:
    """The order of the rows, lost after the first epoch: https://github.com/huggingface/transformers/pull/40691,
    https://github.com/huggingface/accelerate/issues/2016; an epoch that is left out after its border:
    https://github.com/verl-project/verl/issues/7401. 48 rows in batches of 8 are 6 steps an epoch."""
    task = write_colour_task(tmp_path / "colours.jsonl", rows=60)
    settings = ["quantization=fp32", "lora.dropout=0.1", f"training.max_steps={2 * step}"]
    settings.append(f"training.save_every_steps={step}")
    config = configured(family("llama3_2_1b", "base"), task, *settings)
    _, whole = train_once(config, tmp_path / "run")
    last = RunPaths(tmp_path / "run").checkpoints / f"checkpoint-{2 * step}"
    (last / "adapter_model.safetensors").write_bytes(b"torn")
    trained, resumed = train_once(config, tmp_path / "run")
    assert trained.training.resumed_from_step == step
    expected = adapters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in adapters(resumed).items())


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_gradient_checkpointing_trains_the_same_adapters(
    quantization: str, family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """With frozen embeddings every gradient can be lost: https://github.com/huggingface/transformers/issues/26221,
    https://github.com/locuslab/open-unlearning/issues/178, https://github.com/microsoft/LoRA/issues/120."""
    found = []
    for setting in ("on", "off"):
        given = [f"quantization={quantization}", f"training.gradient_checkpointing={setting}"]
        config = configured(family("llama3_2_1b", "base"), colour_task, *given)
        found.append(adapters(train_once(config, tmp_path / setting)[1]))
    assert all(torch.allclose(value, found[1][name], atol=1e-7) for name, value in found[0].items())
    assert all(float(value.abs().max()) > 0 for value in found[0].values())


def test_spaces_before_punctuation_are_scored_as_they_were_trained(family: Build, tmp_path: Path) -> None:
    """Decoding "cleans up": https://github.com/huggingface/transformers/issues/32575,
    https://github.com/huggingface/transformers/pull/44914, https://github.com/inseq-team/inseq/pull/215."""
    folder = shutil.copytree(family("llama3_2_1b", "base"), tmp_path / "model")
    answers = ["a b , c d", "no !", "I do n't know .", "yes , no ?", "x 's", "a ' b"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789IX.,!?'"),
    )  # fmt: skip
    trained.train_from_iterator(answers, trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained, clean_up_tokenization_spaces=True, **names)
    wrapped.save_pretrained(folder)
    task = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{number}", "completion": answer} for number, answer in enumerate(answers * 2)]
    task.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = ["model=local", f"model.path={folder}", "task=local", f"task.path={task}", "evaluation.generate=true"]
    assert perfect_scores(str(folder), given).scores.exact_match == 1.0


def test_answers_longer_than_any_that_was_trained_can_be_right(family: Build, tmp_path: Path) -> None:
    """A limit on new tokens below the answers calls every model wrong:
    https://github.com/NVIDIA-NeMo/RL/issues/2725."""
    folder = family("llama3_2_1b", "base")
    for split, answer in (("train", "yes"), ("validation", "a much longer answer than those of the training rows")):
        rows = [{"prompt": f"{split} {number}", "completion": answer} for number in range(6)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = ["model=local", f"model.path={folder}", "task=local", f"task.path={tmp_path}", "task.test_fraction=0"]
    assert perfect_scores(str(folder), [*given, "evaluation.generate=true"]).scores.exact_match == 1.0


def test_sampling_settings_of_a_base_do_not_keep_its_model_from_being_exported(
    family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """ "GenerationConfig is invalid" while saving, when all is trained:
    https://github.com/huggingface/transformers/issues/29988, https://github.com/hiyouga/LlamaFactory/issues/2479."""
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    model = changed(family("llama3_2_1b"), tmp_path / "model", "generation_config.json", **odd)
    ran(model, colour_task, tmp_path / "outputs", "model.variant=instruct")
    folder = exported(tmp_path / "outputs", tmp_path / "to", "merged")
    AutoModelForCausalLM.from_pretrained(folder / "merged")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_weights_that_a_model_ties_get_no_adapter(
    target: str, family: Build, colour_task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged into a tied head, an adapter changes the embeddings too, or is lost when the model is loaded again:
    https://github.com/huggingface/peft/issues/2018, https://github.com/huggingface/peft/issues/2777."""
    model = family("llama3_2_1b", "base")
    given = ["model=local", f"model.path={model}", "task=local", f"task.path={colour_task}"]
    assert main(["validate", *given, f"targets.modules=[q_proj,{target}]"]) == 2
    assert target in capsys.readouterr().err


def test_what_a_tokenizer_file_says_of_truncation_and_padding_cuts_no_row(
    family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """tokenizer.json keeps the truncation of whoever saved it: https://github.com/daulet/tokenizers/issues/30,
    https://github.com/deepjavalibrary/djl/pull/2741."""
    first = family("llama3_2_1b", "base")
    cut = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    pad |= {"pad_to_multiple_of": None}
    second = changed(first, tmp_path / "model", "tokenizer.json", truncation=cut, padding=pad)
    splits = [
        loaded(["model=local", f"model.path={model}", "task=local", f"task.path={colour_task}"])[2]
        for model in (first, second)
    ]
    assert [item.ids for item in splits[0].train] == [item.ids for item in splits[1].train]


def test_an_end_that_is_also_the_padding_is_learned(family: Build, colour_task: Path) -> None:
    """Masking padding by its id hides every real end where PAD is EOS; such models never stop:
    https://github.com/mlabonne/llm-course/issues/33, https://github.com/unslothai/unsloth/issues/416,
    https://github.com/huggingface/trl/pull/456. SmolLM2's instruct model is published with PAD = EOS."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from qlora_exp.data.load import to_training_dataset

    model = family("smollm2_135m")
    given = ["model=local", f"model.path={model}", "model.variant=instruct", "task=local", f"task.path={colour_task}"]
    _, tokenizer, splits = loaded(given)
    published = read(model / "tokenizer_config.json")
    assert published["pad_token"] == published["eos_token"]
    rows = list(to_training_dataset(splits.train[:8]))
    for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        batch = DataCollatorForLanguageModeling(pad_token_id=pad)(rows)
        learned = (batch["labels"] == tokenizer.eos_token_id).sum(dim=1)
        assert learned.tolist() == [1] * 8
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        assert torch.equal(batch["attention_mask"].sum(dim=1), lengths)


@pytest.mark.parametrize("name", ["gemma3_1b", "gemma3_4b", "qwen3_0_6b"])
def test_scores_do_not_depend_on_what_else_is_in_a_batch(name: str, family: Build, tmp_path: Path) -> None:
    """Left padding and sliding windows: https://github.com/huggingface/transformers/issues/22707,
    https://github.com/huggingface/transformers/issues/30378, https://github.com/unslothai/unsloth/issues/3699.
    The prompts are longer than the window of 16 tokens."""
    from qlora_exp.evaluation.scoring import evaluate_model
    from qlora_exp.models.base import load_base

    lengths, answers = (0, 3, 9, 20, 35, 50, 70, 5, 44, 60), ("red", "dark green", "deep blue sea", "a, b; and c")
    rows = [
        {"prompt": "word " * length + "Colour?", "completion": answers[number % 4]}
        for number, length in enumerate(lengths)
    ]
    task = tmp_path / "rows.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = []
    for size in (1, 16):
        given = ["model=local", f"model.path={family(name)}", "model.variant=instruct", "quantization=fp32"]
        given += ["task=local", f"task.path={task}", "evaluation.generate=true", f"evaluation.batch_size={size}"]
        config, tokenizer, splits = loaded([*given, "evaluation.max_new_tokens=12"])
        base = load_base(config, "cpu").model
        items = (*splits.train, *splits.validation, *splits.test)
        table = evaluate_model(base, tokenizer, items, splits, config).items
        found.append((table["loss_sum_nats"].to_pylist(), table["generated"].to_pylist()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == found[1][1]
    ids = torch.tensor([items[0].ids])
    with torch.no_grad():
        whole = torch.log_softmax(base(input_ids=ids).logits[0, :-1].float(), dim=-1)
    first = len(items[0].prompt_ids)
    alone = -sum(float(whole[place - 1, items[0].ids[place]]) for place in range(first, len(items[0].ids)))
    assert found[0][0][0] == pytest.approx(alone, abs=1e-4)


def test_labels_that_read_like_missing_values_are_labels(family: Build, tmp_path: Path) -> None:
    """pandas and what is built on it read "NA", "None" and "nan" as nothing:
    https://github.com/pandas-dev/pandas/issues/16078."""
    labels = ["NA", "None", "null", "nan", "N/A", "true", "01", "1e5"]
    task = tmp_path / "labels.csv"
    lines = [f"Question {number}?,{label}" for number, label in enumerate(labels * 4)]
    task.write_text("\n".join(["prompt,completion", *lines]), encoding="utf-8")
    model = family("llama3_2_1b", "base")
    given = ["model=local", f"model.path={model}", "task=local", f"task.path={task}", "task.kind=classification"]
    splits = loaded(given)[2]
    assert sorted(splits.labels) == sorted(labels)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 32


def test_of_several_templates_the_default_is_used_and_one_is_asked_for_where_there_is_none(
    family: Build, colour_task: Path, tmp_path: Path
) -> None:
    """Command R and Hermes have templates by name: https://github.com/EleutherAI/lm-evaluation-harness/pull/2129,
    https://github.com/huggingface/transformers/pull/31429."""
    named = [{"name": "default", "template": SMOLLM2_TEMPLATE}, {"name": "rag", "template": "{{ messages }}"}]
    first = changed(family("smollm2_135m"), tmp_path / "named", "tokenizer_config.json", chat_template=named)
    given = ["model=local", "model.variant=instruct", "task=local", f"task.path={colour_task}"]
    ours = loaded([*given, f"model.path={first}"])[2].train[0]
    assert ours.ids == loaded([*given, f"model.path={family('smollm2_135m')}"])[2].train[0].ids
    second = changed(first, tmp_path / "no_default", "tokenizer_config.json", chat_template=named[1:])
    assert main(["validate", *given, f"model.path={second}"]) == 2


@needs_gguf
def test_an_adapter_of_a_gguf_base_names_that_file(family: Build, colour_task: Path, tmp_path: Path) -> None:
    """PEFT takes the base's name from the adapter: https://github.com/huggingface/transformers/pull/25738. Of a base
    that was read from GGUF it was "None", which is a name on the Hub."""
    outputs = tmp_path / "outputs"
    ran(family("llama3_2_1b"), colour_task, outputs, "model.variant=instruct")
    file = exported(outputs, tmp_path / "to", "q8_0") / "model-q8_0.gguf"
    record, folder = ran(file, colour_task, tmp_path / "again", "model.variant=instruct")
    assert record.status is Status.COMPLETED
    assert read(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(file)
