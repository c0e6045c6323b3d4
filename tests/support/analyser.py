"""QEMU's own analyser of save streams, run on ours: what it finds, as Python values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.analyser import ANALYSER

Fields = dict[str, int | bytes]


def analyse(stream: bytes, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Let it read `stream`, with `folder` for the stream and for what it extracts."""
    script = Path(os.environ.get("ANALYZE_MIGRATION") or ANALYSER)
    assert script.exists(), f"{script} is missing: `make test` fetches QEMU's analyser, or ANALYZE_MIGRATION names it"
    (folder / "vmstate").write_bytes(stream)
    return subprocess.run(
        [sys.executable, script, "-f", "vmstate", *arguments], capture_output=True, text=True, cwd=folder, check=False
    )


def found_sections(stream: bytes, folder: Path) -> dict[str, Any]:
    """Every section as it prints it, by "name (section id)"."""
    done = analyse(stream, folder, "-d", "state")
    assert done.returncode == 0, done.stderr
    sections: dict[str, Any] = json.loads(done.stdout)
    return sections


def field_values(section: dict[str, str]) -> Fields:
    """A device's fields: it prints integers as 0x12, and bytes as 12 34."""
    return {name: int(text, 16) if text.startswith("0x") else bytes.fromhex(text) for name, text in section.items()}
