"""Training checkpoints with checksums, so that an incomplete or damaged one is never resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_exp.records.files import write_json

CHECKSUM_FILE = "checksums.json"
EARLIER_CHECKSUM_FILE = "seal.json"
"""The name in checkpoints of version 1."""


class ChecksumCallback(TrainerCallback):  # type: ignore[misc]
    """After each save: deletes ``training_args.bin`` (a pickle that can hold access tokens), then writes checksums."""

    def __init__(self, resume_state: Any) -> None:
        self.resume_state = resume_state
        """``resume_state() -> dict``: counters that a resumed training continues."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "README.md").unlink(missing_ok=True)
            write_json(
                folder / CHECKSUM_FILE,
                {"step": state.global_step, "files": _digests(folder), "resume_state": self.resume_state()},
            )


def newest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint whose files match their checksums, and its counters; ``None`` if there is none."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(checkpoints, key=step_of, reverse=True):
        try:
            earlier = path / EARLIER_CHECKSUM_FILE
            file = earlier if earlier.exists() else path / CHECKSUM_FILE
            checksums = json.loads(file.read_text(encoding="utf-8"))
            if checksums["files"] == _digests(path):
                return path, checksums["carried" if file == earlier else "resume_state"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def step_of(checkpoint: Path) -> int:
    """Return a checkpoint folder's optimizer step."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_checkpoint_bytes(folder: Path) -> int | None:
    """Return bytes of the newest valid checkpoint on disk; ``None`` if there is none."""
    newest = newest_valid(folder)
    return sum(file.stat().st_size for file in newest[0].rglob("*") if file.is_file()) if newest else None


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUM_FILE, EARLIER_CHECKSUM_FILE)
    )
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
