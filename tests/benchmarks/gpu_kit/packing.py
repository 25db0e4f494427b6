"""Wheels for a GPU machine without a network: downloaded here, small enough to be sent with the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from gpu_kit.runner import EXIT_FAILED, EXIT_OK, ROOT

SETS = {
    "A": "trl peft bitsandbytes datasets dill multiprocess evaluate hydra-core omegaconf antlr4-python3-runtime optuna "
    "colorlog alembic Mako SQLAlchemy cmaes httpx2 httpcore2 truststore typer annotated-doc pydantic pydantic_core "
    "annotated-types",
    "B": "mlflow-skinny mlflow-tracing cryptography cffi pycparser cachetools databricks-sdk google-auth pyasn1 "
    "pyasn1_modules fastapi starlette uvicorn GitPython gitdb smmap importlib_metadata zipp opentelemetry-api "
    "opentelemetry-proto opentelemetry-sdk opentelemetry-semantic-conventions python-dotenv sqlparse",
    "C": "transformers huggingface_hub tokenizers",
    "L": "liger-kernel",
}
"""A: what training needs besides torch, transformers and accelerate. B: MLflow, in its small form. C: the transformers
that pyproject.toml asks for. L: Liger's kernels."""
PINNED_HERE = {"opentelemetry-semantic-conventions": "0.66b2", "pyasn1_modules": "0.4.2", "liger-kernel": "0.8.5"}
"""Versions of what constraints.txt lacks."""
WITHOUT_WHEEL = ("antlr4-python3-runtime",)
"""Built here: the registry has the source only."""
PLATFORMS = ("2_34", "2_28", "2_27", "2_24", "2_17")
MIB = 2**20
LARGE_BYTES = 500_000
"""Of a wheel that is compressed anew. LZMA saves a tenth of all, but takes a minute."""
KEPT_LIBRARIES = re.compile(r"_(cuda130|cpu)\.so$")
LIBRARIES = re.compile(r"libbitsandbytes_\w+\.so$")


def pack(folder: Path, sets: str, limit_mib: float, python: str = "3.12") -> int:
    """Download the wheels of ``sets`` into ``folder``, make them smaller, and print all sizes.

    Returns exit code 1 if the wheels and the repository's files together have more than ``limit_mib`` MiB.
    """
    unknown = sorted(set(sets) - set(SETS))
    if unknown:
        print(f"error: no set {', '.join(unknown)}: choose from {', '.join(SETS)}, e.g. --sets ACL")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    download(folder, requirements(sets), python)
    for wheel in folder.glob("*.whl"):
        if wheel.stat().st_size > LARGE_BYTES:
            shrink(wheel)
    wheels = sorted(folder.glob("*.whl"), key=lambda file: -file.stat().st_size)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / MIB:8.2f} MiB  {wheel.name}")
    packed, own = sum(wheel.stat().st_size for wheel in wheels), repository_bytes()
    together = (packed + own) / MIB
    print(f"{packed / MIB:8.2f} MiB  {len(wheels)} wheels")
    print(f"{own / MIB:8.2f} MiB  the repository's files")
    print(f"{together:8.2f} MiB  together, of {limit_mib:g}")
    if together > limit_mib:
        print(f"error: {together - limit_mib:.2f} MiB too much: leave a set out of --sets, or raise --limit-mib")
        return EXIT_FAILED
    return EXIT_OK


def requirements(sets: str) -> list[str]:
    """Return the pinned requirements of ``sets``, with the versions of constraints.txt."""
    pins = dict(PINNED_HERE)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, separator, version = line.partition("==")
        if separator:
            pins[name.strip()] = version.strip()
    by_name = {_normal(name): version for name, version in pins.items()}
    names = " ".join(SETS[one] for one in sets).split()
    return [f"{name}=={by_name[_normal(name)]}" for name in names]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(folder: Path, pinned: list[str], python: str) -> None:
    flags = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    flags += [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    flags += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64", "--platform=any"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = [one for one in pinned if one.startswith(WITHOUT_WHEEL)]
    subprocess.run(
        [*pip, "download", *flags, "-d", str(folder), *(one for one in pinned if one not in built)], check=True
    )
    for one in built:
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), one], check=True)


def shrink(wheel: Path) -> None:
    """Compress ``wheel`` with LZMA, which pip reads, and leave out bitsandbytes' libraries for other versions of CUDA
    than 13.0 and for other vendors."""
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w") as new:
        dropped = {name for name in old.namelist() if LIBRARIES.search(name) and not KEPT_LIBRARIES.search(name)}
        for name in old.namelist():
            if name in dropped:
                continue
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = data.splitlines(keepends=True)
                data = b"".join(line for line in lines if line.split(b",")[0].decode() not in dropped)
            new.writestr(old.getinfo(name), data, zipfile.ZIP_LZMA)
    smaller.replace(wheel)


def repository_bytes() -> int:
    """Return the bytes of the files that git tracks here."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    files = (ROOT / name.decode() for name in names if name)
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def install_here(site: Path, wheels: Path | None) -> None:
    """Make this checkout usable without an installation: install ``wheels`` into ``site``, and say there which version
    of qlora-exp this is (the product asks for its installed version)."""
    site.mkdir(parents=True, exist_ok=True)
    if wheels is not None:
        files = sorted(str(file) for file in wheels.glob("*.whl"))
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        subprocess.run([*pip, *options, *files], check=True)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = site / f"qlora_exp-{project['version']}.dist-info"
    metadata.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(text, encoding="utf-8")
