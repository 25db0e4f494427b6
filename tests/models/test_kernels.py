"""Liger's kernels change one model, not its architecture: a run without them in the same process has transformers' own.

The kernels need a GPU. Here torch's formulas stand in for them.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Kernels
from qlora_exp.errors import ConfigError
from qlora_exp.models.adapters import attach_adapters
from qlora_exp.models.base import Base, load_base
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.kernels import SUPPORTED, kernels_of_run, with_kernels
from tests import processes
from tests.conftest import save_tiny_model

CALLS: list[str] = []


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package. ``CALLS``: which of its functions were called."""
    CALLS.clear()

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, in_place: bool) -> torch.Tensor:
        CALLS.append("rms_norm")
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        CALLS.append("swiglu")
        return torch.nn.functional.silu(gate) * up

    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional")
    for name in names:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules[names[-1]]).update(liger_rms_norm=rms_norm, liger_swiglu=swiglu)


def test_kernels_are_those_that_can_be_used(liger: None) -> None:
    assert kernels_of_run(Kernels.auto, "llama", "cuda") == "liger"
    assert kernels_of_run(Kernels.liger, "llama", "cuda") == "liger"
    for choice, model_type, device in ((Kernels.none, "llama", "cuda"), (Kernels.auto, "gpt2", "cuda")):
        assert kernels_of_run(choice, model_type, device) == "none"
    assert kernels_of_run(Kernels.auto, "llama", "cpu") == "none"
    for model_type, device, says in (("llama", "cpu", "GPU"), ("gpt2", "cuda", "gpt2")):
        with pytest.raises(ConfigError, match=says) as error:
            kernels_of_run(Kernels.liger, model_type, device)
        assert error.value.where == "training.kernels = liger"


def test_kernels_that_are_not_installed_are_refused_where_they_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels_of_run(Kernels.auto, "llama", "cuda") == "none"
    with pytest.raises(ConfigError, match="isn't installed") as error:
        kernels_of_run(Kernels.liger, "llama", "cuda")
    assert "qlora-exp[liger]" in str(error.value.hint)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_a_model_with_kernels_computes_the_same_and_leaves_others_alone(
    liger: None, family: str, tmp_path: Path
) -> None:
    config = compose(["model=local", f"model.path={save_tiny_model(family, tmp_path / family)}", "quantization=fp32"])
    bases = BaseCache()
    base: Base = bases.get(config, "cpu")
    ids = torch.arange(12).reshape(2, 6)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        CALLS.clear()
        with torch.no_grad():
            result: torch.Tensor = model(input_ids=ids).logits
        return result

    expected = logits(bases.model(base))
    assert CALLS == []
    patched = with_kernels(bases.model(base), "liger")
    torch.testing.assert_close(logits(patched), expected)
    layers = patched.config.num_hidden_layers
    assert CALLS.count("swiglu") == layers
    assert CALLS.count("rms_norm") >= 2 * layers + 1
    logits(bases.model(base))
    assert CALLS == []
    assert with_kernels(patched, "liger") is patched  # scores of the base and training may use the same model
    torch.testing.assert_close(logits(patched), expected)
    fresh = bases.get(config, "cpu")
    assert fresh is base
    logits(with_kernels(bases.model(base), "none"))
    assert CALLS == []


def test_adapters_train_through_the_kernels(liger: None, tmp_path: Path) -> None:
    path = save_tiny_model("llama", tmp_path / "llama")
    config = compose(["model=local", f"model.path={path}", "quantization=fp32", "targets=mlp"])
    gradients = []
    for kernels in ("none", "liger"):
        base = load_base(config, "cpu")
        names = [name for name, module in base.model.named_modules() if name.endswith(("gate_proj", "down_proj"))]
        model = with_kernels(attach_adapters(base.model, config, names), kernels)
        CALLS.clear()
        model(input_ids=torch.arange(12).reshape(2, 6)).logits.square().mean().backward()
        assert bool(CALLS) == (kernels == "liger")
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_required_kernels_without_a_gpu_are_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlora_exp.cli", "validate", "training.kernels=liger", "training.device=cpu"]
    ended = processes.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "training.kernels = liger" in ended.stderr
