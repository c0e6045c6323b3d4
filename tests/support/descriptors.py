"""Which descriptors this process has open."""

from __future__ import annotations

import gc
import os


def open_descriptors(*, collect: bool = False) -> set[str]:
    """By number. `collect`: what earlier tests have left for the collector goes first; a map among it has a descriptor,
    and lets go of it at any moment."""
    if collect:
        gc.collect()
    return set(os.listdir("/proc/self/fd"))
