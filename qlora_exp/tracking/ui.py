"""The MLflow UI over a run's store: how to start it, and the address that compares runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

from qlora_exp.errors import TrackingError

DEFAULT_PORT = 5000

VIEW_KEY = "qlora-exp"
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
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps({"selectedColumns": VIEW_COLUMNS}),
}
"""Without them the UI takes an experiment for one about agents, and its runs table shows neither settings nor scores.
:func:`runs_url` opens the view."""


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
    query = f"viewStateShareKey={VIEW_KEY}&workflowType=machine_learning"
    return f"{address.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"


def compare_url(address: str, experiment_id: str, mlflow_run_ids: Sequence[str]) -> str:
    """The UI's comparison of these runs (parallel coordinates, table of parameters and metrics)."""
    runs = quote(json.dumps(list(mlflow_run_ids), separators=(",", ":")))
    experiments = quote(json.dumps([experiment_id]))
    return f"{address.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"
