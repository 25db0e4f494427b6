"""The MLflow UI of a run's store: the command that starts it, and the addresses of its views."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

from qlora_exp.errors import TrackingError
from qlora_exp.system.environment import NO_TELEMETRY

DEFAULT_PORT = 5000

VIEW_KEY = "qlora-exp"
CHARTS_VIEW_KEY = "qlora-exp-charts"
MAX_COMPARED = 5
"""Runs of a comparison that nobody chose: more don't fit on a screen."""
VIEW_COLUMNS = (
    "attributes.`Duration`",
    "tags.`qlora_exp.best`",
    "params.`model.variant`",
    "params.`quantization.mode`",
    "params.`lora.r`",
    "metrics.`score_before/accuracy`",
    "metrics.`score/accuracy`",
    "metrics.`score/loss_per_item`",
    "metrics.`memory/peak_train_mib`",
    "metrics.`speed/train_tokens_per_second`",
)
VIEW_PARAMS = (
    "model.family",
    "model.variant",
    "quantization.mode",
    "targets",
    "lora.r",
    "lora.alpha",
    "training.learning_rate",
)
VIEW_PLOTS = {
    "Axes and accuracy": ("speed/train_tokens_per_second", "score/accuracy"),
    "Axes and loss": ("speed/train_tokens_per_second", "score/loss_per_item"),
    "Axes and memory": ("memory/peak_train_mib", "score/loss_per_item"),
}
"""Plots of all axes against a few metrics; the last metric colours the lines. A plot leaves out runs that lack one of
its metrics, and is hidden if all do. So metrics that only some tasks or machines have are in separate plots."""

VIEW_FIGURES = "Quality, memory, speed"
VIEW_BARS = ("score/accuracy", "score/loss_per_item", "memory/peak_train_mib", "speed/train_tokens_per_second")


VIEW_SECTIONS = {**dict.fromkeys(VIEW_PLOTS, (1, 400)), VIEW_FIGURES: (2, 300)}
"""Heading → charts a row, height in pixels. Each plot has its own section: the UI gives plots no titles."""

CHARTS = [
    *(
        {
            "type": "PARALLEL",
            "uuid": name,
            "metricSectionId": name,
            "selectedParams": VIEW_PARAMS,
            "selectedMetrics": metrics,
            "showAllRuns": True,
        }
        for name, metrics in VIEW_PLOTS.items()
    ),
    *(
        {
            "type": "BAR",
            "uuid": key,
            "displayName": key,
            "metricSectionId": VIEW_FIGURES,
            "metricKey": key,
            "runsCountToCompare": 20,
        }
        for key in VIEW_BARS
    ),
]
"""The first charts: all axes against quality, memory and speed, then a chart for each of these."""

TABLE_VIEW = {"selectedColumns": VIEW_COLUMNS}
CHARTS_VIEW = TABLE_VIEW | {
    # Unless it sorts by time, the UI shows trials next to their study instead of folded beneath it.
    "orderByKey": "metrics.`score/loss_per_item`",
    "orderByAsc": True,
    "runsHiddenMode": "FIRST_20_RUNS",
    "compareRunCharts": [chart | {"isGenerated": False, "deleted": False} for chart in CHARTS],
    "compareRunSections": [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": columns, "cardHeight": height}
        for name, (columns, height) in VIEW_SECTIONS.items()
    ],
    "isAccordionReordered": True,
}
"""Columns of the runs table and first charts of the comparison, in the format of the UI's shared views."""

VIEW_TAGS = {
    f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(TABLE_VIEW),
    f"mlflow.sharedViewState.{CHARTS_VIEW_KEY}": json.dumps(CHARTS_VIEW, separators=(",", ":")),
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"} | VIEW_TAGS
"""Without them the UI takes the experiment for one about agents: its runs table shows neither settings nor scores, and
its charts are one per metric, by name. :func:`runs_url` and :func:`charts_url` open the views."""


def ui_command(config_uri: str | None, database: Path, port: int = DEFAULT_PORT) -> list[str]:
    """Return the command that serves the UI on 127.0.0.1, for ``tracking.uri`` (``None``: for ``database``).

    Run it with :func:`ui_environment`.

    Raises:
        TrackingError: the URI is a server's, which has its own UI; there are no tracked runs; the port is invalid.
    """
    if config_uri is not None and urlsplit(config_uri).scheme in ("http", "https", "databricks"):
        raise TrackingError("the tracking server has its own UI", config_uri, f"open {config_uri} in a browser")
    if config_uri is None and not database.is_file():
        raise TrackingError("there are no tracked runs yet", str(database), "qlora-exp run, or qlora-exp sync")
    if not 1 <= port <= 65535:
        raise TrackingError(f"invalid port {port}", "--port", f"1024 … 65535, e.g. {DEFAULT_PORT}")
    folder = database.parent
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", config_uri or f"sqlite:///{database}"),
        # For experiments created in the UI; those of qlora-exp name their folder themselves.
        *("--artifacts-destination", (folder / "mlartifacts").as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]


def ui_environment() -> dict[str, str]:
    """Return this process's environment for the UI: no telemetry, no background job workers."""
    return {**os.environ, **NO_TELEMETRY, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def runs_url(address: str, experiment_id: str) -> str:
    """Return the address of the table of all runs, with the columns that distinguish them."""
    return _view_url(address, experiment_id, VIEW_KEY)


def charts_url(address: str, experiment_id: str) -> str:
    """Return the address of the charts of all runs: first the axes against quality, memory and speed."""
    return f"{_view_url(address, experiment_id, CHARTS_VIEW_KEY)}&compareRunsMode=CHART"


def answers_url(address: str, experiment_id: str) -> str:
    """Return the address of the runs' answers, item by item (:mod:`qlora_exp.tracking.answers_table`)."""
    return f"{_view_url(address, experiment_id, VIEW_KEY)}&compareRunsMode=ARTIFACT"


def compare_url(address: str, experiment_id: str, mlflow_run_ids: Sequence[str]) -> str:
    """Return the address of the page that puts settings and scores of these runs side by side."""
    runs, experiments = (
        quote(json.dumps(list(ids), separators=(",", ":"))) for ids in (mlflow_run_ids, [experiment_id])
    )
    query = f"runs={runs}&experiments={experiments}&workflowType=machine_learning"
    return f"{address.rstrip('/')}/#/compare-runs?{query}"


def _view_url(address: str, experiment_id: str, view: str) -> str:
    query = f"viewStateShareKey={view}&workflowType=machine_learning"
    return f"{address.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"
