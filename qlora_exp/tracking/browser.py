"""Opens a page in the browser once its server answers: ``python -m qlora_exp.tracking.browser URL``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Mapping
from urllib.parse import urlsplit

SERVER_SECONDS = 120.0
"""MLflow may first upgrade a database."""


def has_browser(environment: Mapping[str, str], is_terminal: bool, platform: str = sys.platform) -> bool:
    """Return whether a person at this machine would see a page that is opened: a terminal, no SSH, and a display."""
    if not is_terminal or environment.get("SSH_CONNECTION") or environment.get("CI"):
        return False
    if environment.get("BROWSER"):
        return True
    return platform in ("darwin", "win32") or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def open_when_served(url: str) -> None:
    """Start a process that opens ``url`` when its server answers. This process may be replaced meanwhile."""
    command = [sys.executable, "-m", "qlora_exp.tracking.browser", url]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def wait_and_open(url: str, seconds: float = SERVER_SECONDS) -> bool:
    """Open ``url`` once its server answers. Returns whether it did within ``seconds``."""
    address, until = f"http://{urlsplit(url).netloc}/health", time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            try:
                with urllib.request.urlopen(address, timeout=5):
                    return webbrowser.open(url)
            except urllib.error.HTTPError:  # a server that answers anything
                return webbrowser.open(url)
        time.sleep(0.3)
    return False


if __name__ == "__main__":
    wait_and_open(sys.argv[1])
