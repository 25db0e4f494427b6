"""The report as Chromium draws it, at desktop and phone width, light and dark: what its own script sees is read out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

import made_up

from qlora_exp.analysis.report import build
from qlora_exp.analysis.report_content import StudyInfo, to_html

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        shutil.which("chromium") is None,
        reason="Chromium is needed for these tests: install it so that 'chromium' is found",
    ),
]

PAGE_SECONDS = 120
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1500,1200"),
    *("--virtual-time-budget=20000", "--dump-dom"),
)

EARLY = """<script>
const seen = {errors: []};
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => seen.errors.push(`refused: ${event.blockedURI}`));
console.error = (...words) => seen.errors.push(words.join(" "));
</script>"""

LATE = """<script>
addEventListener("load", () => setTimeout(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  seen.width = innerWidth;
  seen.first = document.querySelector(".answer").textContent;
  seen.cards = all(".card").length;
  seen.folded = all("details.section:not([open])").length;
  seen.undrawn = all("details.section [data-figure]").filter((place) => !place.querySelector(".main-svg")).length;
  all("details.section").forEach((section) => { section.open = true; });
  setTimeout(look, 500);
}, 500));

function look() {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const number = (row, column) => Number(row.cells[column].textContent.replace(/[^0-9.eE-]/g, ""));
  seen.pageWidth = document.documentElement.scrollWidth;
  seen.background = getComputedStyle(document.body).backgroundColor;
  seen.plots = all("[data-figure]").map((place) => place.querySelectorAll(".main-svg .trace").length);
  seen.plotText = all(".main-svg .xtick text").slice(0, 1).map((text) => getComputedStyle(text).fill);
  seen.overflowing = all("h1, h2, p, li, a, label, .use, .card, nav, .controls")
    .filter((one) => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline")
    .map((one) => one.textContent.slice(0, 60));
  seen.outside = all("body *").filter((one) => !one.closest(".scroll, .figure, pre, script, style"))
    .filter((one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80));
  const heads = all("#run-table th");
  const column = heads.findIndex((head) => head.textContent === "loss per item");
  const read = () => all("#run-table tbody tr").map((row) => number(row, column));
  heads[column].querySelector("button").click();
  seen.ascending = read();
  heads[column].querySelector("button").click();
  seen.descending = read();
  const small = document.querySelector("#speed table");
  small.tHead.rows[0].cells[3].querySelector("button").click();
  seen.speeds = [...small.tBodies[0].rows].map((row) => number(row, 3));
  const plot = document.querySelector("#tradeoffs [data-figure]");
  const run = plot.data[0].customdata[0];
  plot.emit("plotly_click", { points: [{ customdata: run }] });
  seen.clicked = run;
  seen.chosen = all("tr.chosen td:first-child").map((cell) => cell.textContent);
  const filter = document.getElementById("filter");
  filter.value = "OUT_OF_MEMORY";
  filter.dispatchEvent(new Event("input"));
  seen.failed = all("#run-table tbody tr").length;
  parent.postMessage(JSON.stringify(seen), "*");
}
</script>"""

FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe src="page.html" style="border:0;width:{width}px;height:1100px"></iframe>
<script>addEventListener("message", (event) => {{
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = event.data;
  document.body.append(told);
}});</script></body>"""
"""Chromium's own window can't be as narrow as a phone."""


def looked_at(folder: Path, width: int, *flags: str, runs: int = 300) -> dict[str, Any]:
    """What the page's script sees once it has been drawn, sorted, clicked and filtered."""
    page = to_html(build(made_up.many(runs), [StudyInfo("which-rank-is-worth-paying-for", "Which rank?")]), "runs")
    page = page.replace("<style>", f"{EARLY}<style>", 1).replace("</body>", f"{LATE}</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = ["chromium", *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'frame.html'}"]
    browser = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        drawn = browser.communicate(timeout=PAGE_SECONDS)[0].decode(errors="replace")
    finally:
        end_group(browser)
    found = re.search(r'<pre id="told">(.*?)</pre>', drawn, re.DOTALL)
    assert found is not None, drawn[-2000:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


def end_group(browser: subprocess.Popen[bytes]) -> None:
    """Chromium's helpers must not outlive the test."""
    try:
        os.killpg(browser.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        browser.wait(20)


@pytest.mark.parametrize("width", [1400, 390])
def test_the_report_is_drawn_sorts_and_stays_inside_the_screen(tmp_path: Path, width: int) -> None:
    seen = looked_at(tmp_path, width)
    assert seen["errors"] == []
    assert seen["width"] == width
    assert seen["pageWidth"] <= width
    assert seen["overflowing"] == []
    assert seen["outside"] == []
    assert seen["first"].startswith("Use base, r = ")
    assert seen["cards"] >= 4
    assert seen["folded"] >= 5
    assert seen["undrawn"] >= 2, "a folded plot is drawn when its section opens"
    assert len(seen["plots"]) >= 4
    assert all(seen["plots"])
    assert len(seen["ascending"]) == 100
    assert seen["ascending"] == sorted(seen["ascending"])
    assert seen["descending"] == sorted(seen["descending"], reverse=True)
    assert seen["speeds"] == sorted(seen["speeds"])
    assert len(seen["speeds"]) == 4
    assert seen["chosen"] == [seen["clicked"]]
    assert seen["failed"] == sum(number % 97 == 5 for number in range(300))


def test_a_dark_screen_gets_a_dark_page_with_light_plots(tmp_path: Path) -> None:
    light, dark = looked_at(tmp_path, 1400), looked_at(tmp_path, 1400, "--force-dark-mode")
    assert light["background"] == "rgb(255, 255, 255)"
    assert dark["background"] == "rgb(20, 23, 27)"
    assert light["plotText"] != dark["plotText"]
    assert dark["errors"] == []
