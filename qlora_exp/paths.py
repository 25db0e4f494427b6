"""Paths: conf/, sweeps/ and the embedded assets (in a checkout and in a wheel), and the files of runs and studies."""

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
    """Return ``text`` as a safe file name of lower-case ASCII letters, digits, ``-`` and ``_``."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9_]+", "-", ascii_text.lower()).strip("-")[:limit].strip("-") or "unnamed"


def study_name(text: str) -> str:
    """Return a study's name in Unicode NFC, the form in which names are compared: é may be one code point or two."""
    return unicodedata.normalize("NFC", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Make an output folder and its parents. Raises :class:`ConfigError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        what = f"the output folder can't be made: {error.strerror}"
        raise ConfigError(what, str(folder), "output_root=FOLDER, one that you may write to") from None


@dataclass(frozen=True)
class OutputPaths:
    """The folders under ``output_root``, and the tracking database next to it."""

    root: Path

    @classmethod
    def of(cls, output_root: str | Path) -> OutputPaths:
        return cls(Path(output_root).expanduser().absolute())

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """Cached scores of base models (before tuning) and of baselines, by fingerprint."""
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
        """Return the study's folder. If the name is no valid folder name, a digest keeps two names apart.

        Example: ``My study!`` is in ``my-study-1a2b3c4d``. Earlier versions added no digest; their studies keep their
        folders.
        """
        name = study_name(name)
        plain = StudyPaths(self.studies / slug(name))
        digested = StudyPaths(self.studies / f"{slug(name)}-{_digest(name)}")
        owner = plain.name
        if slug(name) == name:
            return digested if owner not in (None, name) else plain
        return plain if owner == name and digested.name != name else digested


@dataclass(frozen=True)
class StudyPaths:
    """One study's files. Its trials are runs, with folders under ``runs/``."""

    folder: Path

    @property
    def outputs(self) -> OutputPaths:
        """The output root that the study's folder is in."""
        return OutputPaths(self.folder.parent.parent)

    @property
    def name(self) -> str | None:
        """The study's name in ``study.json``; ``None`` if that file is missing or can't be read."""
        try:
            raw = json.loads(self.spec.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        name = raw.get("name") if isinstance(raw, dict) else None
        return study_name(name) if isinstance(name, str) else None

    @property
    def spec(self) -> Path:
        """The study's specification (axes, sampler, objectives): ``study.types.StudySpec`` as JSON."""
        return self.folder / "study.json"

    @property
    def lock(self) -> Path:
        """Lock held briefly while a process claims, requeues or enqueues a trial."""
        return self.folder / "lock"

    @property
    def created(self) -> Path:
        """Marker that the storage has held the study. If the storage then lacks the study, it was lost."""
        return self.folder / "created"

    @property
    def orchestrator(self) -> Path:
        """The process that orchestrates the study now."""
        return self.folder / "orchestrator.json"

    @property
    def stop(self) -> Path:
        """A request to stop: ``gracefully`` or ``now``."""
        return self.folder / "stop.json"

    @property
    def workers(self) -> Path:
        """One JSON file per worker: the state of each of its trial processes."""
        return self.folder / "workers"

    @property
    def threads(self) -> Path:
        """CPU threads per trial process, fixed by the study's first worker: equal counts give bit-equal results."""
        return self.folder / "threads.json"

    @property
    def logs(self) -> Path:
        """Output of the trial processes."""
        return self.folder / "logs"

    @property
    def summary(self) -> Path:
        """What the tracking store got last: status, best trials, all trials."""
        return self.folder / "summary.json"

    @property
    def ladder(self) -> Path:
        """Results of rank doubling, one object per ladder."""
        return self.folder / "ladder.json"

    @property
    def tracking_state(self) -> Path:
        """The id of the study's parent run in the tracking store, and whether everything was delivered."""
        return self.folder / "tracking.json"

    @property
    def tracking_lock(self) -> Path:
        """Lock held briefly while a process looks up or creates the study's parent run."""
        return self.folder / "tracking.lock"

    @property
    def delivery_lock(self) -> Path:
        """Lock held by the process that delivers the study's status to the tracking store."""
        return self.folder / "delivery.lock"


@dataclass(frozen=True)
class RunPaths:
    """One run's files, one property each."""

    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / "record.json"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def lock(self) -> Path:
        """Lock held by the process that executes the run; it names the process. The file stays after the lock ends."""
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
        """The default folder of ``qlora-exp export``."""
        return self.folder / "export"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def trained(self) -> Path:
        """Result of a finished training (``Trained`` as JSON); deleted when the run is complete."""
        return self.folder / "trained.json"

    @property
    def tracking_state(self) -> Path:
        """The run's id in the tracking store, and whether everything was delivered."""
        return self.folder / "tracking.json"

    @property
    def tracking_lock(self) -> Path:
        """Lock held by the process that delivers this run to the tracking store."""
        return self.folder / ".tracking.lock"

    def items(self, moment: str, split: str) -> Path:
        """Per-item results (Parquet); ``moment`` is ``before``, ``after`` or ``few_shot_DRAW``."""
        return self.folder / f"items_{moment}_{split}.parquet"
