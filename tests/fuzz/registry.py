"""The fuzz targets by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from lazymem.errors import LazymemError

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}

IDENTITY = bytes(range(32))
TOTAL_PAGES = 1000

T = TypeVar("T")


def target(function: Target) -> Target:
    """Registers it under its name, and takes every `LazymemError` for a refusal."""

    def guarded(data: bytes) -> None:
        with contextlib.suppress(LazymemError):
            function(data)

    TARGETS[function.__name__] = guarded
    return guarded


def maybe(read: Callable[[], T]) -> T | None:
    """None where it is refused."""
    try:
        return read()
    except LazymemError:
        return None
