"""Notifications at the end of a run and of a sweep: a command and a webhook get a JSON object, and can't fail a run."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.records.files import read_record
from qlora_exp.runs.notify import notify

SYNTHETIC = ("training.engine=sleep", "training.sleep_seconds=0.01", "training.max_steps=2", "tracking=off")


class Server:
    """An HTTP server on loopback that keeps what is posted to it and answers with ``answer``."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.answer, self.seconds = 200, 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posted.append(json.loads(content) | {"path of the request": self.path})
                time.sleep(outer.seconds)
                self.send_response(outer.answer)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook/T0SECRETPATH"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_a_webhook_gets_the_end_of_a_run_and_no_file_holds_its_url(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", *SYNTHETIC, f"output_root={tmp_path}", f"notify.webhook={server.url}", "name=tuned"]
    assert main(arguments) == 0
    [posted] = server.posted
    assert (posted["event"], posted["status"], posted["exit_code"]) == ("run_ended", "COMPLETED", 0)
    assert posted["text"].startswith("run SYNTHETIC tuned: COMPLETED")
    record = read_record(Path(posted["path"]) / "record.json")
    assert record.run_id == posted["run_id"]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any(b"T0SECRETPATH" in file.read_bytes() for file in files)
    printed = capsys.readouterr()
    assert "T0SECRETPATH" not in printed.out + printed.err


def test_a_run_that_fails_is_notified_with_its_failure(server: Server, tmp_path: Path) -> None:
    failing = (*SYNTHETIC, "training.sleep_fault=diverge", f"output_root={tmp_path}", f"notify.webhook={server.url}")
    assert main(["run", *failing]) == 1
    [posted] = server.posted
    assert (posted["status"], posted["exit_code"]) == ("DIVERGED", 1)
    assert posted["failure"]


@pytest.mark.parametrize("trouble", ["an error", "no answer", "no server"])
def test_a_webhook_that_fails_costs_a_line_and_not_the_run(
    trouble: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url
    if trouble == "an error":
        server.answer = 503
    elif trouble == "no answer":
        server.seconds = 5.0
    else:
        url = "http://127.0.0.1:9/T0SECRETPATH"
    hook = (f"notify.webhook={url}", "notify.timeout_seconds=0.2")
    assert main(["run", *SYNTHETIC, f"output_root={tmp_path}", *hook]) == 0
    errors = capsys.readouterr().err
    assert "notify.webhook: not notified" in errors
    assert "T0SECRETPATH" not in errors


def test_a_command_gets_the_object_on_standard_input_and_its_main_values_in_the_environment(tmp_path: Path) -> None:
    file, values = tmp_path / "notified.json", tmp_path / "values"
    script = tmp_path / "script.sh"
    script.write_text(f'cat > {file}; echo "$QLORA_EXP_EVENT $QLORA_EXP_EXIT_CODE" > {values}; echo printed\n')
    assert main(["run", *SYNTHETIC, f"output_root={tmp_path / 'outputs'}", f"notify.command='sh {script}'"]) == 0
    assert json.loads(file.read_text())["event"] == "run_ended"
    assert values.read_text() == "run_ended 0\n"


def test_a_command_that_fails_or_hangs_costs_a_line_and_not_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("run", *SYNTHETIC, f"output_root={tmp_path}")
    assert main([*given, "notify.command='echo no such channel >&2; exit 3'"]) == 0
    assert "notify.command: not notified: the command ended with exit code 3: no such channel" in capfd.readouterr().err
    began = time.monotonic()
    assert main([*given, "notify.command='sleep 60 & sleep 60'", "notify.timeout_seconds=0.3"]) == 0
    assert time.monotonic() - began < 50
    assert "took longer than notify.timeout_seconds=0.3" in capfd.readouterr().err


def test_a_sweep_is_notified_once_with_its_best_trial_and_no_trial_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_URL", server.url)
    arguments = ["run", "-m", *SYNTHETIC, "lora.r=4,8", f"output_root={tmp_path}", "workers.count=1"]
    assert main([*arguments, "notify.webhook=${oc.env:HOOK_URL}", "sweep.name=hooked"]) == 0
    [posted] = server.posted
    assert (posted["event"], posted["name"], posted["exit_code"]) == ("sweep_ended", "hooked", 0)
    assert posted["trials"]["completed"] == posted["trials"]["total"] > 1
    assert posted["best"]["run_id"]
    assert posted["best"]["params"]["lora.r"] in (4, 8)
    assert "trials completed" in posted["text"]
    assert posted["next_command"].startswith("qlora-exp report hooked --output-root ")
    assert not any(key.startswith(("minimize", "maximize")) for key in posted["best"]["values"])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"T0SECRETPATH" in file.read_bytes() for file in files)


def test_a_webhook_needs_a_url_that_can_be_posted_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SYNTHETIC, "notify.webhook=file:///etc/passwd"]) == 2
    assert "notify.webhook" in capsys.readouterr().err


def test_numbers_that_json_lacks_and_urls_that_are_none_cost_a_line_and_show_no_secret(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([f"notify.webhook={server.url}"]).notify
    notify(config, {"event": "run_ended", "scores": {"before": {"loss": float("nan")}, "after": [1.5, float("inf")]}})
    assert server.posted[0]["scores"] == {"before": {"loss": None}, "after": [1.5, None]}
    broken = dataclasses.replace(config, webhook="http://127.0.0.1/services/SECRETTOKEN abc")
    notify(broken, {"event": "run_ended"})
    printed = capsys.readouterr()
    assert "the URL is not valid" in printed.err
    assert "SECRETTOKEN" not in printed.out + printed.err


def test_a_sweep_with_an_address_that_is_not_set_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOOK_URL", raising=False)
    axes = ["lora.r=2,4", "sweep.name=unset", "notify.webhook=${oc.env:HOOK_URL}"]
    assert main(["run", "-m", *SYNTHETIC, *axes, f"output_root={tmp_path / 'outputs'}"]) == 2
    assert "HOOK_URL" in capsys.readouterr().err
    assert not list((tmp_path / "outputs").glob("runs/*"))


def test_without_a_setting_nothing_is_notified() -> None:
    config = compose([])
    assert config.notify is not None
    assert (config.notify.command, config.notify.webhook) == (None, None)
