"""Where and with what a run was made: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_PROGRAMS = {
    "nbdkit": ["nbdkit", "--version"],
    "nbdfuse": ["nbdfuse", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "qemu": ["qemu-system-x86_64", "--version"],
}


def describe() -> dict[str, Any]:
    """Names and versions; nothing that says whose machine it is."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("lazymem", "pyfuse3", "trio", "zstandard", "blake3")},
        "programs": {name: _first_line(command) for name, command in _PROGRAMS.items()},
        "commit": _commit(),
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return (done.stdout or done.stderr).partition("\n")[0]


def _commit() -> str | None:
    """The checkout's commit, with + when its product code differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "lazymem", "server"], cwd=ROOT, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
