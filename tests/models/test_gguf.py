"""A GGUF file that transformers would not load whole is refused; one in several parts loads as in one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.export.gguf import _llama3_rope_factors as llama3_factors
from qlora_exp.models.base import load_base
from qlora_exp.models.gguf_tensors import one_name_map, one_reader
from qlora_exp.models.inspect import describe
from qlora_exp.models.sources import fingerprint, resolve_source
from tests.models.gguf_files import FAMILIES, SIZES, tensors_of, write_gguf

pytest.importorskip("gguf", reason="the gguf extra is not installed")
TIED_WITHOUT = "output.weight"
"""Without a head a file is that of a model whose head is its embedding: nothing in it says otherwise."""


def local(path: Path, *more: str) -> Any:
    return compose(["model=local", f"model.path={path}", *more])


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        describe(local(path).model)
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_whole_file_loads_and_one_that_lacks_any_tensor_is_refused_with_its_name(
    architecture: str, tmp_path: Path
) -> None:
    whole = tensors_of(architecture)
    file = write_gguf(tmp_path / "whole.gguf", architecture, whole)
    describe(local(file).model)
    loaded = [load_base(local(file, "quantization=fp32", f"seed={seed}"), "cpu").model for seed in (1, 2)]
    assert all(torch.equal(one, other) for one, other in zip(*(m.parameters() for m in loaded), strict=True))
    for lacking in whole.keys() - {TIED_WITHOUT}:
        kept = {name: values for name, values in whole.items() if name != lacking}
        message = refusal(write_gguf(tmp_path / "lacking.gguf", architecture, kept))
        assert "not in its files" in message, message
        assert architecture == "lfm2" or lacking in message, message


def test_a_file_that_lacks_a_tensor_is_refused_at_the_loading_too(tmp_path: Path) -> None:
    kept = {name: values for name, values in tensors_of("llama").items() if name != "blk.0.ffn_up.weight"}
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight"):
        load_base(local(write_gguf(tmp_path / "m.gguf", tensors=kept)), "cpu")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3moe"])
def test_a_model_in_parts_is_the_same_model_whichever_part_is_named(architecture: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "whole.gguf", architecture)
    first = write_gguf(tmp_path / "parts.gguf", architecture, tensors_a_part=5)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    whole = load_base(local(file, "quantization=fp32"), "cpu").model
    marks = set()
    for part in (first, parts[-1]):
        assert describe(local(part).model) == describe(local(file).model)
        marks.add(fingerprint(resolve_source(local(part).model)))
        split = load_base(local(part, "quantization=fp32"), "cpu").model
        assert split.state_dict().keys() == whole.state_dict().keys()
        assert all(torch.equal(tensor, split.state_dict()[name]) for name, tensor in whole.state_dict().items())
        assert split.config.tie_word_embeddings == whole.config.tie_word_embeddings
    assert len(marks) == 1
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"\1")
    assert fingerprint(resolve_source(local(first).model)) not in marks


def test_missing_parts_are_named_whichever_part_is_given(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tensors_a_part=4)
    first, second, *others = sorted(tmp_path.glob("m-*.gguf"))
    second.rename(tmp_path / "elsewhere")
    for part in (first, *others):
        message = refusal(part)
        assert second.name in message
        assert f"{len(others) + 2} parts" in message
    first.rename(tmp_path / "renamed.gguf")
    assert "its name doesn't say which" in refusal(tmp_path / "renamed.gguf")


def test_parts_of_another_model_or_out_of_order_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tensors_a_part=4)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    assert "by its metadata this is part 3" in refusal(parts[0])
    parts[1].write_bytes(kept)
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "m.gguf", tensors=dict(reversed(tensors_of("llama").items())), tensors_a_part=4)
    shutil.copy(tmp_path / "other" / parts[-1].name, parts[-1])
    assert "the model has 12" in refusal(parts[0])


def test_an_architecture_of_the_newer_reader_in_parts_is_refused_with_the_way_to_join_them(tmp_path: Path) -> None:
    assert "llama-gguf-split --merge" in refusal(write_gguf(tmp_path / "m.gguf", "lfm2", tensors_a_part=6))


def with_more(name: str, *shape: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return tensors_of("llama") | {name: np.full(shape, value, dtype=np.float32)}


EXTRA = {
    "a bias": ("blk.0.attn_q.bias", (64,)),
    "attention sinks": ("blk.0.attn_sinks.weight", (4,)),
    "a further layer": ("blk.1.attn_q.weight", (64, 64)),
    "an unknown tensor": ("blk.0.altup.weight", (64,)),
    "a classifier": ("cls.output.weight", (2, 64)),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_a_tensor_that_transformers_leaves_out_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    name, shape = EXTRA[kind]
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors=with_more(name, *shape)))
    assert name in message
    assert "leave out" in message


def llama3_config(factor: float, **more: Any) -> Any:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192} | more
    return AutoConfig.for_model("llama", **SIZES, rope_parameters=rope)


def with_rope_factors(file: Path, factors: np.ndarray, tensors_a_part: int = 0) -> Path:
    tensors = tensors_of("llama") | {"rope_freqs.weight": factors.astype(np.float32)}
    return write_gguf(file, tensors=tensors, settings={"rope.freq_base": 500_000.0}, tensors_a_part=tensors_a_part)


@pytest.mark.parametrize("tensors_a_part", [0, 5])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_embedding_of_llama_3_is_that_of_the_file(
    factor: float, tensors_a_part: int, tmp_path: Path
) -> None:
    published = llama3_config(factor)
    file = with_rope_factors(tmp_path / "m.gguf", llama3_factors(published), tensors_a_part)
    plain = with_rope_factors(tmp_path / "plain.gguf", np.ones(8))
    describe(local(file).model)
    loaded, unscaled = (load_base(local(one, "quantization=fp32"), "cpu").model for one in (file, plain))
    expected = LlamaForCausalLM(published).eval()
    expected.load_state_dict(loaded.state_dict())
    tokens = torch.arange(60)[None] % 64
    with torch.no_grad():
        logits = [model(tokens).logits for model in (loaded, expected, unscaled)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_factors_of_another_rotary_embedding_are_refused_unless_they_change_nothing(tmp_path: Path) -> None:
    unknown = llama3_factors(llama3_config(8.0, high_freq_factor=2.0))
    for factors in (np.full(8, 8.0), unknown, llama3_factors(llama3_config(8.0))[4:]):
        assert "rope_freqs.weight" in refusal(with_rope_factors(tmp_path / "m.gguf", factors))
    describe(local(with_rope_factors(tmp_path / "ones.gguf", np.ones(8))).model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attention.head_count_kv": None}, "attention.head_count_kv"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"feed_forward_length": 128}, "shape"),
        ({"block_count": 2}, "blk.1.attn_q.weight"),
    ],
)
def test_a_setting_that_transformers_does_not_take_over_is_refused(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refusal(write_gguf(tmp_path / "m.gguf", settings=settings))


def test_a_width_of_heads_by_which_transformers_would_scale_scores_otherwise_is_refused(tmp_path: Path) -> None:
    assert "scales attention scores by 16" in refusal(write_gguf(tmp_path / "m.gguf", "gemma2", head_dim=16))


def test_a_file_that_was_cut_off_or_holds_unknown_blocks_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    content = file.read_bytes()
    for size in (len(content) - 100, len(content) // 2, 2000, 40):
        file.write_bytes(content[:size])
        message = refusal(file)
        assert "truncated" in message or "can't be read" in message, message
    numbers = tensors_of("llama") | {"blk.0.ffn_up.weight": np.zeros((96, 64), dtype=np.int8)}
    assert "I8" in refusal(write_gguf(tmp_path / "i8.gguf", tensors=numbers))
    piece = tmp_path / "m.gguf.part1of2"
    piece.write_bytes(content[:1000])
    assert "cat m.gguf" in refusal(piece)


def test_a_file_that_says_it_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "type adapter" in refusal(write_gguf(tmp_path / "m.gguf", kind="adapter"))


def test_an_adapter_beside_a_file_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(file)


def test_a_folder_of_a_gguf_file_and_a_configuration_names_the_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    AutoConfig.for_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    assert f"model.path={file}" in refusal(tmp_path)


def test_preparing_a_run_reads_a_vocabulary_once_and_builds_one_map_of_names(tmp_path: Path) -> None:
    import gguf

    file = write_gguf(tmp_path / "m.gguf")
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    with one_reader(str(file)), one_name_map():
        assert gguf.GGUFReader(str(file)) is gguf.GGUFReader(str(file))
        llama = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(llama, 2) is gguf.get_tensor_name_map(llama, 2)
        assert gguf.get_tensor_name_map(llama, 3) is not gguf.get_tensor_name_map(llama, 2)
    with one_reader("folder"):
        assert gguf.GGUFReader is reader
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, name_map)
