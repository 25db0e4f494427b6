"""``qlora-exp ui`` opens its page where a person sees it, once the server answers."""

from __future__ import annotations

import http.server
import sys
import threading
from pathlib import Path

import pytest

from qlora_exp.tracking.browser import has_browser, wait_and_open

DISPLAY = {"DISPLAY": ":0"}


@pytest.mark.parametrize(
    ("environment", "is_terminal", "platform", "expected"),
    [
        (DISPLAY, True, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, True, "linux", True),
        ({}, True, "darwin", True),
        ({"BROWSER": "w3m"}, True, "linux", True),
        ({}, True, "linux", False),
        (DISPLAY, False, "linux", False),
        ({**DISPLAY, "SSH_CONNECTION": "10.0.0.1 22"}, True, "linux", False),
        ({**DISPLAY, "CI": "true"}, True, "linux", False),
    ],
)
def test_a_page_is_opened_only_where_somebody_sees_it(
    environment: dict[str, str], is_terminal: bool, platform: str, expected: bool
) -> None:
    assert has_browser(environment, is_terminal, platform) is expected


def test_the_page_is_opened_once_the_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tmp_path / "opened"
    script = tmp_path / "browser"
    script.write_text(f"#!{sys.executable}\nimport sys\nopen({str(opened)!r}, 'w').write(sys.argv[1])\n")
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(script))
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}/#/experiments/1"
    assert not wait_and_open(f"http://127.0.0.1:{_unused_port()}/", seconds=0.5)
    assert not opened.exists()
    threading.Timer(0.5, server.serve_forever).start()
    try:
        assert wait_and_open(url, seconds=30)
        assert opened.read_text() == url
    finally:
        server.shutdown()
        server.server_close()


def _unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
