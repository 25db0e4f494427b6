"""The commands of ``qlora-exp``. Each imports what it needs when it is called: ``--help`` and completion stay fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from qlora_exp.cli import confirm, data, export, imports, inspect, machine, plan, quantize, records, report, run, sweep
from qlora_exp.errors import QloraExpError, unwritable_error
from qlora_exp.system import heap
from qlora_exp.system.streams import check_arguments, show_any_text

EPILOG = (
    "Each command has its own help with examples: qlora-exp run --help. Hydra's own help: python -m qlora_exp --help"
)

HELP_GROUPS = {
    "Before a run": ("init", "import", "ls", "validate", "data", "plan", "calibrate", "doctor"),
    "Runs and studies": ("run", "rerun", "sweep", "resume", "stop", "status", "confirm"),
    "Results": ("best", "trials", "show", "diff", "report", "analyze", "export", "quantize", "inspect", "chat"),
    "MLflow and disk": ("ui", "sync", "clean"),
    "Other commands": ("version",),
}
"""Heading in ``--help`` → its commands, in the order in which they are shown."""


class Commands(TyperGroup):
    """The list of all commands in ``--help``: in groups, with whole descriptions."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group. Commands that no group names come last."""
        width = max(map(len, self.commands))
        grouped = [name for names in HELP_GROUPS.values() for name in names]
        ungrouped = tuple(name for name in self.commands if name not in grouped)
        for heading, names in {**HELP_GROUPS, "Other commands": (*HELP_GROUPS["Other commands"], *ungrouped)}.items():
            present = [name for name in names if name in self.commands]
            rows = [(name.ljust(width), _first_paragraph(self.commands[name].help)) for name in present]
            with formatter.section(heading):
                formatter.write_dl(rows)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


app = typer.Typer(
    name="qlora-exp",
    cls=Commands,
    help="Train LoRA and QLoRA configurations, measure and compare them, and find the one that is worth its cost.",
    epilog=EPILOG,
    no_args_is_help=True,
    # Plain help: Rich's panels cost more time than everything else together, and can't be searched in a log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
run.add_to(app)
sweep.add_to(app)
confirm.add_to(app)
plan.add_to(app)
data.add_to(app)
imports.add_to(app)
records.add_to(app)
report.add_to(app)
export.add_to(app)
quantize.add_to(app)
inspect.add_to(app)
machine.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (a run failed or doctor found a problem), 2 (wrong input), 130
    (interrupted)."""
    show_any_text()
    if arguments is None and sys.argv[1:2] in (["run"], ["rerun"]):
        heap.reexec_with_tunables(sys.argv[2:])
    # Shell completion ends inside app(): no error of it is handled here.
    try:
        check_arguments(sys.argv[1:] if arguments is None else arguments)
        result: Any = app(args=list(arguments) if arguments is not None else None, prog_name="qlora-exp",
                          standalone_mode=False)  # fmt: skip
        if sys.stdout is not None:
            sys.stdout.flush()  # Python's flush at exit would print a second error
    except SystemExit as ended:
        # click or Rich has handled the closed pipe of `… | head`.
        if type(sys.stdout).__name__ != "PacifyFlushWrapper" and not isinstance(ended.__context__, BrokenPipeError):
            raise
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `… | head` has closed the pipe. Without devnull, Python's flush at exit would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (QloraExpError, OSError) as error:
        problem = error if isinstance(error, QloraExpError) else unwritable_error(error)
        if problem is None:
            raise
        from qlora_exp.runs.process import print_error

        print_error(problem)
        return problem.exit_code
    except Exception as error:
        # Typer's own errors: an unknown command or option, a missing argument. Anything else is a bug: show its trace.
        if not hasattr(error, "format_message"):
            raise
        from qlora_exp.cli.typed_options import options_error

        typed_setting = options_error(error, sys.argv[1:] if arguments is None else arguments)
        if typed_setting is not None:
            print(f"error: {typed_setting}", file=sys.stderr)
            return typed_setting.exit_code
        error.show() if hasattr(error, "show") else print(error, file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
