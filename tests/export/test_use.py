"""What an export says of its use: the code of its card runs, the Modelfile is the chat template, a push has all."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from qlora_exp.cli import main
from qlora_exp.export.modelfile import modelfile, turns_of
from qlora_exp.export.usage import Usage, usage_chapter
from qlora_exp.paths import EMBEDDED
from qlora_exp.records.items import read_items
from tests.hub.fake_hub import FakeHub, serving

RUN = [
    *("training.device=cpu", "training.max_steps=30", "training.batch_size=8", "training.max_length=64"),
    *("training.learning_rate=0.01", "evaluation=quick", "evaluation.max_items=12", "tracking=off"),
]


@pytest.fixture(scope="module")
def outputs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished nf4 run of a tiny Llama, exported to its own folder."""
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("use")
    task = write_colour_task(folder / "colours.jsonl")
    given = ["model=local", f"model.path={tiny_models['llama']}", "task=local", f"task.path={task}"]
    assert main(["run", *RUN, *given, "task.kind=classification", f"output_root={folder / 'outputs'}"]) == 0
    words = ["--formats", "adapter,merged,q8_0", "--check-items", "0"]
    assert main(["export", "last", "--output-root", str(folder / "outputs"), *words]) == 0
    return folder / "outputs"


@pytest.fixture
def run(outputs: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be changed."""
    [folder] = (outputs / "runs").iterdir()
    return shutil.copytree(folder, tmp_path / "outputs" / "runs" / folder.name)


def code_of(card: Path, library: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if f"from {library} import" in block)


@pytest.mark.parametrize(
    ("card", "library"),
    [
        ("README.md", "peft"),
        ("adapter/README.md", "peft"),
        ("merged/README.md", "transformers"),
        pytest.param(
            "README.md",
            "llama_cpp",
            marks=pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="it isn't installed"),
        ),
    ],
)
def test_the_code_of_a_card_answers_as_the_task_does(
    run: Path, card: str, library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "export" / card
    monkeypatch.chdir(file.parent)
    code = code_of(file, library)
    assert code.count('"…"') == 1
    capsys.readouterr()
    exec(compile(code.replace('"…"', '"Item 3: the lemon has the colour"'), card, "exec"), {})
    answer = capsys.readouterr().out.strip()
    labels = {row["expected"] for row in read_items(run)}
    assert answer in labels


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's and SmolLM's: it adds a system message where there is none."""
GEMMA = (
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{% if loop.first and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""It puts a system message into the first question."""


def ollama_text(modelfile: str, messages: list[dict[str, str]], system: str) -> str:
    """A conversation as Ollama renders it: the template once for each question and its answer; the last has none."""
    [template] = re.findall(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    system_part, question = re.fullmatch(r"(?:{{ if .System }}(.*?){{ end }})?(.*)", template, re.DOTALL).groups("")
    questions = [message["content"] for message in messages if message["role"] == "user"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    text = system_part.replace("{{ .System }}", system) if system else ""
    for number, content in enumerate(questions):
        rendered = question if number < len(answers) else question.partition("{{ .Response }}")[0]
        for name, value in ((".Response", answers[number] if number < len(answers) else ""), (".Prompt", content)):
            rendered = rendered.replace(f"{{{{ {name} }}}}", value)
        text += rendered
    return text.replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("template", [None, CHATML, GEMMA], ids=["embedded", "default system", "system in question"])
def test_the_modelfile_renders_what_the_chat_template_renders(template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "instruct"))
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.bos_token = "<s>" if template == GEMMA else tokenizer.bos_token
    text = modelfile("m.gguf", tokenizer, chat=True, end_token=tokenizer.eos_token_id)
    default = re.search(r'SYSTEM "(.*)"', text)
    one = [{"role": "user", "content": "1 + 1?"}]
    two = [*one, {"role": "assistant", "content": "2"}, {"role": "user", "content": "and {{ 3 }}?"}]
    for messages in (one, two):
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        assert ollama_text(text, messages, default[1] if default else "") == rendered.removeprefix("<s>")
    assert ("{{ .System }}" in text) == (template != GEMMA)
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text


def test_a_template_that_cannot_be_cut_is_not_guessed() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "instruct"))
    for template in ("{{ messages | length }}", "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert turns_of(tokenizer) is None
        text = modelfile("m.gguf", tokenizer, chat=True, end_token=None)
        assert "TEMPLATE" not in text
        assert "can't be written" in text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub({}, token="hf_writer")) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


def push(run: Path, *words: str) -> int:
    return main(["export", str(run), *words])


def test_a_push_is_the_first_format_with_its_card_in_a_private_repository(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, "--push", "someone/tuned") == 0
    assert f"pushed: {hub.url}/someone/tuned" in capsys.readouterr().out
    files = hub.pushed["someone/tuned"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.private["someone/tuned"]
    own = run / "export" / "adapter"
    assert files["adapter_model.safetensors"] == (own / "adapter_model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert '"someone/tuned")' in card
    assert "llama_cpp" not in card
    base = json.loads((own / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert base.startswith("/")
    assert base not in card + files["adapter_config.json"].decode()

    assert push(run, "--formats", "merged", "--push", "someone/merged", "--public") == 0
    merged = {path.name for path in (run / "export" / "merged").iterdir()}
    assert hub.pushed["someone/merged"].keys() == merged
    assert not hub.private["someone/merged"]
    assert push(run, "--formats", "q8_0", "--push", "someone/gguf") == 0
    assert hub.pushed["someone/gguf"].keys() == {"README.md", "Modelfile", "model-q8_0.gguf"}


def test_a_push_that_cannot_be_is_refused_before_anything_is_exported(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.rmtree(run / "export")

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert push(run, "--formats", "adapter", *words) == 2
        error = capsys.readouterr().err
        assert "do:" in error
        assert "Traceback" not in error
        assert "hf_w" not in error
        assert not (run / "export").exists()
        return error

    hub.pushed["someone/tuned"] = {}
    assert "has a model someone/tuned already" in refused("--push", "someone/tuned")
    assert "not the name of a repository" in refused("--push", "tuned")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "doesn't know this token" in refused("--push", "someone/new")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert "hf auth login" in refused("--push", "someone/new")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("--push", "someone/new")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in refused("--push", "someone/new")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    assert push(run, "--formats", "adapter", "--push", "someone/tuned", "--push-again") == 0
    assert "README.md" in hub.pushed["someone/tuned"]
    assert push(run, "--formats", "adapter", "--push", "forbidden/new") == 2
    assert "may not write there" in capsys.readouterr().err


def test_texts_of_the_data_are_not_pushed(run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export" / "adapter" / "rows.jsonl").write_text("{}")
    assert push(run, "--push", "someone/tuned") == 2
    assert "texts of the data set" in capsys.readouterr().err
    assert push(run, "--formats", "q4_0", "--push", "someone/tuned") == 2
    assert "the export has no format q4_0" in capsys.readouterr().err
    assert hub.pushed == {}


def test_a_card_says_with_which_variables_of_the_template_the_model_was_trained() -> None:
    usage = Usage("Qwen/Qwen3-8B", None, True, "1 + 1?", None, None, 64, 8, False, variables={"enable_thinking": False})
    text = "\n".join(usage_chapter(usage, {"adapter": "adapter", "merged": "merged", "q8_0": "m.gguf"}))
    calls = re.findall(r"tokenizer\.apply_chat_template\((.*)\)\.to", text)
    assert len(calls) == 2
    assert all(call.endswith("enable_thinking=False") for call in calls)
    assert """llama-server -m m.gguf --jinja --chat-template-kwargs '{"enable_thinking": false}'""" in text
    assert "chat_template_kwargs" in text
    plain = "\n".join(usage_chapter(replace(usage, variables={}), {"merged": "merged", "q8_0": "m.gguf"}))
    assert "enable_thinking" not in plain
    assert "kwargs" not in plain
