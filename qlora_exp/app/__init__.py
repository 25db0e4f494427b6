"""Joins configuration, run and tracking; what every door (Hydra, the verbs, Python) calls."""

from qlora_exp.app.beginning import display_name
from qlora_exp.app.doors import config_from_plain, end_killed_run, run_and_tell, summary
from qlora_exp.app.execution import check_may_start, execute
from qlora_exp.app.process import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    Ended,
    exit_code_of,
    import_to_stay,
    quiet_libraries,
    set_threads,
    tell,
    use_one_gpu,
)

__all__ = [
    "EXIT_COMPLETED",
    "EXIT_INTERRUPTED",
    "EXIT_RUN_FAILED",
    "EXIT_WRONG_INPUT",
    "Ended",
    "check_may_start",
    "config_from_plain",
    "display_name",
    "end_killed_run",
    "execute",
    "exit_code_of",
    "import_to_stay",
    "quiet_libraries",
    "run_and_tell",
    "set_threads",
    "summary",
    "tell",
    "use_one_gpu",
]
