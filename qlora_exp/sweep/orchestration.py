"""Who orchestrates a study: one process at a time, unless another shares the work; and how it is asked to stop."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator

from qlora_exp.environment import alive, process_identity
from qlora_exp.errors import RecordError
from qlora_exp.paths import StudyPaths, make_folder
from qlora_exp.records import Process, from_dict, write_json
from qlora_exp.standing import running


@contextlib.contextmanager
def orchestrating(paths: StudyPaths, name: str, join: bool) -> Iterator[bool]:
    """Hold the study, or share it; yields whether this process is the one that holds it.

    Raises:
        RecordError: a living process holds it, and this one doesn't want to share.
    """
    from filelock import FileLock

    make_folder(paths.folder)
    me = process_identity()
    with FileLock(paths.lock):
        holder = orchestrator(paths)
        if holder is not None and not join:
            raise RecordError(
                f"study {name} is being worked on",
                f"process {holder.pid} ({paths.orchestrator})",
                "wait for it, share the work (--join, or sweep.join=true), or qlora-exp stop it",
            )
        if holder is None:
            write_json(paths.orchestrator, me)
            paths.stop.unlink(missing_ok=True)
    try:
        yield holder is None
    finally:
        if holder is None:
            paths.orchestrator.unlink(missing_ok=True)


def orchestrator(paths: StudyPaths) -> Process | None:
    """The process that orchestrates the study now; ``None`` where none does, or it has died. One on another machine
    counts as living: it can't be seen from here."""
    try:
        holder = from_dict(Process, json.loads(paths.orchestrator.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecordError):
        return None
    return None if alive(holder) is False else holder


def request_stop(paths: StudyPaths, name: str, now: bool) -> str:
    """Ask the workers to stop, ``gracefully`` or ``now`` (also where the first has been asked for before); which.

    Raises:
        RecordError: nobody works on the study.
    """
    if orchestrator(paths) is None and not running(paths):
        raise RecordError(
            "nobody works on the study", f"study {name}", f"qlora-exp resume {shlex.quote(name)} goes on with it"
        )
    mode = "now" if now or paths.stop.is_file() else "gracefully"
    write_json(paths.stop, {"mode": mode})
    return mode
