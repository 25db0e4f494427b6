"""A model that can't be used is refused in one message before anything of it is loaded."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import ModelConfig, TargetsConfig
from qlora_exp.errors import ModelError
from qlora_exp.models import file_digests
from qlora_exp.models.base import load_base
from qlora_exp.models.file_digests import MIN_CACHED_BYTES, _known_digest
from qlora_exp.models.inspect import describe
from qlora_exp.models.sources import ModelSource, fingerprint, resolve_source
from qlora_exp.models.tokenizers import load_tokenizer
from tests.conftest import save_tiny_model


def local(path: Path | str, *more: str) -> ModelConfig:
    return compose(["model=local", f"model.path={path}", *more]).model


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a whole model, to be damaged."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded_with_a_shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def index_of_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (shutil.rmtree, ["no such model"]),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "torn config.json": (lambda folder: truncate(folder / "config.json", 40), ["config.json"]),
    "a list as config.json": (lambda folder: (folder / "config.json").write_text("[]"), ["model_type"]),
    "no model_type": (lambda folder: edit(folder, model_type=None), ["model_type"]),
    "misspelt model_type": (lambda folder: edit(folder, model_type="lama"), ["lama", "llama"]),
    "no causal language model": (lambda folder: edit(folder, model_type="vit"), ["vit"]),
    "no attention mask": (lambda folder: edit(folder, model_type="rwkv"), ["rwkv", "padding"]),
    "remote code": (
        lambda folder: edit(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
        ["code", "never"],
    ),
    "impossible sizes": (lambda folder: edit(folder, hidden_size=-64), ["build", "config.json"]),
    "sizes of a wrong type": (lambda folder: edit(folder, hidden_size="wide"), ["config"]),
    "quantized already": (
        lambda folder: edit(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["gptq"],
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no weights", "safetensors"]),
    "pickled weights": (pickled, ["pickle", "save_pretrained"]),
    "damaged weights": (lambda folder: truncate(folder / "model.safetensors", 20_000), ["damaged"]),
    "a damaged header": (lambda folder: truncate(folder / "model.safetensors", 5), ["damaged"]),
    "a missing shard": (sharded_with_a_shard_missing, ["missing", "00002"]),
    "an index of elsewhere": (index_of_elsewhere, ["outside of the directory", "../model.safetensors"]),
    "weights of another shape": (lambda folder: edit(folder, intermediate_size=100), ["shape", "config.json"]),
    "weights of fewer layers": (lambda folder: edit(folder, num_hidden_layers=3), ["not in its files", "layers.2"]),
    "a torn index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), ["index.json"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directories_are_refused_at_the_description(damage: str, folder: Path) -> None:
    break_it, told = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ModelError) as caught:
        describe(local(folder))
    message = str(caught.value)
    assert all(text in message for text in told), message
    assert str(folder) in message
    assert caught.value.hint


@pytest.mark.parametrize("mode", ["fp32", "int8", "nf4"])
def test_weights_that_are_not_of_the_described_model_are_refused_at_the_loading(mode: str, folder: Path) -> None:
    """Left alone, transformers fills missing weights at random, and quantizes wrong shapes as they come."""
    config = compose(["model=local", f"model.path={folder}", f"quantization={mode}"])
    edit(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match="not in its files"):
        load_base(config, "cpu")
    edit(folder, num_hidden_layers=2, intermediate_size=100)
    with pytest.raises(ModelError) as caught:
        load_base(config, "cpu")
    assert caught.value.where == str(folder)


def test_an_attention_without_its_package_is_refused_at_the_description(folder: Path) -> None:
    config = compose(["model=local", f"model.path={folder}", "model.attention=flash_attention_2"])
    with pytest.raises(ModelError, match="flash_attention_2 is not available"):
        describe(config.model)


def test_an_architecture_without_sdpa_is_loaded_with_eager_attention_and_sdpa_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    gemma2 = save_tiny_model("gemma2", tmp_path / "gemma2")
    for path, taken in ((folder, "sdpa"), (gemma2, "eager")):
        config = compose(["model=local", f"model.path={path}", "quantization=nf4"])
        assert load_base(config, "cpu").model.config._attn_implementation == taken
    with pytest.raises(ModelError, match="no scaled_dot_product_attention for gemma2"):
        describe(compose(["model=local", f"model.path={gemma2}", "model.attention=sdpa"]).model)


def test_files_that_are_no_gguf_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="GGUF"):
        resolve_source(local(folder / "model.safetensors"))
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGML" + bytes(64))
    with pytest.raises(ModelError, match="isn't GGUF"):
        resolve_source(local(fake))
    fake.write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(ModelError, match="read"):
        resolve_source(local(fake))


def write_gguf(path: Path) -> Path:
    """A random two-layer Llama with a four-token vocabulary, as llama.cpp would have written it."""
    import gguf
    import numpy

    rng = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(64)])
    shapes = {"token_embd": (64, 64), "output_norm": (64,), "output": (64, 64)}
    for layer in range(2):
        sizes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        sizes |= {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
        sizes |= {"attn_norm": (64,), "ffn_norm": (64,)}
        shapes |= {f"blk.{layer}.{name}": size for name, size in sizes.items()}
    for name, size in shapes.items():
        values = rng.normal(size=size) * 0.1 if len(size) == 2 else numpy.ones(size)
        writer.add_tensor(f"{name}.weight", values.astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_loads_in_every_precision_without_its_marks(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    file = write_gguf(tmp_path / "tiny.gguf")
    tokens = torch.arange(10)[None]
    logits = {}
    for mode in ("fp32", "fp16", "int8", "nf4"):
        config = compose(["model=local", f"model.path={file}", f"quantization={mode}"])
        base = load_base(config, "cpu")
        quantized = [m for m in base.model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
        assert len(quantized) == (14 if mode in ("int8", "nf4") else 0)
        settings = getattr(base.model.config, "quantization_config", None)
        assert settings is None or "gguf" not in str(settings).lower()
        assert getattr(base.model, "quantization_method", None) in (None, "bitsandbytes")
        with torch.no_grad():
            logits[mode] = base.model(tokens).logits.float()
    for mode, bound in (("fp16", 0.01), ("int8", 0.05), ("nf4", 0.3)):
        assert 0 < (logits[mode] - logits["fp32"]).norm() / logits["fp32"].norm() < bound
    assert len(resolve_targets(describe(local(file)), TargetsConfig("attention", None))) == 8


def test_gguf_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(ModelError, match="gguf") as caught:
        resolve_source(local(file))
    assert "qlora-exp[gguf]" in str(caught.value)


def test_a_hub_id_that_is_not_at_hand_is_told_at_once_offline() -> None:
    with pytest.raises(ModelError, match="local cache") as caught:
        resolve_source(compose(["model=qwen3_0_6b"]).model)
    assert "hf download Qwen/Qwen3-0.6B-Base" in str(caught.value)


def test_no_code_of_a_checkpoint_is_ever_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An auto_map on a known architecture is passed over: transformers' own class is used."""
    (folder / "modeling_own.py").write_text("raise SystemExit('remote code was run')")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.OwnConfig"})
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")
    config = compose(["model=local", f"model.path={folder}"])
    assert type(load_base(config, "cpu").model).__name__ == "LlamaForCausalLM"


def test_the_fingerprint_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(resolve_source(local(folder)))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("words")
    assert fingerprint(resolve_source(local(moved))) == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint(resolve_source(local(folder))) != first


def test_large_weights_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call stands for a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    hashed: list[str] = []
    hash_file = file_digests._hash

    def digest(file: Path) -> str:
        hashed.append(file.name)
        return hash_file(file)

    monkeypatch.setattr(file_digests, "_hash", digest)

    def write(last: bytes, seconds_ago: float) -> None:
        with weights.open("wb") as stream:
            stream.truncate(MIN_CACHED_BYTES)
            stream.seek(-1, os.SEEK_END)
            stream.write(last)
        written = time.time_ns() - round(seconds_ago * 1e9)
        os.utime(weights, ns=(written, written))

    def found() -> tuple[str, list[str]]:
        _known_digest.cache_clear()
        hashed.clear()
        return fingerprint(ModelSource("model", str(weights.parent), None, None, True)), list(hashed)

    write(b"a", 0.0)
    fresh, read = found()
    assert read == found()[1] == ["model.safetensors"]  # written just now: another write may have the same time
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 60.0)
    assert found() == (fresh, ["model.safetensors"])
    assert found() == (fresh, [])
    entry = next((tmp_path / "cache").rglob("*.json"))
    for damage in (b"", b"[1]", b'{"sha256": 1}', entry.read_bytes()[:40], b"\xff\xfe"):
        entry.write_bytes(damage)
        assert found() == (fresh, ["model.safetensors"])
        assert found() == (fresh, [])
    times = weights.stat()
    write(b"b", 0.0)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a tool that keeps times does
    changed, read = found()
    assert changed != fresh
    assert read == ["model.safetensors"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # no folder: nothing can be kept
    assert found() == found() == (changed, ["model.safetensors"])
    (weights.parent / "config.json").write_text("{}")
    assert found()[1] == ["config.json", "model.safetensors"]


def test_the_embedded_pair_is_two_models_of_one_architecture() -> None:
    base = compose(["model=embedded", "model.variant=base"]).model
    instruct = compose(["model=embedded", "model.variant=instruct"]).model
    assert describe(base) == describe(instruct)
    assert fingerprint(resolve_source(base)) != fingerprint(resolve_source(instruct))
    assert load_tokenizer(base).get_vocab() == load_tokenizer(instruct).get_vocab()
    assert load_tokenizer(base).chat_template == load_tokenizer(instruct).chat_template is not None


def test_padding_is_told_from_the_end_of_a_text_where_the_vocabulary_can(folder: Path) -> None:
    tokenizer = load_tokenizer(local(folder))
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    settings = folder / "tokenizer_config.json"
    raw = json.loads(settings.read_text())
    raw["pad_token"] = raw["eos_token"]
    settings.write_text(json.dumps(raw))
    assert load_tokenizer(local(folder)).pad_token_id != tokenizer.eos_token_id


def test_a_chat_template_can_be_given_as_a_file(folder: Path, tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if name.endswith(".jinja"):
            file.unlink(missing_ok=True)
        else:
            raw = json.loads(file.read_text())
            raw.pop("chat_template", None)
            file.write_text(json.dumps(raw))
    assert load_tokenizer(local(folder)).chat_template is None
    template = tmp_path / "mine.jinja"
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    template.write_text(text)
    assert load_tokenizer(local(folder, f"model.chat_template={template}")).chat_template == text
    template.write_text("{% for m in messages %}")
    with pytest.raises(ModelError, match="Jinja"):
        load_tokenizer(local(folder, f"model.chat_template={template}"))
    with pytest.raises(ModelError, match="template"):
        load_tokenizer(local(folder, f"model.chat_template={tmp_path / 'none.jinja'}"))


def test_a_missing_or_torn_tokenizer_is_refused(folder: Path) -> None:
    truncate(folder / "tokenizer.json", 300)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(local(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(local(folder))


@pytest.mark.parametrize("installed", [True, False])
def test_a_tokenizer_in_sentencepiece_form_alone_says_what_is_missing(
    installed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    find = importlib.util.find_spec
    there = importlib.util.find_spec("tokenizers") if installed else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *r: there if name == "sentencepiece" else find(name, *r)
    )
    with pytest.raises(ModelError) as caught:
        load_tokenizer(local(folder))
    assert "only in SentencePiece format (tokenizer.model)" in caught.value.what
    assert caught.value.hint is not None
    assert ("pip install sentencepiece" in caught.value.hint) is not installed
    assert "tokenizer.json" in caught.value.hint


def test_a_directory_without_a_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(local(folder))
