"""The MLflow UI over a run's store: how to start it, and the address that compares runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from qlora_exp.errors import TrackingError

DEFAULT_PORT = 5000

VIEW_KEY = "qlora-exp"
CHARTS_VIEW_KEY = "qlora-exp-charts"
VIEW_COLUMNS = (
    "attributes.`Duration`",
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
"""Plots of all axes against a few metrics, the last of which colours the lines. A plot leaves out runs that lack one
of its metrics and hides where all do, so that what only some tasks or machines have gets a plot of its own."""

VIEW_FIGURES = "Quality, memory, speed"
VIEW_BARS = ("score/accuracy", "score/loss_per_item", "memory/peak_train_mib", "speed/train_tokens_per_second")


def _charts() -> list[dict[str, Any]]:
    """The charts that come first: all axes against quality, memory and speed, then each of these alone."""
    plots = [
        {
            "type": "PARALLEL",
            "uuid": name,
            "metricSectionId": name,
            "selectedParams": VIEW_PARAMS,
            "selectedMetrics": metrics,
            "showAllRuns": True,
        }
        for name, metrics in VIEW_PLOTS.items()
    ]
    bars = [
        {
            "type": "BAR",
            "uuid": key,
            "displayName": key,
            "metricSectionId": VIEW_FIGURES,
            "metricKey": key,
            "runsCountToCompare": 20,
        }
        for key in VIEW_BARS
    ]
    return [chart | {"isGenerated": False, "deleted": False} for chart in (*plots, *bars)]


def _section(name: str, columns: int, height_pixels: int) -> dict[str, Any]:
    """Charts under a heading, ``columns`` side by side. A plot has one of its own: the UI gives plots no titles."""
    shown = {"display": True, "isReordered": True, "columns": columns, "cardHeight": height_pixels}
    return {"uuid": name, "name": name} | shown


TABLE_VIEW = {"selectedColumns": VIEW_COLUMNS}
CHARTS_VIEW = TABLE_VIEW | {
    # In any order but that of time the UI shows trials beside their study instead of folded away beneath it.
    "orderByKey": "metrics.`score/loss_per_item`",
    "orderByAsc": True,
    "runsHiddenMode": "FIRST_20_RUNS",
    "compareRunCharts": _charts(),
    "compareRunSections": [*(_section(name, 1, 400) for name in VIEW_PLOTS), _section(VIEW_FIGURES, 2, 300)],
    "isAccordionReordered": True,
}
"""Columns of the runs table and first charts of the comparison, as the UI stores a view that a person shares."""

VIEW_TAGS = {
    f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(TABLE_VIEW),
    f"mlflow.sharedViewState.{CHARTS_VIEW_KEY}": json.dumps(CHARTS_VIEW, separators=(",", ":")),
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"} | VIEW_TAGS
"""Without them the UI takes an experiment for one about agents, its runs table shows neither settings nor scores, and
its charts are one per metric, by name. :func:`runs_url` and :func:`charts_url` open the views."""


def ui_command(config_uri: str | None, database: Path, port: int = DEFAULT_PORT) -> list[str]:
    """The command that serves the UI on 127.0.0.1, for ``tracking.uri`` (``None``: ``database``).

    Run it with :func:`ui_environment`. A server's URI raises :class:`TrackingError`: it has a UI of its own.
    """
    if config_uri is not None and urlsplit(config_uri).scheme in ("http", "https", "databricks"):
        raise TrackingError("the tracking server has its own UI", config_uri, f"open {config_uri} in a browser")
    if config_uri is None and not database.is_file():
        raise TrackingError("there are no tracked runs yet", str(database), "qlora-exp run, or qlora-exp sync")
    if not 1 <= port <= 65535:
        raise TrackingError(f"{port} is no port", "--port", f"1024 … 65535, e.g. {DEFAULT_PORT}")
    folder = database.parent
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", config_uri or f"sqlite:///{database}"),
        # For experiments made in the UI; ours name their folder themselves.
        *("--artifacts-destination", (folder / "mlartifacts").as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]


def ui_environment() -> dict[str, str]:
    """This process's environment for the UI: no telemetry, no background job workers."""
    return os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def runs_url(address: str, experiment_id: str) -> str:
    """The UI's table of all runs, with the columns that tell them apart."""
    return _view_url(address, experiment_id, VIEW_KEY)


def charts_url(address: str, experiment_id: str) -> str:
    """The UI's charts of all runs: the axes against quality, memory and speed come first."""
    return f"{_view_url(address, experiment_id, CHARTS_VIEW_KEY)}&compareRunsMode=CHART"


def compare_url(address: str, experiment_id: str, mlflow_run_ids: Sequence[str]) -> str:
    """The UI's comparison of these runs, every parameter and metric side by side. Its plot opens on the parameters
    and metrics that the UI picks by name, and no address can say otherwise: :func:`charts_url` opens on the axes."""
    runs = quote(json.dumps(list(mlflow_run_ids), separators=(",", ":")))
    experiments = quote(json.dumps([experiment_id]))
    return f"{address.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


def _view_url(address: str, experiment_id: str, view: str) -> str:
    query = f"viewStateShareKey={view}&workflowType=machine_learning"
    return f"{address.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"
