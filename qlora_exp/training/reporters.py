"""``tracking.also``: a run's curve and scores in TensorBoard, Weights & Biases or Trackio, by transformers' callbacks.

They come in addition to MLflow and never end a training: the first error of a callback is noted, and the run continues
without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_exp.config.schema import Config, TrackingConfig
from qlora_exp.errors import ConfigError
from qlora_exp.formatting import flatten
from qlora_exp.paths import RunPaths
from qlora_exp.records.redaction import redact, redact_text
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord, Scores
from qlora_exp.training.outcome import Observer

FINAL_PREFIXES = {
    "before": "eval_base_",
    "after": "eval_tuned_",
    "test_before": "test_base_",
    "test": "test_tuned_",
}
"""Field of the record's scores → beginning of the names that callbacks get. They turn ``eval_`` into ``eval/``."""


def check_reporters(tracking: TrackingConfig) -> None:
    """Raise :class:`ConfigError` if a library of ``tracking.also`` isn't installed. Names are checked with the
    configuration."""
    for name in tracking.also:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, e.g. of W&B's files, is no library
            raise ConfigError(f"{name} isn't installed", f"tracking.also={name}", f"pip install {name}")


class Reporter:
    """Passes a training's events to one of transformers' callbacks, until it raises.

    It is a :class:`transformers.TrainerCallback` only in that it has the methods that are called: this module doesn't
    import transformers.
    """

    def __init__(self, name: str, callback: Any, observer: Observer) -> None:
        self.name, self._callback, self._observer = name, callback, observer
        self._last_event: tuple[Any, Any, Any, dict[str, Any]] | None = None
        self.problem: str | None = None

    def __getattr__(self, event: str) -> Any:
        """Any other event of a callback: nothing happens. Some callbacks would upload checkpoints."""
        if event.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(event)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_event = args, state, control, {"model": kwargs.get("model")}
        self._call("on_train_begin", **self._last_event[3])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._call("on_log", logs=dict(logs or {}), **(self._last_event[3] if self._last_event else {}))

    def finish(self, record: RunRecord) -> None:
        """Log the scores of a record, close the callback's files, and end its run."""
        if self._last_event is None:  # no training in this process
            return
        scores = final_scores(record)
        if scores and self.name == "tensorboard":
            step = self._last_event[1].global_step
            self._guard(lambda: self._write_hparams(record, scores, step))
        elif scores:
            self.on_log(*self._last_event[:3], logs=scores)
        self._call("on_train_end", **self._last_event[3])
        if self.name == "wandb":  # its callback leaves the run open, and the next run would continue it
            with contextlib.suppress(Exception):
                self._callback._wandb.finish()
        self._last_event = None

    def _write_hparams(self, record: RunRecord, scores: dict[str, float], step: int) -> None:
        """Write the scores as points, and with the settings for TensorBoard's HParams page, which compares runs."""
        settings = {key: value for key, value in flatten(redact(record.config)) if key.startswith(HPARAMS)}
        plain = {key: value if isinstance(value, str | int | float) else str(value) for key, value in settings.items()}
        metrics = {name.replace("_", "/", 1): value for name, value in scores.items()}
        self._callback.tb_writer.add_hparams(plain, metrics, run_name=".", global_step=step)

    def _call(self, event: str, **kwargs: Any) -> None:
        if self._last_event is not None:
            args, state, control, _ = self._last_event
            self._guard(lambda: getattr(self._callback, event)(args, state, control, **kwargs))

    def _guard(self, action: Any) -> None:
        """Run ``action`` unless an earlier one has failed; a failure is noted, whatever its type: every library raises
        its own."""
        if self.problem is not None:
            return
        try:
            action()
        except Exception as error:
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.problem = redact_text(line)[:300]
            self._observer.note(f"tracking.also: {self.name} failed, and the run continues without it: {self.problem}")


HPARAMS = ("model.family", "model.variant", "model.path", "quantization.mode", "lora.", "targets.", "training.", "seed")
"""Beginnings of the settings on TensorBoard's HParams page."""


def final_scores(record: RunRecord) -> dict[str, float]:
    """Return the record's scores before and after tuning by the names that callbacks get, e.g.
    ``eval_tuned_accuracy``."""
    found: dict[str, float] = {}
    for field, prefix in FINAL_PREFIXES.items():
        scores: Scores | None = getattr(record.scores, field)
        for name, value in to_dict(scores).items() if scores is not None else ():
            if isinstance(value, int | float) and name not in ("items", "max_new_tokens"):
                found[prefix + name] = float(value)
    return found


@contextlib.contextmanager
def reporting(config: Config, paths: RunPaths, observer: Observer) -> Iterator[tuple[Reporter, ...]]:
    """Yield the reporters of ``tracking.also``, with their files in the run's folder; none imports nothing."""
    if not config.tracking.also:
        yield ()
        return
    places = {
        "TENSORBOARD_LOGGING_DIR": str(paths.tensorboard),
        "WANDB_DIR": str(paths.folder),
        "WANDB_PROJECT": os.environ.get("WANDB_PROJECT", config.tracking.experiment),
    }
    before = {name: os.environ.get(name) for name in places}
    os.environ.update(places)
    reporters: list[Reporter] = []
    try:
        reporters += _reporters(config.tracking.also, observer)
        yield tuple(reporters)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reporters(names: Sequence[str], observer: Observer) -> Iterator[Reporter]:
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            [callback_class] = get_reporting_integration_callbacks([name])
            yield Reporter(name, callback_class(), observer)
        except Exception as error:
            observer.note(
                f"tracking.also: {name} can't start, and the run continues without it: {redact_text(str(error))}"
            )
