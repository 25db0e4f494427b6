"""Paths: conf/, sweeps/ and the embedded assets (in a checkout and in a wheel), and the files of runs and studies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
CONF = (PACKAGE / "conf").resolve()
SWEEPS = (PACKAGE / "sweeps").resolve()
EMBEDDED = PACKAGE / "embedded"


def user_cache() -> Path:
    """Return the folder for what this machine's runs share: ``qlora-exp`` in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qlora-exp"


def slug(text: str, limit: int = 64) -> str:
    """Return ``text`` as a safe file name of lower-case ASCII letters, digits, ``-`` and ``_``."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9_]+", "-", ascii_text.lower()).strip("-")[:limit].strip("-") or "unnamed"


def study_name(text: str) -> str:
    """Return a study's name in Unicode NFC, the form in which names are compared: é may be one code point or two."""
    return unicodedata.normalize("NFC", text)


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
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        digested = StudyPaths(self.studies / f"{slug(name)}-{digest}")
        owner = plain.name
        if slug(name) == name:
            return digested if owner not in (None, name) else plain
        return plain if owner == name and digested.name != name else digested


class Child:
    """A file or folder in the ``folder`` of the object that has it as an attribute."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, paths: StudyPaths | RunPaths, kind: type) -> Path:
        return paths.folder / self.name


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

    spec = Child("study.json")
    """The study's specification (axes, sampler, objectives): ``study.types.StudySpec`` as JSON."""
    lock = Child("lock")
    """Lock held briefly while a process claims, requeues or enqueues a trial."""
    created = Child("created")
    """Marker that the storage has held the study. If the storage then lacks the study, it was lost."""
    orchestrator = Child("orchestrator.json")
    """The process that orchestrates the study now."""
    stop = Child("stop.json")
    """A request to stop: ``gracefully`` or ``now``."""
    workers = Child("workers")
    """One JSON file per worker: the state of each of its trial processes."""
    threads = Child("threads.json")
    """CPU threads per trial process, fixed by the study's first worker: on a CPU, equal counts give bit-equal
    results."""
    logs = Child("logs")
    """Output of the trial processes."""
    summary = Child("summary.json")
    """What the tracking store got last: status, best trials, all trials."""
    ladder = Child("ladder.json")
    """Results of rank doubling, one object per ladder."""
    best = Child("best.yaml")
    """The best trial's configuration, for ``qlora-exp run --from``."""
    confirmation = Child("confirm.json")
    """Only of a study that ``qlora-exp confirm`` started: its finalists, its seeds, and its answer."""
    tracking_state = Child("tracking.json")
    """The id of the study's parent run in the tracking store, and whether everything was delivered."""
    tracking_lock = Child("tracking.lock")
    """Lock held briefly while a process looks up or creates the study's parent run."""
    delivery_lock = Child("delivery.lock")
    """Lock held by the process that delivers the study's status to the tracking store."""


@dataclass(frozen=True)
class RunPaths:
    """One run's files."""

    folder: Path

    record = Child("record.json")
    config = Child("config.yaml")
    lock = Child(".lock")
    """Lock held by the process that executes the run; it names the process. The file stays after the lock ends."""
    curve = Child("curve.jsonl")
    """Training curve, one JSON object per logged step: step, loss, learning_rate, gradient_norm, tokens."""
    adapter = Child("adapter")
    tuned = Child("tuned")
    """What methods other than LoRA trained: ``tuned.safetensors``."""
    tensorboard = Child("tensorboard")
    """TensorBoard's event files, with ``tracking.also=[tensorboard]``."""
    export = Child("export")
    """The default folder of ``qlora-exp export``."""
    quantization = Child("quantization.json")
    """Results of ``qlora-exp quantize``."""
    checkpoints = Child("checkpoints")
    trained = Child("trained.json")
    """Result of a finished training (``Trained`` as JSON); deleted when the run is complete."""
    tracking_state = Child("tracking.json")
    """The run's id in the tracking store, and whether everything was delivered."""
    tracking_lock = Child(".tracking.lock")
    """Lock held by the process that delivers this run to the tracking store."""

    @property
    def weights(self) -> Path:
        """The folder with what the run trained: ``adapter``, or ``tuned`` if that is there."""
        return self.tuned if self.tuned.is_dir() else self.adapter

    def items(self, moment: str, split: str) -> Path:
        """Per-item results (Parquet); ``moment`` is ``before``, ``after`` or ``few_shot_DRAW``."""
        return self.folder / f"items_{moment}_{split}.parquet"

    def texts(self, split: str) -> Path:
        """The items' prompts (Parquet), with the few answers that were generated only to be shown. Not written with
        ``evaluation.keep_texts=false``."""
        return self.folder / f"texts_{split}.parquet"
