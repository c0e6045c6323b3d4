"""What an emulator ended with, in a file: for whoever has to know and is not its parent any more."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def note(maybe_path: Path | None, code: int) -> None:
    """The last that a process does, so nothing that goes wrong with it is anybody's business."""
    if maybe_path is not None:
        draft = maybe_path.with_name(f".{maybe_path.name}.{os.getpid()}")
        with suppress(OSError):
            draft.write_text(f"{code}\n")
            os.replace(draft, maybe_path)


def maybe_noted(path: Path) -> int | None:
    """None: it did not come so far, as one that was killed."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
