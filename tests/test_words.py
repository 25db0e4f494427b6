"""The words of the product are the field's: no private language, and one name for one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BANNED = re.compile(r"\b(told|kin|purse|cashier|untouched|lend|lends|lending|affording|buys)\b", re.IGNORECASE)
EARLIER_NAMES = "qlora_exp/records/upgrade.py"
"""Version 1's names of keys, which it reads."""
SHARED_NAMES = {
    # Typer's commands and arguments are called as a user types them; the embedded pair's builder is maintainers' code.
    *("COMMAND", "COMPUTED", "HEADINGS", "INSTRUCT", "Item", "Message"),
    *(
        "PR_SET_PDEATHSIG",
        "Splits",
        "Study",
        "T",
        "calibrate",
        "document",
        "plan",
        "run",
        "sweep",
        "train",
    ),
}
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "conf/**/*.yaml", "sweeps/*.yaml", "sweeps/*.md")


def modules() -> list[Path]:
    found = [*(ROOT / "qlora_exp").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]
    return sorted(path for path in found if "qlora_exp/analysis/" not in path.as_posix())


def texts() -> list[Path]:
    return [*modules(), *(path for pattern in PAGES for path in sorted(ROOT.glob(pattern)))]


def test_no_text_speaks_a_private_language() -> None:
    wrong = []
    for path in texts():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if BANNED.search(line) and name != EARLIER_NAMES:
                wrong.append(f"{name}:{number}: {line.strip()}")
    assert wrong == []


def test_no_public_name_is_defined_in_two_modules() -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _names(node):
                where[name].add(path.relative_to(ROOT).as_posix())
    shared = {name for name, paths in where.items() if len(paths) > 1 and not name.startswith("_")}
    assert shared - SHARED_NAMES - {"main", "add_to"} == set()
    assert SHARED_NAMES - shared == set(), "no exception without its case"


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
