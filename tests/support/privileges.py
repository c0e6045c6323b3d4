"""What a test needs root for: as root, or by a sudo that asks for no password."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess


@functools.cache
def maybe_as_root() -> tuple[str, ...] | None:
    """What to put before a command so that root runs it; None where we cannot become root."""
    if os.geteuid() == 0:
        return ()
    if shutil.which("sudo") is None:
        return None
    allowed = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    return ("sudo", "-n") if allowed else None
