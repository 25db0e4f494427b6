"""The house plan, held by tests: which room may import which, who alone imports a library, and what must stay light."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qlora_exp
from qlora_exp.app import import_to_stay

PACKAGE = Path(qlora_exp.__file__).resolve().parent
ELSEWHERE = {"conf", "sweeps", "plugins"}
"""Symlinks to top-level folders, and Hydra's plugin namespace, which is no room of ours."""

FOUNDATION = {"errors", "gpus", "heap", "memory_limits", "paths", "ranks"}
"""What every room may import; they import nothing of ours."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "heap": set(),
    "gpus": set(),
    "memory_limits": set(),
    "paths": set(),
    "ranks": set(),
    "redaction": set(),
    "measurement": set(),
    "metrics": set(),
    "starter": set(),
    "overrides": set(),
    "progress": set(),
    "records": set(),
    "analysis": {"records"},
    "config": set(),
    "catalogue": set(),
    "chat_templates": set(),
    "budget": {"config", "measurement", "records", "study"},
    "checks": {"config", "records"},
    "checkpoints": {"records"},
    "model_card": {"records", "redaction"},
    "history": {"records"},
    "environment": {"config", "records"},
    "endings": {"records"},
    "callbacks": {"endings", "measurement", "records"},
    "tables": {"catalogue", "records"},
    "out_of_memory": {"records", "tables"},
    "plan": {"checks", "config", "measurement", "records"},
    "compose": {"config", "plan"},
    "planning": {
        *("budget", "calibration", "chat_templates", "checks", "compose", "config", "data", "environment"),
        *("measurement", "models", "overrides", "plan"),
        *("rank_doubling", "records", "redaction", "study", "tables"),
    },
    "models": {"catalogue", "chat_templates", "checks", "config", "plan"},
    "calibration": {"config", "measurement", "models", "plan", "records"},
    "data": {"config", "records"},
    "evaluation": {"config", "data", "metrics", "plan", "records"},
    "train": {"callbacks", "checkpoints", "config", "data", "endings", "models", "records"},
    "synthetic": {"budget", "config", "endings", "plan", "records", "redaction"},
    "untouched": {"config", "data", "evaluation", "records"},
    "few_shot": {"config", "data", "evaluation", "records", "untouched"},
    "tracking": {"config", "environment", "history", "model_card", "out_of_memory", "records", "redaction"},
    "one_run": {
        *(
            "budget",
            "calibration",
            "callbacks",
            "checkpoints",
            "config",
            "data",
            "endings",
            "evaluation",
            "few_shot",
            "history",
            "measurement",
        ),
        *("checks", "metrics", "models", "plan", "records", "redaction", "tables", "train", "untouched"),
    },
    "app": {
        *("budget", "checkpoints", "compose", "config", "endings", "environment", "one_run", "plan"),
        *("out_of_memory", "progress", "records", "redaction", "synthetic", "tracking"),
    },
    "feasibility": {"plan", "records", "study", "tables"},
    "study": {"analysis", "config", "environment", "overrides", "records", "redaction"},
    "workers": {
        *("app", "budget", "compose", "config", "endings", "environment", "feasibility", "models", "one_run", "plan"),
        *("out_of_memory", "records", "redaction", "study", "tracking"),
    },
    "standing": {"environment", "feasibility", "overrides", "records", "redaction", "study", "tables", "tracking"},
    "retention": {"records", "study"},
    "rank_doubling": {"compose", "config", "records", "study"},
    "sweep": {
        *("app", "budget", "compose", "config", "environment", "feasibility", "history", "overrides", "plan"),
        *("rank_doubling", "records"),
        *("planning", "redaction", "standing", "study", "tables", "tracking", "workers"),
    },
    "hydra_app": {"app", "compose", "config", "sweep"},
    "job": {"app"},
    "repetition": {"catalogue", "compose", "config", "overrides", "records", "redaction"},
    "export": {"app", "config", "data", "evaluation", "model_card", "models", "plan", "records"},
    "doctor": {
        "calibration",
        "compose",
        "config",
        "environment",
        "measurement",
        "models",
        "plan",
        "planning",
        "study",
        "sweep",
        "tracking",
        "workers",
    },
    "embedded": {"app", "compose", "records"},
    "cli": {
        *("__init__", "analysis", "app", "calibration", "catalogue", "compose", "config", "data", "doctor"),
        *("environment", "export", "history", "hydra_app", "one_run", "overrides", "plan", "planning", "progress"),
        *("rank_doubling", "records", "redaction", "repetition", "retention", "standing", "starter", "study"),
        *("sweep", "tables", "tracking"),
    },
    "__init__": {"app", "compose", "history", "records"},
    "__main__": {"hydra_app"},
}

ONE_IMPORTER = {
    "bitsandbytes": "models",
    "peft": "models",
    "datasets": "data",
    "trl": "train",
    "evaluate": "metrics",
    "mlflow": "tracking",
    "optuna": "study",
    "typer": "cli",
    "plotly": "analysis",
    "gguf": "export",
    "llama_cpp": "export",
}

TORCH_FREE = ("config", "records", "paths", "errors", "redaction", "environment", "plan", "compose", "history", "app")


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def source_files() -> list[Path]:
    """``rglob`` doesn't go through the symlink to analysis/, which is a room like any other."""
    files = {*PACKAGE.rglob("*.py"), *(PACKAGE / "analysis").rglob("*.py")}
    return [file for file in sorted(files) if room_of(file) not in ELSEWHERE]


def imported_names(file: Path) -> Iterator[str]:
    """Dotted names of all imports, those inside functions included: a cycle hidden in a function is a cycle."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the room they come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms() -> dict[str, set[str]]:
    rooms = {room_of(file) for file in source_files()}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for file in source_files():
        for name in imported_names(file):
            parts = name.split(".")
            if parts[0] == "qlora_exp":
                target = parts[1] if len(parts) > 1 and parts[1] in rooms | ELSEWHERE else "__init__"
                if target != room_of(file):
                    found[room_of(file)].add(target)
    return found


def test_every_room_imports_only_what_the_plan_allows() -> None:
    wrong = {
        room: sorted(targets - MAY_IMPORT.get(room, set()) - FOUNDATION)
        for room, targets in imported_rooms().items()
        if targets - MAY_IMPORT.get(room, set()) - FOUNDATION
    }
    assert wrong == {}, "imports against the plan; change the plan in this file, docs and README together with the code"


def test_every_room_is_in_the_plan() -> None:
    assert set(imported_rooms()) <= set(MAY_IMPORT)


def test_the_plan_has_no_cycle() -> None:
    assert len(list(TopologicalSorter(MAY_IMPORT).static_order())) >= len(MAY_IMPORT)


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_a_library_has_one_importer(library: str) -> None:
    importers = {
        room_of(file) for file in source_files() for name in imported_names(file) if name.split(".")[0] == library
    }
    assert importers <= {ONE_IMPORTER[library]}


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after ``code``."""
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_command_line_loads_neither_torch_nor_mlflow() -> None:
    heavy = {"torch", "mlflow", "transformers", "hydra", "omegaconf", "numpy", "rich"}
    assert not heavy & loaded_after("import qlora_exp.cli")


def test_the_analysis_loads_no_library_of_training_or_searching() -> None:
    modules = [file.stem for file in (PACKAGE / "analysis").glob("*.py") if file.stem != "__init__"]
    code = "\n".join(f"import qlora_exp.analysis.{module}" for module in modules)
    assert "rank" in modules
    assert not {"torch", "mlflow", "transformers", "trl", "optuna", "hydra"} & loaded_after(code)


def test_rooms_for_arithmetic_and_records_do_not_load_torch() -> None:
    code = "\n".join(f"import qlora_exp.{room}" for room in TORCH_FREE)
    assert not {"torch", "mlflow", "transformers"} & loaded_after(code)


def test_what_a_trial_imports_leaves_out_the_compiler_that_nothing_uses() -> None:
    assert "torch._inductor.compile_fx" not in loaded_after("import qlora_exp.one_run")


def test_what_is_imported_to_stay_is_left_alone_by_the_collector_and_nothing_that_comes_later() -> None:
    code = (
        "import gc\nfrom qlora_exp.app import import_to_stay\n"
        "import_to_stay(['colorsys'])\nfirst = gc.get_freeze_count()\n"
        "later = [[] for _ in range(1000)]\nimport_to_stay(['colorsys'])\n"
        "assert gc.isenabled() and 0 < first >= gc.get_freeze_count(), (first, gc.get_freeze_count())"
    )
    assert "colorsys" in loaded_after(code)


def test_a_module_that_cannot_be_imported_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_to_stay(["qlora_exp.nowhere"])
    assert gc.isenabled()


def test_opening_a_study_does_not_load_what_only_importances_need() -> None:
    assert "sklearn" not in loaded_after("import qlora_exp.study.store")
