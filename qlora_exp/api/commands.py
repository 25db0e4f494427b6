"""``run`` and ``sweep`` from Python: the commands' work, with exceptions in place of exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_exp.api.loaded_run import LoadedRun
from qlora_exp.api.loaded_study import LoadedStudy
from qlora_exp.config.from_record import flat_overrides
from qlora_exp.errors import raise_all
from qlora_exp.paths import OutputPaths
from qlora_exp.runs.process import EXIT_INTERRUPTED, EXIT_WRONG_INPUT, errors_collected, print_error

GivenSettings = Sequence[str | Mapping[str, Any]]


def run_here(overrides: GivenSettings, quiet: bool) -> LoadedRun:
    """See :func:`qlora_exp.run`."""
    from qlora_exp.config.compose import compose_run
    from qlora_exp.runs.console import ProgressReporter
    from qlora_exp.runs.execute import execute

    config = compose_run(list(_texts(overrides)))
    if quiet:
        record = execute(config)
    else:
        with ProgressReporter() as observer:
            record = execute(config, observer)
    return LoadedRun(record, OutputPaths.of(config.output_root).run(record.run_id))


def sweep_here(arguments: GivenSettings) -> LoadedStudy:
    """See :func:`qlora_exp.sweep`."""
    from qlora_exp.config.override_errors import problems_of
    from qlora_exp.orchestration.command import study_spec
    from qlora_exp.orchestration.hydra_app import main

    texts = list(_texts(arguments))
    if texts and "=" not in texts[0]:
        texts[0] = f"sweeps={texts[0]}"
    raise_all(problems_of(texts, multirun=True))
    paths = study_spec(texts, {}).paths
    own_arguments = sys.argv
    try:
        with errors_collected() as errors:
            code = main(["--multirun", *texts])
    finally:
        sys.argv = own_arguments  # Hydra reads its arguments there
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code == EXIT_WRONG_INPUT:
        raise_all(errors)
    for error in errors:  # the study ended, and this is why it has fewer trials
        print_error(error)
    return LoadedStudy.of(paths)


def _texts(overrides: GivenSettings) -> Iterator[str]:
    for override in overrides:
        if isinstance(override, Mapping):
            yield from flat_overrides(override)
        else:
            yield override
