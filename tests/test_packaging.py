"""Wheel and sdist hold everything that runs, and nothing else: the installed command line never leans on a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST_WHEEL_BYTES = 30_000_000
NOT_COPIED = (".git", ".venv", "outputs", "multirun", "mlartifacts", "__pycache__", "dist", ".*_cache")


def build(source: Path, target: Path, kind: str) -> Path:
    """Build a wheel or an sdist of ``source`` with the installed build backend, without a network."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(target), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    return next(target.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, symlinks kept: the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("tree") / "source"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(folder), str(wheel)], check=True, capture_output=True, text=True)
    return folder


def run_installed(installed: Path, cwd: Path, *command: str) -> str:
    """Run Python elsewhere with the installed copy first on the path. ``-P``: not the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-P", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def files_of(wheel: Path) -> dict[str, int]:
    """Name → checksum of the wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.is_dir()}


def test_code_configuration_and_assets_come_from_the_installed_folder(installed: Path, tmp_path: Path) -> None:
    code = """
import qlora_exp, qlora_exp.analysis, qlora_exp.cli
from qlora_exp.cli.data import STARTER
from qlora_exp.paths import CONF, EMBEDDED, PACKAGE, SWEEPS
print(qlora_exp.__file__, qlora_exp.analysis.__file__, qlora_exp.cli.__file__, STARTER, sep="\\n")
print(PACKAGE, CONF / "config.yaml", SWEEPS, EMBEDDED / "base" / "model.safetensors", sep="\\n")
print(EMBEDDED / "instruct" / "model.safetensors", EMBEDDED / "task" / "test.jsonl", sep="\\n")
print(EMBEDDED / "SHA256SUMS")
"""
    places = [Path(line) for line in run_installed(installed, tmp_path, "-c", code).splitlines()]
    assert len(places) == 11
    assert [place for place in places if not place.is_relative_to(installed)] == []
    assert [place for place in places if not place.exists()] == []


def test_the_installed_command_line_works_from_anywhere(installed: Path, tmp_path: Path) -> None:
    assert "all_linear" in run_installed(installed, tmp_path, "-m", "qlora_exp.cli", "ls", "targets")
    told = run_installed(installed, tmp_path, "-m", "qlora_exp", "lora.r=4", "--cfg", "job")
    assert "r: 4" in told
    run_installed(installed, tmp_path, "-m", "qlora_exp.cli", "init", "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "sweeps",
        "task.jsonl",
        "task.yaml",
    ]


def test_plugins_are_installed_under_hydras_own_namespace(installed: Path) -> None:
    """Hydra finds plugins in the top-level ``hydra_plugins``, a namespace package: an ``__init__.py`` of ours there
    would hide everybody else's."""
    assert not (installed / "hydra_plugins" / "__init__.py").exists()
    assert [path.name for path in (installed / "hydra_plugins").iterdir()] == ["qlora_exp_sweeper"]


def test_the_installed_application_has_our_sweeper_and_finds_our_sweeps(installed: Path, tmp_path: Path) -> None:
    told = run_installed(installed, tmp_path, "-m", "qlora_exp", "sweeps=demo", "--cfg", "all")
    assert "_target_: hydra_plugins.qlora_exp_sweeper.QloraOptunaSweeper" in told
    assert "model.variant: base,instruct" in told
    where = "import hydra_plugins.qlora_exp_sweeper as plugin; print(plugin.__file__)"
    assert Path(run_installed(installed, tmp_path, "-c", where).strip()).is_relative_to(installed)


def test_the_wheel_is_small_and_holds_neither_tests_nor_symlinks(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        links = [entry.filename for entry in archive.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]
        assert links == []
    names = list(files_of(wheel))
    assert [name for name in names if {"tests", "conftest.py"} & set(name.split("/")) or "/test_" in name] == []
    assert [name for name in names if name.split("/")[0] in ("conf", "sweeps", "analysis")] == []
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []
    assert [name for name in names if "/build/" in name or "/error_rates/" in name or name.endswith("/build.py")] == []


def test_the_wheel_of_the_sdist_equals_the_wheel_of_the_tree(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive.getmembers() if member.issym() or member.islnk()] == []
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    again = build(source, tmp_path / "again", "wheel")
    assert files_of(again) == files_of(wheel)


def test_the_sdist_brings_what_a_clone_has(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
    }
    assert wanted <= names
    assert {"tests/test_packaging.py", "qlora_exp/embedded/build/__main__.py"} <= names


def test_every_pin_lies_within_the_declared_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in map(Requirement, [*project["dependencies"], *optional]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} but {name}=={pins[name]}"
    assert [name for name in pins if name.startswith(("nvidia-cu", "triton", "qlora"))] == []
    assert "+" not in pins["torch"], "a local version label is found at one index only"


def test_the_installed_report_has_its_templates_and_draws(installed: Path, tmp_path: Path) -> None:
    code = (
        "from qlora_exp.analysis.report_content import ReportContent, Section, value_table;"
        "from qlora_exp.analysis.report_content import to_html;"
        "section = Section('s', 'S', figures=({'data': [], 'layout': {}},));"
        "content = ReportContent('t', None, ('h',), None, (section,), value_table(('run',), [('r',)]), 'now');"
        "print(len(to_html(content)))"
    )
    assert int(run_installed(installed, tmp_path, "-c", code)) > 1_000_000
