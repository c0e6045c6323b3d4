"""What is fuzzed: for each reader of bytes from outside a function that feeds it and checks what must always hold.

Each gets any bytes. It may refuse them with a `LazymemError`, which is swallowed here; anything else that comes out of
a target is a bug: another exception, an assertion about what was accepted (most often that it comes back the same when
it is encoded again), memory or time without bound (the drivers watch those two).

Many formats end in a checksum, which no mutation gets right. Their targets look at the first byte: when it is odd, the
rest is sealed here, so that the reader behind the checksum is reached.
"""

from __future__ import annotations

from tests.fuzz import filetargets, wiretargets
from tests.fuzz.registry import TARGETS

__all__ = ["TARGETS", "filetargets", "wiretargets"]
