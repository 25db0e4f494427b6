"""Write the golden files from this checkout's code: ``python -m tests.contracts.write [NAME]...``, all without a name.

Two calls give the same bytes. The files of an earlier version under ``golden/v1/`` are never written again: they are
what that version left.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.contracts import analyses, commands, errors, plans, reading, runs, store, wheel
from tests.contracts.golden_files import GOLDEN, write

CONTRACTS: dict[str, Callable[[Path], None]] = {}
"""Name → what writes its files, given an empty folder to work in."""


def contract(writer: Callable[[Path], None]) -> Callable[[Path], None]:
    CONTRACTS[writer.__name__] = writer
    return writer


@contract
def commands_(folder: Path) -> None:
    write("commands.json", commands.commands())
    write("configuration.json", commands.configuration(folder))


@contract
def help_(_folder: Path) -> None:
    folder = GOLDEN / commands.WORDS
    folder.mkdir(parents=True, exist_ok=True)
    texts = commands.help_texts()
    for file in folder.glob("*.txt"):
        if file.stem not in texts:
            file.unlink()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


@contract
def plans_(folder: Path) -> None:
    write("plans.json", plans.plans(folder))


@contract
def errors_(folder: Path) -> None:
    write("errors.json", errors.errors(folder))


@contract
def runs_(folder: Path) -> None:
    called = runs.make(folder)
    for name, value in runs.collected(folder, called).items():
        write(name, value)


@contract
def analyses_(folder: Path) -> None:
    write("analyses.json", analyses.analyses(folder))


@contract
def wheel_(folder: Path) -> None:
    write("wheel.json", wheel.contents(folder))


def readings_of(version: str) -> Callable[[Path], None]:
    """What this code reads from an earlier version's outputs; the outputs themselves stay."""

    def writer(folder: Path) -> None:
        write(f"{version}/readings.json", reading.readings(folder / "outputs", version))
        write(f"{version}/loaded.json", reading.loaded(folder / "loaded", version))

    return writer


CONTRACTS.update({version: readings_of(version) for version in store.VERSIONS})


def main(names: list[str]) -> int:
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")
    writers = {name.rstrip("_"): writer for name, writer in CONTRACTS.items()}
    aliases = {"configuration": "commands"}
    for name in [aliases.get(name, name) for name in names] or list(writers):
        if name not in writers:
            print(f"no contract is called {name!r}; valid: {', '.join(writers)}", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            writers[name](Path(folder).resolve())
        print(f"written: {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
