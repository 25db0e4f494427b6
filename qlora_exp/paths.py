"""Where things are: conf/, sweeps/ and embedded assets in a checkout and in a wheel, and a run's artefacts."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
CONF = (PACKAGE / "conf").resolve()
SWEEPS = (PACKAGE / "sweeps").resolve()
EMBEDDED = PACKAGE / "embedded"


def slug(text: str, limit: int = 64) -> str:
    """``text`` as a file name that stays inside its folder: lower-case ASCII letters, digits, ``-`` and ``_``."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9_]+", "-", ascii_text.lower()).strip("-")[:limit].strip("-") or "unnamed"


def study_name(text: str) -> str:
    """A study's name in the one form in which it is compared: an é typed as one character or as two is the same."""
    return unicodedata.normalize("NFC", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Make an output folder and those above it. Raises :class:`ConfigError` where that can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        what = f"the output folder can't be made: {error.strerror}"
        raise ConfigError(what, str(folder), "output_root=FOLDER, one that you may write to") from None


@dataclass(frozen=True)
class OutputPaths:
    """What lies under ``output_root``, and the tracking database beside it."""

    root: Path

    @classmethod
    def of(cls, output_root: str | Path) -> OutputPaths:
        return cls(Path(output_root).expanduser().absolute())

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """Scores of untouched bases and baselines, by fingerprint: they don't change, so they are computed once."""
        return self.root / "cache"

    @property
    def mlflow_database(self) -> Path:
        return self.root.parent / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root.parent / "mlartifacts"

    @property
    def optuna_database(self) -> Path:
        return self.root / "optuna.db"

    @property
    def studies(self) -> Path:
        return self.root / "studies"

    def run(self, run_id: str) -> RunPaths:
        return RunPaths(self.runs / slug(run_id, limit=120))

    def study(self, name: str) -> StudyPaths:
        """The folder of the study of this name. A name that a folder can't have as it is gets a digest of the name: two
        names never share a folder. Earlier versions gave none; a study of theirs keeps its folder."""
        name = study_name(name)
        plain = StudyPaths(self.studies / slug(name))
        digested = StudyPaths(self.studies / f"{slug(name)}-{_digest(name)}")
        held_by = plain.name
        if slug(name) == name:
            return digested if held_by not in (None, name) else plain
        return plain if held_by == name and digested.name != name else digested


@dataclass(frozen=True)
class StudyPaths:
    """One study's files; its trials are runs of their own."""

    folder: Path

    @property
    def name(self) -> str | None:
        """The study's name, as ``study.json`` has it; ``None`` where there is no such file, or it can't be read."""
        try:
            raw = json.loads(self.spec.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        name = raw.get("name") if isinstance(raw, dict) else None
        return study_name(name) if isinstance(name, str) else None

    @property
    def spec(self) -> Path:
        """What the study asks and how it searches: ``study.types.StudySpec`` as JSON."""
        return self.folder / "study.json"

    @property
    def lock(self) -> Path:
        """Held for moments: whoever asks, requeues or enqueues."""
        return self.folder / "lock"

    @property
    def created(self) -> Path:
        """There once the storage has held the study: a storage without it has then lost it."""
        return self.folder / "created"

    @property
    def orchestrator(self) -> Path:
        """Which process orchestrates the study now."""
        return self.folder / "orchestrator.json"

    @property
    def stop(self) -> Path:
        """A request to stop: ``gracefully`` or ``now``."""
        return self.folder / "stop.json"

    @property
    def workers(self) -> Path:
        """One JSON file per worker: what each of its hosts is doing."""
        return self.folder / "workers"

    @property
    def threads(self) -> Path:
        """CPU threads of each trial host, fixed by the study's first worker: results are bit-equal at equal counts."""
        return self.folder / "threads.json"

    @property
    def logs(self) -> Path:
        """What trial hosts printed."""
        return self.folder / "logs"

    @property
    def summary(self) -> Path:
        """What was last told to the tracking store: status, best trials, all trials."""
        return self.folder / "summary.json"

    @property
    def ladder(self) -> Path:
        """What rank doubling found, one object a ladder."""
        return self.folder / "ladder.json"

    @property
    def tracking_state(self) -> Path:
        """What the tracking store has of the study's parent run: its run id there, and whether all was delivered."""
        return self.folder / "tracking.json"

    @property
    def tracking_lock(self) -> Path:
        """Held for moments: whoever looks for the study's parent run, or makes it."""
        return self.folder / "tracking.lock"

    @property
    def delivery_lock(self) -> Path:
        """Held by the process that tells the tracking store how the study stands."""
        return self.folder / "delivery.lock"


@dataclass(frozen=True)
class RunPaths:
    """One run's artefacts, one property each."""

    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / "record.json"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def lock(self) -> Path:
        """Held by the process that executes the run, and names it. The file stays: only who holds it counts."""
        return self.folder / ".lock"

    @property
    def curve(self) -> Path:
        """Training curve, one JSON object per logged step: step, loss, learning_rate, gradient_norm, tokens."""
        return self.folder / "curve.jsonl"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def export(self) -> Path:
        """Where ``qlora-exp export`` writes unless it is told otherwise."""
        return self.folder / "export"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def trained(self) -> Path:
        """What the training did, once it has ended; until the run is complete."""
        return self.folder / "trained.json"

    @property
    def tracking_state(self) -> Path:
        """What the tracking store has of this run: its run id there, and whether all was delivered."""
        return self.folder / "tracking.json"

    @property
    def tracking_lock(self) -> Path:
        """Held by the process that tells the tracking store of this run."""
        return self.folder / ".tracking.lock"

    def items(self, moment: str, split: str) -> Path:
        """Per-item results (Parquet); ``moment`` is ``before``, ``after`` or ``few_shot_DRAW``."""
        return self.folder / f"items_{moment}_{split}.parquet"
