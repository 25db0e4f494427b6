"""Shared fixtures: one OpenMP thread, no telemetry, tiny random models on disk, a small task of one's own."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest

from tests import processes  # noqa: F401 - it keeps the environment as it is now

LONGEST = ("faults/", "workers/", "test_run.py", "test_cli.py", "test_sweep.py", "tracking/", "test_launchers.py")
"""Begun first, so that no process ends long after the other."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Half as many again as there are cores: a third of the suite's time is waiting — for trials that sleep, for one
    process that starts, for leases."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + cores // 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(tests).as_posix()
        return next((i for i, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))

    items.sort(key=place)


FAMILIES = ("llama", "gpt2", "phi3")
"""Separate projections, Conv1D with a fused qkv, and Linear with a fused qkv and gate_up."""


def save_tiny_model(family: str, folder: Path, hidden: int = 64) -> Path:
    """A random two-layer model with the embedded pair's tokenizer, saved as a local directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_exp.paths import EMBEDDED

    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    vocabulary = len(tokenizer)
    shapes = {
        "llama": {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        **{
            family: {
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": hidden // 4,
            }
            for family in ("mistral", "qwen2", "qwen3")
        },
        "gemma2": {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
        },
        "gpt2": {"n_embd": hidden, "n_layer": 2, "n_head": 4, "n_positions": 512},
        "phi3": {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 512,
        },
        "mixtral": {
            "hidden_size": hidden,
            "intermediate_size": hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    }[family]
    tokens = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **shapes, **tokens)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its workers a width; output that isn't a terminal's is not cut to one."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session", autouse=True)
def servers_kept() -> Iterator[None]:
    """Fork servers stay between the sweeps of different tests. No folder of a test holds a module."""
    from qlora_exp.orchestration import forking

    with forking.servers_kept(in_any_folder=True):
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder of a random tiny model."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


def write_colour_task(path: Path, rows: int = 120) -> Path:
    """A learnable classification task in a file of its own: a fruit's colour."""
    colours = {"cherry": "red", "lemon": "yellow", "lime": "green", "plum": "blue"}
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            fruit = rng.choice(sorted(colours))
            row = {"prompt": f"Item {number}: the {fruit} has the colour", "completion": colours[fruit]}
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def colour_task(tmp_path: Path) -> Path:
    return write_colour_task(tmp_path / "colours.jsonl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-rounds", type=int, default=None, help="rounds of the tests that kill sweeps at random")
