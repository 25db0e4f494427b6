"""As much of the Hub's API as transformers, datasets and evaluate ask for, served from folders on the loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


@dataclass
class FakeHub:
    """``repositories``: (``models``, ``datasets`` or ``spaces``, OWNER/NAME) → folder with its files."""

    repositories: dict[tuple[str, str], Path]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    closed: dict[str, tuple[int, str]] = field(default_factory=dict)
    """OWNER/NAME → status and error code of its answers, e.g. ``(403, "GatedRepo")``."""
    token: str = ""
    """The token that may write; what is written with it is in ``private`` (by name) and ``pushed`` (name → path →
    content)."""
    private: dict[str, bool] = field(default_factory=dict)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def files(self, kind: str, name: str) -> list[dict[str, Any]]:
        folder = self.repositories[kind, name]
        return [
            {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": oid(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at ``hub.url`` for as long as the context lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if found := re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)/paths-info/[^/]+", unquote(self.path)):
            fields = json.loads(body) if body.startswith("{") else parse_qs(body)
            wanted = fields["paths"] if isinstance(fields["paths"], list) else [fields["paths"]]
            self._json([file for file in self.hub.files(found[1], found[2]) if file["path"] in wanted])
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, b"{}", {})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._json({"files": modes})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.hub.pushed[found[1]] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._json({"commitUrl": f"{self.hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._refuse("EntryNotFound")

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "forbidden":
            self._send(403, b"{}", {})
        elif name in self.hub.pushed:
            self._send(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode(), {})
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.private[name], self.hub.pushed[name] = private, {}
            self._json({"url": f"{self.hub.url}/{name}"})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
            self._json({"name": "someone"}) if known else self._send(401, b"{}", {})
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)) and found[1] in self.hub.pushed:
            self._json({"id": found[1], "sha": COMMIT, "siblings": []})
        elif found := re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            self._facts(found[1], found[2], found[3], found[4] or "main", found[5] or "")
        elif found := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1] or "models", found[2], found[3], found[4])
        else:
            self._refuse("EntryNotFound")

    def _facts(self, kind: str, name: str, what: str | None, revision: str, folder: str) -> None:
        if self._is_there(kind, name, revision):
            files = self.hub.files(kind, name)
            if what == "tree":
                self._json([file for file in files if file["path"].startswith(folder and f"{folder}/")])
            else:
                self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in files]})

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        if not self._is_there(kind, name, revision):
            return
        path = self.hub.repositories[kind, name] / file
        if path.is_file():
            self._send(200, path.read_bytes(), {"ETag": f'"{oid(path)}"', "X-Repo-Commit": COMMIT})
        else:
            self._refuse("EntryNotFound")

    def _is_there(self, kind: str, name: str, revision: str) -> bool:
        if name in self.hub.closed:
            status, code = self.hub.closed[name]
            self._refuse(code, status)
            return False
        if (kind, name) not in self.hub.repositories:
            self._refuse("RepoNotFound")
            return False
        if revision not in ("main", COMMIT) and kind != "spaces":
            self._refuse("RevisionNotFound")
            return False
        return True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str, status: int = 404) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
