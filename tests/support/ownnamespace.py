"""A Python program that is alone in its mount namespace; where nobody can have one, one for which it looks so."""

from __future__ import annotations

import sys

import pytest

from tests.support import skips
from tests.support.privileges import maybe_own_mount_namespace

_SEEN_ALONE = """
import os
from lazymem.fs import checks
checks._propagates = lambda path: False
checks._maybe_namespace = lambda pid: {seen}
"""

_SHELL = ("sh", "-c", '"$@"; exit $?', "sh")


def own_mount_namespace(test: pytest.Item, propagation: str, code: str, *, shell: bool = False) -> list[str]:
    """A command that runs `code`, to be followed by its arguments. `shell`: one of the same namespace started it."""
    alone = maybe_own_mount_namespace(propagation)
    if alone is not None:
        return [*alone, *(_SHELL if shell else ()), sys.executable, "-c", code]
    skips.stood_in(test, f"another answer of /proc/PID/ns/mnt, for a mount namespace of its own: {skips.OWN_ROOT}")
    others = '"mnt:[1]"'
    seen = f'os.readlink("/proc/self/ns/mnt") if pid == str(os.getppid()) else {others}' if shell else others
    return [sys.executable, "-c", _SEEN_ALONE.format(seen=seen) + code]
