"""The import table of the design held against the code: which room may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BASE = {"errors", "pages", "digests", "settings", "nowait", "residency", "timeslice", "capabilities"}

MAY_IMPORT: dict[str, set[str]] = {
    "wire": BASE,
    "snapshot": BASE,
    "store": BASE,
    "tls": BASE,
    "fetch": BASE | {"wire", "tls"},
    "fs": BASE | {"store"},
    "vm": BASE | {"snapshot"},
    "handover": BASE | {"wire", "snapshot", "vm", "tls"},
    # The demo's guest and processes: a QEMU from outside, looked at through vm's monitor client.
    "demo": BASE | {"vm", "snapshot"},
    "lazymem_server": BASE | {"wire", "snapshot", "tls"},
}
"""Room to the rooms (or base modules) it may import besides itself. `cli` may import anything; nothing imports it."""

PURE = (
    "lazymem.wire",
    "lazymem.handover.states",
    "lazymem.handover.messages",
    "lazymem.fetch.plan",
    "lazymem.fs.tree",
    "lazymem.tls.pipe",
    "lazymem.tls.failures",
    "lazymem.pages",
    "lazymem.digests",
)
"""No event loop, sockets, files or clocks in these. (A lock or a thread-local is no such thing.)"""

NOT_PURE = {"trio", "socket", "os", "time", "select", "subprocess", "pyfuse3", "random", "asyncio"}

ONLY_IN: dict[str, str | tuple[str, ...]] = {
    "unicorn": "lazymem.vm",
    "pyfuse3": "lazymem.fs",
    "rich": "lazymem.cli",
    "argparse": ("lazymem.cli", "lazymem.tls.options"),
    "cryptography": "lazymem.tls.authority",
    "numpy": "lazymem.handover.planes",
    "lazymem_server": ("lazymem_server", "lazymem.cli"),
}
"""Foreign package to the room that may know of it. (argparse and rich: also the server's command.
argparse: also the options that it shares with the others.)"""


def modules() -> dict[str, Path]:
    """Dotted name to file, of everything that is installed."""
    found = {}
    for root, package in ((ROOT, "lazymem"), (ROOT / "server", "lazymem_server")):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, typing_too: bool = True) -> set[str]:
    """Dotted names that a module imports, wherever in it; relative imports are not used here and fail."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(name: str) -> str | None:
    """The room (or base module) that a dotted name is in; None for what is not ours or the bare package."""
    parts = name.split(".")
    if parts[0] == "lazymem_server":
        return "lazymem_server"
    return parts[1] if parts[0] == "lazymem" and len(parts) > 1 else None


MODULES = modules()


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_in_the_table(name: str) -> None:
    here = room(name)
    reached = {target: room(target) for target in imports(MODULES[name])}
    ours = {target: found for target, found in reached.items() if found is not None and not found.startswith("__")}
    if here == "cli":
        return
    if here is None:
        allowed: set[str] = set()
    elif here in BASE:
        allowed = BASE
    else:
        assert here in MAY_IMPORT, f"the room {here} is not in the table"
        allowed = MAY_IMPORT[here] | {here}
    wrong = {target for target, found in ours.items() if found not in allowed}
    assert not wrong, f"{name} may not import {sorted(wrong)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(PURE)])
def test_pure_modules_touch_nothing_outside(name: str) -> None:
    found = {target.split(".")[0] for target in imports(MODULES[name], typing_too=False)}
    assert not found & NOT_PURE


@pytest.mark.parametrize("package", ONLY_IN)
def test_foreign_packages_stay_in_their_room(package: str) -> None:
    users = {name for name, path in MODULES.items() if package in {t.split(".")[0] for t in imports(path)}}
    if package == "unicorn":
        assert users == {"lazymem.vm.cpu"} or all(name.startswith("lazymem.vm.cpu") for name in users)
    strangers = {name for name in users if not name.startswith(ONLY_IN[package]) and name != "lazymem_server.app"}
    assert not strangers


def test_the_heavy_ones_are_not_imported_with_the_rest() -> None:
    """Each costs a tenth of a second. rich: only where something is shown, and only then. numpy: while others start."""
    for name, path in MODULES.items():
        top = ast.parse(path.read_text()).body
        eager = {target.name.split(".")[0] for node in top if isinstance(node, ast.Import) for target in node.names} | {
            (node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)
        }
        assert not eager & {"rich", "numpy"}, name


def test_the_table_has_no_rooms_that_are_gone() -> None:
    assert {room(name) for name in MODULES} >= set(MAY_IMPORT)
