"""Outputs as a version left them: ``golden/v1/outputs.tar.xz`` is what every later version must read.

A new ``schema_version`` gets a store of its own, written once by ``python -m tests.contracts.store v2``; the older ones
stay as they are.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tests.contracts import runs
from tests.contracts.calling import call, called_in, command_line, environment
from tests.contracts.golden_files import GOLDEN, ROOT

VERSIONS = sorted(folder.name for folder in GOLDEN.glob("v[0-9]*"))
UNFINISHED = f"run -m {runs.SLEEP} training.sleep_seconds=0.4 sweep.name=half lora.r=1,2,3,4,5,6 sweep.sampler=grid"
FINISHED_BEFORE = 2


def unpacked(version: str, folder: Path) -> Path:
    """The store of ``version`` in ``folder``: ``outputs/``, ``mlflow.db`` and ``mlartifacts/``."""
    with tarfile.open(GOLDEN / version / "outputs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def make(folder: Path) -> None:
    """A run, sweeps, sleeping runs by how they end, and a study that Ctrl-C ended in its third trial."""
    for name, called in runs.make(folder).items():
        if called.code not in (0, 1):
            raise SystemExit(f"{name}: {called.err}")
    interrupt(folder)


def interrupt(folder: Path) -> None:
    command = command_line(*runs.words(UNFINISHED))
    with (folder / "half.log").open("w") as log:
        sweep = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)
        while sweep.poll() is None and finished(folder) < FINISHED_BEFORE:
            time.sleep(0.1)
        sweep.send_signal(signal.SIGINT)
        sweep.wait()
    (folder / "half.log").unlink()


def finished(folder: Path) -> int:
    with called_in(folder):
        return call("trials", "half", "--csv").out.count(",COMPLETED,")


def pack(folder: Path, file: Path) -> None:
    """What the commands left, without locks and the cache, and without the places of this checkout."""
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w:xz", preset=9) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or name.startswith("cache/") or name.endswith(".lock") or "/cache/" in name:
                continue
            data = path.read_bytes()
            if path.suffix in (".json", ".log", ".yaml", ".jsonl", ".csv"):
                for place in (str(ROOT), sys.prefix):
                    data = data.replace(place.encode(), b"/checkout")
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(data))


def main(version: str) -> int:
    file = GOLDEN / version / "outputs.tar.xz"
    if file.exists():
        print(f"{file} is what an earlier version left: it is never written again", file=sys.stderr)
        return 2
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")
    folder = Path(tempfile.gettempdir()) / f"qlora-exp-{version}"
    folder.mkdir()
    make(folder)
    pack(folder, file)
    shutil.rmtree(folder)
    print(f"{file}: {file.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
