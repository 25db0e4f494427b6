"""A run folder's home, and a stand-in for a tracking server that misbehaves over real HTTP."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qlora_exp.paths import OutputPaths

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fresh_output(tmp_path: Path) -> OutputPaths:
    """Without a database: creating one takes seconds, so only the tests of that do it."""
    return OutputPaths.of(tmp_path / "outputs")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qlora_exp.tracking.store import MlflowClient

    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def output(fresh_output: OutputPaths, empty_database: Path) -> OutputPaths:
    """Beside an empty MLflow database of the test's own."""
    shutil.copy(empty_database, fresh_output.mlflow_database)
    return fresh_output


@pytest.fixture
def hostile_server() -> Iterator[Callable[[str], str]]:
    """``hostile_server("500")`` starts a server that answers so and returns its URI; also ``429``, ``garbage``,
    ``hang`` and ``dies`` (answers nothing and closes)."""
    servers: list[ThreadingHTTPServer] = []
    released = threading.Event()

    def start(behaviour: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                if behaviour == "hang":
                    released.wait(60)
                elif behaviour == "garbage":
                    self._send(200, b"<html>it works!</html>")
                elif behaviour != "dies":
                    self.send_response(int(behaviour))
                    self.send_header("Retry-After", "3600")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = answer

            def _send(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()
