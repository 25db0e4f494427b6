"""How to use an exported model in other programs: a chapter of its model card, with code and commands to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_exp.models.sources import ModelSource
from qlora_exp.records.types import RunRecord

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for --max-lora-rank."""
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Usage:
    """What other programs need to know, to answer as the run did."""

    base: str
    """The base model: a Hub id, the path of a local one, or ``embedded:NAME``."""
    gguf_file: str | None
    """The file in the folder ``base``, if the base is a GGUF file."""
    chat: bool
    prompt: str
    """The prompts' template if there is one, e.g. ``Definition: {definition}\\nCategory:``."""
    system: str | None
    end_token: int | None
    new_tokens: int
    rank: int
    """Of the exported adapter, which has twice the run's rank with PiSSA."""
    dora: bool
    peft_type: str = "LORA"
    whole: bool = False
    """It holds whole modules, or adapters of experts' parameters. vLLM and llama.cpp read neither these nor DoRA's
    adapters."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template with which its prompt is the one that was trained."""


def usage_of(record: RunRecord, model: ModelSource, end_token: int | None, adapter: Mapping[str, Any]) -> Usage:
    """Return a run's usage. ``adapter``: the content of its ``adapter_config.json``."""
    task = record.config.get("task") or {}
    after = record.scores.after
    rank = int(adapter.get("r") or (record.config.get("lora") or {}).get("r") or 0)
    return Usage(
        base=model.name if model.name.startswith("embedded:") else model.path_or_id,
        gguf_file=model.gguf_file,
        chat=record.plan is not None and record.plan.format == "chat",
        prompt=task.get("prompt") or "…",
        system=task.get("system"),
        end_token=end_token,
        new_tokens=(after.max_new_tokens if after is not None else None) or DEFAULT_NEW_TOKENS,
        rank=max(rank, *map(int, (adapter.get("rank_pattern") or {"": 0}).values())),
        dora=bool(adapter.get("use_dora")),
        peft_type=str(adapter.get("peft_type") or "LORA"),
        variables=(record.data.answer_prefix_variables if record.data is not None else None) or {},
        whole=bool(adapter.get("modules_to_save") or adapter.get("target_parameters")),
    )


def usage_chapter(usage: Usage, places: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a card's chapter.

    Args:
        places: format → where the reader finds it, e.g. ``{"adapter": "adapter", "q8_0": "model-q8_0.gguf"}``, or the
            name of a repository on the Hub.
    """
    yield "## How to use it"
    yield ""
    if usage.prompt != "…":
        yield "Replace the names in braces in the prompt by their values, as in training."
        yield ""
    if usage.chat and usage.variables:
        given = ", ".join(f"`{name}={value}`" for name, value in usage.variables.items())
        yield f"It was trained with {given} in the chat template: without it, the template writes another prompt."
        yield "vLLM and llama-server take it with each request as `chat_template_kwargs`."
        yield ""
    if "adapter" in places:
        yield from _adapter(usage, places["adapter"])
    if "merged" in places:
        yield from _merged(usage, places["merged"])
    files = [place for name, place in places.items() if name not in ("adapter", "merged")]
    if files:
        yield from _gguf(usage, files[0])


def _adapter(usage: Usage, place: str) -> Iterator[str]:
    yield "**The adapter in transformers and PEFT**, on its base model:"
    yield ""
    yield "```python"
    yield "from peft import PeftModel"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if usage.base.startswith("embedded:"):
        yield "from qlora_exp.paths import EMBEDDED"
        yield ""
        yield f"base = str(EMBEDDED / {_text(usage.base.removeprefix('embedded:'))})"
    else:
        yield ""
        yield f"base = {_text(usage.base)}"
    file = f", gguf_file={_text(usage.gguf_file)}" if usage.gguf_file else ""
    yield f"tokenizer = AutoTokenizer.from_pretrained(base{file})"
    yield f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{file}), {_text(place)})"
    yield from _generation(usage, end_token=True)
    yield "```"
    yield ""
    if usage.dora or usage.whole or usage.peft_type != "LORA":
        kind = "DoRA's adapters" if usage.dora else f"{usage.peft_type} adapters"
        kind = "adapters with whole modules or experts" if usage.whole else kind
        yield f"vLLM and llama.cpp don't read {kind}: merge it for them."
        yield ""
    elif not usage.base.startswith("embedded:") and not usage.gguf_file:
        rank = next((rank for rank in VLLM_RANKS if rank >= usage.rank), usage.rank)
        yield "**The adapter in vLLM**, as the model `tuned`:"
        yield ""
        yield "```console"
        yield f"$ vllm serve {usage.base} --enable-lora --lora-modules tuned={place} --max-lora-rank {rank}"
        yield "```"
        yield ""


def _merged(usage: Usage, place: str) -> Iterator[str]:
    yield "**The merged model in transformers**:"
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f"tokenizer = AutoTokenizer.from_pretrained({_text(place)})"
    yield f"model = AutoModelForCausalLM.from_pretrained({_text(place)})"
    yield from _generation(usage, end_token=False)
    yield "```"
    yield ""
    yield "**The merged model in vLLM**:"
    yield ""
    yield "```console"
    yield f"$ vllm serve {place}"
    yield "```"
    yield ""


def _generation(usage: Usage, end_token: bool) -> Iterator[str]:
    """Yield the lines that answer one prompt. ``end_token``: the model's own files may not name it."""
    end = f", eos_token_id={usage.end_token}" if end_token and usage.end_token is not None else ""
    if usage.chat:
        system = [{"role": "system", "content": usage.system}] if usage.system else []
        messages = json.dumps([*system, {"role": "user", "content": usage.prompt}], ensure_ascii=False)
        yield f"messages = {messages}"
        rendering = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        rendering += "".join(f", {name}={value!r}" for name, value in usage.variables.items())
        yield f"inputs = tokenizer.apply_chat_template(messages, {rendering}).to(model.device)"
    else:
        yield f"prompt = {_text(usage.prompt)}"
        yield 'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)'
    yield f"answer = model.generate(**inputs, max_new_tokens={usage.new_tokens}, do_sample=False{end})"
    yield 'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'


def _gguf(usage: Usage, file: str) -> Iterator[str]:
    yield "**A GGUF file in llama.cpp**, from Python (`pip install llama-cpp-python`) or on the command line:"
    yield ""
    yield "```python"
    yield "from llama_cpp import Llama"
    yield ""
    yield f"model = Llama({_text(file)}, n_ctx=512, verbose=False)"
    if usage.chat:
        turns = [("system", usage.system)] if usage.system else []
        roles = [{"role": role, "content": text} for role, text in [*turns, ("user", usage.prompt)]]
        messages = json.dumps(roles, ensure_ascii=False)
        yield f"answer = model.create_chat_completion({messages}, max_tokens={usage.new_tokens}, temperature=0)"
        yield 'print(answer["choices"][0]["message"]["content"])'
    else:
        yield f"prompt = {_text(usage.prompt)}"
        yield f"answer = model.create_completion(prompt, max_tokens={usage.new_tokens}, temperature=0)"
        yield 'print(answer["choices"][0]["text"])'
    yield "```"
    yield ""
    yield "```console"
    kwargs = (
        f" --jinja --chat-template-kwargs {shlex.quote(json.dumps(dict(usage.variables)))}" if usage.variables else ""
    )
    yield f"$ llama-server -m {file}{kwargs if usage.chat else ''}"
    yield "```"
    yield ""
    yield "**The same file in Ollama.** `Modelfile` has its template and its stop token:"
    yield ""
    yield "```console"
    yield "$ ollama create tuned -f Modelfile"
    yield "$ ollama run tuned"
    yield "```"
    yield ""


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
