"""A study in Python: its trials, its best run, its answer, its plots and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_exp.api.loaded_run import LoadedRun
from qlora_exp.errors import AnalysisError, RecordError, nearest
from qlora_exp.paths import StudyPaths
from qlora_exp.rank_doubling.ladder import proposer_of
from qlora_exp.records.upgrade import upgrade_answers
from qlora_exp.study.spec import read_spec, storage_of
from qlora_exp.study.types import StudySpec, TrialRow

if TYPE_CHECKING:
    import pandas as pd

    from qlora_exp.study.study import Study


@dataclass(frozen=True, repr=False)
class LoadedStudy:
    """A study's specification and its files; trials are read when they are asked for, so a running study can be
    watched."""

    spec: StudySpec
    paths: StudyPaths

    @classmethod
    def of(cls, paths: StudyPaths) -> LoadedStudy:
        return cls(read_spec(paths), paths)

    def __repr__(self) -> str:
        counts = self._opened().counts()
        return f"<study {self.spec.name}: {counts.finished} of {counts.total} trials done>"

    def trials(self) -> pd.DataFrame:
        """Return one row a trial: number, status, the objectives' values, the axes' values, seconds, run id.

        The columns of objectives and axes have their keys, e.g. ``scores.after.loss`` and ``lora.r``.
        """
        import pandas as pd

        fields = [objective.split(maxsplit=1)[-1] for objective in self.spec.objectives]
        axes = [axis.key for axis in self.spec.axes]
        columns = ["number", "status", *fields, *axes, "seconds", "run_id", "failure"]
        rows = [
            {"number": row.number, "status": row.status.value if row.status is not None else row.state}
            | dict(zip(fields, row.values, strict=False))
            | {key: row.params.get(key) for key in axes}
            | {"seconds": row.seconds, "run_id": row.run_id, "failure": row.failure}
            for row in self._opened().trials()
        ]
        return pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))

    def runs(self) -> pd.DataFrame:
        """Return the trials' runs as :func:`qlora_exp.runs` does: scores, memory, seconds, cost, all settings."""
        from qlora_exp.api.frames import runs_frame

        return runs_frame(self.paths.outputs.root, self.spec.name, ())

    @property
    def best(self) -> LoadedRun | None:
        """The run of the best trial; of several objectives, the first of :meth:`best_runs`; of rank doubling, a run at
        the rank to use now. ``None``: no trial has completed."""
        return next(iter(self.best_runs()), None)

    def best_runs(self) -> list[LoadedRun]:
        """Return the best trial's run; of several objectives, the Pareto front; of rank doubling, the runs at the rank
        to use now."""
        rows: list[TrialRow] = self._opened().best()
        return [LoadedRun.of(self.paths.outputs.run(row.run_id)) for row in rows if row.run_id is not None]

    @property
    def answer(self) -> dict[str, Any] | None:
        """The content of ``ladder.json``: one object for each ladder, with its sentence, rank to use, and comparisons.
        ``None``: the study is no rank doubling, or has no answer yet.

        Raises:
            RecordError: the file can't be read.
        """
        try:
            content = json.loads(self.paths.ladder.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            hint = f"qlora-exp resume {self.spec.name} writes it again"
            raise RecordError(f"the answer can't be read: {error}", str(self.paths.ladder), hint) from None
        answers: dict[str, Any] = upgrade_answers(content)
        return answers

    def plots(self) -> dict[str, list[Any]]:
        """Return the report's plots as plotly figures, by the name of their section: ``rank``, ``curves``,
        ``tradeoffs`` …"""
        from qlora_exp.analysis.figures import plotly_figure
        from qlora_exp.cli.report import content_of

        content, _ = content_of([self.paths], self.paths.outputs)
        return {
            section.name: [plotly_figure(f) for f in section.figures] for section in content.sections if section.figures
        }

    def plot(self, section: str | None = None) -> Any:
        """Return the first plot of a section of the report, or of the report itself, as a plotly figure.

        Raises:
            AnalysisError: there is no such plot; the hint names those that exist.
        """
        plots = self.plots()
        if section is None and plots:
            return next(iter(plots.values()))[0]
        if section not in plots:
            what = "the study has no plot yet" if section is None else f"the report has no plot {section!r}"
            raise AnalysisError(what, f"study {self.spec.name}", nearest(section or "", plots))
        return plots[section][0]

    def report(self) -> Path:
        """Write ``report.html``, ``report.md`` and ``runs.csv`` into the study's folder, print the report's first line,
        and return the HTML file."""
        from qlora_exp.cli.report import report

        report([self.spec.name], output_root=str(self.paths.outputs.root))
        return self.paths.folder / "report.html"

    def _opened(self) -> Study:
        from qlora_exp.study.study import Study

        return Study.read(self.spec, self.paths, proposer_of(self.spec, self.paths), storage_of(self.spec, None))
