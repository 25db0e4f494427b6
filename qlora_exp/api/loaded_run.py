"""A finished run in Python: its record, and on request its items, its training curve and its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_curve, read_record
from qlora_exp.records.method_name import is_lora
from qlora_exp.records.types import RunRecord

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

CURVE_COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "gradient_norm", "validation_loss")
SHOWN_SCORES = ("accuracy", "exact_match", "loss")


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run's record and its files. The record's fields can be read directly: ``run.status``, ``run.scores``."""

    record: RunRecord
    paths: RunPaths

    @classmethod
    def of(cls, paths: RunPaths) -> LoadedRun:
        return cls(read_record(paths.record), paths)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "record":  # copy and pickle ask before the fields are set
            raise AttributeError(name)
        return getattr(self.record, name)

    def __repr__(self) -> str:
        before, after = self.record.scores.before, self.record.scores.after
        parts = [f"{self.record.run_id}: {self.record.status}"]
        for name in SHOWN_SCORES:
            if (value := getattr(after, name, None)) is not None:
                old = getattr(before, name, None)
                parts.append(f"{name} {f'{old:.3f} → ' if old is not None else ''}{value:.3f}")
        if self.record.failure is not None:
            parts.append(f"{self.record.failure.kind} in {self.record.failure.phase}")
        return f"<{', '.join(parts)}>"

    def items(self, split: str | None = None) -> pd.DataFrame:
        """Return one row a scored item: prompt, right answer, the base model's and the tuned model's answers, losses.

        Args:
            split: ``validation`` or ``test``; by default test if the run was scored on it.

        The columns are those of :func:`~qlora_exp.records.items.read_items`.

        Raises:
            qlora_exp.errors.RecordError: the run has no items of this split.
        """
        import pandas as pd

        from qlora_exp.records.items import read_items

        return pd.DataFrame(read_items(self.paths.folder, split))

    def curve(self) -> pd.DataFrame:
        """Return one row a logged step: step, tokens and seconds so far, loss and validation loss in nats per token."""
        import pandas as pd

        return pd.DataFrame(read_curve(self.paths.curve), columns=list(CURVE_COLUMNS))

    def plot_curve(self) -> Any:
        """Return the training curve as a plotly figure, with the validation loss if it was measured.

        Raises:
            qlora_exp.errors.AnalysisError: the run logged no step.
        """
        from qlora_exp.analysis.figures import CurveLine, learning_curves, plotly_figure
        from qlora_exp.errors import AnalysisError

        curve, lines = self.curve(), []
        for name, column in (("training", "loss"), ("validation", "validation_loss")):
            drawn = curve[curve[column] > 0]
            if len(drawn):
                rank = int(self.record.config["lora"]["r"]) if is_lora(self.record.config) else 0
                lines.append(CurveLine(name, name, rank, drawn["step"].tolist(), drawn[column].tolist()))
        figure = learning_curves(lines, "loss, nats per token (lower is better)")
        if figure is None:
            raise AnalysisError("the run logged no training step", str(self.paths.curve), f"status: {self.status}")
        return plotly_figure(figure)

    def model(self, device: str = "auto") -> tuple[Any, PreTrainedTokenizerBase]:
        """Load the tuned model as it was trained: the base in the run's quantization, with the adapter.

        Args:
            device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

        Returns:
            The PEFT model in eval mode and the tokenizer. ``model.generate`` stops where the run's answers ended.

        Raises:
            qlora_exp.errors.ModelError: the base can't be loaded or has changed since the run, or there is no adapter.
        """
        from qlora_exp.runs.process import silence_libraries

        silence_libraries()  # before the libraries are imported
        from qlora_exp.export.tuned_model import load_tuned_model

        return load_tuned_model(self.record, self.paths, device)
