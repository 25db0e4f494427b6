"""The house plan, held by tests: which room may import which, who alone imports a library, and what must stay light."""

from __future__ import annotations

import ast
import functools
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_exp
from qlora_exp.runs.process import import_and_freeze_gc

PACKAGE = Path(qlora_exp.__file__).resolve().parent
NO_ROOMS = {"conf", "sweeps"}
"""Symlinks to top-level folders."""

ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("formatting", "paths", "progress"),
    ("records",),
    ("config",),
    ("analysis", "data", "system"),
    ("architecture",),
    ("evaluation", "quantizers", "study", "tracking"),
    ("models",),
    ("rank_doubling",),
    ("training",),
    ("estimate",),
    ("runs",),
    ("export", "orchestration"),
    ("doctor", "inspection", "plugins", "ptq"),
    ("cli",),
    ("api",),
    ("__init__", "__main__", "embedded"),
)
"""From the ground up: a room imports only from rooms above it in this list, never from one beside it."""

MAINTAINERS = ("analysis/error_rates/", "architecture/shipped/build.py", "embedded/build/")
"""In the repository, not in the wheel: nothing else may import it, and it may import everything."""

NOT_EMPTY = {"__init__.py", "cli/__init__.py", "models/__init__.py"}
"""The public functions; the command line itself; the order of imports. Every other name has one place to come from."""

ONE_IMPORTER: dict[str, str | tuple[str, ...]] = {
    "bitsandbytes": "models",
    "peft": "models",
    "liger_kernel": "models",
    "datasets": "data",
    "trl": "training",
    "evaluate": "evaluation",
    "mlflow": "tracking",
    "optuna": "study",
    "typer": "cli",
    "plotly": "analysis",
    "pandas": ("__init__", "api"),
    "gguf": ("export", "models"),
    "llama_cpp": "export",
}

MAX_LINES = 520
"""Lines of the longest file: more than that has two concepts, or is read by nobody."""
LONGER: dict[str, str] = {}
"""File → why it may have more lines."""

SAME_NAME: dict[str, str] = {
    "few_shot.py": "data/ draws the worked examples, evaluation/ scores the base model with them",
    "files.py": "data/ reads rows, records/ reads and writes records",
    "items.py": "data/: rows ready for training; records/: what a run's models answered",
    "messages.py": "data/: of conversations; orchestration/: between a worker and its trial process",
    "schema.py": "config/: of configurations; records/: of records",
    "sources.py": "data/: where rows come from; models/: where weights come from",
    "study.py": "study/: the study; tracking/: the study as a run of MLflow",
    "types.py": "records/ and study/ each have a file of nothing but dataclasses",
}
"""Name of a file in two rooms → what tells the two apart. A file of cli/ is named after its command, even if it is
called elsewhere."""

TORCH_FREE = (
    *("architecture.run_plan", "config.compose", "config.schema", "errors", "paths", "records.files", "records.find"),
    *("records.redaction", "records.types", "runs.entry_points", "runs.execute", "system.environment"),
)


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def source_files() -> list[Path]:
    """``rglob`` doesn't go through the symlink to analysis/, which is a room like any other."""
    files = {*PACKAGE.rglob("*.py"), *(PACKAGE / "analysis").rglob("*.py")}
    return [file for file in sorted(files) if room_of(file) not in NO_ROOMS]


@functools.cache
def imported_names(file: Path) -> tuple[str, ...]:
    """Dotted names of all imports, those inside functions included: a cycle hidden in a function is a cycle."""
    return tuple(_imported_names(file))


def _imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the room they come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(file: Path) -> set[str]:
    rooms = {room for level in ORDER for room in level}
    parts = [name.split(".") for name in imported_names(file)]
    ours = {name[1] if len(name) > 1 and name[1] in rooms else "__init__" for name in parts if name[0] == "qlora_exp"}
    return ours - {room_of(file)}


def against_the_order(file: Path) -> set[str]:
    level = {room: number for number, level in enumerate(ORDER) for room in level}
    return {room for room in imported_rooms(file) if level[room] >= level[room_of(file)]}


def is_maintainers(file: Path) -> bool:
    return name_of(file).startswith(MAINTAINERS)


def test_every_room_imports_only_what_the_plan_allows() -> None:
    wrong = {
        name_of(file): sorted(rooms)
        for file in source_files()
        if not is_maintainers(file)
        if (rooms := against_the_order(file))
    }
    assert wrong == {}, "imports against the order of the rooms"


def test_every_room_is_in_the_plan() -> None:
    assert {room_of(file) for file in source_files()} == {room for level in ORDER for room in level}


def test_what_is_not_in_the_wheel_is_imported_by_nothing_that_is() -> None:
    modules = tuple("qlora_exp." + name.removesuffix(".py").rstrip("/").replace("/", ".") for name in MAINTAINERS)
    found = [
        (name_of(file), name)
        for file in source_files()
        if not is_maintainers(file)
        for name in imported_names(file)
        if f"{name}.".startswith(tuple(f"{module}." for module in modules))
    ]
    assert found == []
    assert all((PACKAGE / name).exists() for name in MAINTAINERS)


def test_no_file_is_too_long_to_read() -> None:
    lines = {name_of(file): file.read_text(encoding="utf-8").count("\n") for file in source_files()}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert long.keys() == LONGER.keys(), f"{long}: split them, or take what is short enough off LONGER"


def test_a_file_name_stands_in_one_room() -> None:
    rooms: dict[str, set[str]] = {}
    for file in source_files():
        if file.name not in ("__init__.py", "__main__.py") and room_of(file) != "cli" and not is_maintainers(file):
            rooms.setdefault(file.name, set()).add(room_of(file))
    twice = {name: sorted(rooms) for name, rooms in rooms.items() if len(rooms) > 1}
    assert twice.keys() == SAME_NAME.keys(), f"{twice}: rename one, or take what is no longer so off SAME_NAME"


def test_a_room_has_no_second_door() -> None:
    """A name that ``__init__.py`` passed on would have two places to be imported from, and load all of its room."""
    full = {name_of(file) for file in source_files() if file.name == "__init__.py" and file.stat().st_size}
    assert {name for name in full if not name.startswith("plugins/")} == NOT_EMPTY


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_a_library_has_one_importer(library: str) -> None:
    importers = {
        room_of(file) for file in source_files() for name in imported_names(file) if name.split(".")[0] == library
    }
    allowed = ONE_IMPORTER[library]
    assert importers <= set((allowed,) if isinstance(allowed, str) else allowed)


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
    code = "\n".join(f"import qlora_exp.{module}" for module in TORCH_FREE)
    assert not {"torch", "mlflow", "transformers"} & loaded_after(code)


def test_what_a_trial_imports_leaves_out_the_compiler_that_nothing_uses() -> None:
    assert "torch._inductor.compile_fx" not in loaded_after("import qlora_exp.runs.pipeline")


def test_what_is_imported_to_stay_is_left_alone_by_the_collector_and_nothing_that_comes_later() -> None:
    code = (
        "import gc\nfrom qlora_exp.runs.process import import_and_freeze_gc\n"
        "import_and_freeze_gc(['colorsys'])\nfirst = gc.get_freeze_count()\n"
        "later = [[] for _ in range(1000)]\nimport_and_freeze_gc(['colorsys'])\n"
        "assert gc.isenabled() and 0 < first >= gc.get_freeze_count(), (first, gc.get_freeze_count())"
    )
    assert "colorsys" in loaded_after(code)


def test_a_module_that_cannot_be_imported_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_and_freeze_gc(["qlora_exp.nowhere"])
    assert gc.isenabled()


def test_opening_a_study_does_not_load_what_only_importances_need() -> None:
    assert "sklearn" not in loaded_after("import qlora_exp.study.study")
