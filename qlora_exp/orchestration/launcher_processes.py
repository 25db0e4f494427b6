"""Worker processes that a launcher such as joblib keeps: they end when their launcher is gone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator

CHECK_SECONDS = 1.0
_idle = threading.Event()
_watched = threading.Lock()


@contextlib.contextmanager
def launcher_job() -> Iterator[None]:
    """Context of one launcher job.

    joblib's processes wait five minutes for another job, even if the process that started them was killed. Such a
    process ends here once its own job is done.
    """
    if not multiprocessing.current_process().name.startswith("LokyProcess"):
        yield
        return
    _idle.clear()
    if _watched.acquire(blocking=False):
        threading.Thread(target=_exit_after_parent, args=(os.getppid(),), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        _idle.set()


def _exit_after_parent(parent: int) -> None:
    while os.getppid() == parent or not _idle.is_set():
        time.sleep(CHECK_SECONDS)
    os._exit(0)
