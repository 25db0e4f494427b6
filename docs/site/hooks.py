"""Adds the repository's pages outside of docs/ to the site, and turns links between files into links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "AGENTS.md": "agents.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "sweeps/README.md": "sweeps.md",
    "qlora_exp/embedded/MODEL_CARD.md": "model_card.md",
}
"""File of the repository → page of the site."""

LINK = re.compile(r"(?P<start>\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?P<end>\))")


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    sources = {site: name for name, site in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def on_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        if target in PAGES:
            address = PAGES[target]
        elif target.startswith("docs/"):
            address = target.removeprefix("docs/")
        else:
            # A file that is no page, such as a licence, becomes a download.
            address = f"files/{target}"
            if (ROOT / target).is_file() and not files.get_file_from_path(address):
                files.append(File.generated(config, address, abs_src_path=str(ROOT / target)))
        here = posixpath.dirname(page.file.src_uri)
        return f"{link['start']}{posixpath.relpath(address, here or '.')}{link['anchor'] or ''}{link['end']}"

    return LINK.sub(on_the_site, markdown)
