"""Commands for this machine and the tracking store: ``doctor``, ``calibrate``, ``sync``, ``ui``, ``version``."""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import AsJson, OutputRoot, Overrides, complete_runs, examples, outputs_of
from qlora_exp.errors import TrackingError
from qlora_exp.version import __version__

if TYPE_CHECKING:
    from qlora_exp.records.types import RunRecord


def add_to(app: typer.Typer) -> None:
    app.command(
        "doctor",
        epilog=examples(
            "qlora-exp doctor",
            "qlora-exp doctor --no-self-test",
            "qlora-exp doctor sweeps=demo                           # is there disk for this sweep?",
            "qlora-exp doctor --cluster hydra/launcher=slurm workers.jobs=2",
        ),
    )(doctor)
    app.command("calibrate", epilog=examples("qlora-exp calibrate", "qlora-exp calibrate --threads 4"))(calibrate)
    app.command(
        "sync",
        epilog=examples("qlora-exp sync", "qlora-exp sync --uri http://127.0.0.1:5000"),
    )(sync)
    app.command(
        "ui",
        epilog=examples("qlora-exp ui", "qlora-exp ui --port 5001", "qlora-exp ui 3f2a 91e3     # these side by side"),
    )(ui)
    app.command("version", epilog=examples("qlora-exp version"))(version)


def doctor(
    overrides: Overrides = None,
    self_test: Annotated[
        bool, typer.Option(help="Also measure this machine's speed, and test the gradients of every quantization mode")
    ] = True,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Check only the cluster of the launcher: workers.jobs=N small jobs report"),
    ] = False,
    as_json: AsJson = False,
    output_root: OutputRoot = None,
) -> int:
    """Check this machine: print ok, or the problem and its fix.

    With overrides it also checks whether the runs fit on the disk. With --cluster it starts workers and checks what
    they share: files, locks, versions, clocks, storage, tracking. The exit code is 1 if there is a problem.
    """
    from qlora_exp.config.enums import DeviceChoice
    from qlora_exp.runs.process import hide_other_gpus, set_threads, silence_libraries

    hide_other_gpus(DeviceChoice.auto)
    set_threads(None)
    silence_libraries()
    from qlora_exp.doctor.machine_checks import checks
    from qlora_exp.doctor.sweep_disk import sweep_disk

    problems = 0
    if cluster:
        from qlora_exp.doctor.cluster_checks import cluster_checks

        every_check = cluster_checks(overrides or [], output_root)
    else:
        disk_check = [sweep_disk(overrides, output_root)] if overrides else []
        every_check = itertools.chain(disk_check, checks(outputs_of(output_root).root, self_test))
    if as_json:
        from qlora_exp.cli.tables import print_json

        results = {True: "ok", False: "problem", None: "not checked"}
        rows = [{"check": c.name, "result": results[c.ok], "detail": c.detail, "fix": c.fix} for c in every_check]
        print_json(rows)
        return 1 if any(row["result"] == "problem" for row in rows) else 0
    for check in every_check:
        problems += check.ok is False
        result = {True: "ok", False: "PROBLEM", None: "–"}[check.ok]
        fix = f"\n{'':26}do: {check.fix}" if check.fix else ""
        print(f"{result:8}{check.name:18}{check.detail}{fix}", flush=True)
    print("no problem found" if not problems else f"{problems} problem{'s' if problems != 1 else ''}")
    return 1 if problems else 0


def calibrate(
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of torch threads; the throughput is stored for each number")
    ] = None,
) -> int:
    """Measure this machine's training throughput in each quantization mode, for plans (ten seconds).

    The results are stored in the user's cache folder, by device and number of threads.
    """
    from qlora_exp.config.enums import DeviceChoice
    from qlora_exp.estimate.calibration import calibrate_device, rates_file
    from qlora_exp.runs.process import hide_other_gpus, set_threads, silence_libraries
    from qlora_exp.system.environment import probe

    hide_other_gpus(DeviceChoice.auto)
    set_threads(threads)
    silence_libraries()
    for mode, flops_per_second in calibrate_device(probe()):
        print(f"{mode:6}{flops_per_second / 1e9:10.1f} GFLOP/s", flush=True)
    print(f"stored in {rates_file()}")
    return 0


def sync(
    uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Log to this MLflow store instead of the one in each run's configuration"),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Log to this experiment instead of each run's own")
    ] = None,
    output_root: OutputRoot = None,
) -> int:
    """Log the runs to MLflow that it has not received.

    A run whose process died is marked as interrupted.
    """
    from qlora_exp.runs.process import silence_libraries
    from qlora_exp.tracking.sync import sync_runs

    silence_libraries()
    report = sync_runs(outputs_of(output_root).root, uri, experiment)
    counts = {
        "delivered": report.delivered,
        "already there": report.already,
        "studies delivered": report.studies,
        "still running": report.running,
        "running on another host": report.elsewhere,
        "deleted in MLflow": report.deleted,
        "marked as interrupted": report.repaired,
        "failed": report.failed,
    }
    print(", ".join(f"{len(ids)} {name}" for name, ids in counts.items() if ids) or "there is nothing to deliver")
    for run_id, reason in report.failed.items():
        print(f"{run_id}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def ui(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Runs to compare, as for show; default: the best of the newest study, or the newest runs",
            autocompletion=complete_runs,
            show_default=False,
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1")] = 5000,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no page in the browser")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Serve the runs in the MLflow UI, on 127.0.0.1, print the addresses of its pages, and open one in the browser.

    The page is the named runs side by side, or the list of all runs. Without a terminal or a display, and over SSH,
    none is opened. End it with Ctrl-C.
    """
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run, read_runs, tracking_uri
    from qlora_exp.tracking.browser import has_browser, open_when_served
    from qlora_exp.tracking.state import read_state
    from qlora_exp.tracking.ui import answers_url, charts_url, compare_url, runs_url, ui_command, ui_environment

    outputs = outputs_of(output_root)
    records = read_runs(outputs)[0]
    compared = [read_record(find_run(run, outputs).record) for run in runs or []]
    command = ui_command(tracking_uri(records), outputs.mlflow_database, port)
    _check_free(port)
    address = f"http://127.0.0.1:{port}"
    print(f"MLflow UI: {address}", flush=True)
    page = address
    state = read_state(outputs.run(records[-1].run_id)) if records else None
    if state is not None and state.experiment_id is not None:
        states = [read_state(outputs.run(record.run_id)) for record in compared or _worth_comparing(records)]
        ids = [found.mlflow_run_id for found in states if found is not None and found.mlflow_run_id is not None]
        pages = {
            "all runs, with settings and scores:": runs_url(address, state.experiment_id),
            "charts of quality, memory and speed:": charts_url(address, state.experiment_id),
            "answers, item by item:": answers_url(address, state.experiment_id),
        }
        if len(ids) > 1:
            pages[f"{len(ids)} runs side by side:"] = compare_url(address, state.experiment_id, ids)
        page = list(pages.values())[-1 if runs and len(ids) > 1 else 0]
        # An address on a line without other text: terminals make it a link, also where they break the line.
        print("\n".join(f"{what}\n{url}" for what, url in pages.items()), flush=True)
    if not no_browser and has_browser(os.environ, sys.stdout.isatty()):
        open_when_served(page)
    # The server replaces this process, so that it gets the signals, and its exit code is ours.
    os.execve(command[0], command, ui_environment())


def _worth_comparing(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the best completed runs of the newest run's study, best first; the newest runs if that has fewer than two.

    If some were scored on test, only these: scores of two splits can't be compared.
    """
    from qlora_exp.records.flat_rows import RISING_SCORES, flat_run
    from qlora_exp.records.types import Status
    from qlora_exp.tracking.ui import MAX_COMPARED

    completed = [record for record in records if record.status is Status.COMPLETED]
    study = records[-1].trial.study if records[-1].trial is not None else None
    done = [record for record in completed if record.trial is not None and record.trial.study == study]
    done = [record for record in done if record.scores.test is not None] or done
    if len(done) < 2:
        return completed[-MAX_COMPARED:]

    def order(record: RunRecord) -> tuple[bool, float]:
        row = flat_run(record)
        value = row["score_after"]
        if value is None:
            return True, 0.0
        return False, -value if row["score"] in RISING_SCORES else value

    return sorted(done, key=order)[:MAX_COMPARED]


def version() -> int:
    """Print the version."""
    print(f"qlora-exp {__version__}")
    return 0


def _check_free(port: int) -> None:
    """Raise TrackingError if another process uses the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            what = f"port {port} is not available: {error.strerror}"
            raise TrackingError(what, "--port", f"qlora-exp ui --port {port + 1}") from None
